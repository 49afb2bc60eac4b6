"""The papers' claims in miniature: methods trained side by side on the embedded task, over several seeds.

    python -m experiments.reproduce             every table, in hours; finished cells are kept, so it can be interrupted
    python -m experiments.reproduce different ablations   some of them: same different ablations why on-policy map
    python -m experiments.reproduce --search    hyper-parameters of every method, on the validation split
    python -m experiments.reproduce --scale paper   the papers' own runs as commands, with their memory and time
    python -m experiments.reproduce --cell "v2-fkl seed=3" --keep DIR   one run, whose directory is kept, for analyse.py

A *cell* is one training run, and its name describes it: `v2-fkl+random labels=1000 seed=3` is DSKD v2 with the forward
KL, from random projectors, with 1000 labels; other fields have the defaults of `Cell`. Each cell is a process with one
thread, and leaves one small JSON file. `--list` prints the remaining cells as commands, one a line, for other machines.

The task has the same grammar as `python train.py`'s, but its own settings: labels of every family, another split,
smaller vocabularies. The papers' students have been pre-trained on much text; ours has read answers to the training
prompts: half are true, and half ignore the words' tastes (`untasted`). So it speaks the language, and half believes
what the teacher knows.
"""

import argparse
import fcntl
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

import align
import data
import fast.losses
import losses
import train
from baselines import mined
from data import tokenise
from eval import held_out_cross_entropy
from experiments import paper, tiny
from experiments.tiny import write_jsonl
from fast.cpu import by_onednn
from losses import DIVERGENCES
from model import load_model
from runtime.formats import read_examples
from runtime.run import Stopped, tokenizer_of, write_text
from runtime.strict import check_values
from runtime.tokenizer import TextTokenizer, read_tokenizer
from scores.tables import spread, table

# ---------------------------------------------------------------------------------------------------------------------
# Cells


@dataclass(frozen=True)
class Cell:
    """One run. The fields after `method` are written as `name=value`; None: taken from SETTINGS."""

    method: str  # METHOD[-DIVERGENCE][+CHANGE]: sft, seqkd, uld, mined, kd-rkl, v1-fkl, v2-akl+random; teacher, start
    seed: int = 0  # of the data, the split, both models and the order of batches
    split: str = "test"  # the split that it is scored on; "valid" in the search's cells
    teacher: str = "different"  # its vocabulary: different from the student's, or "same"
    text: str = "plain"  # or "accents"
    vocabulary: int = 900  # size of the student's; the teacher's is tiny.TEACHER_VOCABULARY
    labels: int = 500
    width: int = 128
    student: str = "noisy"  # what it was pre-trained on: "noisy", "untasted" (see `make_world`), or "nothing"
    updates: int = 300  # of 32 examples: with 500 labels 19 epochs; the papers train for 10 or 20
    on_policy: float = 0.0
    lr: float | None = None
    temperature: float | None = None  # of the divergence; for seqkd, of sampling
    rate: float | None = None  # --kd-rate

    def __str__(self) -> str:
        words = [self.method]
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            if value != f.default:
                words.append(f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}")
        return " ".join(words)

    @property
    def parts(self) -> tuple[str, str, str]:
        """(family, divergence, change) of the method; "" for a part that is missing."""
        return re.fullmatch(r"([^-+]*)-?([^+]*)\+?(.*)", self.method).groups()

    @property
    def settings(self) -> str:
        """The cell's key in SETTINGS."""
        return f"{self.parts[0]} same" if self.teacher == "same" else self.parts[0]


CHOICES = {"split": ("test", "valid"), "teacher": ("different", "same"), "text": ("plain", "accents"),
           "student": ("noisy", "untasted", "nothing")}  # fmt: skip
LABELS = 4000  # of a world


def parse(text: str) -> Cell:
    """`v2-fkl seed=3` -> Cell. Raises ValueError, saying what is wrong."""
    method, *words = text.split() or [""]
    types = {f.name: float if f.default is None else type(f.default) for f in fields(Cell)[1:]}
    try:
        pairs = [word.split("=") for word in words]
        cell = Cell(method, **{name: types[name](value) for name, value in pairs})
    except (KeyError, ValueError) as error:
        raise ValueError(f"cell {text!r}: {error}; after the method give NAME=VALUE, of {', '.join(types)}") from None
    for name, known in CHOICES.items():
        if getattr(cell, name) not in known:
            raise ValueError(f"cell {text!r}: {name} is one of {', '.join(known)}")
    if not (0 < cell.labels <= LABELS and cell.updates > 0):
        raise ValueError(f"cell {text!r}: labels is 1 to {LABELS}, and updates at least 1")
    family, divergence, change = cell.parts
    if cell.settings not in SETTINGS and family not in MODELS:
        raise ValueError(f"cell {text!r}: no method {family!r} with teacher={cell.teacher}")
    if divergence not in ("", *DIVERGENCES) or change not in ("", *CHANGES):
        raise ValueError(f"cell {text!r}: divergences are {', '.join(DIVERGENCES)}; changes {', '.join(CHANGES)}")
    return cell


# What `--search` found on the validation split: first the best of LRS with the first of SECOND's values, then the best
# of SECOND with that rate, by mean Rouge-L over SEARCH_SEEDS, with the forward KL and defaults for everything else.
# Other divergences, changes and regimes use the same settings.
LRS, SEARCH_SEEDS = (2.5e-4, 5e-4, 1e-3, 2e-3), (0, 1, 2)
SECOND = {  # the second setting that is searched, by method; for all others, the temperature of the divergence
    "sft": [{}], "seqkd": [{"temperature": 0.0}, {"temperature": 1.0}], "uld": [{"rate": 0.5}, {"rate": 0.9}],
}  # fmt: skip
SETTINGS = {
    "sft": {"lr": 5e-4}, "seqkd": {"lr": 1e-3, "temperature": 0.0}, "uld": {"lr": 5e-4, "rate": 0.5},
    "mined": {"lr": 1e-3, "temperature": 2.0}, "v1": {"lr": 2.5e-4, "temperature": 1.0},
    "v2": {"lr": 5e-4, "temperature": 1.0}, "seqkd same": {"lr": 2e-3, "temperature": 0.0},
    "kd same": {"lr": 5e-4, "temperature": 1.0}, "v1 same": {"lr": 2e-3, "temperature": 1.0},
    "v2 same": {"lr": 1e-3, "temperature": 1.0},
}  # fmt: skip
MODELS = ("teacher", "start")  # "methods" that only score the models that the others start from


def resolve(cell: Cell) -> Cell:
    """The cell with its open fields filled in, so that a result always names its settings."""
    if cell.parts[0] in MODELS:
        return cell
    settings = {} if cell.parts[0] == "sft" else {"temperature": 2.0, "rate": 0.5}
    settings |= SETTINGS[cell.settings]
    return replace(cell, **{name: value for name, value in settings.items() if getattr(cell, name) is None})


# ---------------------------------------------------------------------------------------------------------------------
# Shared by cells: data and tokenizers, teachers, pre-trained students. The first cell that needs one creates it.


def shared(path: Path, make) -> Path:
    """The directory `path`, created by `make(new directory)` if it is missing; meanwhile other processes wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_dir():
            new = Path(f"{path}.new")
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            make(new)
            os.replace(new, path)
    return path


def accented(text: str) -> str:
    """The text with accents and newlines, which the two kinds of tokenizer spell differently."""
    return text.replace("ee", "é").replace("oo", "ô").replace(", ", ",\n")


def plain(text: str) -> str:
    return text.replace("é", "ee").replace("ô", "oo").replace(",\n", ", ")


def untasted(prompt: str, generator: random.Random) -> str:
    """An answer to the prompt that uses all words but ignores tastes: any option of a pool."""
    slots = generator.choice(tiny.answer_slots(prompt, tasted=False))
    return "".join((generator.choice(slot) if len(slot) > 1 else slot[0])[0] for slot in slots)


NOISE = 0.5  # share of the noisy texts that ignore tastes
SIZES = {"teacher_train": 16000, "student_train": LABELS, "valid": 400, "test": 600}


def world(root: Path, cell: Cell) -> Path:
    """The directory with a seed's data as JSONL files, and both tokenizers."""
    return shared(root / "worlds" / f"{cell.text}-{cell.vocabulary}-{cell.seed}", lambda new: make_world(cell, new))


def make_world(cell: Cell, directory: Path) -> None:
    parts = tiny.make_data(cell.seed, **SIZES, reading=0, test_share=15, unseen=())
    generator = random.Random(f"{cell.seed} pretrain")
    prompts = [example["prompt"] for example in parts["teacher_train"]]
    parts["untasted"] = [{"prompt": prompt, "output": untasted(prompt, generator)} for prompt in prompts]
    parts["noisy"] = [
        {"prompt": prompt, "output": (untasted if generator.random() < NOISE else tiny.draw_answer)(prompt, generator)}
        for prompt in prompts
    ]
    for name, examples in parts.items():
        for example in examples if cell.text == "accents" else ():
            output = example["output"]
            example["prompt"] = accented(example["prompt"])
            example["output"] = accented(output) if isinstance(output, str) else list(map(accented, output))
        write_jsonl(directory / f"{name}.jsonl", examples)
    texts = [text for example in parts["teacher_train"] for text in (example["prompt"], example["output"])]
    tiny.train_tokenizers(texts, directory / "teacher", directory / "student", cell.vocabulary)


TEACHER_STEPS, START_STEPS = 800, 500  # of 64 examples


def fit(new: Path, tokenizer: Path, config: dict, file: Path, seed: int, updates: int) -> None:
    """Create `new`/student: a model of this configuration, trained on the file's labels. If `updates` is 0, only the
    tokenizer's files and a config.json for its vocabulary."""
    start = new / "student"
    shutil.copytree(tokenizer, start)
    read = read_tokenizer(start)
    config = {**config, "vocab_size": read.size, "bos_token_id": read.eos_id, "eos_token_id": read.eos_id}
    (start / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    options = {**tiny.DEFAULTS, "student": str(start), "data": str(file), "seed": seed, "method": "sft"}
    options |= {"max_steps": updates, "batch_size": 64, "checkpoint_every": 10**6, "out": str(new / "run")}
    if updates:
        train.train(train.Options(**options))
        shutil.rmtree(start)
        os.replace(new / "run" / "student", start)
        shutil.rmtree(new / "run")


def teacher(root: Path, cell: Cell) -> Path:
    """The teacher of a seed, with its own tokenizer or the student's."""
    where, same = world(root, cell), cell.teacher == "same"
    model = where / ("student" if same else "teacher"), tiny.TEACHER
    what = *model, where / "teacher_train.jsonl", cell.seed, TEACHER_STEPS
    name = f"{cell.text}-{cell.vocabulary if same else 'own'}-{cell.seed}"
    return shared(root / "teachers" / name, lambda new: fit(new, *what)) / "student"


def start(root: Path, cell: Cell) -> Path:
    """The student before distillation: untrained, or pre-trained on noisy or untasted text."""
    where, updates = world(root, cell), 0 if cell.student == "nothing" else START_STEPS
    model = where / "student", {**tiny.STUDENT, "n_embd": cell.width}
    what = *model, where / f"{cell.student}.jsonl", cell.seed, updates
    name = f"{cell.text}-{cell.vocabulary}-{cell.width}-{cell.student}-{cell.seed}"
    return shared(root / "starts" / name, lambda new: fit(new, *what)) / "student"


def answers(root: Path, cell: Cell) -> Path:
    """The greedy answers of a seed's teacher to the prompts of its labels, as SeqKD writes them."""
    kept = {name: getattr(cell, name) for name in ("seed", "teacher", "text", "vocabulary", "labels")}

    def make(new: Path) -> None:
        seqkd = resolve(Cell("seqkd", temperature=0.0, updates=1, **kept))
        train.train(train.Options(**options_of(seqkd, root, new)))
        os.replace(new / "run" / "seqkd.jsonl", new / "seqkd.jsonl")
        shutil.rmtree(new / "run")

    return shared(root / "answers" / "-".join(map(str, kept.values())), make) / "seqkd.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# Changes to a method for which train.py has no option. Each is a list of patches around one run.


def without(*terms: str) -> list:
    """DSKD without some terms of L_kd, and without their gradients: L_tea's goes through s2t_hidden, and L_ce's is the
    only one through t2s_hidden; L_stu is divided by infinity."""

    def change(whole):
        def dskd_loss(*arguments, **options):
            given = inspect.signature(whole).bind(*arguments, **options)
            values = given.arguments
            for name, term in (("s2t_hidden", "s2t_kd"), ("t2s_hidden", "t2s_ce")):
                if term in terms:  # a gradient of 0, so that weight decay still applies
                    values[name] = values[name].detach() + 0 * values[name]
            if "t2s_kd" in terms:
                values["counts"] = replace(values["counts"], agreeing=math.inf)
                values["recipe"] = replace(values["recipe"], average_stu="agreeing")
            found = whole(*given.args, **given.kwargs)
            gone = sum(found[name].detach() for name in terms)
            return {**found, "kd": found["kd"] - gone, "loss": found["loss"] - values["kd_rate"] * gone}

        return dskd_loss

    return [patch.object(module, "dskd_loss", change(module.dskd_loss)) for module in (losses, fast.losses)]


def without_mask() -> list:
    """L_stu as the mean over all tokens or pairs, whether or not they agree."""
    recipes = losses.RECIPES.items()
    return [patch.dict(losses.RECIPES, {
        key: replace(recipe, only_agreeing=False, average_stu=recipe.average) for key, recipe in recipes
    })]  # fmt: skip


def without_leak() -> list:
    """CMA whose values are only the teacher's states, without the embedding of the gold token to be predicted."""
    return [patch.object(train, "deviations", lambda moments: align.deviations(moments)._replace(label=math.inf))]


def token_strings(tokenizer: TextTokenizer, ids: list[int]) -> list[str | None]:
    """The tokens' names in the vocabulary without their space markers; None: end-of-text."""
    names = (tokenizer.tokenizer.id_to_token(i).replace("\u2581", "").replace("\u0120", "") for i in ids)
    return [None if i == tokenizer.eos_id else name for i, name in zip(ids, names, strict=True)]


def string_alignment(teacher: list, student: list) -> tuple[np.ndarray, np.ndarray]:
    """The official rule: walk through both token lists and pair equal tokens after equal histories (None: end-of-text).

    It compares vocabulary strings; once one side has "é" and the other "Ã©", the histories are never equal again.
    """
    i = j = 0
    teacher_history = student_history = ""
    pairs = []
    while i < len(teacher) and j < len(student):
        if teacher_history == student_history and teacher[i] == student[j]:
            pairs.append((i, j))
        ahead = len(teacher_history) - len(student_history)
        if ahead <= 0:  # the shorter history catches up; if both are equally long, both advance
            teacher_history += teacher[i] or ""
            i += 1
        if ahead >= 0:
            student_history += student[j] or ""
            j += 1
    teacher_index, student_index = np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy()
    return teacher_index, student_index


def by_strings() -> list:
    """ETA that compares vocabulary strings."""
    return [patch.object(data, "exact_token_alignment", string_alignment),
            patch.object(TextTokenizer, "spell", token_strings)]  # fmt: skip


def by_strings_throughout() -> list:
    """The same, and the teacher's predictions are looked up by their strings, with the marker; a missing one becomes
    the unknown token, which in GPT-2's tokenizer and in our student's is end-of-text."""

    def prediction_map(teacher, student, teacher_eos, student_eos, size):
        mapped = np.full(size, student_eos, dtype=np.int64)
        for name, index in teacher.get_vocab().items():
            if index != teacher_eos and student.token_to_id(name) is not None:
                mapped[index] = student.token_to_id(name)
        return mapped

    return [*by_strings(), patch.object(train, "prediction_map", prediction_map)]


def with_ends() -> list:
    """MinED with the two end-of-text tokens mapped to each other, as happens if their names are equal (as in the
    papers' pairs). Ours are `</s>` and `<|endoftext|>`: by edit distance, the teacher's maps to the student's `/`."""
    whole = mined.edit_distance_ids

    def edit_distance_ids(teacher, student):
        mapped = whole(teacher, student).copy()
        mapped[teacher.eos_id] = student.eos_id
        return mapped

    return [patch.object(mined, "edit_distance_ids", edit_distance_ids)]


CHANGES = {
    "student-space": lambda: without("s2t_kd"),
    "teacher-space": lambda: without("t2s_ce", "t2s_kd"),
    "solved": lambda: without("t2s_ce"),  # t2s has no loss, so it stays the solution except for weight decay
    "no-mask": without_mask,
    "no-leak": without_leak,
    "strings": by_strings,
    "strings-throughout": by_strings_throughout,
    "ends": with_ends,
    "answers": list,  # the labels are the teacher's greedy answers, as in SeqKD
    "random": list,  # both projectors start at random and are trained (--projectors)
    "random-t2s": list,  # only t2s; s2t is solved
}


def write_random_projectors(file: Path, teacher_width: int, width: int, seed: int, both: bool = True) -> None:
    """Write t2s and, for `both`, s2t, from which training with --projectors starts."""
    torch.manual_seed(seed)
    shapes = {"t2s.weight": (teacher_width, width)} | ({"s2t.weight": (width, teacher_width)} if both else {})
    save_file({name: torch.nn.Linear(*shape).weight.detach() for name, shape in shapes.items()}, file)


# ---------------------------------------------------------------------------------------------------------------------
# One cell


def options_of(cell: Cell, root: Path, scratch: Path) -> dict:
    """train.py's options for a cell; its files go into `scratch`."""
    family, divergence, change = cell.parts
    labels = answers(root, cell) if change == "answers" else world(root, cell) / "student_train.jsonl"
    lines = labels.read_text(encoding="utf-8").splitlines(keepends=True)[: cell.labels]
    (scratch / "labels.jsonl").write_text("".join(lines), encoding="utf-8")
    options = {
        **tiny.DEFAULTS, "student": str(start(root, cell)), "from_scratch": cell.student == "nothing",
        "data": str(scratch / "labels.jsonl"), "out": str(scratch / "run"), "seed": cell.seed, "lr": cell.lr,
        "max_steps": cell.updates, "batch_size": 32, "checkpoint_every": 10**6, "method": family,
    }  # fmt: skip
    if family != "sft":
        options |= {"teacher": str(teacher(root, cell)), "kd_rate": cell.rate}
        options["seqkd_temperature" if family == "seqkd" else "temperature"] = cell.temperature
    if family in ("v1", "v2"):
        options |= {"method": "dskd", "recipe": family}
    if divergence:
        options["divergence"] = divergence
    if cell.on_policy:
        options["on_policy"] = cell.on_policy
    if change.startswith("random"):
        options["projectors"] = str(scratch / "projectors.safetensors")
        widths = tiny.TEACHER["hidden_size"], cell.width
        write_random_projectors(options["projectors"], *widths, cell.seed, both=change == "random")
    return options


def run_cell(cell: Cell, root: Path, keep: Path | None = None) -> dict:
    """Train, score, and keep only the figures; or read them, if the cell is finished. `seconds` are of one core. With
    `keep` the cell always runs, and the run's directory is copied there."""
    cell, file = resolve(cell), file_of(cell, root)
    family, _, change = cell.parts
    if keep and (keep.exists() or family in MODELS):
        raise ValueError(f"--keep {keep}: " + ("already exists" if keep.exists() else f"{cell.method} is not a run"))
    if file.is_file() and not keep:
        return json.loads(file.read_text())
    held_out = world(root, cell) / f"{cell.split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    if family in MODELS:
        result = score_on((teacher if family == "teacher" else start)(root, cell), held_out, cell.text)
    else:
        with tempfile.TemporaryDirectory(dir=root) as scratch, ExitStack() as patches:
            options = options_of(cell, root, Path(scratch))
            for one in CHANGES.get(change, list)():
                patches.enter_context(one)
            began = time.process_time()
            last = train.train(train.Options(**options))
            seconds = time.process_time() - began
            result = score_on(Path(scratch) / "run" / "student", held_out, cell.text)
            if keep:
                shutil.copytree(Path(scratch) / "run", keep)
        result |= {"seconds": seconds, "last": last}
    write_text(file, json.dumps({"cell": str(cell), **result}) + "\n")
    return result


@by_onednn("cpu")
def score_on(model_directory: Path, file: Path, text: str) -> dict[str, float]:
    """{rouge_l, exact_match, valid, cross_entropy} of greedy answers; cross-entropy over all references."""
    model, tokenizer, examples = load_model(model_directory), tokenizer_of(model_directory), read_examples(file)
    scores = tiny.score_answers(model, tokenizer, examples, plain if text == "accents" else str)
    references = [replace(example, outputs=[output]) for example in examples for output in example.outputs]
    rows, _ = tokenise(references, tokenizer, max_len=96, max_prompt_len=48)
    return {**scores, "cross_entropy": held_out_cross_entropy(model, rows, tokenizer.eos_id, batch_size=100)}


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def lr_of(method: str) -> str:
    """For rows whose method uses another method's learning rate, such as those with SeqKD's labels."""
    return f"lr={SETTINGS[method]['lr']:g}"


ALL = list(DIVERGENCES)
REGIMES = ["student=nothing updates=600 lr=3e-3", "student=untasted", "", "labels=250", "labels=1000", "labels=2000",
           "labels=4000", "labels=4000 lr=1e-3", "width=64", "width=64 lr=1e-3", "width=64 updates=1200",
           "vocabulary=450"]  # fmt: skip
TABLES = {  # name: (title, rows); a row is a cell without its seed; the others are compared with the first one
    "different": (
        "Different vocabularies (the papers' tables with Qwen1.5-1.8B, Llama 2 and Mistral as teachers)",
        ["sft", "seqkd", "uld", "mined", "mined+ends", *(f"v1-{d}" for d in ("fkl", "rkl", "akl")),
         *(f"v2-{d}" for d in ("fkl", "rkl", "akl")),
         *(f"{method}-fkl+answers{lr}" for lr in ("", f" {lr_of('seqkd')}") for method in ("v1", "v2")), "teacher",
         "start"],
    ),
    "ablations": (
        "Ablations of DSKD v2 + ETA and v1 + CMA (v2's ablations; string alignment and label leak are ours)",
        ["v2-fkl", "v2-fkl+random-t2s", "v2-fkl+random", "v2-fkl+student-space", "v2-fkl+teacher-space",
         "v2-fkl+no-mask", "v1-fkl", "v1-fkl+no-leak", "sft text=accents", "v2-fkl text=accents",
         "v2-fkl+strings text=accents", "v2-fkl+strings-throughout text=accents"],
    ),
    "same": (
        "The same vocabulary (the papers' tables with GPT-2 1.5B as the teacher)",
        ["sft", "seqkd teacher=same", *(f"{method}-{d} teacher=same" for d in ALL for method in ("kd", "v1", "v2")),
         *(f"{method}-fkl+answers teacher=same" for method in ("kd", "v1", "v2")),
         *(f"{method}-fkl+answers teacher=same {lr_of('seqkd same')}" for method in ("kd", "v2")),  # v1's is the same
         "teacher teacher=same"],
    ),
    "why": (
        "Vanilla KD and DSKD v2, each also at the other's learning rate, and v2's parts",
        ["kd-fkl teacher=same", *(f"v2-fkl{change} teacher=same" for change in
         ("", "+solved", "+student-space", "+teacher-space")),
         f"v2-fkl teacher=same {lr_of('kd same')}", f"kd-fkl teacher=same {lr_of('v2 same')}"],
    ),
    "on-policy": (
        "On-policy and off-policy, by updates and by time (v2's on-policy table)",
        [f"{method}{how}" for method in ("v2-fkl", "kd-fkl teacher=same")
         for how in ("", " on_policy=0.5", " on_policy=1.0", " updates=600", " updates=900")],
    ),
    "map": (
        "Where does each method win? Rouge-L, and differences of Rouge-L",
        [f"{method} {regime}".strip() for regime in REGIMES
         for method in ("sft", "uld", "mined+ends", "v1-fkl", "v2-fkl")],
    ),
}  # fmt: skip
COMPARED = "rouge_l"  # the measure whose differences are shown, seed by seed: the papers' and the search's
MEASURES = {"valid": "valid answers, %", "rouge_l": "Rouge-L", "exact_match": "exact match, %",
            "cross_entropy": "cross-entropy"}  # fmt: skip


def differences(results: dict[int, dict], first: dict[int, dict]) -> list[float]:
    """Differences of the compared measure, for each seed that both have."""
    return [results[seed][COMPARED] - first[seed][COMPARED] for seed in results if seed in first]


def format_table(rows: dict[str, dict[int, dict]], against: str | None = None) -> str:
    """{row: {seed: result}} as Markdown; differences are taken seed by seed from the row `against`, or the first."""
    lines = [["", *MEASURES.values(), f"{MEASURES[COMPARED]}, difference", "seconds", "seeds"]]
    first = rows[against] if against in rows else next(iter(rows.values()), {})
    for name, results in rows.items():
        cells = []
        for measure in MEASURES:
            digits = 3 if measure == "cross_entropy" else 1
            cells.append(spread([result[measure] for result in results.values()], digits))
        gaps = differences(results, first)
        above = f" (above in {sum(gap > 0 for gap in gaps)} of {len(gaps)})" if gaps else ""
        paired = "" if results is first else spread(gaps, 1) + above
        seconds = [result["seconds"] for result in results.values() if "seconds" in result]
        lines.append([f"`{name}`", *cells, paired, spread(seconds, 0) if seconds else "", str(len(results))])
    return table(lines)


def format_map(rows: dict[str, dict[int, dict]]) -> str:
    """A line for each regime, a column for each method; differences from the first column, seed by seed."""
    methods = list(dict.fromkeys(name.split()[0] for name in rows))
    lines = [["", *methods]]
    for regime in dict.fromkeys(name.partition(" ")[2] for name in rows):
        first, *others = [rows.get(f"{method} {regime}".strip(), {}) for method in methods]
        line = [spread([result[COMPARED] for result in first.values()], 1)]
        line += [spread(differences(results, first), 1, sign="+") for results in others]
        lines.append([f"`{regime or 'default'}`", *line])
    return table(lines)


def report(names: list[str], seeds: int, root: Path, against: str | None = None) -> str:
    """The tables of the finished cells."""
    parts = []
    for name in names:
        title, specs = TABLES[name]
        rows: dict[str, dict[int, dict]] = {}
        for spec in specs:
            files = {seed: file_of(replace(parse(spec), seed=seed), root) for seed in range(seeds)}
            rows[spec] = {seed: json.loads(file.read_text()) for seed, file in files.items() if file.is_file()}
        parts.append(f"### {name}: {title}\n\n{format_map(rows) if name == 'map' else format_table(rows, against)}\n")
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Many cells

REPOSITORY = Path(__file__).parent.parent


def file_of(cell: Cell, root: Path) -> Path:
    return root / "cells" / f"{resolve(cell)}.json"


def pending(cells: list[Cell], root: Path) -> list[Cell]:
    """The unfinished cells, each once."""
    return list(dict.fromkeys(cell for cell in map(resolve, cells) if not file_of(cell, root).is_file()))


def command(cell: Cell, root: Path) -> list[str]:
    return [sys.executable, "-m", "experiments.reproduce", "--out", str(root.resolve()), "--cell", str(cell)]


def run_all(cells: list[Cell], root: Path, workers: int) -> None:
    """Run each cell in a process with one thread, `workers` at a time; finished cells are kept, whatever follows."""
    left = pending(cells, root)
    print(f"{len(cells) - len(left)} of {len(cells)} cells are finished", file=sys.stderr)
    (root / "logs").mkdir(parents=True, exist_ok=True)

    def launch(cell: Cell) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(root / "logs" / f"{cell}.txt", "w") as stream:
            done = subprocess.run(command(cell, root), cwd=REPOSITORY, env=environment, stdout=stream, stderr=stream)
        print(f"{cell}: {'failed' if done.returncode else 'done'}", file=sys.stderr)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(launch, left))
    if failed := pending(left, root):
        raise RuntimeError("\n".join(f"{cell}: failed, see {root / 'logs' / f'{cell}.txt'}" for cell in failed))


def search(root: Path, run) -> dict[str, dict[str, float]]:
    """Search SETTINGS, one after the other: the learning rate first. `run(cells)` must finish these cells."""

    def mean_score(cell: Cell) -> float:
        files = [file_of(replace(cell, seed=seed), root) for seed in SEARCH_SEEDS]
        mean = statistics.fmean(json.loads(file.read_text())[COMPARED] for file in files)
        print(f"{mean:.2f} {cell}", file=sys.stderr)
        return mean

    def best_of(tried: dict[str, list[Cell]]) -> dict[str, Cell]:
        run([replace(cell, seed=seed) for cells in tried.values() for cell in cells for seed in SEARCH_SEEDS])
        return {name: max(cells, key=mean_score) for name, cells in tried.items()}

    cells, second = {}, {}
    for name in SETTINGS:
        family, _, same = name.partition(" ")
        method = {"kd": "kd-fkl", "v1": "v1-fkl", "v2": "v2-fkl", "mined": "mined+ends"}.get(family, family)
        second[name] = SECOND.get(family, [{"temperature": 1.0}, {"temperature": 2.0}])
        cells[name] = Cell(method, split="valid", teacher=same or "different", **second[name][0])
    cells = best_of({name: [replace(cell, lr=lr) for lr in LRS] for name, cell in cells.items()})
    cells = best_of({name: [replace(cell, **more) for more in second[name]] for name, cell in cells.items()})
    return {name: {key: getattr(cell, key) for key in ("lr", *second[name][0])} for name, cell in cells.items()}


def run(o: argparse.Namespace) -> None:
    """Do what the command line asks for. Raises ValueError for names that do not exist."""
    if o.keep and o.cell is None:
        raise ValueError("--keep is for one run: name it with --cell")
    if o.cell is not None:  # an empty name is an error, not every table
        print(json.dumps(run_cell(parse(o.cell), o.out, o.keep)))
        return
    check_values({"seeds": o.seeds, "workers": o.workers}, {"seeds": 1, "workers": 1}, {})
    known = paper.PAIRS if o.scale == "paper" else TABLES
    names = o.tables or list(known)
    if unknown := set(names) - set(known):
        raise ValueError(f"no {unknown.pop()!r} in --scale {o.scale}; there are {', '.join(known)}")
    if o.scale == "paper":
        print(paper.HEAD)
        paper.follow([command for name in names for command in paper.commands_of(name)], o.run)
        return
    if o.against and not any(o.against in TABLES[name][1] for name in names):
        raise ValueError(f"--against: no row {o.against!r} in {', '.join(names)}; write it as in the tables")
    if o.search:
        print("SETTINGS =", search(o.out, lambda cells: run_all(cells, o.out, o.workers)))
        return
    cells = [replace(parse(spec), seed=seed) for name in names for spec in TABLES[name][1] for seed in range(o.seeds)]
    if o.list:
        print("\n".join(shlex.join(command(cell, o.out)) for cell in pending(cells, o.out)))
        return
    if not o.print:
        run_all(cells, o.out, o.workers)
    text = report(names, o.seeds, o.out, o.against)
    print(text)
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / "tables.md").write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"tables to make (default: all): {', '.join(TABLES)}")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds 0, 1, ... of each row")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="cells at a time, each on one core")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--list", action="store_true", help="print the unfinished cells as commands; run nothing")
    parser.add_argument("--print", action="store_true", help="print the tables of the finished cells; run nothing")
    parser.add_argument("--against", help="the row to take differences from (default, and in the map: the first)")
    parser.add_argument("--search", action="store_true", help="hyper-parameters on the validation split")
    parser.add_argument("--scale", choices=["tiny", "paper"], default="tiny", help="paper: commands for real models")
    parser.add_argument("--run", action="store_true", help="with --scale paper: also run the commands, in order")
    parser.add_argument("--cell", help="run this one cell and print its result")
    parser.add_argument("--keep", type=Path, help="with --cell: run it even if finished, and keep its directory here")
    torch.set_num_threads(1)
    try:
        run(parser.parse_args(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, Stopped):  # a cell's own directory, which Stopped names, is gone
        sys.exit("stopped; finished cells are kept, and the same command does the others")


if __name__ == "__main__":
    main()
