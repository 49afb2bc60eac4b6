"""Low-rank adapters (LoRA, arXiv 2106.09685): train W + (alpha/rank)·B·A in place of W, and save it as peft does.

    attach                           freeze a model and give some of its linear layers an adapter each
    merge                            fold the adapters into the weights: a plain model again, with the same logits
    save_adapter / load_adapter      peft's files, adapter_config.json and adapter_model.safetensors, out and in

Which layers: where none are named, those that peft then adapts, as the papers' runs do: q_proj and v_proj, or GPT-2's
c_attn. A layer's weight and bias keep their names and values, so the model around it notices nothing. Embeddings, norms
and the prediction head (lm_head) stay as they are. Not here: DoRA, rsLoRA, biases, a rank per layer; files with these
are refused.

    >>> class MLP(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up_proj, self.down_proj = nn.Linear(8, 9), nn.Linear(9, 8)
    ...     def forward(self, x):
    ...         return self.down_proj(self.up_proj(x).relu())
    >>> m, x = MLP(), torch.randn(5, 8)
    >>> before = m(x)
    >>> torch.equal(attach(m, rank=2, alpha=4, targets="all-linear")(x), before)  # B starts at 0: nothing has changed
    True
    >>> [(name, tuple(p.shape)) for name, p in m.named_parameters() if p.requires_grad]
    [('up_proj.lora_A', (2, 8)), ('up_proj.lora_B', (9, 2)), ('down_proj.lora_A', (2, 9)), ('down_proj.lora_B', (8, 2))]
    >>> _ = nn.init.ones_(m.up_proj.lora_B)
    >>> trained = m(x)
    >>> torch.allclose(merge(m)(x), trained, atol=1e-5), torch.allclose(trained, before), type(m.up_proj).__name__
    (True, False, 'Linear')
"""

import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class LoraLinear(nn.Linear):
    """y = x·Wᵀ + b + (alpha/rank)·dropout(x)·Aᵀ·Bᵀ with A (rank, in) random, B (out, rank) zero; W and b frozen."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        A = nn.init.kaiming_uniform_(torch.empty(rank, self.in_features), a=math.sqrt(5))  # peft's, on every device
        self.lora_A = nn.Parameter(A.to(self.weight))  # in the weight's dtype, on its device
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.train(linear.training)

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., in) -> (..., rank)
        return super().forward(x) + F.linear(low * (self.alpha / self.rank), self.lora_B)  # (..., out)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """W + (alpha/rank)·B·A, summed in float32 or better, as a layer of its own; this one is left as it is."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        update = (self.alpha / self.rank) * (self.lora_B.to(exact) @ self.lora_A.to(exact))  # (out, rank) x (rank, in)
        plain.weight = nn.Parameter((self.weight.to(exact) + update).to(self.weight.dtype), requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)


def adapted(model: nn.Module) -> dict[str, LoraLinear]:
    """{module path: layer} of the layers that have an adapter; empty for a plain model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def attach(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0, targets=None) -> nn.Module:
    """Freeze all of the model and give each linear layer that `targets` chooses (see `choose_layers`) an adapter. In
    place; returns the model, whose outputs have not changed yet.

    Seed with torch.manual_seed. A rank above a layer's width is allowed, and wasteful. Raises ValueError for values out
    of range, for a model that has adapters already, and for a target that is no layer's name.
    """
    check_values("LoRA", rank, alpha, dropout)
    if adapted(model):
        raise ValueError("LoRA: the model has adapters already: merge them first")
    chosen = choose_layers(model, targets)
    model.requires_grad_(False)
    for name in chosen:
        replace(model, name, LoraLinear(model.get_submodule(name), rank, alpha, dropout))
    return model


def default_targets(model: nn.Module) -> list[str]:
    """What peft adapts where nothing is named: the projections to queries and values. GPT-2 has one layer for queries,
    keys and values."""
    return ["c_attn"] if is_gpt2(model) else ["q_proj", "v_proj"]


def choose_layers(model: nn.Module, targets=None) -> list[str]:
    """Paths of the linear layers to adapt, in the model's order.

    targets: as peft's target_modules. A list of names, or of ends of the path in transformers' model ("mlp.c_proj");
    "all-linear" for every linear layer but the head; None for `default_targets`. Raises ValueError for a name that no
    layer has, with those that there are.
    """
    paths = {name: f".{peft_path(model, name)}" for name in linear_layers(model)}
    targets = default_targets(model) if targets is None else [targets] if isinstance(targets, str) else list(targets)
    endings = {target: "" if target == "all-linear" else f".{target}" for target in targets}  # "" ends every path
    unknown = [target for target in targets if not any(path.endswith(endings[target]) for path in paths.values())]
    if unknown or not targets:
        names = dict.fromkeys(path.rpartition(".")[2] for path in paths.values())
        raise ValueError(f"LoRA: the model has no linear layer called {', '.join(map(repr, unknown))}; give some of "
                         f"{', '.join(names)}, or all-linear for all of them")  # fmt: skip
    return [name for name, path in paths.items() if path.endswith(tuple(endings.values()))]


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapters into the weights: plain linear layers again, and the same outputs (without dropout). In place;
    returns the model, still frozen. The old weight tensors are not written to: other models may share them."""
    for name, layer in adapted(model).items():
        replace(model, name, layer.merged())
    return model


def check_values(where: str, rank, alpha, dropout) -> None:
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{where}: rank {rank!r} must be a whole number of at least 1")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"{where}: alpha {alpha!r} must be positive and finite")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{where}: dropout {dropout!r} must be at least 0 and below 1")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """{module path: layer} of those that may have an adapter: not the head, whose weight the losses use as it is."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: layer for name, layer in layers.items() if name != "lm_head"}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)


# ---------------------------------------------------------------------------------------------------------------------
# peft's files

# What peft's configuration may say without changing the computation: used, about other software, or about training.
KNOWN = set("""peft_type r lora_alpha lora_dropout target_modules fan_in_fan_out init_lora_weights task_type
    inference_mode base_model_name_or_path revision peft_version auto_mapping layers_to_transform layers_pattern
    exclude_modules megatron_core qalora_group_size""".split())
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")  # A (rank, in), B (out, rank)


def is_gpt2(model: nn.Module) -> bool:
    return any(name.endswith("c_attn") for name in linear_layers(model))


def peft_path(model: nn.Module, name: str) -> str:
    """The path of a layer in transformers' model. model.py calls the stack `blocks`, and has the same names inside."""
    return re.sub(r"^blocks\.", "transformer.h." if is_gpt2(model) else "model.layers.", name)


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name in peft's file: tensor} of all A and B."""
    state = {}
    for name, layer in adapted(model).items():
        path = f"base_model.model.{peft_path(model, name)}"
        state |= {f"{path}.lora_A.weight": layer.lora_A.detach(), f"{path}.lora_B.weight": layer.lora_B.detach()}
    return state


def save_adapter(model: nn.Module, path, base: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which peft loads on transformers' model.

    base: name or directory of the model underneath, for those who want to load both at once. Each file is written
    beside its place and moved there. Raises ValueError for a model without adapters.
    """
    layers = adapted(model)
    if not layers:
        raise ValueError("save_adapter: the model has no adapters")
    layer = next(iter(layers.values()))
    plain = {name.rpartition(".")[2] for name in linear_layers(model).keys() - layers.keys()}
    endings = {name: name.rpartition(".")[2] for name in layers}  # the whole path, where not all of one ending have one
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
    save_file(tensors, path / "adapter_model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(path / "adapter_model.safetensors.tmp", path / "adapter_model.safetensors")
    (path / "adapter_config.json.tmp").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(path / "adapter_config.json.tmp", path / "adapter_config.json")


def load_adapter(model: nn.Module, path) -> nn.Module:
    """Attach the adapter of such a directory, written here or by peft, to the plain model it was made for. In place;
    returns the model, frozen but for the adapters.

    Raises FileNotFoundError for missing files and ValueError, with the model as it was, for an adapter of another model
    (naming tensor and shapes), another kind than plain LoRA, or a damaged file.
    """
    path, file = Path(path), Path(path) / "adapter_model.safetensors"
    rank, alpha, dropout = read_adapter_config(path / "adapter_config.json")
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found (adapters in pickled .bin files are not read)")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error
    layers = {peft_path(model, name): layer for name, layer in linear_layers(model).items()}
    found: dict[str, dict[str, torch.Tensor]] = {}  # {path in transformers' model: {"A": ..., "B": ...}}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or match[1] not in layers:
            raise ValueError(f"{file}: the model has no linear layer for tensor {key!r} {list(tensor.shape)}: "
                             "is it an adapter of another model?")  # fmt: skip
        layer = layers[match[1]]
        expected = [rank, layer.in_features] if match[2] == "A" else [layer.out_features, rank]
        if list(tensor.shape) != expected:
            raise ValueError(f"{file}: tensor {key!r} is {list(tensor.shape)}, the model and rank {rank} of "
                             f"adapter_config.json need {expected}: is it an adapter of another model?")  # fmt: skip
        whole = tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        if not whole or not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{file}: tensor {key!r} is quantised ({tensor.dtype}), or has values that are not finite")
        found.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"{file}: {name} has only lora_{min(pair)} of lora_A and lora_B")
    if not found:
        raise ValueError(f"{file}: no tensors")
    attach(model, rank, alpha, dropout, targets=found)
    with torch.no_grad():
        for name, layer in adapted(model).items():
            layer.lora_A.copy_(found[peft_path(model, name)]["A"])
            layer.lora_B.copy_(found[peft_path(model, name)]["B"])
    return model


def read_adapter_config(file: Path) -> tuple[int, float, float]:
    """Rank, alpha and dropout of an adapter_config.json. Raises ValueError for what is more than plain LoRA."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; expected adapter_config.json and adapter_model.safetensors")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: not an adapter of peft_type LORA")
    # PiSSA, OLoRA and the like also change the weights underneath
    wrong = [] if config.get("init_lora_weights") in (True, False, None, "gaussian") else ["init_lora_weights"]
    wrong += [field for field, value in config.items() if field not in KNOWN and value and value != "none"]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]} = {config[wrong[0]]!r} is not supported, only plain LoRA")
    values = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout")
    check_values(str(file), *values)
    return values
