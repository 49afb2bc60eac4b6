"""The papers' own runs as commands, with the memory and the time they need, worked out from the models' configurations.

`python reproduce.py --scale paper` prints them, `--run` starts them. Nothing of this has been measured on a GPU.
"""

import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

import lora
from model import Decoder


def _gpt2(width: int, layers: int, heads: int) -> dict:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_layer": layers,
            "n_head": heads}  # fmt: skip


def _llama(kind: str, width: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> dict:
    return {"model_type": kind, "vocab_size": vocabulary, "max_position_embeddings": 2048, "hidden_size": width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "intermediate_size": inner}  # fmt: skip


CONFIGS = {  # hub.py's name: what decides about size in its config.json
    "gpt2": _gpt2(768, 12, 12), "gpt2-xl": _gpt2(1600, 48, 25),
    "qwen": _llama("qwen2", 2048, 24, 16, 16, 5504, 151936),
    "tinyllama": _llama("llama", 2048, 22, 32, 4, 5632, 32000),
    "llama2": _llama("llama", 4096, 32, 32, 32, 11008, 32000),
    "mistral": _llama("mistral", 4096, 32, 32, 8, 14336, 32000),
}  # fmt: skip
FULL, LORA = "--lr 5e-4 --epochs 20", "--lora 256 --lr 1e-3 --epochs 10"
PAIRS = {  # name: (teacher, how it is fine-tuned, student, how it is trained)
    "gpt2-xl-gpt2": ("gpt2-xl", "--lr 2e-5 --epochs 10", "gpt2", FULL),
    "qwen-gpt2": ("qwen", "--lr 2e-5 --epochs 10", "gpt2", FULL),
    "llama2-tinyllama": ("llama2", LORA, "tinyllama", LORA),
    "mistral-tinyllama": ("mistral", LORA, "tinyllama", LORA),
}
# Dolly: training examples; tokens of a response and of the longest of 32 examples (means over 2,996 lines, GPT-2)
EXAMPLES, RESPONSE, LONGEST = 11000, 81, 480
GPU_BYTES, PEAK, UTILISATION = 80e9, 312e12, 0.3  # of an A100; the share of its bf16 peak is an assumption


def size_of(name: str, rank: int = 0) -> SimpleNamespace:
    """Numbers of parameters: all, those of the blocks (`body`), of a head, and the trained ones."""
    with torch.device("meta"):
        model = Decoder(CONFIGS[name])
        counted = {"all": sum(p.numel() for p in model.parameters()), "head": model.head_weight.numel()}
        counted |= {"body": sum(p.numel() for p in model.blocks.parameters()), "layers": len(model.blocks)}
        if rank:
            lora.attach(model, rank, 8.0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    vocabulary, width = model.embed.weight.shape
    return SimpleNamespace(**counted, trained=trained, vocabulary=vocabulary, width=width)


@cache
def kept_per_token(name: str, rank: int = 0) -> float:
    """Bytes that a block keeps of each token for the backward pass under bf16 autocast, counted on a block on the CPU:
    the difference between two lengths, which is without the weights."""
    config = CONFIGS[name]
    one = {**config, "n_layer" if "n_layer" in config else "num_hidden_layers": 1, "vocab_size": 8}
    with torch.device("meta"):
        model = Decoder(one)
        if rank:
            lora.attach(model, rank, 8.0, 0.1)
    model = model.to_empty(device="cpu")
    kept = []
    for length in (16, 32):
        storages = {}

        def count(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(torch.zeros((1, length), dtype=torch.long))
        kept.append(sum(storages.values()))
    return (kept[1] - kept[0]) / 16


def needs(student: str, teacher: str | None, rank: int, epochs: int) -> tuple[int, float, float]:
    """(examples at a time, bytes of memory, hours) on one GPU; --max-len 512, batch 32, --chunk 512.

    Weights float32 and a bf16 copy under autocast; gradient and AdamW's two moments of what is trained, float32; the
    teacher in bf16; what blocks keep of 512 tokens of each example; eight float32 tensors of a chunk's logits. Of all
    batches that divide 32 the largest that leaves a tenth of the memory free. Operations: two per weight and token
    forward, four backward (two where the weight is frozen); heads on response tokens only, made again going back.
    """
    s = size_of(student, rank)
    fixed = 6 * s.all + 12 * s.trained + 32 * 512 * s.vocabulary
    tokens, responses = EXAMPLES * epochs * LONGEST, EXAMPLES * epochs * RESPONSE
    work = tokens * s.body * (4 if rank else 6) + (6 * tokens * s.trained if rank else 0) + 8 * responses * s.head
    if teacher:
        t = size_of(teacher)
        fixed += 2 * t.all + 4 * t.width * min(s.vocabulary, t.vocabulary)  # v2's pseudo-inverse of the shared head
        fixed += 32 * 512 * max(0, t.vocabulary - s.vocabulary)  # the larger logits count
        work += 2 * tokens * t.body + responses * (6 * s.head + 12 * t.head)
    each = 512 * s.layers * kept_per_token(student, rank)
    examples = next((n for n in (32, 16, 8, 4, 2) if fixed + n * each < 0.9 * GPU_BYTES), 1)
    return examples, fixed + examples * each, work / (PEAK * UTILISATION) / 3600


def commands_of(name: str) -> list[tuple[str, str]]:
    """(command, what it needs) for the teacher, SFT, each recipe, and the evaluation of all."""
    teacher, teacher_recipe, student, recipe = PAIRS[name]
    home = f"runs/paper/{name}"
    jobs = [("teacher", teacher, None, teacher_recipe, "--method sft"), ("sft", student, None, recipe, "--method sft")]
    methods = {version: f"--method dskd --recipe {version}" for version in ("v1", "v2")}
    if name == "gpt2-xl-gpt2":
        methods = {"kd": "--method kd", **methods}
    jobs += [(key, student, teacher, recipe, f"{how} --teacher {home}/teacher/student") for key, how in methods.items()]
    commands = []
    for key, model, taught_by, options, how in jobs:
        rank, epochs = 256 if "--lora" in options else 0, int(options.split()[-1])
        examples, memory, hours = needs(model, taught_by, rank, epochs)
        batch = f"--batch-size {examples}" + (f" --grad-accum {32 // examples}" if examples < 32 else "")
        about = f"{memory / 1e9:.0f} GB, {hours:.1f} h" + (" (does not fit)" if memory > GPU_BYTES else "")
        commands.append((f"train.py {how} --student {model} --data dolly {options} {batch} --out {home}/{key}", about))
    runs = " ".join(f"{home}/{key}" for key, *_ in jobs)
    return [*commands, (f"eval.py {runs} --data dolly self-inst vicuna sinst uinst", "not estimated")]


def show(names: list[str], run: bool) -> None:
    """Print the commands; with `run`, run each before the next is printed."""
    print(f"# one GPU of {GPU_BYTES / 1e9:.0f} GB; hours assume {UTILISATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s; bf16")
    for name in names:
        for text, about in commands_of(name):
            print(f"python {text}    # {about}", flush=True)
            if run:
                subprocess.run([sys.executable, *shlex.split(text)], cwd=Path(__file__).parent, check=True)


