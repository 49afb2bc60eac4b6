"""The embedded tiny task: a generated English instruction data set, and the two tokenizers for it.

    python -m experiments.tiny      what `python train.py` does, over eight seeds; finished seeds are kept

Why the task is open-ended: distillation helps if the teacher knows more than the labels say. Here most prompts have
hundreds of valid answers, and the gold answer is *one random draw* from a small slot grammar in which every word has
its own tastes: a fox mostly sniffs the flowers, sometimes dances and never hides, but a wolf does. A teacher that reads
16,000 draws learns these conditional distributions. The student's 500 single draws do not show them, but the teacher's
soft predictions do. No test prompt occurs in training.

The student is pre-trained, like the papers' students: half of the answers that it has read ignore tastes. So it speaks
the language, and half believes what the teacher knows. The tastes of a word are seeded by the word itself, so that all
data seeds share one language.
"""

import argparse
import json
import random
import re
import shlex
import statistics
import sys
from dataclasses import asdict, replace
from functools import cache
from itertools import product, zip_longest
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.implementations import ByteLevelBPETokenizer

import train
from data import Example
from eval import respond, score
from model import load_model
from runtime import parallel
from runtime.device import say_device
from runtime.formats import read_examples
from runtime.run import Stopped, tokenizer_of, write_text
from runtime.strict import check_options, choose_alignment, refuse_first
from runtime.tokenizer import TextTokenizer, read_tokenizer
from scores.tables import spread, table

# ----------------------------------------------------------------------------------------------------------------------
# The words. A group has its words and, for every property, the pool in which each word has its own favourites; "shared"
# are pools of several groups, "members" and "opposites" are words that each have their own pool.

WORDS = json.loads(Path(__file__).with_name("tiny_words.json").read_text())
GROUPS, MEMBERS, OPPOSITES = WORDS["groups"], WORDS["members"], WORDS["opposites"]

# fmt: off
# family: (prompt, answers). {noun} is the prompt's own word, {noun.look} one of that word's favourite looks.
FAMILIES = {
    "sentence": ("Write a sentence about a {noun} in the {place}.",
        ["The {noun.look} {noun} {noun.does} {place.spot} {place.when}.",
         "{place.when}, the {noun.look} {noun} {noun.does} {place.spot}."]),
    "look": ("How does the {noun} in the {place} look?",
        ["The {noun} looks {noun.look} {place.when}, with {noun.feature}.",
         "Rather {noun.look}, with {noun.feature}, especially {place.when}."]),
    "find": ("Where in the {place} can I find the {noun}?",
        ["Look {place.spot}, where the {noun} {noun.does} {place.when}.",
         "The {noun.look} {noun} is usually {place.spot} {place.when}."]),
    "do": ("What does a {noun} do {time}?",
        ["The {noun} {noun.does} with {noun.friend}, because {time.why}.",
         "{time}, since {time.why}, the {noun.look} {noun} {noun.does}."]),
    "list": ("List three things that the {noun} keeps in the {place}.",
        ["The {noun.look} {noun} keeps {noun.own}, {place.hold} and {noun.friend}.",
         "{place.hold}, {noun.own} and, {place.spot}, {noun.friend}."]),
    "kind": ("Name a kind of {kind} for the {noun}.",
        ["A {kind.member} is the right {kind} for the {noun.look} {noun}.",
         "A {kind.member}, as long as the {noun} {noun.does}."]),
    "capital": ("What should a {noun} do in the capital of {country}?",
        ["In {country.capital} the {noun} should see {country.sight} and {country.treat}.",
         "Visit {country.sight} in {country.capital}, and {country.treat} with {noun.friend}."]),
    "plural": ("Use the plural of {noun} in a sentence about the {place}.",
        ["Two {noun.look} {noun.plural} {noun.do} {place.spot}.",
         "{place.when}, the {noun.plural} {noun.do} {place.spot}."]),
    "opposite": ("Say the opposite: the {place} is {quality}.",
        ["The {place} is {quality.opposite} {place.when}, with {place.hold} {place.spot}.",
         "Even {place.spot}, the {place} is {quality.opposite} {place.when}."]),
    "story": ("Begin a story about a {person} and the {animal}.",
        ["Once the {person.look} {person} gave {person.own} to the {animal.look} {animal}.",
         "Nobody knew why the {animal.look} {animal} followed the {person} with {person.feature}."]),
    "say": ("What does the {person} say to the {animal}?",
        ["{person.greet}, my {animal.look} {animal}, {person.ask}!",
         "{person.greet}, says the {person.look} {person}, {person.ask}!"]),
}
# fmt: on

UNSEEN = ("find", "plural", "story")  # no label is of these families, but all words and tastes occur in others

FIELDS = {  # the groups that a {field} of a prompt runs through
    "noun": ("animal", "person", "thing"),
    "place": ("outdoor", "indoor"),
    **{name: (name,) for name in ("animal", "person", "time", "country")},
}
FIELDS = {field: ", ".join(GROUPS[name]["words"] for name in names).split(", ") for field, names in FIELDS.items()}
FIELDS |= {"kind": list(MEMBERS), "quality": list(OPPOSITES)}
POOLS = {word: group | WORDS["shared"] for group in GROUPS.values() for word in group["words"].split(", ")}
POOLS |= {word: {"member": pool} for word, pool in MEMBERS.items()}
POOLS |= {word: {"opposite": pool} for word, pool in OPPOSITES.items()}

WEIGHTS = (6, 4, 3, 2, 1)  # a word's taste for its five favourites in a pool; it never takes the other options
MARKER = "\n"  # ends every prompt: prompt and answer are tokenised separately, and the answer starts without a space


# ----------------------------------------------------------------------------------------------------------------------
# The grammar.


@cache
def favourites(word: str, name: str, tasted: bool = True) -> tuple[tuple[str, int], ...]:
    """The options of one property of a word with their weights: (("shy", 6), ("muddy", 4), ...) for ("fox", "look").
    Not `tasted`: every option of the pool, equally likely."""
    if name == "plural":
        return ((WORDS["plurals"].get(word, word + "s"), 1),)
    if name == "capital":
        return ((WORDS["capitals"][word], 1),)
    if name == "does":  # the same taste as "do"
        return tuple((in_third_person(option), weight) for option, weight in favourites(word, "do", tasted))
    pool = POOLS[word][name].split(", ")
    if not tasted:
        return tuple((option, 1) for option in pool)
    # A string seed does not depend on the process, and random() is the only method whose results Python guarantees.
    taste = random.Random(f"taste of {word} in {name}")
    return tuple(zip(sorted(pool, key=lambda _: taste.random()), WEIGHTS, strict=False))


def in_third_person(phrase: str) -> str:
    verb, space, rest = phrase.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return verb + "es" + space + rest
    return (verb[:-1] + "ies" if re.search("[^aeiou]y$", verb) else verb + "s") + space + rest


@cache
def all_prompts() -> dict[str, tuple[str, dict[str, str]]]:
    """Every prompt of the task, in a fixed order: prompt -> (family, the words it was filled with)."""
    prompts = {}
    for family, (template, _) in FAMILIES.items():
        fields = re.findall(r"\{(\w+)\}", template)
        for words in product(*(FIELDS[field] for field in fields)):
            filled = dict(zip(fields, words, strict=True))
            prompts[re.sub(r"\ba (?=[aeiou])", "an ", template.format(**filled)) + MARKER] = (family, filled)
    return prompts


@cache
def answer_slots(prompt: str, tasted: bool = True) -> tuple[tuple[tuple[tuple[str, int], ...], ...], ...]:
    """The grammar of a prompt's answers: two equally likely forms, each a sequence of slots, each slot a tuple of
    (option, weight); plain text is a slot with one option."""
    family, words = all_prompts()[prompt]
    forms = []
    for template in FAMILIES[family][1]:
        slots = []
        for piece in filter(None, re.split(r"(\{[^}]+\})", template)):
            field, _, name = piece.strip("{}").partition(".")
            text = words[field] if piece.startswith("{") else piece
            slots.append(favourites(text, name, tasted) if name else ((text, 1),))
        slots[0] = tuple((option[0].upper() + option[1:], weight) for option, weight in slots[0])
        forms.append(tuple(slots))
    return tuple(forms)


def draw_answer(prompt: str, generator: random.Random, tasted: bool = True) -> str:
    """One random answer: a form, then every slot by its word's taste; not `tasted`: by chance."""
    slots = generator.choice(answer_slots(prompt, tasted))
    return "".join(generator.choices(*zip(*slot, strict=True))[0] for slot in slots)


@cache
def answer_pattern(prompt: str) -> re.Pattern:
    """A pattern that matches all possible answers."""
    forms = [[[re.escape(option) for option, _ in slot] for slot in form] for form in answer_slots(prompt)]
    return re.compile("|".join("".join(f"(?:{'|'.join(slot)})" for slot in form) for form in forms))


def is_valid(prompt: str, answer: str) -> bool:
    """Whether the whole answer, from its capital letter to its full stop, fits the prompt's grammar."""
    return answer_pattern(prompt).fullmatch(answer) is not None


def score_answers(model, tokenizer: TextTokenizer, examples: list[Example], spelt=str) -> dict[str, float]:
    """{valid, rouge_l, exact_match} of greedy answers, in per cent. `valid`: the share that the grammar allows, after
    `spelt` is applied to the texts."""
    answers = respond(model, tokenizer, [example.prompt for example in examples], max_new_tokens=48, batch_size=100)
    valid = [is_valid(spelt(e.prompt), spelt(answer)) for e, answer in zip(examples, answers, strict=True)]
    scores = score(answers, examples)
    return {"valid": 100 * statistics.fmean(valid), **{name: scores[name] for name in ("rouge_l", "exact_match")}}


# ----------------------------------------------------------------------------------------------------------------------
# The data set.


def make_data(
    seed: int = 0, teacher_train: int = 16000, student_train: int = 500, valid: int = 400, test: int = 2000,
    reading: int = 16000, test_share: int = 50, unseen: tuple[str, ...] = UNSEEN,
) -> dict[str, list[dict]]:
    """The parts of the data set, each a list of {"prompt", "output"}.

    The seed splits the prompts of every family once: 10% for validation, `test_share`% for the test, the rest for
    training. teacher_train, student_train and reading have single draws for random training prompts, with every family
    equally often (a prompt may be repeated with another answer); student_train has none of the `unseen` families, and
    in reading every second answer ignores tastes. valid and test have distinct prompts without the unseen families,
    test_unseen half as many of only these; each has five reference draws as "output". A part does not change with the
    size of another. Raises ValueError if a test needs more prompts than exist.
    """
    groups: dict[str, dict[str, list[str]]] = {"train": {}, "valid": {}, "test": {}}
    for family in FAMILIES:
        prompts = [prompt for prompt, (its_family, _) in all_prompts().items() if its_family == family]
        random.Random(f"{seed} split {family}").shuffle(prompts)
        first, second = len(prompts) // 10, len(prompts) * (10 + test_share) // 100
        groups["valid"][family], groups["test"][family] = prompts[:first], prompts[first:second]
        groups["train"][family] = prompts[second:]

    seen, data = [family for family in FAMILIES if family not in unseen], {}
    drawn = {"teacher_train": (teacher_train, [*FAMILIES]), "student_train": (student_train, seen)}
    for name, (size, families) in (drawn | {"reading": (reading, [*FAMILIES])}).items():
        generator = random.Random(f"{seed} {name}")
        prompts = enumerate(generator.choice(groups["train"][generator.choice(families)]) for _ in range(size))
        every = 2 if name == "reading" else 1
        data[name] = [{"prompt": p, "output": draw_answer(p, generator, i % every == 0)} for i, p in prompts]
    held_out = {"valid": (valid, seen), "test": (test, seen), "test_unseen": (test // 2 if unseen else 0, unseen)}
    for name, (size, families) in held_out.items():
        generator = random.Random(f"{seed} {name}")
        # one prompt of each family in turn, as long as it has any
        turns = zip_longest(*(groups[name.removesuffix("_unseen")][family] for family in families))
        in_turn = [prompt for turn in turns for prompt in turn if prompt is not None]
        if size > len(in_turn):
            raise ValueError(f"{name}={size}, but the tiny task has only {len(in_turn)} {name} prompts; ask for fewer")
        chosen = in_turn[:size]
        generator.shuffle(chosen)
        data[name] = [{"prompt": p, "output": [draw_answer(p, generator) for _ in range(5)]} for p in chosen]
    return data


def write_jsonl(file: Path, examples: list[dict]) -> None:
    file.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizers: two kinds with nothing in common, like those of a Llama teacher and a GPT-2 student.


TEACHER_VOCABULARY, STUDENT_VOCABULARY = 1000, 900


def train_tokenizers(
    texts: list[str],
    teacher_directory: str | Path,
    student_directory: str | Path,
    student_vocabulary: int = STUDENT_VOCABULARY,
    teacher_vocabulary: int = TEACHER_VOCABULARY,
) -> None:
    """Train both tokenizers on the texts and write tokenizer.json and tokenizer_config.json into the two directories.

    Give prompts and outputs as separate texts, since they are tokenised separately. Equal texts give equal files.
    Teacher: SentencePiece-style BPE like Llama's ("▁" for a space and before the text, 256 byte-fallback tokens).
    Student: byte-level BPE like GPT-2's.
    """
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    teacher = train_sentencepiece_style(texts, teacher_vocabulary, list(special.values()))
    save_tokenizer(teacher, teacher_directory, {"add_bos_token": True, "add_eos_token": False, **special})
    student, end = ByteLevelBPETokenizer(), "<|endoftext|>"
    student.train_from_iterator(texts, student_vocabulary, min_frequency=0, show_progress=False, special_tokens=[end])
    save_tokenizer(student, student_directory, dict.fromkeys(special, end))


def train_sentencepiece_style(texts: list[str], size: int, special: list[str]) -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizer
    # Only training needs the split into words: merges learned inside words never join two words later.
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\w+|▁?[^\w▁]|▁"), "isolated")
    size -= len(byte_tokens) + len(special)
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    # The byte tokens are added afterwards, because the trainer would make them special, and match "<0x41>" in a text.
    pieces = special + byte_tokens + sorted(learned["vocab"], key=learned["vocab"].get)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=special[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer | ByteLevelBPETokenizer, directory: str | Path, config: dict) -> None:
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# The stages: teacher, pre-trained student, the supervised twins, the distilled student, scores.

ROOT = "runs/tiny"
TEACHER = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": TEACHER_VOCABULARY,
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 384, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STUDENT = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": STUDENT_VOCABULARY, "n_embd": 128,
    "n_layer": 2, "n_head": 4, "n_positions": 128, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
DEFAULTS = {  # of options; all others have the defaults of the command line
    "lr": 3e-3, "projector_lr": 1e-2, "temperature": 1.0, "max_len": 96, "max_prompt_len": 48, "weight_decay": 0.1,
    "warmup": 20, "chunk": 4096, "log_every": 20, "from_scratch": True, "seed": 0,
}  # fmt: skip
DISTILLATION = (  # options that do not matter to supervised fine-tuning
    "teacher teacher_chat recipe align divergence kd_rate temperature on_policy on_policy_after seqkd_temperature "
    "projectors projector_lr cache_teacher"
).split()
TEACHER_STAGE = {"max_steps": 800, "batch_size": 64, "lr": 3e-3}
READING_STAGE = {"max_steps": 300, "batch_size": 64, "lr": 3e-3}
STUDENT_STAGE = {"max_steps": 300, "batch_size": 32, "lr": 2e-3, "from_scratch": False}
TWINS = {"sft": {}, "sft-early": {"max_steps": 100, "lr": 1e-3}}  # as long as DSKD; the best settings on valid.jsonl
SEEDS = Path(__file__).with_suffix(".json")  # a list of the results of `run` for seed 0, 1, ...
COLUMNS = {
    "valid": "valid answers, %", "rouge_l": "Rouge-L",
    "valid_unseen": "valid, families without labels", "rouge_l_unseen": "Rouge-L, families without labels",
}  # fmt: skip
MEANING = """\
All students start from `pretrained` and train on 500 labels. sft uses only these, with as many updates as the distilled
student; sft-early too, with the updates and the learning rate that are best for labels alone on validation prompts. The
distilled student also learns from the teacher. The differences show what the teacher adds. An answer is valid if the
grammar allows all of it. The labels never show the families of the last two columns; the teacher's labels do. Answers
are greedy, to 2,000 and 1,000 test prompts; Rouge-L is the best of five references."""


def find(role: str) -> Path:
    """The file or directory that the name "tiny" stands for as a student, teacher or data."""
    files = {"student": "pretrained/student", "teacher": "teacher/student", "data": "student_train.jsonl"}
    path = Path(ROOT) / files[role]
    if not path.exists():
        raise FileNotFoundError(f"{role} 'tiny': {path} does not exist yet; `python train.py` creates it")
    return path


def run(given: dict) -> dict[str, dict[str, float]]:
    """`python train.py` without a model: train a teacher, a pre-trained student and, from that one, the supervised
    twins and the distilled student (same batches). Prints and returns their scores on the test splits. Finished stages
    in the directory are kept and reused.

    given: the options of the command line.
    """
    refuse_first([
        ("dry_run" in given,
         "--dry-run needs --teacher, --student and --data: the embedded task trains its own models"),
        (given.keys() & {"task", "teacher_sft"},
         "--task, --teacher-sft: the embedded task has its own settings and trains its own teacher"),
        (parallel.by_torchrun(), "torchrun needs --student and --data: the embedded task runs in one process"),
        ("epochs" in given, "--epochs: the embedded task counts updates; use --max-steps"),
    ])  # fmt: skip
    o = train.Options(**{**DEFAULTS, "out": ROOT, **given})
    checked = check_options(replace(o, student="tiny", teacher="tiny", data="tiny"))  # before anything is written
    say_device(given.get("device"), checked.device)
    root, start = Path(o.out), Path(o.out) / "start"
    prepare(root, o.seed, o.resume)
    if o.method not in ("sft", "seqkd"):  # report an impossible combination before the teacher is trained
        tokenizers = read_tokenizer(start / "teacher"), read_tokenizer(start / "student")
        choose_alignment(o.align, o.method, o.recipe, *tokenizers)

    def stage(name: str, **changes) -> None:
        options = {**asdict(o), "out": str(root / name), "checkpoint_every": 10**6, **changes}
        options |= {key: given[key] for key in ("max_steps", "batch_size", "lr", "checkpoint_every") if key in given}
        if options["method"] == "sft":  # the same teacher, start and twins serve all methods
            options = {key: value for key, value in options.items() if key not in DISTILLATION}
        train.run_stage(train.Options(**options), f"{name} {stages.index(name) + 1}/{len(stages)}")

    taught = {"data": str(root / "teacher_train.jsonl"), "student": str(start / "teacher"), **TEACHER_STAGE}
    reading = {"data": str(root / "reading.jsonl"), "student": str(start / "student"), **READING_STAGE}
    learned = {"data": str(root / "student_train.jsonl"), "student": str(root / "pretrained/student"), **STUDENT_STAGE}
    recipe = [o.recipe] if o.method == "dskd" else []
    words = [o.method, *recipe, *(given[key] for key in ("align", "divergence") if key in given)]
    distilled = "-".join([*words, "on-policy"] if o.on_policy else words)
    stages = list(dict.fromkeys(["teacher", "pretrained", *TWINS, distilled]))
    stage("teacher", method="sft", **taught)
    stage("pretrained", method="sft", **reading)
    for name, settings in TWINS.items():
        stage(name, method="sft", **learned | settings)
    if o.method != "sft":
        stage(distilled, teacher=str(root / "teacher" / "student"), **learned)
    finished = [file.parent.name for file in sorted(root.glob("*/finished.json"))]
    names = dict.fromkeys([*stages, *finished])  # also the stages of earlier calls
    scores = {name: score_stage(root, name, checked.device) for name in names}
    print(f"\nseed {o.seed}; everything is in {root}\n\n{tabulate([scores], distilled)}\n\n{MEANING}")
    if given.keys() <= {"seed", "out", "device", "resume"}:  # the stored seeds have the default settings
        seeds = json.loads(SEEDS.read_text())
        print(f"\nover {len(seeds)} seeds (python -m experiments.tiny), mean ± standard deviation\n")
        print(tabulate(seeds, distilled))
    print(f'talk to a model: python eval.py {shlex.quote(f"{root}/NAME")} --prompt "..."', file=sys.stderr)
    return scores


def score_stage(root: Path, name: str, device: str) -> dict[str, float]:
    """The scores of a finished stage on both test splits, stored in its scores.json."""
    file, directory = root / name / "scores.json", root / name / "student"
    if not file.is_file():
        scores, model, tokenizer = {}, load_model(directory, device=device), tokenizer_of(directory)
        for test, suffix in (("test", ""), ("test_unseen", "_unseen")):
            found = score_answers(model, tokenizer, read_examples(root / f"{test}.jsonl"))
            scores |= {measure + suffix: round(value, 2) for measure, value in found.items()}
        write_text(file, json.dumps(scores) + "\n")
    return json.loads(file.read_text())


def tabulate(seeds: list[dict[str, dict[str, float]]], distilled: str) -> str:
    """A table of the scores of every model over the seeds, and the distilled student's differences from its twins."""
    rows = {name: [[scores[name][key] for scores in seeds] for key in COLUMNS] for name in seeds[0]
            if all(name in scores for scores in seeds)}  # fmt: skip
    lines = [["", *COLUMNS.values()], *([name, *(spread(values, 1) for values in row)] for name, row in rows.items())]
    for twin in TWINS if distilled != "sft" else ():
        gaps = [[b - a for a, b in zip(*both, strict=True)] for both in zip(rows[twin], rows[distilled], strict=True)]
        lines.append([f"{distilled} − {twin}", *(spread(gap, 1, "+") for gap in gaps)])
    return table(lines)


def prepare(root: Path, seed: int, resume: bool = False) -> None:
    """Write the data as JSONL files, both tokenizers, and a config.json for each model into `root`, if missing. Raises
    ValueError if `root` was made with another seed, FileNotFoundError if it is missing and `resume` asks for it."""
    asked = {"seed": seed, "version": 2}  # 1: without pre-training
    if (root / "prepared.json").is_file():
        if (made := json.loads((root / "prepared.json").read_text())) != asked:
            raise ValueError(f"--seed {seed}: {root} was made with {made}, not with {asked}; give another --out")
        return
    for other in (root / "args.json", root / "teacher/args.json"):
        if other.is_file():
            raise ValueError(f"{root} holds another run ({other}), not the embedded task: give another --out or, to "
                             "continue that run, its whole command")  # fmt: skip
    if resume:  # a name that was spelt wrong, or a run that was stopped before it wrote args.json
        raise FileNotFoundError(f"--resume: {root} holds no run; start without --resume")
    data = make_data(seed)
    root.mkdir(parents=True, exist_ok=True)
    for name, examples in data.items():
        write_jsonl(root / f"{name}.jsonl", examples)
    texts = [text for example in data["teacher_train"] for text in (example["prompt"], example["output"])]
    sizes = {"student": 1200, "teacher": 1300}  # most words are one token, as in real vocabularies
    train_tokenizers(texts, root / "start" / "teacher", root / "start" / "student", *sizes.values())
    for name, config in (("teacher", TEACHER), ("student", STUDENT)):
        config = {**config, "vocab_size": sizes[name]}
        (root / "start" / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_text(root / "prepared.json", json.dumps(asked) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The embedded task over several seeds.")
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds; each has its own data, split and models")
    parser.add_argument("--out", default="runs/tiny-seeds", help="a folder for each seed; finished stages are kept")
    parser.add_argument("--scores", type=Path, help="the file for the scores (default: with 8 seeds "
                        "experiments/tiny.json, which `python train.py` shows; else OUT/tiny.json)")  # fmt: skip
    o = parser.parse_args(arguments)
    if o.seeds < 1:
        parser.error("--seeds: must be at least 1")
    try:
        seeds = [run({"seed": seed, "out": f"{o.out}/{seed}"}) for seed in range(o.seeds)]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, Stopped) as stopped:
        sys.exit(f"{str(stopped) or 'stopped at once'}\nthe same command goes on from there")
    scores = o.scores or (SEEDS if o.seeds == parser.get_default("seeds") else Path(o.out) / SEEDS.name)
    scores.write_text("[\n" + ",\n".join(map(json.dumps, seeds)) + "\n]\n")
    print(f"\n{tabulate(seeds, 'dskd-v2')}")


if __name__ == "__main__":
    main()
