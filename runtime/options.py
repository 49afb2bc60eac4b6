"""The command line of train.py: every option with its default, its unit and its reason."""

import argparse
from dataclasses import dataclass, field, fields
from typing import get_args

from losses import DIVERGENCES


def option(default, help: str, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Options:
    """Everything a run depends on; each field is a command-line option."""

    student: str | None = option(None, "preset, hub repository or directory of the student")
    teacher: str | None = option(None, "the same for the teacher")
    data: str | None = option(None, "named set or file (default: dolly, for gpt2, tinyllama, qwen, llama2 or mistral)")
    valid: str | None = option(None, "held-out named set or file, for valid_ce, samples.txt and --keep-best")
    keep_best: str | None = option(
        None, "keep in student/ the checkpoint with the best score on --valid instead of the last one. The score is "
        "the Rouge-L of one sampled response per prompt, or the cross-entropy", ["rouge", "ce"],
    )  # fmt: skip
    student_chat: str | None = option(
        None, "chat template of the student's prompts: own (the model's; the same as --student-chat alone), thinking "
        "(own, with thinking on), a path, or none (default: as in the run that trained it here, else none)",
    )  # fmt: skip
    teacher_chat: str | None = option(None, "the same for the teacher; the two may differ (default: likewise)")
    bos: bool | None = option(
        None, "begin each prompt with what the model's tokenizer puts before a text, such as <s> (default: as in the "
        "run that trained the model here, else without)",
    )  # fmt: skip
    method: str = option("dskd", "training method", ["sft", "seqkd", "kd", "dskd", "uld", "mined"])
    recipe: str = option("v2", "which of the two papers DSKD follows", ["v1", "v2"])
    align: str = option(
        "auto", "auto: none for vocabularies of one family, else eta (v2) or cma (v1)", ["auto", "none", "eta", "cma"]
    )
    divergence: str = option("fkl", "D(student, teacher)", list(DIVERGENCES))
    kd_rate: float = option(0.5, "weight of the distillation term; the rest is cross-entropy with the gold tokens")
    temperature: float = option(2.0, "divides all logits inside the divergence")
    on_policy: float = option(0.0, "probability that an update distils on responses sampled from the student")
    on_policy_after: int = option(0, "epochs before the first on-policy update (3 in the official run)")
    seqkd_temperature: float = option(0.0, "sampling temperature of the teacher with --method seqkd; 0 is greedy")
    projectors: str | None = option(None, "safetensors file: t2s, s2t, query (.weight, .bias) to start from and train")
    from_scratch: bool = option(False, "initialise the student at random from its config.json")
    lora: int = option(0, "rank of the student's LoRA adapters; only they are trained (0: train the whole student)")
    lora_targets: list | None = option(  # of str
        None, "linear layers that get an adapter: names as in peft, or all-linear for all but the head (default, as in "
        "peft and the papers: q_proj v_proj, or c_attn for GPT-2)",
    )  # fmt: skip
    lora_alpha: float | None = option(None, "the adapters are scaled by alpha / rank (default: 8, as in the papers)")
    lora_dropout: float | None = option(None, "dropout on the adapters' input (default: 0.1, as in the papers)")
    epochs: int = option(20, "passes over the data")
    max_steps: int = option(0, "number of updates, in place of --epochs (0: use --epochs)")
    batch_size: int = option(32, "examples per forward pass of each process")
    grad_accum: int = option(1, "forward passes per update, which covers batch size x this x processes examples")
    bucket: bool = option(False, "put examples of similar length into the same update, for less padding")
    tokens_per_batch: int = option(0, "split updates by length into passes of up to this many tokens (0: --batch-size)")
    lr: float = option(5e-4, "peak learning rate of the student")
    projector_lr: float = option(0.0, "peak learning rate of the projectors (0: the papers' 1e-3 for v1, 5e-4 for v2)")
    weight_decay: float = option(1e-2, "AdamW's weight decay, on the student's matrices and all of the projectors")
    warmup: int = option(0, "updates of linear warm-up; cosine decay to zero follows")
    clip: float = option(1.0, "largest norm of the whole gradient; a larger one is scaled down")
    seed: int = option(42, "seed of initialisation, data order, dropout and sampling")
    max_len: int | None = option(None, "most tokens of an example, per model (default: 512, at most its positions)")
    max_prompt_len: int | None = option(None, "most tokens of the prompt, per model (default: half of --max-len, 256)")
    chunk: int = option(512, "tokens whose logits are in memory at once (0: all, with the plain losses)")
    recompute: bool = option(False, "activation checkpointing of the student's blocks: less memory, more time")
    cache_teacher: str | None = option(None, "directory for the teacher's hidden states, to compute them only once")
    dtype: str | None = option(
        None, "bf16: autocast (default on CUDA from Ampere on); the student's weights and all losses stay float32. On "
        "CUDA, float32 products use TF32 even with fp32: their factors have 10 bits of mantissa instead of 23",
        ["fp32", "bf16"],
    )  # fmt: skip
    device: str | None = option(None, "cuda, cuda:1, cpu, ... (default: cuda if there is one that torch can use)")
    shard: str | None = option(
        None, "with torchrun: split a model's weights over all processes (FSDP2)", ["teacher", "student", "both"]
    )
    compile: bool | None = option(None, "torch.compile both models (default: on CUDA)")
    out: str | None = option(None, "run directory (default: runs/METHOD; of the embedded task: runs/tiny)")
    resume: bool = option(False, "continue the run in --out")
    checkpoint_every: int = option(0, "updates between checkpoints and held-out scores (0: every epoch)")
    log_every: int = option(10, "updates between lines of log.jsonl")
    tensorboard: bool = option(False, "also write the log as TensorBoard event files (needs the package tensorboard)")
    dry_run: bool = option(False, "print the loss terms of the first --batch-size lines; no update, no dropout")


GROUPS = {  # title: its first option; the others follow as in Options
    "models and data": "student",
    "method": "method",
    "low-rank adapters": "lora",
    "schedule": "epochs",
    "lengths, memory and speed": "max_len",
    "the run": "out",
}


def parse(arguments: list[str] | None = None, description: str | None = None) -> dict:
    """The options that were given on the command line: {field of Options: value}."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description, formatter_class=form)
    titles, group = {first: title for title, first in GROUPS.items()}, parser
    for entry in fields(Options):
        if entry.name in titles:
            group = parser.add_argument_group(titles[entry.name])
        kind = next(iter(get_args(entry.type)), entry.type)  # str for str | None
        about, default = entry.metadata["help"], "off" if entry.default is False else entry.default
        if default is not None:
            about += f" (default: {default})"
        elif "default" not in about:
            about += " (default: none)"
        if kind is bool:  # a switch whose default is None has a --no- form too
            takes = {"action": argparse.BooleanOptionalAction if entry.default is None else "store_true"}
        elif kind is list:
            takes = {"nargs": "+"}
        elif entry.name.endswith("_chat"):
            takes = {"nargs": "?", "const": "own"}
        else:
            takes = {"type": kind, "choices": entry.metadata["choices"]}
        group.add_argument("--" + entry.name.replace("_", "-"), default=argparse.SUPPRESS, help=about, **takes)
    about = "start from v2's settings for mathematics or code (default: from the papers' settings for the student)"
    group.add_argument("--task", choices=["math", "code"], default=argparse.SUPPRESS, help=about)
    about = "fine-tune the teacher on the data first, in OUT/teacher (kept if it is finished), then distil from it"
    group.add_argument("--teacher-sft", action="store_true", default=argparse.SUPPRESS, help=f"{about} (default: off)")
    about = "sets both --student-chat and --teacher-chat (default: see these)"
    group.add_argument("--chat", nargs="?", const="own", default=argparse.SUPPRESS, help=about)
    given = vars(parser.parse_args(arguments))
    sides = ["student_chat", "teacher_chat"][: 1 if given.get("method") == "sft" else 2]
    return {**dict.fromkeys(sides if "chat" in given else [], given.pop("chat", None)), **given}
