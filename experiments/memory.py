"""The memory that a run needs on each device, calculated from both config.json, to choose --shard and the processes.

    python -m experiments.memory                                         the table of docs/multi_gpu.md
    python -m experiments.memory --teacher DIR --student DIR --devices 4 --shard teacher

A teacher (bf16, frozen) needs 2 bytes per parameter. A student needs 16 bytes per trained parameter (weight, gradient,
two moments of AdamW, all float32), and 2 more in the blocks' matrices for autocast's copy in bf16, which the backward
pass needs. A model sharded over N devices has 1/N of its blocks' matrices on each, and two whole blocks at a time in
bf16: the one being computed and the one being prefetched. Added to this are the projectors; what the student's blocks
keep per token for the backward pass (counted on one block, see `kept_per_token`; with --recompute, that of one block
and the float32 inputs of all); and the part of a chunk's logits that exceeds the gradients, which are created later.
CUDA graphs, which a run in bf16 uses by default unless a model is sharded, keep the gradients, so that the losses need
memory of their own: for all logits, for the head in bf16 and for its gradient; and 0.5 GB for what graphs and allocator
cannot share, a number chosen by the measurements below.

Not included: the start (for a moment, the projectors' solution takes V x D numbers in float64), the key-value cache of
sampling, CUDA itself; allow a tenth. On an H100, for GPT-2 120M with a teacher of Qwen1.5-1.8B's size, with 4, 8 and 32
examples and each of four methods, PyTorch reserved 0.95 to 1.08 times as much as these formulas give
(`experiments.bench steps`); without graphs, two updates took 0.92 and 1.04 times as much, all tensors together.
"""

import argparse
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lora
from model import Decoder, read_json
from runtime.hub import model_directory
from runtime.strict import check_values

GB = 1e9
UNSHARED = 0.5 * GB  # what CUDA graphs and the allocator cannot share; chosen by measurements, see above


def gpt2(width: int, layers: int, heads: int, vocabulary: int = 50257) -> dict:
    """The fields of a config.json that matter here."""
    return {"model_type": "gpt2", "vocab_size": vocabulary, "n_positions": 1024, "n_embd": width, "n_layer": layers,
            "n_head": heads}  # fmt: skip


def llama(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary=32000, kind="llama") -> dict:
    """The same for LLaMA; `inner`: the width of the MLP. No parameter depends on the number of positions."""
    return {"model_type": kind, "vocab_size": vocabulary, "max_position_embeddings": 2048, "hidden_size": width,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "tie_word_embeddings": False}  # fmt: skip


CONFIGS = {  # as published
    "GPT-2 120M": gpt2(768, 12, 12),
    "GPT-2 1.5B": gpt2(1600, 48, 25),
    "TinyLlama 1.1B": llama(2048, 5632, 22, 32, 4),
    "Llama-2 7B": llama(4096, 11008, 32, 32, 32),
    "Mistral 7B": llama(4096, 14336, 32, 32, 8),
    "Qwen1.5 1.8B": llama(2048, 5504, 24, 16, 16, 151936, "qwen2"),
    "Qwen2.5 7B": llama(3584, 18944, 28, 28, 4, 152064, "qwen2"),
    "Qwen2.5 72B": llama(8192, 29568, 80, 64, 8, 152064, "qwen2"),
}
TABLE = [  # teacher, student, LoRA's rank, examples per forward pass, --shard, devices, --recompute
    ("Qwen1.5 1.8B", "GPT-2 120M", 0, 32, None, 1, False),
    ("Qwen1.5 1.8B", "GPT-2 120M", 0, 32, None, 1, True),
    ("Llama-2 7B", "TinyLlama 1.1B", 256, 8, None, 1, False),
    ("Llama-2 7B", "TinyLlama 1.1B", 256, 32, None, 1, True),
    ("Llama-2 7B", "TinyLlama 1.1B", 0, 8, "teacher", 4, False),
    ("Qwen2.5 72B", "GPT-2 120M", 0, 32, "teacher", 4, False),
    ("Qwen2.5 72B", "GPT-2 120M", 0, 32, "teacher", 8, False),
    ("Qwen2.5 72B", "Qwen2.5 7B", 0, 1, "both", 8, False),
    ("Qwen2.5 72B", "Qwen2.5 7B", 0, 8, "both", 8, True),
    ("Qwen2.5 72B", "Qwen2.5 7B", 0, 1, "both", 16, False),
]


def decoder(config: dict, rank: int, targets, dropout: float = 0.0, device: str = "meta") -> Decoder:
    """A decoder without weights. rank, targets: LoRA's, as in `lora.attach`; rank 0 for none."""
    with torch.device(device):
        m = Decoder(config)
        if rank:
            lora.attach(m, rank, 8.0, dropout, targets)
    return m


def counts(config: dict, rank: int = 0, targets=None) -> SimpleNamespace:
    """Numbers of parameters: in the `matrices` of all blocks and of one `block`, in the `rest`, in the `head`; and of
    the trained ones among them."""
    m = decoder(config, rank, targets)
    sharded = {p for p in m.blocks.parameters() if p.dim() >= 2}  # as in parallel.shard
    rest = set(m.parameters()) - sharded
    trained = {p for p in m.parameters() if p.requires_grad}
    groups = {"matrices": sharded, "rest": rest, "trained_matrices": sharded & trained, "trained_rest": rest & trained}
    sizes = {name: sum(p.numel() for p in group) for name, group in groups.items()}
    layers, (vocabulary, width) = len(m.blocks), m.head_weight.shape
    return SimpleNamespace(**sizes, block=sizes["matrices"] // layers, layers=layers, vocabulary=vocabulary,
                           width=width, head=vocabulary * width)  # fmt: skip


def teacher_bytes(c: SimpleNamespace, devices: int) -> float:
    """Weights in bf16, with the blocks sharded over `devices`."""
    return 2 * (c.rest + c.matrices / devices + (2 * c.block if devices > 1 else 0))


def student_bytes(c: SimpleNamespace, devices: int) -> float:
    """Weights in float32, gradients and moments of the trained ones, and bf16 copies."""
    here = 4 * (c.rest + c.matrices / devices) + 12 * (c.trained_rest + c.trained_matrices / devices)
    return here + 2 * (2 * c.block if devices > 1 else c.matrices)


def projector_bytes(student: SimpleNamespace, teacher: SimpleNamespace) -> float:
    """v2: t2s is trained; s2t is solved in every update with the (D, V) pseudo-inverse over the shared vocabulary."""
    inverse = teacher.width * min(student.vocabulary, teacher.vocabulary)
    return (16 + 4) * student.width * teacher.width + 4 * inverse


class DropoutOfCuda(torch.nn.Dropout):
    """nn.Dropout that keeps a byte per element, as CUDA's kernel does; on a CPU, PyTorch's keeps floats."""

    def forward(self, x):
        return torch.native_dropout(x, self.p, self.training)[0]


def kept_per_token(config: dict, rank: int = 0, targets=None) -> float:
    """Bytes that one block keeps per token for the backward pass under bf16 autocast. Counted on fake tensors, as on a
    CPU, for two lengths, so that the weights cancel out; and without attention's dropout, for which a CPU keeps what
    CUDA's fused kernel computes again."""
    gpt2 = config["model_type"] == "gpt2"
    one = {**config, "vocab_size": 8, "n_layer" if gpt2 else "num_hidden_layers": 1}
    one["attn_pdrop" if gpt2 else "attention_dropout"] = 0.0
    storages: dict[int, int] = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def kept(length: int) -> int:
        storages.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            m(torch.zeros((1, length), dtype=torch.long))
        return sum(storages.values())

    with FakeTensorMode():
        m = decoder(one, rank, targets, dropout=0.1, device="cpu").train()
        for module in m.modules():
            if type(module) is torch.nn.Dropout and module.p:
                module.__class__ = DropoutOfCuda
        m.embed.weight.requires_grad_()  # so that the block's input has a gradient, as in all blocks but the first
        return (kept(32) - kept(16)) / 16


def needs(teacher: dict | None, student: dict, rank: int, batch_size: int, shard: str | None, devices: int,
          recompute: bool = False, targets=None, max_len: int = 512, chunk: int = 512,
          graphs: bool = True) -> dict[str, float]:  # fmt: skip
    """Bytes on each device, by purpose; without a teacher, for supervised fine-tuning. teacher and student: their
    config.json; rank and targets: LoRA's, rank 0 for none; graphs: unless a model is sharded; the rest as in train.py's
    options."""
    t, s = counts(teacher) if teacher else None, counts(student, rank, targets)
    of_block, of_input = kept_per_token(student, rank, targets), 4 * s.width
    student_devices = devices if shard in ("student", "both") else 1
    # per token and row of the larger head, two logits in bf16 and two float32 numbers (fast/losses.py)
    logits = 12 * min(chunk, batch_size * max_len) * max(s.vocabulary, t.vocabulary if t else 0)
    gradients = 4 * (s.trained_rest + s.trained_matrices / student_devices)  # they do not exist yet
    return {
        "teacher": teacher_bytes(t, devices if shard in ("teacher", "both") else 1) if t else 0.0,
        "student": student_bytes(s, student_devices),
        "projectors": projector_bytes(s, t) if t else 0.0,
        "activations": (of_block + of_input * s.layers if recompute else of_block * s.layers) * batch_size * max_len,
        "logits": max(0.0, logits - gradients),
        "graphs": min(logits, gradients) + (2 if rank else 6) * s.head + UNSHARED if graphs and not shard else 0.0,
    }


def config_of(name: str) -> dict:
    return CONFIGS.get(name) or read_json(model_directory(name, weights=False) / "config.json")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="preset, hub repository or directory; without it: the table")
    parser.add_argument("--student", help="the same for the student")
    parser.add_argument("--devices", type=int, default=1, help="number of devices that a model is sharded over")
    parser.add_argument("--shard", choices=["teacher", "student", "both"], help="as in train.py")
    parser.add_argument("--lora", type=int, default=0, help="as in train.py")
    parser.add_argument("--lora-targets", nargs="+", help="names of linear layers, or all-linear")
    parser.add_argument("--batch-size", type=int, default=32, help="as in train.py")
    parser.add_argument("--recompute", action="store_true", help="as in train.py")
    o = parser.parse_args(arguments)
    if (o.teacher is None) != (o.student is None):
        parser.error("give both --teacher and --student, or neither of them")
    try:
        check_values(vars(o), {"devices": 1, "lora": 0, "batch_size": 1}, {})
    except ValueError as error:
        parser.error(str(error))
    asked = [(o.teacher, o.student, o.lora, o.batch_size, o.shard, o.devices, o.recompute)]
    print("| teacher → student | devices | `--shard` | `--batch-size` | teacher | student | projectors | activations "
          "| logits | graphs | GB each |\n|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for teacher, student, rank, batch_size, shard, devices, recompute in asked if o.teacher else TABLE:
        try:
            models = config_of(teacher), config_of(student)
            parts = needs(*models, rank, batch_size, shard, devices, recompute, o.lora_targets)
        except (ValueError, OSError) as error:  # about a model, or about LoRA's rank or targets
            parser.error(str(error))
        pair = f"{teacher} → {student}" + f", LoRA {rank}" * (rank > 0) + ", `--recompute`" * recompute
        figures = " | ".join(f"{value / GB:.1f}" for value in [*parts.values(), sum(parts.values())])
        print(f"| {pair} | {devices} | {shard or '–'} | {batch_size} | {figures} |")


if __name__ == "__main__":
    main()
