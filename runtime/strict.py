"""Checks of a run's input. Each error is found before any long work starts, and is reported in one sentence.

The files of the method trust their input. Code that opens a model directory calls `check_model` first, which reads
config.json and the headers of the weight files, but no weights.
"""

import math
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

import model
from runtime import parallel
from runtime.device import choose_device, computes_bf16
from runtime.options import Options
from runtime.tokenizer import TextTokenizer, count_shared, say_once

AT_LEAST = dict.fromkeys(["epochs", "batch_size", "grad_accum", "max_prompt_len", "log_every"], 1) | {"max_len": 2}
AT_LEAST |= dict.fromkeys(
    "max_steps warmup chunk checkpoint_every weight_decay projector_lr seed lora seqkd_temperature tokens_per_batch "
    "on_policy_after".split(), 0
)  # fmt: skip
BELOW = {"weight_decay": math.inf, "projector_lr": math.inf, "seqkd_temperature": math.inf, "lora": 2**16,
         "seed": 2**32}  # it is multiplied to make the seeds of epochs; all other bounds are 2**31 # fmt: skip


def has_tensorboard() -> bool:
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


def check_options(o: Options) -> Options:
    """The options with their defaults filled in. Raises ValueError, naming the value, for one that makes no sense."""
    check_numbers(o)
    check_together(o)
    check_cache(o)
    for name in ("student", "data") + (() if o.method == "sft" else ("teacher",)):
        if getattr(o, name) is None:
            other = "or --out and --resume alone: the run's own" if o.resume else "without any argument: the tiny task"
            raise ValueError(f"--{name} is missing: --method {o.method} needs it ({other})")
    check_processes(o)
    device = o.device or choose_device()[0]
    on_cuda = check_device(device).type == "cuda"
    if o.projectors is not None:  # only that it can be read: whether it fits is known once the models are loaded
        check_safetensors(Path(o.projectors), f"--projectors {o.projectors}")
    if o.lora:
        alpha = 8.0 if o.lora_alpha is None else o.lora_alpha
        o = replace(o, lora_alpha=alpha, lora_dropout=0.1 if o.lora_dropout is None else o.lora_dropout)
    if o.lora_targets is not None:  # separated by commas or spaces; sorted, because --resume compares them
        o = replace(o, lora_targets=sorted(set(" ".join(o.lora_targets).replace(",", " ").split())))
    return replace(
        o,
        device=f"cuda:{os.environ['LOCAL_RANK']}" if on_cuda and parallel.by_torchrun() else device,
        dtype=o.dtype or ("bf16" if on_cuda and computes_bf16(device) else "fp32"),
        compile=on_cuda if o.compile is None else o.compile,
        projector_lr=o.projector_lr or {"v1": 1e-3, "v2": 5e-4}[o.recipe],
        out=str(Path(o.out or f"runs/{o.method}")),  # runs/mine for runs/mine/, because names are built from it
    )


def refuse_first(rules: list[tuple]) -> None:
    """Raises ValueError with the message of the first rule (condition, message) whose condition is true."""
    for wrong, message in rules:
        if wrong:
            raise ValueError(message)


def check_numbers(o: Options) -> None:
    check_values(asdict(o), AT_LEAST, BELOW)
    for name in ("lr", "temperature", "clip", "lora_alpha"):
        value = getattr(o, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be positive and finite")
    refuse_first([
        (not 0 <= o.kd_rate <= 1,
         f"--kd-rate {o.kd_rate}: must be between 0 (only gold labels) and 1 (only the teacher)"),
        (not 0 <= o.on_policy <= 1,
         f"--on-policy {o.on_policy}: must be between 0 (gold responses) and 1 (sampled ones)"),
        (o.lora_dropout is not None and not 0 <= o.lora_dropout < 1,
         f"--lora-dropout {o.lora_dropout}: must be at least 0 and below 1"),
        (0 < o.seqkd_temperature < 1e-3,
         f"--seqkd-temperature {o.seqkd_temperature}: must be 0 (greedy) or at least 0.001"),
    ])  # fmt: skip


def check_values(options: dict, at_least: dict, below: dict) -> None:
    """Raises ValueError, naming the option, if one is empty or has a number outside [at_least, below).

    below: the upper bounds that are not 2**31.
    """
    for name, value in options.items():
        if value in ("", [], [[]]) or isinstance(value, list) and "" in value:  # argparse reads "--limit=--" as []
            raise ValueError(f"--{name.replace('_', '-')} is empty; leave it out for the default")
    for name, least in at_least.items():
        most = below.get(name, 2**31)
        for value in options[name] if isinstance(options[name], list) else [options[name]]:
            if value is not None and not least <= value < most:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least} and below {most}")


def check_together(o: Options) -> None:
    """Raises ValueError for an option that the method, or another option, does not allow."""
    why = {"sft": "has no teacher to judge sampled responses", "seqkd": "learns the teacher's responses"}
    why_fkl = {"uld": "compares sorted probabilities by their absolute difference",
               "mined": "uses the gold token where none is aligned, which only the forward KL allows"}  # fmt: skip
    of_lora = any(value is not None for value in (o.lora_alpha, o.lora_dropout, o.lora_targets))
    refuse_first([
        (o.on_policy and o.method not in ("kd", "dskd"), "--on-policy works only with --method kd and dskd; --method "
         f"{o.method} {why.get(o.method, 'is defined on the gold responses')}"),
        (o.on_policy and o.method == "dskd" and o.recipe == "v1", "--on-policy needs --recipe v2: v1 uses the response "
         "as the label, so the student would learn its own samples as if they were right"),
        (o.on_policy and o.dry_run,
         "--dry-run uses the gold responses, so that results can be compared: leave out --on-policy"),
        (o.resume and o.dry_run,
         "--dry-run does not read a run's state: leave out --resume, or give the run's student/ as --student"),
        (o.on_policy_after and not o.on_policy,
         f"--on-policy-after {o.on_policy_after} needs --on-policy, which is not given"),
        (o.on_policy_after >= o.epochs and not o.max_steps, f"--on-policy-after {o.on_policy_after}: the run ends "
         f"after --epochs {o.epochs}, so no update would be on-policy"),
        (o.teacher_chat not in (None, "none") and o.method == "sft",
         "--teacher-chat needs a teacher; --method sft has none, its model is the --student"),
        (o.keep_best and o.valid is None,
         f"--keep-best {o.keep_best} needs scores on held-out examples: give them with --valid"),
        (o.tensorboard and not has_tensorboard(),
         "--tensorboard needs the package tensorboard, which is not installed: pip install tensorboard"),
        (of_lora and not o.lora,
         "--lora-targets, --lora-alpha and --lora-dropout need --lora RANK, which is not given"),
        (o.lora and o.from_scratch, f"--lora {o.lora} adapts a trained student; --from-scratch (which the embedded "
         "task implies) starts without one"),
        (o.method in why_fkl and o.divergence != "fkl", f"--divergence {o.divergence}: --method {o.method} "
         f"{why_fkl.get(o.method)}; leave --divergence out"),
        (o.seqkd_temperature and o.method != "seqkd",
         f"--seqkd-temperature works only with --method seqkd; --method {o.method} generates nothing"),
        (o.projectors is not None and o.method != "dskd",
         f"--projectors works only with --method dskd; --method {o.method} has none"),
    ])  # fmt: skip


def check_processes(o: Options) -> None:
    by_torchrun, rank = parallel.by_torchrun(), int(os.environ.get("LOCAL_RANK", 0))
    devices = torch.cuda.device_count() if by_torchrun and o.device != "cpu" else 0
    refuse_first([
        (o.shard and not by_torchrun,
         f"--shard {o.shard} splits weights over processes: start with torchrun --nproc_per_node=N"),
        (o.shard in ("teacher", "both") and o.method in ("sft", "seqkd"),
         f"--shard {o.shard}: --method {o.method} trains without a teacher; use --shard student"),
        (by_torchrun and o.dry_run, "--dry-run runs in one process: start it without torchrun"),
        (by_torchrun and o.device not in (None, "cuda", "cpu", f"cuda:{rank}"),
         f"--device {o.device}: torchrun gives each process its own device; use cuda or cpu, or leave --device out"),
        (0 < devices <= rank, f"torchrun started more processes than there are CUDA devices ({devices})"),
    ])  # fmt: skip


def check_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError if it cannot be used here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: not a device; use cuda, cuda:1, cpu, ...") from error
    usable, why = choose_device(device.index or 0)
    refuse_first([
        (device.type not in ("cuda", "cpu"), f"--device {name}: only cuda and cpu are supported (Apple's mps has no "
         "float64, in which projectors are solved)"),
        (device.type == "cuda" and usable != "cuda",
         f"--device {name}: cannot be used here ({why}); use --device cpu or leave it out"),
    ])  # fmt: skip
    return device


def check_cache(o: Options) -> None:
    if o.cache_teacher is None:
        return
    refuse_first([(wrong, f"--cache-teacher {o.cache_teacher}: {why}") for wrong, why in [
        (o.method == "sft", "--method sft has no teacher; leave it out"),
        (o.method == "seqkd", "--method seqkd keeps the teacher's text, in seqkd.jsonl; leave it out"),
        (o.on_policy, "with --on-policy the teacher reads new responses in every update; leave it out"),
        (o.dry_run, "--dry-run is for exact comparisons, but cached states are rounded to bfloat16; leave it out"),
        (o.shard in ("teacher", "both"), f"--shard {o.shard} is for a teacher that runs in every update, but only an "
         "unsharded teacher can fill the cache; leave one of the two out"),
        (Path(o.cache_teacher).exists() and not Path(o.cache_teacher).is_dir(), "not a directory"),
    ]])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# config.json: every field that changes the computation is used or refused. All others are ignored, with a note.

# What the value of a field must be: its type, and for a number the minimum and the maximum. The maximum is far above
# any real model's; it keeps a typing error from asking for terabytes or hours.
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list",
         dict: "an object"}  # fmt: skip
VALUES = {field: rule for fields, *rule in [
    ("n_layer num_hidden_layers", int, 1, 2**10),
    ("n_embd n_head n_inner hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim", int, 1,
     2**20), ("max_window_layers", int, 0, 2**20),
    ("vocab_size n_positions max_position_embeddings original_max_position_embeddings sliding_window", int, 1, 2**24),
    ("embd_pdrop attn_pdrop resid_pdrop attention_dropout layer_norm_epsilon rms_norm_eps", float, 0, 1),
    ("initializer_range mscale mscale_all_dim", float, 0, 100),
    ("rope_theta factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow", float, 1e-3, 1e15),
    ("tie_word_embeddings attention_bias mlp_bias use_sliding_window truncate", bool, 0, 1),
    ("activation_function hidden_act", str), ("layer_types", list), ("rope_scaling rope_parameters", dict),
] for field in fields.split()}  # fmt: skip

# Fields that change the computation of one of the families, or the weights, with the only value that is implemented.
ONLY = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
        "add_cross_attention": False, "is_encoder_decoder": False, "is_causal": True, "rope_interleaved": False,
        "use_mrope": False, "pruned_heads": {}, "partial_rotary_factor": 1.0, "quantization_config": None,
        "compression_config": None, "transformers_weights": None}  # fmt: skip
GPT2_ALIASES = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
                "num_hidden_layers": "n_layer"}  # transformers accepts either # fmt: skip

# Other fields that common files have; they are ignored without a note.
HARMLESS = set("""model_type architectures _name_or_path transformers_version torch_dtype dtype use_cache pretraining_tp
    _attn_implementation_autoset bos_token_id eos_token_id pad_token_id tokenizer_class task_specific_params max_length
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout output_past id2label
    label2id _num_labels n_ctx n_special predict_special_tokens gradient_checkpointing is_llama_config return_dict
    transformers.js_config is_decoder chunk_size_feed_forward""".split())  # fmt: skip


def check_config(config: dict, file="config.json") -> SimpleNamespace:
    """Check a config and return its `read_config`. Raises ValueError, naming `file` and the field."""
    family = config.get("model_type")
    if family not in list(model.FIELDS):
        raise ValueError(f"{file}: model_type {family!r} is not supported, only {', '.join(model.FIELDS)}; for other "
                         "decoders, examples/ has the method on transformers")  # fmt: skip
    where, f = f"{file} (model_type {family})", model.read_fields(config)
    for field in model.FIELDS[family]:
        if (value := getattr(f, field)) is not None:
            check_value(field, "missing" if value is model.REQUIRED else value, where)
    aliases = {alias: getattr(f, field) for alias, field in GPT2_ALIASES.items()} if family == "gpt2" else {}
    only = ONLY | aliases
    for field in sorted(config.keys() & only.keys()):
        if config[field] is not None and config[field] != only[field]:
            hint = "; use the checkpoint that is not quantised" if field == "quantization_config" else ""
            raise ValueError(f"{where}: {field} = {config[field]!r:.60} is not supported, only {only[field]!r}{hint}")
    unused = sorted(config.keys() - model.FIELDS[family].keys() - only.keys() - HARMLESS)
    if unused:
        say_once(f"{file}: fields that do not affect a {family} model are ignored: {', '.join(unused)}")

    if family != "gpt2":
        check_rope(f, where)
    if family in ("mistral", "qwen2", "qwen3"):
        check_windows(f, where)
    c = model.read_config(config)
    if c.width % c.heads and (family in ("gpt2", "llama") or not c.head_dim):  # transformers cannot load it either
        name = "n_embd" if family == "gpt2" else "hidden_size"
        raise ValueError(f"{where}: {name} {c.width} is not divisible by {c.heads} heads")
    if c.activation not in model.ACTIVATIONS:
        raise ValueError(f"{where}: activation {c.activation!r} is not supported, only {', '.join(model.ACTIVATIONS)}")
    if c.heads % c.kv_heads:
        raise ValueError(f"{where}: {c.heads} attention heads cannot share {c.kv_heads} key-value heads")
    if family != "gpt2" and c.head_dim % 2:
        raise ValueError(f"{where}: head_dim {c.head_dim} is odd, but rotary embedding rotates pairs")
    return c


def check_value(field: str, value, where: str) -> None:
    """Raises ValueError unless the value is what VALUES says of the field."""
    kind, *bounds = VALUES[field]
    right = type(value) in ((int, float) if kind is float else (kind,))
    if not right or bounds and not bounds[0] <= value <= bounds[1]:
        between = f" from {bounds[0]} to {bounds[1]}" if bounds and kind is not bool else ""
        raise ValueError(f"{where}: {field} must be {NAMES[kind]}{between}, but is {value!r:.60}")


def check_windows(f: SimpleNamespace, where: str) -> None:
    types = ["full_attention"] * f.num_hidden_layers if f.layer_types is None else f.layer_types
    if len(types) != f.num_hidden_layers or any(t not in ("full_attention", "sliding_attention") for t in types):
        raise ValueError(f"{where}: layer_types must name full_attention or sliding_attention per layer, got {types}")
    slides = f.sliding_window and (f.model_type == "mistral" or f.use_sliding_window)
    if "sliding_attention" in types and not slides:
        raise ValueError(f"{where}: layer_types has sliding_attention, but use_sliding_window or sliding_window is off")


def check_rope(f: SimpleNamespace, where: str) -> None:
    meanings = []
    for rope in [spelt for spelt in (f.rope_parameters, f.rope_scaling) if spelt] or [{}]:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in list(model.ROPE):
            raise ValueError(f"{where}: rotary scaling {kind!r:.60} is not supported, only {', '.join(model.ROPE)}")
        if rope.get("partial_rotary_factor") not in (None, 1) or any(isinstance(x, dict) for x in rope.values()):
            raise ValueError(f"{where}: partial or per-layer rotary embedding is not supported: {rope!s:.200}")
        meaning = model.read_rope(f, rope)
        for field in ("rope_theta", *model.ROPE[kind]):
            if meaning[field] is not None or kind != "yarn":  # yarn has a default for each field
                check_value(field, "missing" if meaning[field] is None else meaning[field], where)
        meanings.append(meaning)
        top = {field: getattr(f, field) or meaning[field] for field in meaning.keys() & model.FIELDS["llama"].keys()}
        if rope.get("type") not in (None, kind) or meanings[0] != meaning or meaning | top != meaning:
            raise ValueError(f"{where}: rope_theta {f.rope_theta}, rope_scaling {f.rope_scaling!s:.200} and "
                             f"rope_parameters {f.rope_parameters!s:.200} contradict each other; keep one")  # fmt: skip
        if kind == "llama3" and not meaning["low_freq_factor"] < meaning["high_freq_factor"]:
            raise ValueError(f"{where}: rotary scaling 'llama3' needs a low_freq_factor below its high_freq_factor")
        if kind == "yarn" and meaning["rope_theta"] <= 1:
            raise ValueError(f"{where}: rotary scaling 'yarn' needs a rope_theta above 1")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

# Constants that older versions of transformers saved with the weights: causal masks and rotary frequencies.
CONSTANTS = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")


def check_model(path: str | Path, weights: bool = True) -> None:
    """Raises FileNotFoundError for a file that a model directory lacks, ValueError for a config, a tensor or a file
    that is not supported, incomplete or damaged. weights: False if the weights need not be there."""
    path, file = Path(path), Path(path) / "config.json"
    config = model.read_json(file)
    check_config(config, file)
    if not weights:
        return
    for shard in model.checkpoint_files(path):
        if shard.parent != path or shard.name == ".." or "\\" in shard.name:
            raise ValueError(f"{path}: shard '{shard}' is not a plain file name; it would be read from another place")
        check_safetensors(shard, str(shard), "; fetch it again")
    with torch.device("meta"):
        m = model.Decoder(config)
    expected = {ours: list(parameter.shape) for ours, parameter in m.named_parameters()}
    places, head = {}, None
    for file, names in model.find_tensors(m, path).items():
        with safe_open(file, framework="pt") as tensors:
            for theirs, ours in names.items():
                if ours is None and theirs == "lm_head.weight":  # compared below, since the embedding may come later
                    head = file, theirs
                elif ours is None and not CONSTANTS.search(theirs):
                    raise ValueError(f"{file}: tensor {theirs!r} is not known for model_type {config['model_type']}")
                elif ours in places:
                    raise ValueError(f"{file}: tensor {theirs!r} appears twice")
                elif ours is not None:
                    shape = expected[ours][::-1] if model.TRANSPOSED.search(ours) else expected[ours]
                    check_tensor(tensors.get_slice(theirs), shape, f"{file}: {theirs}")
                    places[ours] = file, theirs
    missing = sorted(theirs for ours, theirs in model.hugging_face_names(m).items() if ours not in places)
    if missing:
        raise ValueError(f"{path}: the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:8])}")
    if head is not None and not equal_tensors(head, places["embed.weight"]):
        raise ValueError(f"{path}: lm_head.weight differs from the embedding, but config.json ties them: set "
                         "tie_word_embeddings to false")  # fmt: skip


def check_safetensors(file: Path, where: str, hint: str = "") -> None:
    try:
        if not file.is_file():  # opening a pipe would wait for a writer
            raise FileNotFoundError("no such file")
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{where}: not a readable safetensors file ({error}){hint}") from error


def check_tensor(header, shape: list[int], where: str) -> None:
    if header.get_shape() != shape:
        raise ValueError(f"{where}: shape {header.get_shape()} in the file, but {shape} according to config.json")
    if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{where}: {header.get_dtype()} weights (a quantised checkpoint?) are not supported")


def equal_tensors(*places: tuple[Path, str]) -> bool:
    tensors = []
    for file, name in places:
        with safe_open(file, framework="pt") as opened:
            tensors.append(opened.get_tensor(name))
    return torch.equal(tensors[0].to(tensors[1].dtype), tensors[1])


def fit_lengths(o, directories: dict[str, Path]) -> None:
    """Fill in --max-len and --max-prompt-len for these models. Raises ValueError if one has too few positions."""
    files = {name: path / "config.json" for name, path in directories.items()}
    limits = {name: model.read_config(model.read_json(file)).limit for name, file in files.items()}
    if o.max_len is None:
        o.max_len = min(512, *limits.values())
    if o.max_prompt_len is None:
        o.max_prompt_len = max(1, o.max_len // 2)
    if o.keep_best == "rouge" and o.max_prompt_len >= o.max_len:
        raise ValueError(f"--keep-best rouge: --max-prompt-len {o.max_prompt_len} leaves no token of --max-len "
                         f"{o.max_len} for the responses that are scored; lower --max-prompt-len")  # fmt: skip
    for name, limit in limits.items():
        if o.max_len > limit:
            raise ValueError(f"--max-len {o.max_len}: the {name} has only {limit} positions")
    if 0 < o.tokens_per_batch < o.max_len:
        raise ValueError(f"--tokens-per-batch {o.tokens_per_batch}: an example may have {o.max_len} tokens (--max-len)")


# ---------------------------------------------------------------------------------------------------------------------
# Alignment and projectors


def choose_alignment(align: str, method: str, recipe: str, teacher: TextTokenizer, student: TextTokenizer) -> str:
    """`align` with "auto" resolved; for uld and mined, which pair tokens in their own way, the method's name. Raises
    ValueError if the alignment does not fit the method, and says why."""
    own = {"uld": "pairs tokens itself, position by position", "mined": "pairs tokens itself, by edit distance",
           "kd": "compares position by position"}  # fmt: skip
    if method in own and align != "auto" and (method, align) != ("kd", "none"):
        raise ValueError(f"--method {method} {own[method]}: leave out --align {align}, or use --method dskd")
    if method in ("uld", "mined"):
        return method
    shared = count_shared(teacher, student)
    if align == "auto":
        align = "none" if shared or method == "kd" else {"v1": "cma", "v2": "eta"}[recipe]
    if align == "none" and not shared:
        ends = [tokenizer.tokenizer.id_to_token(tokenizer.eos_id) for tokenizer in (teacher, student)]
        differ = "differ"
        if ends[0] != ends[1]:
            differ += (f" (end-of-text: {ends[0]!r} and {ends[1]!r}; if nothing else differs, --chat DIR gives both "
                       "models the chat template of the model in DIR, and with it the same end-of-text)")  # fmt: skip
        raise ValueError(
            f"--method {method}{'' if method == 'kd' else ' --align none'} needs vocabularies of one family; "
            f"{teacher.directory} and {student.directory} {differ}: use --method dskd with --align eta (recipe v2) or "
            "cma (recipe v1)"
        )
    if (recipe, align) in {("v1", "eta"), ("v2", "cma")}:
        other = {"eta": "v2", "cma": "v1"}[align]
        raise ValueError(f"--align {align} needs --recipe {other} (the papers pair v1 with cma, v2 with eta)")
    sides = {"teacher": teacher, "student": student}
    more = [f"the {side}'s {t.names([i])}" for side, t in sides.items() for i in range(shared, t.size) if t.names([i])]
    if align == "none" and more:
        more[8:] = [f"{len(more) - 8} others"] if len(more) > 8 else []
        say_once(f"{teacher.directory} and {student.directory}: compared on their {shared} common ids; left out: "
                 f"{', '.join(more)}")  # fmt: skip
    return align


def read_projectors(file: str, student_width: int, teacher_width: int, align: str) -> dict[str, Tensor]:
    """The tensors of --projectors FILE, {"t2s.weight": (d, D), ...}. Raises ValueError for one that does not fit."""
    d, D = student_width, teacher_width
    shapes = {"t2s.weight": [d, D], "t2s.bias": [d], "s2t.weight": [D, d], "s2t.bias": [D]}
    if align == "cma":
        shapes |= {"query.weight": [2 * D, 2 * d], "query.bias": [2 * D]}
    given = load_file(file)
    unused = [name for name in given if name.startswith("query.") and align != "cma"]
    if unused:
        print(f"{file}: {' and '.join(unused)} not used, because only --align cma needs a query", file=sys.stderr)
    given = {name: value for name, value in given.items() if name not in unused}
    for name, value in given.items():
        if list(value.shape) != shapes.get(name):
            expected = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
            raise ValueError(f"{file}: {name} {list(value.shape)} does not fit; expected {expected}")
    return given
