"""The methods once on real text: a LLaMA-style chat model of 135M parameters teaches a GPT-2 of 30M with other tokens.

    python -m experiments.realtext --teacher DIR --tokenizer DIR --data FILE.jsonl --reading FILE.jsonl --test FILE
    python -m experiments.realtext ... --run

prints the commands, and with --run makes what they need and runs them one after the other; what is finished stays, and
a command that was stopped goes on. The student first reads the answers of `--reading` from scratch, the teacher is
fine-tuned on `--data` as in the papers, and every method then has as many updates on the same examples. `--data` is
split by a fixed draw into training, validation and test examples; `--test` is a second test set, of other prompts.
"""

import argparse
import json
import random
import shlex
import sys
from pathlib import Path

from experiments import paper, tiny
from runtime.formats import read_examples
from runtime.hub import model_directory
from runtime.tokenizer import read_tokenizer

STUDENT = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 6, "n_head": 6, "n_embd": 384,
    "n_positions": 512, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "initializer_range": 0.02,
    "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
}  # fmt: skip
VALID, TEST = 100, 300
COMMON = "--max-len 256 --max-prompt-len 160 --dtype bf16 --log-every 10 --checkpoint-every 100"
READING = "--epochs 3 --batch-size 16 --lr 6e-4"
TEACHER = "--max-steps 200 --batch-size 8 --lr 2e-5"
STUDENTS = "--epochs 1 --batch-size 8 --lr 5e-4"
METHODS = {
    "sft": "--method sft", "seqkd": "--method seqkd", "uld": "--method uld", "mined": "--method mined",
    "v1": "--method dskd --recipe v1 --align cma", "v2": "--method dskd --recipe v2 --align eta",
}  # fmt: skip


def lines_of(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def split(file: Path, out: Path) -> None:
    """train.jsonl, valid.jsonl and test.jsonl of a file's lines; examples with one prompt stay together. Raises
    ValueError if there are too few."""
    groups: dict[str, list[str]] = {}
    for line, example in zip(lines_of(file), read_examples(file), strict=True):
        groups.setdefault(example.prompt_text(), []).append(line)
    prompts = sorted(groups)
    random.Random(0).shuffle(prompts)
    if len(prompts) <= VALID + TEST:
        raise ValueError(f"{file}: {len(prompts)} prompts; {VALID + TEST} are held out, and some must be left")
    parts = {"test": prompts[:TEST], "valid": prompts[TEST : TEST + VALID], "train": prompts[TEST + VALID :]}
    for part, chosen in parts.items():
        write_lines(out / f"{part}.jsonl", [line for prompt in chosen for line in groups[prompt]])


def readable(file: Path, out: Path, tested: set[str]) -> None:
    """reading.jsonl: the examples of a file that have an answer, and a prompt that is in no test set."""
    answered = [line for line in lines_of(file) if json.loads(line)["output"]]
    write_lines(out / "reading.jsonl", answered)
    examples = zip(answered, read_examples(out / "reading.jsonl"), strict=True)
    write_lines(out / "reading.jsonl", [line for line, example in examples if example.prompt_text() not in tested])


def commands_of(o: argparse.Namespace) -> list[str]:
    """What is run, in order."""
    home, test, teacher = (shlex.quote(str(path)) for path in (o.out, o.test, o.teacher))
    data = f"--data {home}/train.jsonl --valid {home}/valid.jsonl"
    reading = f"--from-scratch --student {home}/untrained --data {home}/reading.jsonl --valid {home}/valid.jsonl"
    taught = f"--student {teacher} {data} {TEACHER}"
    same = f"--student {home}/start/student {data} {STUDENTS}"
    runs = [f"train.py --method sft {reading} {READING} {COMMON} --out {home}/start",
            f"train.py --method sft {taught} {COMMON} --out {home}/teacher"]  # fmt: skip
    for name in o.methods:
        teacher = f" --teacher {home}/teacher/student" if name != "sft" else ""
        runs.append(f"train.py {METHODS[name]}{teacher} {same} {COMMON} --out {home}/{name}")
    scored = " ".join(f"{home}/{name}" for name in ("teacher", "start", *o.methods))
    for file in (f"{home}/test.jsonl", test):
        runs.append(f"eval.py {scored} --data {file} --greedy --max-len 256 --max-prompt-len 160")
    return runs


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a chat model's directory: SmolLM2-135M-Instruct's")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a directory with GPT-2's tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="instructions, to train and test on: Dolly")
    parser.add_argument("--reading", type=Path, required=True, help="what the student has read before: Alpaca")
    parser.add_argument("--test", type=Path, required=True, help="a second test set: self-instruct's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["sft", "uld", "v1", "v2"])
    parser.add_argument("--out", type=Path, default=Path("runs/realtext"))
    parser.add_argument("--run", action="store_true", help="run the commands, too")
    o = parser.parse_args(arguments)
    try:
        for name in ("teacher", "tokenizer", "data", "reading", "test", "out"):
            setattr(o, name, getattr(o, name).resolve())
        model_directory(str(o.teacher))
        read_tokenizer(o.tokenizer)
        tested = {example.prompt_text() for example in [*read_examples(o.data), *read_examples(o.test)]}
        if o.run:
            o.out.mkdir(parents=True, exist_ok=True)
            split(o.data, o.out)
            readable(o.reading, o.out, tested)
            tiny.write_untrained(o.out / "untrained", o.tokenizer, STUDENT)
        paper.follow(commands_of(o), o.run)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
