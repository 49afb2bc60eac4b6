"""Run a training command to its end, killed (SIGKILL) again and again on the way: a process of its own for tests.

    python run_and_kill.py '{"arguments": [...], "out": DIR, "kills": 20, "seed": 0, "events": 36, "seconds": 1.0}'

Every attempt is a fork of this process, so that Python and torch start once. Odd ones are killed at a random moment,
even ones just before or in the middle of a random one of the things that leave something on disk. After each kill
student/, if it is there, must load. Prints a JSON object per attempt: where it was killed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import safetensors.torch
import torch

import model
import train
from runtime import peft
from runtime import run as checkpoint
from runtime.tokenizer import read_tokenizer

WRITES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"}  # Python's audit events


def die_at(count: int, out: str, report: Path) -> None:
    """Arrange for this process to kill itself at the count-th thing it does in the run directory, or update."""
    left = [count]

    def passed(what: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            report.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in WRITES and out in str(arguments[0]) and not (event == "open" and arguments[1] == "r"):
            if left[0] > 0:
                passed(f"{event} {os.path.relpath(str(arguments[0]), out)}")

    def torn(tensors, file, metadata=None):
        whole = safetensors.torch.save(tensors, metadata)
        Path(file).write_bytes(whole[: len(whole) // 2])
        passed(f"half of {os.path.relpath(file, out)}")
        Path(file).write_bytes(whole)

    def half_a_line(log, line):
        text = json.dumps(line) + "\n"
        for part in (text[: len(text) // 2], text[len(text) // 2 :]):
            with open(log.path, "a") as file:
                file.write(part)
            passed("half a line of the log")

    def first(function):
        def wrapper(*arguments, **options):
            passed(function.__name__)
            return function(*arguments, **options)

        return wrapper

    sys.addaudithook(audit)
    for module in (checkpoint, peft, model):
        module.save_file = torn
    checkpoint.Log.write = half_a_line
    for name in ("distil", "held_out_cross_entropy", "sample_rows", "write_samples"):
        setattr(train, name, first(getattr(train, name)))


def in_a_fork(work) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def attempt(arguments: list[str], out: Path, prepare=lambda: None) -> int:
    resume = ["--resume"] * (out / "args.json").is_file()

    def work():
        prepare()
        train.main([*arguments, *resume])

    return in_a_fork(work)


def loads(out: Path) -> None:
    if (out / "student").exists():
        model.load_model(out / "student")
        read_tokenizer(out / "student")


def main() -> None:
    plan = json.loads(sys.argv[1])
    arguments, out, chance = plan["arguments"], Path(plan["out"]), random.Random(plan["seed"])
    torch.set_num_threads(1)
    train.SAMPLE_TOKENS = 8  # as in the tests' own process
    report = out.with_name(out.name + ".killed-at")
    for number in range(plan["kills"]):
        report.write_text("a random moment")
        if number % 2:
            child = attempt(arguments, out)
            time.sleep(chance.uniform(0, plan["seconds"]))
            os.kill(child, signal.SIGKILL)
        else:
            count = chance.randint(1, plan["events"])
            child = attempt(arguments, out, lambda count=count: die_at(count, str(out), report))
        status = os.waitpid(child, 0)[1]
        if status not in (0, signal.SIGKILL):
            sys.exit(f"attempt {number} failed by itself, after {report.read_text()}")
        print(json.dumps({"killed": bool(status), "at": report.read_text()}), flush=True)
        if os.waitpid(in_a_fork(lambda: loads(out)), 0)[1]:
            sys.exit(f"after {report.read_text()} the student cannot be loaded")
    if os.waitpid(attempt(arguments, out), 0)[1]:
        sys.exit("the last attempt failed")


if __name__ == "__main__":
    main()
