"""The papers' own runs as commands, with estimates of memory and time, calculated from the models' configurations.

`python -m experiments.reproduce --scale paper` prints them, `--run` starts them. None of the estimates has been
measured on a GPU.
"""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

from experiments import memory

CONFIGURED = {  # hub.py's name: memory.py's
    "gpt2": "GPT-2 120M", "gpt2-xl": "GPT-2 1.5B", "qwen": "Qwen1.5 1.8B", "tinyllama": "TinyLlama 1.1B",
    "llama2": "Llama-2 7B", "mistral": "Mistral 7B",
}  # fmt: skip
FULL, LORA = "--lr 5e-4 --epochs 20", "--lora 256 --lr 1e-3 --epochs 10"
PAIRS = {  # name: (teacher, how it is fine-tuned, student, how it is trained)
    "gpt2-xl-gpt2": ("gpt2-xl", "--lr 2e-5 --epochs 10", "gpt2", FULL),
    "qwen-gpt2": ("qwen", "--lr 2e-5 --epochs 10", "gpt2", FULL),
    "llama2-tinyllama": ("llama2", LORA, "tinyllama", LORA),
    "mistral-tinyllama": ("mistral", LORA, "tinyllama", LORA),
}
# Dolly: training examples; tokens of an example and of its response (means over 2,996 lines, GPT-2). Padding costs
# nothing, since layers work on the tokens of a batch without it.
EXAMPLES, TOKENS, RESPONSE = 11000, 148, 81
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 operations per second, according to NVIDIA
GPU_BYTES, PEAK, UTILISATION = 80e9, PEAKS["A100"], 0.3  # an A100; the share of its peak is an assumption
HEAD = f"# one GPU of {GPU_BYTES / 1e9:.0f} GB; hours assume {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s; bf16"


def operations(s, t, tokens: int, teacher_tokens: int, responses: int, rank=0, recipe="v2", pairs=None) -> float:
    """Operations of training on this many tokens, of which the student predicts `responses` and compares `pairs` with
    the teacher (default: all). s, t: memory.counts of the student and of the teacher or None; recipe: of DSKD, "" for
    vanilla KD. Two per weight and token forward, four backward (two if the weight is frozen); for the heads, only
    products with response tokens, as in fast/losses.py; without attention's products."""
    work = tokens * s.matrices * (4 if rank else 6)
    if rank:
        work += 2 * tokens * s.trained_matrices  # in addition to the four
    work += (4 if rank else 6) * responses * s.head  # logits, gradient of the states and, if trained, of the head
    if t:
        pairs = responses if pairs is None else pairs
        work += 2 * teacher_tokens * t.matrices + 2 * pairs * t.head  # the teacher's logits
    if t and recipe:
        work += 4 * pairs * (s.head + t.head)  # t2s and s2t under these heads: logits and gradients
    if t and recipe == "v2":
        work += 2 * pairs * (s.head + t.head)  # to count the agreeing pairs, and for the teacher's predictions
    return work


def estimate(student: str, teacher: str | None, rank: int, epochs: int, recipe="v2") -> tuple[int, float, float]:
    """(examples at a time, bytes of memory, hours) on one GPU; --max-len 512, batch 32, --chunk 512.

    Memory as in memory.py, for the largest batch that divides 32 and leaves a tenth of the GPU's memory free. The time
    does not include the scores on the dev set after each epoch.
    """
    config, taught_by = memory.CONFIGS[CONFIGURED[student]], teacher and memory.CONFIGS[CONFIGURED[teacher]]
    parts = memory.needs(taught_by, config, rank, 1, None, 1)
    each = parts.pop("activations")
    fixed = sum(parts.values())

    counts = [EXAMPLES * epochs * tokens for tokens in (TOKENS, TOKENS, RESPONSE)]
    work = operations(memory.counts(config, rank), taught_by and memory.counts(taught_by), *counts, rank, recipe)
    examples = next((n for n in (32, 16, 8, 4, 2) if fixed + n * each < 0.9 * GPU_BYTES), 1)
    return examples, fixed + examples * each, work / (PEAK * UTILISATION) / 3600


def commands_of(name: str) -> list[str]:
    """Commands for the teacher, SFT, each recipe, and the evaluation of all, with the estimates as comments."""
    teacher, teacher_recipe, student, recipe = PAIRS[name]
    home, data = f"runs/paper/{name}", "--data dolly --valid dolly --keep-best rouge"
    jobs = [("teacher", teacher, None, teacher_recipe, "--method sft"), ("sft", student, None, recipe, "--method sft")]
    methods = {version: f"--method dskd --recipe {version}" for version in ("v1", "v2")}
    if name == "gpt2-xl-gpt2":
        methods = {"kd": "--method kd", **methods}
    jobs += [(key, student, teacher, recipe, f"{how} --teacher {home}/teacher/student") for key, how in methods.items()]
    commands = []
    for key, model, taught_by, options, how in jobs:
        rank, epochs = 256 if "--lora" in options else 0, int(options.split()[-1])
        examples, memory, hours = estimate(model, taught_by, rank, epochs, key if key in ("v1", "v2") else "")
        batch = f"--batch-size {examples}" + (f" --grad-accum {32 // examples}" if examples < 32 else "")
        about = f"{memory / 1e9:.0f} GB, {hours:.1f} h" + (" (does not fit)" if memory > GPU_BYTES else "")
        command = f"train.py {how} --student {model} {data} {options} {batch} --out {home}/{key}"
        commands.append(f"{command}    # {about}")
    runs = " ".join(f"{home}/{key}" for key, *_ in jobs)
    return [*commands, f"eval.py {runs} --data dolly self-inst vicuna sinst uinst    # not estimated"]


def follow(commands: list[str], run: bool) -> None:
    """Print the commands, which may end with a comment; with `run`, run each before the next is printed. A training run
    that already exists is resumed or, if it is finished, ends immediately. Raises SystemExit after a command that
    failed, and after Ctrl-C, as soon as the command has saved its state."""
    stopped: list[int] = []  # Ctrl-C reaches the command, too; subprocess.run would kill it 0.25 s later
    for command in commands:
        print(f"python {command}", flush=True)
        words = shlex.split(command, comments=True)
        if words[0] == "train.py" and Path(words[words.index("--out") + 1], "args.json").is_file():
            words.append("--resume")
        if not run:
            continue
        before = signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
        try:
            failed = subprocess.run([sys.executable, *words], cwd=Path(__file__).parent.parent).returncode
        finally:
            signal.signal(signal.SIGINT, before)
        if failed or stopped:
            sys.exit(1)  # the command has printed the reason
