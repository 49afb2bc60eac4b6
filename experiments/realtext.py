"""The methods on real text with pre-trained models: for each pair, which method teaches the same student best.

    python -m experiments.realtext --small DIR --large DIR --judge DIR --data DIR
    python -m experiments.realtext ... --run [--pairs weaker] [--rows sft v2] [--seeds 0 1 2]
    python -m experiments.realtext --tables [--against v2] [--picture FILE]

The first line prints the commands; the second runs them one after the other. Finished commands are skipped, and an
interrupted one is resumed; other models, another judge or other data need another --out. The third line prints tables
of everything that is finished.

    weaker   SmolLM2-135M-Instruct without six of its layers learns from the whole model: one vocabulary, Dolly
    other    the same student learns from Qwen2.5-Coder-0.5B-Instruct: another vocabulary, Dolly
    math     the whole SmolLM2-135M-Instruct learns from Qwen2.5-Coder-0.5B-Instruct, GSM8K
    code     the same two, MBPP and Code Alpaca

`--small`, `--large` and `--judge` are these two models and a larger one that is not a teacher; `--data` is the folder
of the files named in FILES. Each teacher is first fine-tuned on the pair's data, as in the papers. All rows of a pair
start from the same student and see the same examples in the same order.
"""

import argparse
import json
import math
import random
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch.distributions import Categorical

import eval
from data import Example, collate_side, tokenise
from experiments import paper
from experiments.analyse import new_figure, save
from experiments.reproduce import write_random_projectors
from fast.cpu import by_onednn
from losses import logits_under
from model import hidden_at, load_model, read_config, read_json, save_model
from runtime.device import choose_device
from runtime.formats import read_examples
from runtime.hub import model_directory
from runtime.run import tokenizer_of, write_text
from runtime.strict import check_values
from scores.rouge import rouge_l
from scores.tables import spread, table

LEFT_OUT = (10, 13, 16, 19, 22, 25)  # layers that the weaker student lacks
FILES = {  # set: the files of --data that hold it
    "dolly": ["dolly_3k.jsonl"], "gsm8k": ["gsm8k_train.jsonl"], "code": ["mbpp.jsonl", "code_alpaca_2k.jsonl"],
    "self_instruct": ["self_instruct_eval.jsonl"],
}  # fmt: skip


@dataclass
class Pair:
    student: str  # weak, small
    teacher: str  # small, large
    data: str  # the set that it is trained and tested on
    others: tuple[str, ...]  # sets out of domain
    temperature: float = 2.0  # of all rows with a teacher; in v2's paper 1 for mathematics and code


PAIRS = {
    "weaker": Pair("weak", "small", "dolly", ("self_instruct", "gsm8k")),
    "other": Pair("weak", "large", "dolly", ("self_instruct", "gsm8k")),
    "math": Pair("small", "large", "gsm8k", ("dolly", "code"), 1.0),
    "code": Pair("small", "large", "code", ("dolly", "gsm8k"), 1.0),
}
ROWS = {  # how the student is trained; the others are compared with the first one
    "sft": "--method sft",
    "seqkd": "--method seqkd",
    "kd": "--method kd",
    "uld": "--method uld",
    "mined": "--method mined",
    "v1": "--recipe v1",
    "v2": "--recipe v2",
    "v2-random": "--recipe v2 --projectors {home}/random.safetensors",
    "v2-slow": "--recipe v2 --projector-lr 5e-5",
    "v2-fitted": "--recipe v2 --projectors {home}/fitted/projectors.safetensors",  # trained before the student moves
    "sft-as-v2": "",  # not trained: sft's student, sampled at the temperature where it is as confident as v2's
}
ONE_VOCABULARY = [row for row in ROWS if row not in ("uld", "mined")]
TWO = [row for row in ROWS if row != "kd"]
TRAIN, VALID, TEST = 960, 60, 100  # examples
LENGTH = 160  # tokens of prompt and response; longer examples are left out
COMMON = f"--max-len {LENGTH} --max-prompt-len {LENGTH - 16} --dtype bf16 --log-every 10 --no-compile"
TEACHER = "--epochs 1 --batch-size 8 --lr 2e-5"
STUDENT = "--batch-size 8 --lr 1e-4 --warmup 10"
FITTED = "--epochs 1 --batch-size 8 --lr 1e-10 --warmup 10 --seed 100"  # only the projectors move
NEW_TOKENS = 96

# ---------------------------------------------------------------------------------------------------------------------
# Preparation


def prepare(o: argparse.Namespace, name: str) -> None:
    """Create the pair's student, its data and its random projectors, if they are missing."""
    pair, home = PAIRS[name], o.out / name
    tokenizers = [tokenizer_of(directory) for directory in (o.small, o.large)]
    for part in (pair.data, *pair.others):
        write_split(o.data, part, tokenizers, o.out / "data")
    if pair.student == "weak" and not (o.out / "weak").is_dir():
        leave_out_layers(o.small, o.out / "weak.new", LEFT_OUT)
        (o.out / "weak.new").rename(o.out / "weak")  # whole, or not there
    configs = [read_json(directory_of(o, model) / "config.json") for model in (pair.teacher, pair.student)]
    widths = [read_config(config).width for config in configs]
    home.mkdir(parents=True, exist_ok=True)
    write_random_projectors(home / "random.safetensors", *widths, seed=0)


def directory_of(o: argparse.Namespace, model: str) -> Path:
    return o.out / "weak" if model == "weak" else getattr(o, model)


def leave_out_layers(source: Path, out: Path, layers: Iterable[int]) -> None:
    """Write a model directory without these layers of `source`, with its tokenizer."""
    model = load_model(source)
    model.blocks = torch.nn.ModuleList(block for i, block in enumerate(model.blocks) if i not in layers)
    model.config["num_hidden_layers"] = len(model.blocks)
    save_model(model, out)
    for file in source.glob("*token*"):
        (out / file.name).write_bytes(file.read_bytes())


def write_split(folder: Path, part: str, tokenizers: list, out: Path) -> None:
    """Write {part}-train, -valid and -test.jsonl, if they are missing: a fixed draw of the examples that are short
    enough for all tokenizers, and {part}-more.jsonl, one example of each prompt that is left over. Each prompt is in
    only one file. Raises ValueError if there are too few for the test."""
    if (out / f"{part}-train.jsonl").is_file():
        return
    groups: dict[str, list[str]] = {}
    for file in FILES[part]:
        examples = [example for example in read_examples(folder / file) if example.outputs[0].strip()]
        sides = zip(*(tokenizer.encode_examples(examples) for tokenizer in tokenizers), strict=True)
        for example, pair in zip(examples, sides, strict=True):
            if all(len(side) <= LENGTH and len(side.prompt) <= LENGTH - 16 for side in pair):
                line = {"prompt": example.prompt_text(), "output": example.outputs[0]}
                groups.setdefault(line["prompt"], []).append(json.dumps(line, ensure_ascii=False) + "\n")
    prompts = sorted(groups)
    random.Random(0).shuffle(prompts)
    if len(prompts) < TEST:
        files = " and ".join(FILES[part])
        raise ValueError(f"{folder}: {len(prompts)} short prompts in {files}, but {TEST} are needed for the test alone")
    parts = {"test": prompts[:TEST], "valid": prompts[TEST : TEST + VALID], "train": prompts[TEST + VALID :]}
    lines = {split: [line for prompt in chosen for line in groups[prompt]][:TRAIN] for split, chosen in parts.items()}
    firsts = [groups[prompt][0] for prompt in sorted(parts["train"])]
    lines["more"] = [line for line in firsts if line not in lines["train"]]
    out.mkdir(parents=True, exist_ok=True)
    for split in ("more", *parts):
        write_text(out / f"{part}-{split}.jsonl", "".join(lines[split]))


def commands_of(o: argparse.Namespace, name: str) -> list[str]:
    """The pair's remaining commands in order: all rows of a seed, then the next seed, so that seeds are completed."""
    pair = PAIRS[name]
    paths = directory_of(o, pair.student), directory_of(o, pair.teacher), o.judge, o.out / name, o.out / "data"
    student, teacher, judge, home, data = (shlex.quote(str(path)) for path in paths)
    given = f"--data {data}/{pair.data}-train.jsonl --valid {data}/{pair.data}-valid.jsonl {COMMON}"
    tests = " ".join(f"{data}/{part}-test.jsonl" for part in (pair.data, *pair.others))
    score = f"-m experiments.realtext --judge {judge} --tests {tests} --score"
    taught = f"--teacher {home}/teacher/student --temperature {pair.temperature}"
    fit = f"train.py {ROWS['v2']} {taught} --cache-teacher {home}/states --student {student} {given} {FITTED}"
    commands = [f"train.py --method sft --student {teacher} {given} {TEACHER} --out {home}/teacher",
                f"{score} {home}/teacher", f"{score} {student} --out {home}/start"]  # fmt: skip
    rows = o.rows or (ONE_VOCABULARY if name == "weaker" else TWO)
    if "kd" in rows and name != "weaker":
        raise ValueError(f"--rows kd: the models of {name} have different vocabularies; it is for --pairs weaker")
    for seed in o.seeds:
        for row in sorted(rows, key=list(ROWS).index):  # sft-as-v2 is last
            how = ROWS[row].format(home=home)
            if row != "sft":
                how += f" {taught}"
            if row not in ("sft", "seqkd"):
                how += f" --cache-teacher {home}/states"
            out = f"{home}/{row}-{seed}"
            if row == "sft-as-v2":
                for needed in ("sft", "v2"):
                    if needed not in rows and not (o.out / name / f"{needed}-{seed}" / "scores.json").is_file():
                        raise ValueError(f"--rows sft-as-v2 needs {name}/{needed}-{seed}: give --rows sft v2 sft-as-v2")
                like = f"--as-confident-as {home}/v2-{seed} {data}/{pair.data}-valid.jsonl"
                commands.append(f"{score} {home}/sft-{seed} {like} --out {out}")
                continue
            before = o.out / name / f"{row}-{seed}" / "args.json"
            if before.is_file() and read_json(before)["epochs"] != o.epochs:
                raise ValueError(f"{before.parent}: not trained with --epochs {o.epochs}; give another --out")
            how += f" --epochs {o.epochs}" + " --keep-best rouge" * (o.epochs > 1)
            commands += [f"train.py {how} --student {student} {given} {STUDENT} --seed {seed} --out {out}",
                         f"{score} {out}"]  # fmt: skip
    remaining = [command for command in commands if not (Path(shlex.split(command)[-1]) / "scores.json").is_file()]
    fitted = [command for command in remaining if "/fitted/projectors" in command]
    if fitted:
        remaining.insert(remaining.index(fitted[0]), f"{fit} --out {home}/fitted")
    return remaining


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def bits_per_byte(model, tokenizer, examples: list[Example]) -> float:
    """Bits per byte of the first outputs, including their end if they have one: comparable between tokenizers."""
    rows, _ = tokenise(examples, tokenizer, None, 1024, 512)
    tokens, size = (sum(len(row.student.response) for row in rows), sum(len(e.outputs[0].encode()) for e in examples))
    device = model.embed.weight.device.type
    with torch.autocast(device, torch.bfloat16):
        return eval.held_out_cross_entropy(model, rows, tokenizer.eos_id, device) * tokens / size / math.log(2)


@torch.no_grad()
def predictions(model, tokenizer, examples: list[Example]) -> Iterator[torch.Tensor]:
    """For each example, (n, V) logits at the tokens of its first output; those of a whole set may fill the memory."""
    rows, _ = tokenise(examples, tokenizer, None, 1024, 512)
    device = model.embed.weight.device.type
    for row in rows:
        with torch.autocast(device, torch.bfloat16):
            side = collate_side([row.student], pad_id=0).to(device)
            logits = logits_under(hidden_at(model, side), model.head_weight)
        yield logits


def entropy(logits: Iterable[torch.Tensor], temperature: float = 1.0) -> float:
    """Mean entropy over the tokens, in nats."""
    return torch.cat([Categorical(logits=part.float() / temperature).entropy() for part in logits]).mean().item()


def matching_temperature(run: Path, other: Path, file: Path, device="cpu") -> float:
    """The temperature at which the entropy of a run's student on a file's answers equals the other's at 1; to 0.01."""
    examples = read_examples(file)
    students = (model_directory(str(directory)) for directory in (run, other))
    logits, others = (
        list(predictions(load_model(student, device=device), tokenizer_of(student), examples)) for student in students
    )
    aim, low, high = entropy(others), 0.2, 5.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if entropy(logits, middle) > aim else (middle, high)
    return round((low + high) / 2, 2)


def score(run: Path, out: Path, tests: list[Path], judge: Path, device: str, sampling_temperature=1.0) -> None:
    """Write scores.json: for each set, scores of the gold answers, with the entropy of the predictions in nats, and of
    the model's own answers, greedy and sampled once; the judge, which is not a teacher, also reads the sampled ones.
    Removes resume/, which only a continuation would need."""
    student = model_directory(str(run))
    scores: dict[str, dict] = {}
    model, tokenizer, sampled = load_model(student, torch.bfloat16, device), tokenizer_of(student), {}
    for file in tests:
        examples = read_examples(file)
        found = scores[file.stem.removesuffix("-test")] = {"gold": bits_per_byte(model, tokenizer, examples)}
        found["entropy"] = entropy(predictions(model, tokenizer, examples))
        for name, temperature in {"greedy": 0.0, "sampled": sampling_temperature}.items():
            unfinished: set[int] = set()
            prompts = [example.prompt_text() for example in examples]
            responses = eval.respond(
                model, tokenizer, prompts, NEW_TOKENS, temperature, seed=0, batch_size=50, unfinished=unfinished
            )
            found[name] = 100 * fmean(map(rouge_l, responses, (example.outputs for example in examples)))
        sampled[file] = [
            replace(example, outputs=[response], ends=i not in unfinished)
            for i, (example, response) in enumerate(zip(examples, responses, strict=True)) if response.strip()
        ]  # fmt: skip
    model, tokenizer = load_model(judge, torch.bfloat16, device), tokenizer_of(judge)
    for found, examples in zip(scores.values(), sampled.values(), strict=True):
        if examples:  # else all answers are blank
            found["judged"] = bits_per_byte(model, tokenizer, examples)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    shutil.rmtree(out / "resume", ignore_errors=True)


MEASURES = {  # of scores.json: its title, and the digits that are shown
    "gold": ("gold bits per byte", 3), "greedy": ("greedy Rouge-L", 1), "sampled": ("sampled Rouge-L", 1),
    "judged": ("judged bits per byte", 3),
}  # fmt: skip


def scores_of(out: Path, name: str) -> dict[str, dict[str, dict]]:
    """{row: {seed: its scores}} of a pair's finished runs."""
    rows: dict[str, dict[str, dict]] = {}
    for file in sorted((out / name).glob("*/scores.json")):
        row, _, seed = file.parent.name.rpartition("-")
        rows.setdefault(row or seed, {})[seed] = read_json(file)  # `teacher` and `start` have no seed
    return rows


def differences(rows: dict[str, dict[str, dict]], row: str, part: str, key: str, against="sft") -> list[float]:
    """Differences from another row, seed by seed."""
    first = rows.get(against, {}) if row != against else {}
    both = ((scores, first[seed]) for seed, scores in rows.get(row, {}).items() if seed in first)
    cells = ((ours.get(part, {}), theirs.get(part, {})) for ours, theirs in both)
    return [ours[key] - theirs[key] for ours, theirs in cells if key in ours and key in theirs]


def tables(out: Path, against: str = "sft") -> str:
    """A table for each pair, with the mean over the seeds and the difference from the row `against`, seed by seed, ±
    its standard deviation; if fewer seeds have both, with their number."""
    parts = []
    for name, pair in PAIRS.items():
        runs, lines = scores_of(out, name), [[name, "seeds", *(title for title, _ in MEASURES.values())]]
        for part, row in product((pair.data, *pair.others), ("teacher", "start", *ROWS)):
            if found := [scores[part] for scores in runs.get(row, {}).values() if part in scores]:
                lines.append([f"{part}, {row}", str(len(found))])
                for key, (_, digits) in MEASURES.items():
                    gaps = differences(runs, row, part, key, against)
                    fewer = f"; {len(gaps)} of {len(found)} seeds" * (len(gaps) < len(found))
                    difference = f" ({spread(gaps, digits, '+')}{fewer})" if gaps else ""
                    values = [scores[key] for scores in found if key in scores]
                    lines[-1].append(f"{fmean(values):.{digits}f}{difference}" if values else "-")
        if runs:
            parts.append(table(lines))
    return "\n\n".join(parts)


def draw(out: Path):
    """The differences from `sft` with their standard deviations: a panel for each measure, a line for each row, a
    colour for each pair; filled in domain, hollow out of domain."""
    figure = new_figure(10, 4)
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    finished = {row for name in PAIRS for row in scores_of(out, name)}
    rows = [row for row in list(ROWS)[1:] if row in finished]
    for n, (name, pair) in enumerate(PAIRS.items()):
        runs, sets = scores_of(out, name), (pair.data, *pair.others)
        for axis, key in zip(axes, MEASURES, strict=True):
            for (y, row), (m, part) in product(enumerate(rows), enumerate(sets)):
                if gaps := differences(runs, row, part, key):
                    error = stdev(gaps) if len(gaps) > 1 else 0
                    axis.errorbar(fmean(gaps), y + 0.2 * n + 0.06 * m - 0.3, xerr=error, fmt="o", markersize=4,
                                  color=f"C{n}", markerfacecolor="white" if m else f"C{n}")  # fmt: skip
        axes[0].plot([], [], "o", color=f"C{n}", label=name if runs else None)
    for axis, (title, _) in zip(axes, MEASURES.values(), strict=True):
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set(title=title.replace(" ", "\n", 1))
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PAIRS))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, about in {"small": "SmolLM2-135M-Instruct", "large": "Qwen2.5-Coder-0.5B-Instruct",
                        "judge": "a larger model, Qwen2.5-Coder-1.5B-Instruct", "data": "files of examples"}.items():
        parser.add_argument(f"--{name}", type=Path, help=f"directory: {about}")  # fmt: skip
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="(default: all)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="(default: all that the pair's vocabularies allow)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--epochs", type=int, default=1, help="the student's; after each, the best by Rouge-L on the "
                        "validation prompts is kept; each number needs its own --out (default: 1)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/realtext"), help="(default: %(default)s)")
    parser.add_argument("--run", action="store_true", help="also run the commands")
    parser.add_argument("--tables", action="store_true", help="print tables of what is finished")
    parser.add_argument("--against", choices=ROWS, default="sft", metavar="ROW", help="with --tables: the row to take "
                        "differences from (default: %(default)s)")  # fmt: skip
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --tables: the differences from sft as a PNG")
    parser.add_argument("--score", type=Path, metavar="RUN", help="used by the commands: score a run on --tests")
    parser.add_argument("--tests", nargs="+", type=Path, metavar="FILE", help="with --score: the test sets")
    parser.add_argument("--as-confident-as", nargs=2, type=Path, metavar=("RUN", "FILE"), help="with --score: sample "
                        "at the temperature where the entropy on FILE equals RUN's")  # fmt: skip
    o = parser.parse_args(arguments)
    try:
        if o.tables:
            print(tables(o.out, o.against) or f"nothing is finished in {o.out}")
            if o.picture:
                save(draw(o.out), o.picture)
        elif o.score:
            if not (o.tests and o.judge):
                raise ValueError("--score needs --tests and --judge")
            model_directory(str(o.judge))  # before the answers, not after them
            for file in o.tests:
                read_examples(file)
            device, temperature = choose_device()[0], 1.0
            with by_onednn(device):
                if o.as_confident_as:
                    temperature = matching_temperature(o.score, *o.as_confident_as, device)
                    print(f"temperature {temperature}")
                out = o.score if o.out == parser.get_default("out") else o.out
                score(o.score, out, o.tests, o.judge, device, temperature)
        else:
            follow(o)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def follow(o: argparse.Namespace) -> None:
    for name in ("small", "large", "judge", "data"):
        if getattr(o, name) is None:
            raise ValueError(f"--{name} is missing")
        setattr(o, name, getattr(o, name).resolve())
    for model in (o.small, o.large, o.judge):
        model_directory(str(model))
    check_values({"epochs": o.epochs, "seeds": o.seeds}, {"epochs": 1, "seeds": 0}, {"seeds": 2**32})
    o.out = o.out.resolve()
    given = {name: str(getattr(o, name)) for name in ("small", "large", "judge", "data")}
    for name in o.pairs:  # an error in one before hours of another
        kept = o.out / name / "given.json"
        if kept.is_file() and (before := read_json(kept)) != given:
            raise ValueError(f"{kept.parent} was made with {before}, not with {given}; give another --out")
        commands_of(o, name)
    for name in o.pairs:
        if o.run:
            prepare(o, name)
            write_text(o.out / name / "given.json", json.dumps(given) + "\n")
        paper.follow(commands_of(o, name), o.run)


if __name__ == "__main__":
    main()
