"""Write and read adapter files in peft's format: adapter_config.json and adapter_model.safetensors.

Only plain LoRA: files with DoRA, rsLoRA, biases or a rank per layer are refused. peft itself is not needed.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import adapted_layers, attach, check_values, default_targets, linear_layers, merge
from model import load_model, read_json, save_model
from runtime.hub import MODEL_FILES, WEIGHT_FILES, model_directory
from runtime.strict import check_model, check_safetensors
from runtime.tokenizer import say_once

# Fields of peft's configuration that are accepted: they are used here, or do not change the computation.
KNOWN = set("""peft_type r lora_alpha lora_dropout target_modules fan_in_fan_out init_lora_weights task_type
    inference_mode base_model_name_or_path revision peft_version auto_mapping layers_to_transform layers_pattern
    exclude_modules megatron_core qalora_group_size""".split())
# The command that merges any adapter into a model, for adapters that cannot be read here.
MERGE = ('merge it once, python -c "import sys; from peft import AutoPeftModelForCausalLM as P; P.from_pretrained('
         "sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[2])\" ADAPTER MODEL, and copy the tokenizer's files "
         "beside it")  # fmt: skip
UNTIE = ('its base ties head and embedding, and merging would change both: untie a copy of the base, python -c "import '
         "sys; from transformers import AutoModelForCausalLM as M; m = M.from_pretrained(sys.argv[1], "
         "tie_word_embeddings=False); m.get_output_embeddings().weight.data = m.get_input_embeddings().weight.clone()."
         'detach(); m.save_pretrained(sys.argv[2])" BASE COPY, write the path of the copy into base_model_name_or_path '
         "of adapter_config.json, and then ")  # fmt: skip
TIED = re.compile(r"\.(lm_head|embed_tokens|wte)\.(lora_|base_layer)")
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")  # A (rank, in), B (out, rank)


def is_gpt2(model: nn.Module) -> bool:
    return default_targets(model) == ["c_attn"]


def peft_path(model: nn.Module, name: str) -> str:
    """The path of a layer in transformers' model. model.py calls the stack `blocks`; the names inside are the same."""
    return re.sub(r"^blocks\.", "transformer.h." if is_gpt2(model) else "model.layers.", name)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """{name in peft's file: tensor} of all A and B."""
    state = {}
    for name, layer in adapted_layers(model).items():
        path = f"base_model.model.{peft_path(model, name)}"
        state |= {f"{path}.lora_A.weight": layer.lora_A.detach(), f"{path}.lora_B.weight": layer.lora_B.detach()}
    return state


def save_adapter(model: nn.Module, path, base: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which peft loads on top of transformers' model.

    base: name or directory of the base model, so that both can be loaded at once. Raises ValueError for a model without
    adapters.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapters")
    layer = next(iter(layers.values()))
    plain = {name.rpartition(".")[2] for name in linear_layers(model).keys() - layers.keys()}
    endings = {name: name.rpartition(".")[2] for name in layers}  # used if all layers with this ending have an adapter
    targets = {peft_path(model, name) if ending in plain else ending for name, ending in endings.items()}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": layer.rank, "lora_alpha": layer.alpha, "lora_dropout": layer.dropout, "target_modules": sorted(targets),
        "fan_in_fan_out": is_gpt2(model),  # transformers keeps GPT-2's weights as (in, out)
        "bias": "none", "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model).items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, path) -> nn.Module:
    """Attach an adapter that was written here or by peft to the plain model it was made for, in place; returns the
    model, frozen except for the adapters. Raises FileNotFoundError for missing files, and ValueError for a damaged file
    or an adapter of another model or kind; the model is then unchanged."""
    file = Path(path) / "adapter_model.safetensors"
    merging = how_to_merge(model, file)
    rank, alpha, dropout = read_adapter_config(Path(path) / "adapter_config.json", merging)
    adapters = read_adapters(model, file, rank, merging)
    attach(model, rank, alpha, dropout, targets=list(adapters))
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            layer.lora_A.copy_(adapters[name]["A"])
            layer.lora_B.copy_(adapters[name]["B"])
    return model


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds an adapter and no model."""
    weights = [directory / file for file in WEIGHT_FILES[:2]]
    return os.path.isfile(directory / "adapter_config.json") and not any(map(os.path.isfile, weights))


def base_of(adapter: Path) -> str:
    """The name or directory of an adapter's base model, whose weights need not be here yet. Raises FileNotFoundError,
    with its name, if it is missing, and ValueError if it is not supported, or for a revision of a repository that is
    not its main one, since only that is looked up."""
    config = read_json(adapter / "adapter_config.json")
    base, revision = str(config.get("base_model_name_or_path")), config.get("revision")
    if revision not in (None, "main") and not os.path.isdir(base):
        raise ValueError(f"{adapter} is an adapter of revision {revision!r} of {base}; download that one and write "
                         "its path into base_model_name_or_path of adapter_config.json")  # fmt: skip
    hint = "Write the path of the base into base_model_name_or_path of adapter_config.json"
    try:
        check_model(model_directory(base, weights=False), weights=False)  # before gigabytes of weights are downloaded
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{adapter} is an adapter whose base model is missing: {error}. {hint}") from error
    except ValueError as error:  # often a quantised copy, on which QLoRA trains
        raise ValueError(f"{adapter} is an adapter of {base}, which cannot be used: {error}. {hint}") from error
    return base


def merge_into(base: Path, adapter: Path) -> Path:
    """The directory of `base` with the adapter merged into it, in float32: made only once, in the user's cache
    ($XDG_CACHE_HOME or ~/.cache)."""
    names = [*MODEL_FILES, *WEIGHT_FILES, "adapter_*"]
    files = sorted({file for directory in (base, adapter) for name in names for file in directory.glob(name)})
    key = repr([(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dskd"
    merged = cache / f"merged-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    if not merged.is_dir():
        new = merged.with_suffix(f".{os.getpid()}.new")
        save_model(merge(load_adapter(load_model(base), adapter)), new)
        # a tokenizer_config.json of the adapter's decides alone: these two, from the base, would be read before it
        own = (adapter / "tokenizer_config.json").is_file()
        before = {"special_tokens_map.json", "chat_template.jinja"} if own else set()
        of_base = [name for name in MODEL_FILES[1:] if name not in before]
        for file in [*map(base.joinpath, of_base), *map(adapter.joinpath, MODEL_FILES[1:])]:
            if file.is_file():
                shutil.copy(file, new)
        try:
            os.rename(new, merged)
        except OSError:
            if not merged.is_dir():
                raise
            shutil.rmtree(new)  # another run has made the same meanwhile
    say_once(f"{adapter} is an adapter; merged with its base {base}, the model is in {merged}")
    return merged


def how_to_merge(model: nn.Module, file: Path) -> str:
    """What the errors below advise for an adapter that is not supported. If it adapts the head or the token embedding,
    and the base ties the two, peft would merge it wrongly. Raises ValueError for a damaged file."""
    names: list[str] = []
    if file.is_file():
        check_safetensors(file, str(file), "; fetch it again")
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
    tied = model.lm_head is None and any(map(TIED.search, names))
    return UNTIE * tied + MERGE


def read_adapter_config(file: Path, merging: str) -> list:
    """Rank, alpha and dropout of an adapter_config.json. Raises ValueError for anything but plain LoRA."""
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: not an adapter of peft_type LORA")
    # PiSSA, OLoRA and similar kinds also change the base model's weights
    wrong = [] if config.get("init_lora_weights") in (True, False, None, "gaussian") else ["init_lora_weights"]
    wrong += [field for field, value in config.items() if field not in KNOWN and value and value != "none"]
    if wrong:
        if config.get("ensure_weight_tying") and merging != MERGE:
            merging = "and peft cannot merge this one either, because its base ties the head and the embedding"
        raise ValueError(f"{file}: {wrong[0]} = {config[wrong[0]]!r} is not supported, only plain LoRA: {merging}")
    values = [config.get(name) for name in ("r", "lora_alpha", "lora_dropout")]
    check_values(str(file), *values)
    return values


def read_adapters(model: nn.Module, file: Path, rank: int, merging: str) -> dict[str, dict[str, Tensor]]:
    """{path of a layer in our model: {"A": (rank, in), "B": (out, rank)}}"""
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found (pickled .bin files are not read: {MERGE})")
    layers = linear_layers(model)
    ours = {peft_path(model, name): name for name in layers}
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        match = KEY.fullmatch(key)
        if re.search(r"\.(lm_head|embed_tokens|wte|wpe)\.", key):
            raise ValueError(f"{file}: {key} changes the head or an embedding; only plain LoRA on the layers between "
                             f"them is supported: {merging}")  # fmt: skip
        if match is None or match[1] not in ours:
            raise ValueError(f"{file}: the model has no linear layer for tensor {key!r} {list(tensor.shape)}: "
                             "is this an adapter of another model?")  # fmt: skip
        name, letter = ours[match[1]], match[2]
        expected = [rank, layers[name].in_features] if letter == "A" else [layers[name].out_features, rank]
        if list(tensor.shape) != expected:
            raise ValueError(f"{file}: tensor {key!r} is {list(tensor.shape)}, but the model and rank {rank} of "
                             f"adapter_config.json need {expected}: is this an adapter of another model?")  # fmt: skip
        plain = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        if not plain or not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{file}: tensor {key!r} is quantised ({tensor.dtype}), or has values that are not finite")
        adapters.setdefault(name, {})[letter] = tensor
    for name, pair in adapters.items():
        if len(pair) < 2:
            raise ValueError(f"{file}: {peft_path(model, name)} has only lora_{min(pair)} of lora_A and lora_B")
    if not adapters:
        raise ValueError(f"{file}: no tensors")
    return adapters
