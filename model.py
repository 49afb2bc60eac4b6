"""GPT-2 and LLaMA-style decoders in plain PyTorch: read, written and sampled from Hugging Face directories.

One file, no imports but torch and safetensors. `Decoder` is the whole model; a GPT-2 and a LLaMA block fill it:

    Decoder                                  token ids -> hidden states -> logits; hidden states are what gets distilled
    load_model / build_model / save_model    checkpoints in, random models, checkpoints out (transformers reads them)
    generate / sample                        batched generation with a key-value cache

    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    >>> m = build_model(config)
    >>> hidden = m(torch.tensor([[1, 2, 3]]))
    >>> hidden.shape, m.logits(hidden).shape, m.head_weight.shape
    (torch.Size([1, 3, 8]), torch.Size([1, 3, 64]), torch.Size([64, 8]))
    >>> [len(new) for new in generate(m, [[1, 2, 3], [4]], max_new_tokens=5, eos_id=None)]
    [5, 5]

Families (config.json's model_type): gpt2; llama (Llama 1 to 3.x, TinyLlama, SmolLM2); mistral; qwen2 (Qwen1.5 to 2.5);
qwen3. Not here: quantised weights, mixture of experts, LongRoPE. runtime/strict.py checks what this file trusts.
Shapes: B batch, T sequence, P tokens of a batch without its padding, S keys attended to, D width, V vocabulary.
"""

import copy
import json
import math
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# The blocks. Module names inside a block are those of the Hugging Face checkpoint.

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


class Attention(nn.Module):
    """softmax(q kᵀ / √head_dim) v, causal, of either family."""

    scaled_dot_product_attention = staticmethod(F.scaled_dot_product_attention)  # fast/cpu.py replaces it

    def attend(self, q, k, v, mask, store, packing, dropout: float) -> torch.Tensor:
        """q (B, T, heads, head_dim), k and v (B, T, kv_heads, head_dim) -> (B, T, heads·head_dim); with a packing,
        input and output have (1, P) in place of (B, T).

        mask (B or 1, 1, T, S) is True where a query may look; None means plain causal, which the fused kernels support.
        store: `KVCache.store` of this layer, or None.
        """
        if packing is not None and mask is None and store is None:
            if packing.has_flash_kernel(q):
                return packing.attend(q, k, v, dropout).flatten(2)
            if q.device.type == "cpu" and not torch.compiler.is_compiling():
                # one sequence after another; a GPU would have to wait for the lengths and for many small calls
                lengths = packing.starts.diff().tolist()
                parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
                return torch.cat([self.attend(*part, None, None, None, dropout) for part in parts], dim=1)
        if packing is not None:
            q, k, v = map(packing.pad, (q, k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads or kv_heads, T, head_dim)
        if store is not None:
            k, v = store(k, v)  # (B, kv_heads, S, head_dim)
        B, heads, T, head_dim = q.shape
        groups = heads // k.size(1)  # query heads that share a key-value head
        if T == 1 and mask is not None:  # decoding: a group's heads act as more queries, so k and v are not copied
            q = q.reshape(B, -1, groups, head_dim)
            y = self.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, kv_heads, groups, head_dim)
            return y.reshape(B, 1, heads * head_dim)
        if groups > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
            # the only fast CUDA kernel that shares heads is flash attention; it supports neither masks nor float32
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        y = self.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=groups > 1
        )
        y = y.transpose(1, 2).flatten(2)  # (B, heads, T, head_dim) -> (B, T, heads·head_dim)
        return y if packing is None else packing.pack(y)


class Packing:
    """The sequences of a padded batch without the padding, one after another. The layers work on these, attention only
    if it has a kernel for them."""

    def __init__(self, real: torch.Tensor, batch: torch.Tensor):
        self.real, self.batch = real, batch  # (P,) the positions of real tokens in the flattened batch; (B, T)
        B, T = batch.shape
        # (B + 1,) where each sequence starts among the P, and P
        self.starts = torch.searchsorted(real, T * torch.arange(B + 1, device=real.device), out_int32=True)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (1, P, ...)"""
        return x.flatten(0, 1).index_select(0, self.real)[None]

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(1, P, ...) -> (B, T, ...), zeros at the padding"""
        B, T = self.batch.shape
        return x.new_zeros(B * T, *x.shape[2:]).index_copy(0, self.real, x[0]).unflatten(0, (B, T))

    @staticmethod
    def has_flash_kernel(q: torch.Tensor) -> bool:
        """Whether there is a kernel for such heads: on NVIDIA's cards from Ampere on."""
        if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or torch.version.hip:
            return False
        return torch.cuda.get_device_properties(q.device).major >= 8 and q.size(-1) % 8 == 0 and q.size(-1) <= 256

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
        """Causal attention within each sequence: (1, P, heads, head_dim), k and v with kv_heads -> as q. By the
        operator that torch.nn.attention.varlen calls, since varlen itself has no dropout."""
        T = self.batch.size(1)  # no sequence is longer
        where = self.starts, self.starts, T, T
        return torch.ops.aten._flash_attention_forward(q[0], k[0], v[0], *where, dropout, True, False)[0][None]


class GPT2Attention(Attention):
    def __init__(self, c):
        super().__init__()
        self.heads, self.attn_dropout = c.heads, c.attn_dropout
        self.c_attn = nn.Linear(c.width, 3 * c.width)
        self.c_proj = nn.Linear(c.width, c.width)
        self.dropout = nn.Dropout(c.resid_dropout)

    def forward(self, x, *where):
        q, k, v = self.c_attn(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # 3 x (B, T, heads, head_dim)
        y = self.attend(q, k, v, *where, self.attn_dropout if self.training else 0.0)
        return self.dropout(self.c_proj(y))


class GPT2MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.width, c.inner)
        self.c_proj = nn.Linear(c.inner, c.width)
        self.activation = ACTIVATIONS[c.activation]
        self.dropout = nn.Dropout(c.resid_dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class GPT2Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.width, eps=c.eps)
        self.attn = GPT2Attention(c)
        self.ln_2 = nn.LayerNorm(c.width, eps=c.eps)
        self.mlp = GPT2MLP(c)

    def forward(self, x, rotation, *where):  # of attention: mask, store, packing
        x = x + self.attn(self.ln_1(x), *where)
        return x + self.mlp(self.ln_2(x))


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, the division in float32 whatever the dtype of x (as in transformers)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


class Rotary(nn.Module):
    """Rotary position embedding: pairs (x_i, x_{i + head_dim/2}) turn by the angle position · frequency_i."""

    def __init__(self, inverse_frequencies: torch.Tensor, scale: float):
        super().__init__()
        self.exact, self.scale = inverse_frequencies, scale
        self.register_buffer("inverse_frequencies", inverse_frequencies.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # .to(), .bfloat16(), ... move the table with the model, but must not round it
        self.inverse_frequencies = self.exact.to(self.inverse_frequencies.device)
        return self

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (B or 1, T, 1, head_dim / 2) in float32, for positions (B or 1, T); once for all layers."""
        angles = (positions[..., None].float() * self.inverse_frequencies).unsqueeze(2)
        return self.scale * angles.cos(), self.scale * angles.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn x (B, T, heads, head_dim); in float32, rounded once by the caller."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class LlamaAttention(Attention):
    def __init__(self, c):
        super().__init__()
        self.head_dim, self.attn_dropout = c.head_dim, c.attn_dropout
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=c.out_bias)
        self.q_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.eps) if c.qk_norm else nn.Identity()

    def forward(self, x, rotation, *where):
        # (B, T, heads, head_dim), k and v with kv_heads
        q, k, v = (project(x).unflatten(2, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
        return self.o_proj(self.attend(q, k, v, *where, self.attn_dropout if self.training else 0.0))


class LlamaMLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.inner, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.width, c.inner, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.inner, c.width, bias=c.mlp_bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = LlamaAttention(c)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)
        self.mlp = LlamaMLP(c)

    def forward(self, x, rotation, *where):  # of attention: mask, store, packing
        x = x + self.self_attn(self.input_layernorm(x), rotation, *where)
        return x + self.mlp(self.post_attention_layernorm(x))


def embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding (rows, width) without its initialisation, whose imports on the meta device take a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Decoder(nn.Module):
    """A decoder-only language model whose output is its last hidden state; the prediction head is applied separately.

    `embed.weight` (V, D) are the token embeddings, `head_weight` (V, D) the prediction head (the same tensor if tied),
    `config` the Hugging Face config it came from, `limit` the number of positions. If `recompute` is set, only the
    input of each block is kept, and the backward pass runs the block again (activation checkpointing; same dropout).
    """

    def __init__(self, config: dict):
        super().__init__()
        c = read_config(config)
        gpt2 = c.family == "gpt2"
        self.config, self.limit, self.windows, self.recompute = copy.deepcopy(config), c.limit, c.windows, False
        self.embed = embedding(c.vocab_size, c.width)
        self.positions = embedding(c.limit, c.width) if gpt2 else None
        self.rotary = None if gpt2 else Rotary(*c.rotary)
        self.dropout = nn.Dropout(c.embd_dropout if gpt2 else 0.0)
        self.blocks = nn.ModuleList((GPT2Block if gpt2 else LlamaBlock)(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.eps) if gpt2 else RMSNorm(c.width, c.eps)
        self.lm_head = None if c.tied else nn.Linear(c.width, c.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., D) -> (..., V)"""
        return F.linear(hidden, self.head_weight)

    def decode(self, tokens: torch.Tensor, cache: "KVCache") -> torch.Tensor:
        """One more token per sequence, tokens (B,) -> the logits of what comes next (B, V)."""
        hidden = self(tokens[:, None], cache=cache)[:, -1]  # (B, D)
        cache.lengths += 1
        return self.logits(hidden)

    def forward(
        self, input_ids: torch.Tensor, cache: "KVCache | None" = None, real: torch.Tensor | None = None
    ) -> torch.Tensor:
        """input_ids (B, T) -> hidden states after the final norm (B, T, D).

        Padding belongs on the right, where causality hides it from every real token, so no mask is needed; the states
        at padded positions have no meaning. Raises ValueError for more tokens than positions.
        real (P,): the positions of all real tokens in the flattened (B·T), ascending. If given, at most attention is
        computed at the other positions, and their states are 0.
        """
        T = input_ids.size(1)
        if T > self.limit:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's {self.limit} positions: shorten it")
        if cache is not None and cache.slots:  # decoding: one more token per sequence, each at its own position
            positions, n_keys = cache.lengths[:, None], cache.slots  # (B, 1)
        else:
            positions, n_keys = torch.arange(T, device=input_ids.device)[None], T  # (1, T)

        masks = {window: causal_mask(positions, n_keys, window) for window in set(self.windows)}
        packing = None if real is None else Packing(real, input_ids)
        if packing is not None:
            input_ids, positions = packing.pack(input_ids), (real % T)[None]  # (1, P)

        x = self.embed(input_ids)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(positions)
        x = self.dropout(x)
        rotation = None if self.rotary is None else self.rotary(positions)
        for layer, (block, window) in enumerate(zip(self.blocks, self.windows, strict=True)):
            store = None if cache is None else partial(cache.store, layer)
            where = rotation, masks[window], store, packing
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, *where, use_reentrant=False)
            else:
                x = block(x, *where)
        x = self.norm(x)
        return x if packing is None else packing.pad(x)


def hidden_at(m: nn.Module, side) -> torch.Tensor:
    """The hidden states at a batch's response positions (data.ModelBatch): (R, D)."""
    return m(side.input_ids, real=side.real).flatten(0, 1)[side.positions]


def causal_mask(positions: torch.Tensor, n_keys: int, window: int | None) -> torch.Tensor | None:
    """(B or 1, 1, T, S), True where the query at positions (B or 1, T) sees key s: itself and up to window - 1 before;
    None where that is the plain causal triangle, which needs no mask."""
    if positions.size(1) == n_keys and (window is None or window >= n_keys):
        return None
    back = positions[:, None, :, None] - torch.arange(n_keys, device=positions.device)  # how far back the key lies
    return back >= 0 if window is None else (back >= 0) & (back < window)


# ---------------------------------------------------------------------------------------------------------------------
# config.json: GPT-2's and LLaMA's names for the same things

# The fields that are used, with transformers' defaults.
REQUIRED = object()
_ROPE = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None, "original_max_position_embeddings": None}
_LLAMA = {"vocab_size": REQUIRED, "max_position_embeddings": REQUIRED, "hidden_size": REQUIRED,
          "intermediate_size": REQUIRED, "num_hidden_layers": REQUIRED, "num_attention_heads": REQUIRED,
          "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6,
          "attention_dropout": 0.0, "tie_word_embeddings": False, "initializer_range": 0.02, **_ROPE}  # fmt: skip
_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
FIELDS = {
    "gpt2": {"vocab_size": REQUIRED, "n_positions": REQUIRED, "n_embd": REQUIRED, "n_layer": REQUIRED,
             "n_head": REQUIRED, "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
             "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "tie_word_embeddings": True,
             "initializer_range": 0.02},
    "llama": {**_LLAMA, "attention_bias": False, "mlp_bias": False},
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096, "layer_types": None},
    "qwen2": {**_LLAMA, "num_key_value_heads": 32, **_WINDOWS},
    "qwen3": {**_LLAMA, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, **_WINDOWS},
}  # fmt: skip

# The fields that each kind of rotary scaling uses. "dynamic" scaling starts beyond the positions that a model has here.
ROPE = {"default": (), "dynamic": (), "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
                 "mscale_all_dim", "truncate")}  # fmt: skip


def read_fields(config: dict) -> SimpleNamespace:
    """The fields of the family's table, with the default in place of null, and all others unchanged."""
    nullable = "num_key_value_heads", "head_dim", "sliding_window"  # for these, null has its own meaning
    given = {field: value for field, value in config.items() if value is not None or field in nullable}
    return SimpleNamespace(**{**FIELDS[config["model_type"]], **given})


def read_config(config: dict) -> SimpleNamespace:
    """What the model needs from a Hugging Face config, which is not checked here (see runtime/strict.py)."""
    f, family = read_fields(config), config["model_type"]
    if family == "gpt2":
        c = SimpleNamespace(width=f.n_embd, layers=f.n_layer, heads=f.n_head, kv_heads=f.n_head, limit=f.n_positions,
                            head_dim=f.n_embd // f.n_head, inner=f.n_inner or 4 * f.n_embd, eps=f.layer_norm_epsilon,
                            activation=f.activation_function, embd_dropout=f.embd_pdrop, attn_dropout=f.attn_pdrop,
                            resid_dropout=f.resid_pdrop, windows=[None] * f.n_layer)  # fmt: skip
    else:
        bias = "attention_bias" in FIELDS[family] and f.attention_bias
        c = SimpleNamespace(width=f.hidden_size, layers=f.num_hidden_layers, heads=f.num_attention_heads,
                            kv_heads=f.num_key_value_heads or f.num_attention_heads, limit=f.max_position_embeddings,
                            head_dim=f.head_dim or f.hidden_size // f.num_attention_heads, inner=f.intermediate_size,
                            eps=f.rms_norm_eps, activation=f.hidden_act, attn_dropout=f.attention_dropout,
                            qkv_bias=bias or family == "qwen2", out_bias=bias, qk_norm=family == "qwen3",
                            mlp_bias=family == "llama" and f.mlp_bias, windows=read_windows(f, family),
                            rotary=rotary_frequencies(f))  # fmt: skip
    c.family, c.vocab_size, c.tied, c.init_std = family, f.vocab_size, f.tie_word_embeddings, f.initializer_range
    return c


def read_windows(f: SimpleNamespace, family: str) -> list[int | None]:
    """How many tokens a query of each layer sees, itself included; None for all."""
    if family == "llama":
        return [None] * f.num_hidden_layers
    begin = 0 if family == "mistral" else f.max_window_layers if f.use_sliding_window else f.num_hidden_layers
    slides = [layer >= begin for layer in range(f.num_hidden_layers)]
    kinds = f.layer_types or ["sliding_attention" if sliding else "full_attention" for sliding in slides]
    return [f.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def read_rope(f: SimpleNamespace, rope: dict | None = None) -> dict:
    """{"rope_type", "factor", "rope_theta", ...: all that the kind uses}, from the config or `rope`, one of two forms:
    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes both into `rope_parameters`."""
    rope, length = rope or f.rope_parameters or f.rope_scaling or {}, f.original_max_position_embeddings
    given = {"rope_theta": f.rope_theta or 1e4, "original_max_position_embeddings": length or f.max_position_embeddings}
    given |= {field: value for field, value in rope.items() if value is not None}
    given["truncate"] = rope.get("truncate", True)  # the one field whose null is not its default
    kind = given.get("rope_type") or given.get("type") or "default"
    return {"rope_type": kind, "factor": 1.0} | {field: given.get(field) for field in ("rope_theta", *ROPE[kind])}


def rotary_frequencies(f: SimpleNamespace) -> tuple[torch.Tensor, float]:
    """θ^(-2i/head_dim), (head_dim / 2,) float32, with long-context scaling, and the factor of cosine and sine."""
    rope, head_dim = SimpleNamespace(**read_rope(f)), f.head_dim or f.hidden_size // f.num_attention_heads
    pair = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")  # real values, even for a meta model
    inverse = 1.0 / rope.rope_theta ** (2 * pair / head_dim)
    factor, keep, scale = rope.factor, 0.0, 1.0  # slow waves are stretched by `factor`, fast ones kept
    if rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * inverse / (2 * math.pi)  # in the original context
        keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    elif rope.rope_type == "yarn":  # interpolates by the index of the pair (arXiv 2309.00071, section 3)
        length, turns = rope.original_max_position_embeddings, (rope.beta_fast or 32, rope.beta_slow or 1)
        factor = factor or f.max_position_embeddings / length
        first, last = (head_dim / 2 * math.log(length / (2 * math.pi * n), rope.rope_theta) for n in turns)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        keep = 1 - ((pair - first) / (last - first or 0.001)).clamp(0, 1)
        both = (rope.mscale, rope.mscale_all_dim) if rope.mscale and rope.mscale_all_dim else (1, 0)
        above, below = (1 + 0.1 * mscale * math.log(max(factor, 1)) for mscale in both)
        scale = above / below if rope.attention_factor is None else rope.attention_factor
    return (1 - keep) * inverse / factor + keep * inverse, scale


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

# Hugging Face's names for our modules. Modules inside a block already have these names.
GPT2_NAMES = {"embed": "transformer.wte", "positions": "transformer.wpe", "blocks": "transformer.h",
              "norm": "transformer.ln_f", "lm_head": "lm_head"}  # fmt: skip
LLAMA_NAMES = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm", "lm_head": "lm_head"}
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip
# GPT-2's checkpoints store these weights as [in, out], but nn.Linear needs [out, in].
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def hugging_face_names(m: Decoder) -> dict[str, str]:
    """{our parameter name: its name in a Hugging Face checkpoint}"""
    names = GPT2_NAMES if m.config["model_type"] == "gpt2" else LLAMA_NAMES
    parts = (ours.split(".", 1) for ours, _ in m.named_parameters())
    return {f"{module}.{rest}": f"{names[module]}.{rest}" for module, rest in parts}


def build_model(config: dict, device="cpu") -> Decoder:
    """A randomly initialised model for a Hugging Face config: N(0, initializer_range), biases 0, norms 1. GPT-2's
    projections into the residual stream are divided by √(2 layers), as in the original. Seed with torch.manual_seed."""
    with torch.device("meta"):  # skip torch's own initialisation
        m = Decoder(config)
    m.to_empty(device=device)
    c = read_config(config)
    for name, parameter in m.named_parameters():
        if parameter.dim() == 2:
            residual = c.family == "gpt2" and name.endswith("c_proj.weight")
            nn.init.normal_(parameter, std=c.init_std / math.sqrt(2 * c.layers) if residual else c.init_std)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return m


def load_model(path, dtype: torch.dtype = torch.float32, device="cpu", body: bool = True) -> Decoder:
    """Read a Hugging Face directory (config.json with model.safetensors, or its index and shards), in eval mode.

    Weights are converted to dtype one tensor at a time, so the peak memory is the model itself. Without `body`, only
    embedding and head are read and kept: such a model cannot be called. Raises FileNotFoundError for missing files,
    ValueError for weights that are NaN or infinite, RuntimeError for tensors that are missing or do not fit.
    """
    with torch.device("meta"):
        m = Decoder(read_json(Path(path) / "config.json"))
    if not body:
        m.blocks, m.positions, m.rotary, m.norm = nn.ModuleList(), None, None, None
    # a copy, because safetensors maps its tensors from the file, and they would change with it; contiguous, even if the
    # file has the transposed matrix, because FSDP2 shards only contiguous ones
    layout = {"copy": True, "memory_format": torch.contiguous_format}
    weights = {name: tensor.to(device, dtype, **layout) for name, tensor in read_tensors(m, path)}
    m.load_state_dict(weights, assign=True)
    return m.to(device).eval()  # all that is left to move is the rotary table


def find_tensors(m: Decoder, path) -> dict[Path, dict[str, str | None]]:
    """{file: {name of a tensor in it: our parameter's name, None if m has none for it}}, in a checkpoint's order."""
    ours, found = {theirs: name for name, theirs in hugging_face_names(m).items()}, {}
    ours |= {theirs.partition(".")[2]: name for theirs, name in ours.items() if name != "lm_head.weight"}
    for file in checkpoint_files(Path(path)):
        with safe_open(file, framework="pt") as tensors:  # names in a model saved without its head have no prefix
            found[file] = {theirs: ours.get(theirs) for theirs in tensors.keys()}
    if m.lm_head is None and not any("embed.weight" in names.values() for names in found.values()):
        for names in found.values():  # of a tied pair, safetensors' own save_model keeps the first name
            names |= {theirs: "embed.weight" for theirs in names if theirs == "lm_head.weight"}
    return found


def read_tensors(m: Decoder, path):
    """Yield (our parameter name, tensor in our layout, mapped from the file) for each tensor that is a parameter of m,
    in the order of the checkpoint's files. Raises ValueError for weights that are NaN or infinite."""
    for file, names in find_tensors(m, path).items():
        with safe_open(file, framework="pt") as tensors:
            for theirs, name in ((theirs, name) for theirs, name in names.items() if name is not None):
                tensor = tensors.get_tensor(theirs)
                if not torch.stack(tensor.aminmax()).isfinite().all():  # takes a tenth of the time of copying it
                    raise ValueError(f"{file}: {theirs} has weights that are NaN or infinite: the file is damaged")
                yield name, tensor.mT if TRANSPOSED.search(name) else tensor


def read_json(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; expected a Hugging Face directory: config.json and "
                                "model.safetensors (or model.safetensors.index.json and its shards)")  # fmt: skip
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content


def checkpoint_files(path: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory: the single file or else the shards of the index."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    return [single] if single.is_file() else [path / x for x in sorted(set(read_json(index)["weight_map"].values()))]


def save_model(m: Decoder, path) -> None:
    """Write config.json and model.safetensors for transformers' (and our) loader; a tied head is written only once.

    Each file is written under another name and then renamed, so a crash leaves the old file or the new one. The dtype
    is the parameters', and config.json states it. Raises ValueError for a model with adapters: merge them first.
    """
    path = Path(path)
    with torch.device("meta"):
        names = hugging_face_names(Decoder(m.config))
    parameters = dict(m.named_parameters())
    extra = sorted(parameters.keys() ^ names.keys())[:4]
    if extra:
        raise ValueError(f"save_model: not a plain model, parameters {extra} differ: merge adapters before saving")
    tensors = {name: parameters[ours].detach() for ours, name in names.items()}
    tensors = {name: (x.mT if TRANSPOSED.search(name) else x).contiguous() for name, x in tensors.items()}
    config = {**m.config, "architectures": [ARCHITECTURES[m.config["model_type"]]]}
    config["dtype" if "dtype" in config else "torch_dtype"] = str(m.embed.weight.dtype).removeprefix("torch.")

    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(path / "model.safetensors.tmp", path / "model.safetensors")
    (path / "config.json.tmp").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(path / "config.json.tmp", path / "config.json")


# ---------------------------------------------------------------------------------------------------------------------
# Generation


class KVCache:
    """Keys and values of all tokens so far: a buffer per layer, filled at each sequence's own pace.

    The first forward pass stores right-padded prompts from slot 0; every later one stores one token per sequence, at
    slot `lengths[b]`. The padding in later slots is overwritten before any query may look at it. The buffers grow by
    STEP slots when they are full, and are read as a whole, because on a CPU a product with a part of one copies it.
    """

    STEP = 64

    def __init__(self, prompt_lengths: torch.Tensor):
        self.lengths = prompt_lengths.clone()  # (B,) tokens stored per sequence, once the prompts are in
        self.rows = torch.arange(len(prompt_lengths), device=prompt_lengths.device)
        self.slots = 0
        self.buffers: list[torch.Tensor] = []  # per layer (2, B, kv_heads, slots, head_dim): keys, values

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new k, v (B, kv_heads, T, head_dim); return what the new queries may attend to."""
        if layer == len(self.buffers):  # prompts
            self.slots = -(-k.size(2) // self.STEP) * self.STEP
            self.buffers.append(F.pad(torch.stack([k, v]), (0, 0, 0, self.slots - k.size(2))))
            return k, v
        keys, values = self.buffers[layer]
        keys[self.rows, :, self.lengths] = k[:, :, 0]
        values[self.rows, :, self.lengths] = v[:, :, 0]
        return keys, values

    def make_room(self, tokens: int) -> None:
        """Make room for sequences of up to this length. A longer sequence has finished, and idles in the last slot."""
        self.lengths.clamp_(max=tokens - 1)
        more = -(-tokens // self.STEP) * self.STEP - self.slots
        if more > 0:
            self.slots += more
            for layer, buffer in enumerate(self.buffers):
                self.buffers[layer] = F.pad(buffer, (0, 0, 0, more))

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all sequences but these."""
        self.lengths, self.rows = self.lengths[rows], self.rows[: len(rows)]
        for layer, buffer in enumerate(self.buffers):  # one at a time: the peak is one layer's copy
            self.buffers[layer] = buffer[:, rows]


def sample(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, generator=None) -> torch.Tensor:
    """One token id per row of logits (B, V) -> (B,): greedy at temperature 0, else from softmax(logits / temperature).

    top_k > 0 keeps the k likeliest tokens; top_p < 1 then keeps the fewest likeliest tokens that hold that much mass.
    -1 for a row whose logits are not finite, because raising an error here would mean one more wait for the device.
    """
    logits = logits.float()
    if temperature == 0:
        largest, token = logits.max(-1)
        return token.masked_fill(~largest.isfinite(), -1)
    logits = logits / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    spoilt = probabilities[:, 0].isnan()  # one logit that is inf or nan makes its whole row nan
    if top_p < 1:
        likeliest, ids = probabilities.sort(dim=-1, descending=True)
        before = likeliest.cumsum(-1) - likeliest  # mass of all likelier tokens
        likeliest = likeliest.masked_fill(before >= top_p, 0.0)  # the first has 0 before it: one is always kept
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, likeliest)
    # the first token whose cumulative mass exceeds a uniform draw: one random number per row; multinomial needs V
    mass = probabilities.cumsum(-1)
    whole = mass[:, -1:]
    draw = torch.rand(len(mass), 1, generator=generator, device=mass.device) * whole
    below = torch.nextafter(whole, torch.zeros_like(whole))  # so that even a draw that was rounded up finds a token
    return torch.searchsorted(mass, draw.minimum(below), right=True).squeeze(-1).masked_fill(spoilt, -1)


@torch.no_grad()
def generate(
    m: Decoder, prompts, max_new_tokens, eos_id, temperature=1.0, top_k=0, top_p=1.0, seed=None, vocabulary=None
) -> list[list[int]]:
    """Continue each prompt (a non-empty list of token ids, any lengths): the new ids only, a final eos_id included.

    A sequence ends at eos_id (one id, several any of which ends it, or None: never), after max_new_tokens (a number, or
    one per prompt), or when prompt and new ids fill all positions. Only ids below `vocabulary` are drawn (None: all
    rows of the head, also those that pad it). temperature 0 is greedy; seed=None draws from torch's global generator.
    Greedy results do not depend on the batch; sampled ones do, because a seed fixes the draws of the batch as a whole.
    Raises ValueError for impossible arguments, FloatingPointError for logits that are not finite.
    """
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= m.limit or not 0 <= min(prompt) <= max(prompt) < len(m.embed.weight):
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens; it needs 1 to {m.limit} (end-of-text "
                             f"will do), with ids below the vocabulary's {len(m.embed.weight)}")  # fmt: skip
    least = min([temperature, top_k, *max_new_tokens])
    if len(max_new_tokens) != len(prompts) or least < 0 or not 0 < top_p <= 1:
        raise ValueError("generate: max_new_tokens (one number, or one per prompt), temperature and top_k must be >= 0 "
                         f"and 0 < top_p <= 1; got {max_new_tokens}, {temperature}, {top_k} and {top_p}")  # fmt: skip
    ends = {eos_id} if eos_id is None or isinstance(eos_id, int) else set(eos_id)
    device = m.embed.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    outputs = [[] for _ in prompts]
    budget = [min(most, m.limit - len(prompt)) for most, prompt in zip(max_new_tokens, prompts, strict=True)]
    if not (rows := [i for i in range(len(prompts)) if budget[i] > 0]):  # the prompts in the batch
        return outputs
    was_training = m.training
    m.eval()
    try:
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i in rows], device=device)  # (B, T)
        real = [row * longest + at for row, i in enumerate(rows) for at in range(len(prompts[i]))]
        lengths = torch.tensor([len(prompts[i]) for i in rows], device=device)  # (B,)
        cache = KVCache(lengths)
        hidden = m(ids, cache=cache, real=torch.tensor(real, device=device))  # (B, T, D)
        logits = m.logits(hidden[torch.arange(len(rows), device=device), lengths - 1])  # (B, V)
        while True:
            tokens = sample(logits[:, :vocabulary], temperature, top_k, top_p, generator)  # (B,)
            drawn = tokens.tolist()  # the one wait for the device
            if min(drawn) < 0:
                raise FloatingPointError("sample: the logits are not finite, so no token can be drawn")
            for i, token in zip(rows, drawn, strict=True):
                if budget[i] > 0:
                    outputs[i].append(token)
                    budget[i] = 0 if token in ends else budget[i] - 1
            alive = [row for row, i in enumerate(rows) if budget[i] > 0]
            if not alive:
                return outputs
            if len(alive) <= 0.75 * len(rows):  # compacting copies the cache, so wait until it pays
                kept = torch.tensor(alive, device=device)
                cache.keep(kept)
                tokens, rows = tokens[kept], [rows[row] for row in alive]
            cache.make_room(max(len(prompts[i]) + len(outputs[i]) for i in rows))
            logits = m.decode(tokens, cache)
    finally:
        m.train(was_training)
