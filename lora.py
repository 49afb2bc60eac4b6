"""Low-rank adapters (LoRA, arXiv 2106.09685): train W + (alpha/rank)·B·A in place of W.

    attach    freeze a model and give some of its linear layers an adapter; by default, the layers of the papers' runs
    merge     fold the adapters into the weights: a plain model again, with the same logits

A layer's weight and bias keep their names and values. Embeddings, norms and the prediction head (lm_head) never get an
adapter. runtime/peft.py reads and writes peft's files.

    >>> m, x = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8)), torch.randn(5, 8)
    >>> before = m(x)
    >>> torch.equal(attach(m, rank=2, alpha=4, targets="all-linear")(x), before)  # B starts at 0: nothing has changed
    True
    >>> [(name, tuple(p.shape)) for name, p in m.named_parameters() if p.requires_grad]
    [('0.lora_A', (2, 8)), ('0.lora_B', (9, 2)), ('2.lora_A', (2, 9)), ('2.lora_B', (8, 2))]
    >>> _ = nn.init.ones_(m[0].lora_B)
    >>> trained = m(x)
    >>> torch.allclose(merge(m)(x), trained, atol=1e-5), torch.allclose(trained, before), type(m[0]).__name__
    (True, False, 'Linear')
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F


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
    def merge(self) -> nn.Linear:
        """W + (alpha/rank)·B·A, summed in float32 or better, as a new layer; this one is not changed."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        update = (self.alpha / self.rank) * (self.lora_B.to(exact) @ self.lora_A.to(exact))  # (out, rank) x (rank, in)
        plain.weight = nn.Parameter((self.weight.to(exact) + update).to(self.weight.dtype), requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)


def attach(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0, targets=None) -> nn.Module:
    """Freeze the model and give each layer of `choose_layers(model, targets)` an adapter, in place; returns the model,
    whose outputs have not changed yet. Seed with torch.manual_seed. Raises ValueError for values out of range, for
    unknown targets, and for a model that already has adapters."""
    check_values("LoRA", rank, alpha, dropout)
    if adapted_layers(model):
        raise ValueError("LoRA: the model already has adapters: merge them first")
    paths = choose_layers(model, targets)
    model.requires_grad_(False)
    for path in paths:
        model.set_submodule(path, LoraLinear(model.get_submodule(path), rank, alpha, dropout))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Fold the adapters into the weights, in place: plain linear layers again, with the same outputs (without dropout).
    Returns the model, still frozen. The old weight tensors are not written to: other models may share them."""
    for path, layer in adapted_layers(model).items():
        model.set_submodule(path, layer.merge())
    return model


def choose_layers(model: nn.Module, targets: str | list[str] | None = None) -> list[str]:
    """Paths of the linear layers to adapt, in the model's order.

    targets: names, or ends of a layer's path here or in transformers' model ("mlp.c_proj"), as in peft's
    target_modules; "all-linear" for every linear layer but the head; None for `default_targets`. Raises ValueError for
    a name that no layer has.
    """
    targets = default_targets(model) if targets is None else [targets] if isinstance(targets, str) else targets
    layers, chosen = linear_layers(model), {}
    for target in targets:  # transformers calls our blocks transformer.h or model.layers; names inside are the same
        endings = f".{target}", "." + re.sub(r"^((transformer\.)?h|(model\.)?layers)\.", "blocks.", target)
        chosen[target] = {path for path in layers if target == "all-linear" or f".{path}".endswith(endings)}
    unknown = [repr(target) for target, paths in chosen.items() if not paths]
    if unknown or not targets:
        names = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in layers))
        raise ValueError(f"LoRA: the model has no linear layer called {', '.join(unknown)}; give some of {names}, "
                         "or all-linear for all of them")  # fmt: skip
    return [path for path in layers if any(path in paths for paths in chosen.values())]


def default_targets(model: nn.Module) -> list[str]:
    """What peft adapts by default: the projections to queries and values, which are in one layer in GPT-2."""
    return ["c_attn"] if any(name.endswith("c_attn") for name in linear_layers(model)) else ["q_proj", "v_proj"]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """{path: layer} of the layers that may have an adapter: not the head, whose weight the losses read. (transformers'
    own GPT-2 has none, because its layers are not nn.Linear.)"""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and path != "lm_head"}


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """{path: layer} of the layers that have an adapter; empty for a plain model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}


def check_values(place: str, rank, alpha, dropout) -> None:
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{place}: rank {rank!r} must be a whole number of at least 1")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ValueError(f"{place}: alpha {alpha!r} must be positive and finite")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"{place}: dropout {dropout!r} must be at least 0 and below 1")
