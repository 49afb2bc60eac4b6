"""GPT-2 and LLaMA-style decoders in plain PyTorch: read, written and sampled from Hugging Face directories.

One file, no imports but torch and safetensors. `Decoder` is the whole model; a GPT-2 and a LLaMA block fill it:

    load_model / build_model / save_model    checkpoints in, random models, checkpoints out (transformers reads them)
    Decoder                                  token ids -> hidden states -> logits; hidden states are what gets distilled
    generate / sample                        batched generation with a key-value cache

    >>> config = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    >>> m = build_model(config)
    >>> hidden = m(torch.tensor([[1, 2, 3]]))
    >>> hidden.shape, m.logits(hidden).shape, m.head_weight.shape
    (torch.Size([1, 3, 8]), torch.Size([1, 3, 64]), torch.Size([64, 8]))
    >>> [len(new) for new in generate(m, [[1, 2, 3], [4]], max_new_tokens=5, eos_id=None)]
    [5, 5]

Families (config.json's model_type): gpt2; llama (Llama 1 to 3.x, TinyLlama, SmolLM2); mistral; qwen2 (Qwen1.5 to 2.5);
qwen3. A config field or a tensor that is not understood is an error that names it. Not here: quantised weights,
mixture of experts, YaRN and dynamic rotary scaling, cross-attention, pickled (.bin) checkpoints.

Shapes: B batch, T sequence, S keys attended to, D width, V vocabulary.
"""

import copy
import json
import math
import os
import re
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# config.json: every field is either used, known to be harmless, or required to have the one value that we implement

# The fields used, with transformers' defaults.
REQUIRED = object()
_ROPE = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None}
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
    "mistral": {**_LLAMA, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {**_LLAMA, "num_key_value_heads": 32, **_WINDOWS},
    "qwen3": {**_LLAMA, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, **_WINDOWS},
}  # fmt: skip

# What the value of a field must be: a type, and the least and the most of a number. The most is far above any real
# model's; it keeps a slip of the pen from asking for terabytes or hours.
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list",
         dict: "an object"}  # fmt: skip
VALUES = {field: rule for fields, *rule in [
    ("n_layer num_hidden_layers", int, 1, 2**10),
    ("n_embd n_head n_inner hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
     "max_window_layers", int, 1, 2**20),
    ("vocab_size n_positions max_position_embeddings original_max_position_embeddings sliding_window", int, 1, 2**24),
    ("embd_pdrop attn_pdrop resid_pdrop attention_dropout layer_norm_epsilon rms_norm_eps", float, 0, 1),
    ("initializer_range", float, 0, 100),
    ("rope_theta factor low_freq_factor high_freq_factor", float, 1e-3, 1e15),
    ("tie_word_embeddings attention_bias mlp_bias use_sliding_window", bool, 0, 1),
    ("activation_function hidden_act", str), ("layer_types", list), ("rope_scaling rope_parameters", dict),
] for field in fields.split()}  # fmt: skip
NULLABLE = {"attention_dropout", "num_key_value_heads", "head_dim", "sliding_window"}  # and those with the default None

# Fields that would change the computation, with the only values implemented (unless the family's table has the field).
ONLY = {"scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False], "reorder_and_upcast_attn": [False],
        "add_cross_attention": [False], "is_encoder_decoder": [False], "is_decoder": [False, True],
        "attention_bias": [False], "mlp_bias": [False], "sliding_window": [None], "use_sliding_window": [False],
        "rope_interleaved": [False], "use_mrope": [False], "pruned_heads": [None, {}], "partial_rotary_factor": [1.0],
        "chunk_size_feed_forward": [0], "tie_encoder_decoder": [False]}  # fmt: skip

# Fields about other software, other heads or defaults of generation: they do not touch the hidden states or the head.
HARMLESS = set("""model_type architectures _name_or_path name_or_path transformers_version torch_dtype dtype use_cache
    _attn_implementation _attn_implementation_autoset attn_implementation torchscript use_bfloat16 pretraining_tp
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id unk_token_id tokenizer_class prefix
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout task_specific_params
    output_attentions output_hidden_states output_past return_dict id2label label2id num_labels _num_labels problem_type
    finetuning_task n_ctx n_special predict_special_tokens gradient_checkpointing is_llama_config transformers.js_config
    max_length min_length do_sample temperature top_k top_p repetition_penalty max_sequence_length
    transformers_weights""".split())  # fmt: skip

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def read_config(config: dict, file="config.json") -> SimpleNamespace:
    """What the model needs of a Hugging Face config, GPT-2's names and LLaMA's brought together. Raises ValueError,
    naming `file`."""
    family = config.get("model_type")
    if family not in list(FIELDS):
        raise ValueError(f"{file}: model_type {family!r} is not supported, only {', '.join(FIELDS)}")
    where = f"{file} (model_type {family})"
    for field, default in FIELDS[family].items():
        value = config.get(field, "missing" if default is REQUIRED else default)
        if value is not None or not (default is None or field in NULLABLE):
            check_value(field, value, where)
    for field in sorted(config.keys() - FIELDS[family].keys() - HARMLESS):
        if field not in ONLY:
            raise ValueError(f"{where}: field {field!r} (= {config[field]!r}) is not known; it may change the model")
        if config[field] not in ONLY[field]:
            raise ValueError(f"{where}: {field} = {config[field]!r} is not supported, only {ONLY[field][0]!r}")

    f = SimpleNamespace(**{**FIELDS[family], **config})
    if family == "gpt2":
        c = SimpleNamespace(width=f.n_embd, layers=f.n_layer, heads=f.n_head, kv_heads=f.n_head, limit=f.n_positions,
                            head_dim=f.n_embd // f.n_head, inner=f.n_inner or 4 * f.n_embd, eps=f.layer_norm_epsilon,
                            activation=f.activation_function, embd_dropout=f.embd_pdrop, attn_dropout=f.attn_pdrop,
                            resid_dropout=f.resid_pdrop, windows=[None] * f.n_layer)  # fmt: skip
    else:
        c = SimpleNamespace(width=f.hidden_size, layers=f.num_hidden_layers, heads=f.num_attention_heads,
                            kv_heads=f.num_key_value_heads or f.num_attention_heads, limit=f.max_position_embeddings,
                            head_dim=f.head_dim or f.hidden_size // f.num_attention_heads, inner=f.intermediate_size,
                            eps=f.rms_norm_eps, activation=f.hidden_act, attn_dropout=f.attention_dropout or 0.0,
                            qkv_bias=family == "qwen2" or getattr(f, "attention_bias", False),
                            out_bias=family != "qwen2" and getattr(f, "attention_bias", False),
                            mlp_bias=getattr(f, "mlp_bias", False), qk_norm=family == "qwen3",
                            windows=read_windows(family, f, where),
                            inverse_frequencies=read_rope(f, where))  # fmt: skip
    c.family, c.vocab_size, c.tied, c.init_std = family, f.vocab_size, f.tie_word_embeddings, f.initializer_range
    if c.activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation {c.activation!r} is not supported, only {', '.join(ACTIVATIONS)}")
    if c.heads % c.kv_heads:
        raise ValueError(f"{where}: {c.heads} attention heads cannot share {c.kv_heads} key-value heads")
    if family == "gpt2" and c.width % c.heads:
        raise ValueError(f"{where}: n_embd {c.width} does not divide into {c.heads} heads")
    if family != "gpt2" and c.head_dim % 2:
        raise ValueError(f"{where}: head_dim {c.head_dim} is odd, rotary embedding turns pairs")
    return c


def check_value(field: str, value, where: str) -> None:
    """Raises ValueError unless the value is what VALUES says of the field."""
    kind, *bounds = VALUES[field]
    right = type(value) in ((int, float) if kind is float else (kind,))
    if not right or bounds and not bounds[0] <= value <= bounds[1]:
        between = f" from {bounds[0]} to {bounds[1]}" if bounds and kind is not bool else ""
        raise ValueError(f"{where}: {field} must be {NAMES[kind]}{between}, it is {value!r:.60}")


def read_windows(family: str, f: SimpleNamespace, where: str) -> list[int | None]:
    """How many tokens, itself included, a query of each layer sees; None for all of them."""
    window = getattr(f, "sliding_window", None)
    if family in ("llama", "mistral"):
        return [window] * f.num_hidden_layers
    sliding = [f.use_sliding_window and layer >= f.max_window_layers for layer in range(f.num_hidden_layers)]
    types = f.layer_types
    if types is None:
        types = ["sliding_attention" if s else "full_attention" for s in sliding]
    if len(types) != f.num_hidden_layers or any(t not in ("full_attention", "sliding_attention") for t in types):
        raise ValueError(f"{where}: layer_types must name full_attention or sliding_attention per layer, got {types}")
    if "sliding_attention" in types and not (f.use_sliding_window and window):
        raise ValueError(f"{where}: layer_types has sliding_attention, but use_sliding_window or sliding_window is off")
    return [window if kind == "sliding_attention" else None for kind in types]


def read_rope(f: SimpleNamespace, where: str) -> torch.Tensor:
    """Rotary frequencies θ^(-2i/head_dim), (head_dim / 2,) float32, with linear or Llama-3 long-context scaling.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 both in `rope_parameters`.
    """
    if f.rope_scaling and f.rope_parameters and f.rope_scaling != f.rope_parameters:
        raise ValueError(f"{where}: rope_scaling and rope_parameters contradict each other; keep one")
    rope = dict(f.rope_parameters or f.rope_scaling or {})
    thetas = [theta for theta in (rope.pop("rope_theta", None), f.rope_theta) if theta is not None] or [10000.0]
    theta = thetas[0]
    check_value("rope_theta", theta, where)
    if thetas[-1] != theta:
        raise ValueError(f"{where}: rope_theta {f.rope_theta} and {theta} contradict each other; keep one")
    kind = rope.pop("rope_type", rope.get("type", "default"))
    if rope.get("type") == kind:  # the older name of rope_type
        del rope["type"]
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    fields = {"default": (), "linear": ("factor",), "llama3": llama3}.get(str(kind))
    if fields is None:
        raise ValueError(f"{where}: rotary scaling rope_type {kind!r} is not supported, only default, linear, llama3")
    if set(rope) != set(fields):
        raise ValueError(f"{where}: rotary scaling {kind!r} needs the fields {list(fields)}, got {sorted(rope)}")
    for field in fields:
        check_value(field, rope[field], where)
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ValueError(f"{where}: rotary scaling 'llama3' needs a low_freq_factor below its high_freq_factor")

    head_dim = f.head_dim or f.hidden_size // f.num_attention_heads
    # device="cpu": a model that is being built on the meta device still needs real numbers here
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if kind == "linear":
        inverse = inverse / rope["factor"]
    elif kind == "llama3":  # slow waves are stretched by `factor`, fast ones are kept, those between interpolate
        turns = rope["original_max_position_embeddings"] * inverse / (2 * math.pi)  # in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inverse = (1 - keep) * inverse / rope["factor"] + keep * inverse
    return inverse


# ---------------------------------------------------------------------------------------------------------------------
# The blocks. Module names inside a block are those of the Hugging Face checkpoint.


class KVCache:
    """Keys and values of all tokens so far: two buffers per layer, filled at each sequence's own pace.

    The first forward pass stores right-padded prompts from slot 0; every later one stores one token per sequence, at
    slot `lengths[b]`. What padding left in later slots is overwritten before any query may look at it. The buffers grow
    by STEP slots when they are full, and are read as a whole: on a CPU, products with a part of a buffer copy it first.
    """

    STEP = 64

    def __init__(self, prompt_lengths: torch.Tensor):
        self.lengths = prompt_lengths  # (B,) tokens stored per sequence, once the prompts are in
        self.slots = 0
        self.keys: list[torch.Tensor] = []  # per layer (B, kv_heads, slots, head_dim)
        self.values: list[torch.Tensor] = []

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new k, v (B, kv_heads, T, head_dim); return what the new queries may attend to."""
        if layer == len(self.keys):  # prompts
            self.slots = -(-k.size(2) // self.STEP) * self.STEP
            for new, buffers in ((k, self.keys), (v, self.values)):
                buffers.append(F.pad(new, (0, 0, 0, self.slots - new.size(2))))
            return k, v
        rows = torch.arange(len(k), device=k.device)
        self.keys[layer][rows, :, self.lengths] = k[:, :, 0]
        self.values[layer][rows, :, self.lengths] = v[:, :, 0]
        return self.keys[layer], self.values[layer]

    def make_room(self, tokens: int) -> None:
        """For sequences of up to this length. One that is longer has finished, and runs idle in the last slot."""
        self.lengths = self.lengths.clamp(max=tokens - 1)
        more = -(-tokens // self.STEP) * self.STEP - self.slots
        if more > 0:
            self.slots += more
            for buffers in (self.keys, self.values):
                for layer in range(len(buffers)):
                    buffers[layer] = F.pad(buffers[layer], (0, 0, 0, more))

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all sequences but these."""
        self.lengths = self.lengths[rows]
        for buffers in (self.keys, self.values):
            for layer in range(len(buffers)):  # one at a time: the peak is one layer's copy
                buffers[layer] = buffers[layer][rows]


def keep_mask(x: torch.Tensor, p: float) -> torch.Tensor:
    """What dropout keeps of x on a CPU: True with probability 1 − p, to 1/65536. 16 random bits an element take a tenth
    of the time of `bernoulli_`, which is several per cent of a training step."""
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return bits[: x.numel()].view(x.shape) >= round(p * 2**16) - 2**15


class Dropout(nn.Dropout):
    """nn.Dropout, faster on a CPU."""

    def forward(self, x):
        if self.training and 0 < self.p < 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return x * keep_mask(x, self.p) * (1 / (1 - self.p))
        return super().forward(x)


class DropoutAttention(torch.autograd.Function):
    """F.scaled_dot_product_attention(..., dropout_p=dropout, is_causal=True) within each sequence, for CPUs. Those have
    no fused kernel with dropout: SDPA makes several (T, T) matrices per head and keeps them for the backward pass, half
    the memory of a training GPT-2. Here `rows` queries at a time see the keys up to their own; nothing is made above
    the diagonal.

    q, k, v (N, heads, head_dim), sequences of these lengths one after another -> the same: y = (P ∘ keep) v /
    (1 − dropout) with P = softmax(q kᵀ / √head_dim).
    """

    @staticmethod
    def forward(ctx, q, k, v, lengths, dropout, rows=128):
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q * q.size(-1) ** -0.5, k, v))  # (heads, N, head_dim)
        y, blocks, saved, first = torch.empty_like(v), [], [], 0
        for length in lengths:
            for start in range(0, length, rows):
                seen = slice(first, first + min(start + rows, length))
                at = slice(first + start, seen.stop)
                scores = q[:, at] @ k[:, seen].mT  # (heads, rows, seen)
                later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + start)
                p = scores.masked_fill_(later, -torch.inf).softmax(-1)
                keep = keep_mask(p, dropout)
                y[:, at] = (p * keep) @ v[:, seen]
                blocks.append((at, seen))
                saved += p, keep
            first += length
        ctx.save_for_backward(q, k, v, *saved)
        ctx.blocks, ctx.kept = blocks, 1 / (1 - dropout)
        return y.mul_(ctx.kept).transpose(0, 1)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *saved = ctx.saved_tensors
        dy = dy.transpose(0, 1) * ctx.kept
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (at, seen), p, keep in zip(ctx.blocks, saved[::2], saved[1::2], strict=True):
            dv[:, seen] += (p * keep).mT @ dy[:, at]
            dp = (dy[:, at] @ v[:, seen].mT).mul_(keep)
            dp -= (p * dp).sum(-1, keepdim=True)
            ds = dp.mul_(p)  # through the softmax: p·(dp − Σ p dp)
            dq[:, at] = ds @ k[:, seen]
            dk[:, seen] += ds.mT @ q[:, at]
        return (dq * q.size(-1) ** -0.5).transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1), None, None, None


class Packing:
    """Sequences of a padded batch without the padding, one after another: what every layer but attention works on."""

    def __init__(self, real: torch.Tensor, shape: tuple[int, int]):
        self.real, self.shape = real, shape  # (N,) the positions of real tokens in the flattened batch; its (B, T)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) -> (1, N, ...)"""
        return x.flatten(0, 1).index_select(0, self.real)[None]

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(1, N, ...) -> (B, T, ...), zeros at the padding"""
        B, T = self.shape
        return x.new_zeros(B * T, *x.shape[2:]).index_copy(0, self.real, x[0]).unflatten(0, (B, T))

    @cached_property
    def lengths(self) -> list[int]:
        return torch.bincount(self.real // self.shape[1], minlength=self.shape[0]).tolist()


def attend(q, k, v, layer: int, mask, cache: KVCache | None, packing: Packing | None, dropout: float) -> torch.Tensor:
    """softmax(q kᵀ / √head_dim) v, causal. q (B, T, heads, head_dim), k and v (B, T, kv_heads, head_dim) -> (B, T, ·);
    with a packing (1, N) in the place of (B, T), in and out.

    mask (B or 1, 1, T, S) is True where a query may look; None means plain causal, which the fused kernels know.
    """
    on_cpu = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and 0 < dropout < 1 and mask is None and q.size(2) == k.size(2):
        lengths = [q.size(1)] * q.size(0) if packing is None else packing.lengths
        y = DropoutAttention.apply(*(x.flatten(0, 1) for x in (q, k, v)), lengths, dropout)  # (N, heads, head_dim)
        return y.flatten(1).unflatten(0, q.shape[:2])
    if packing is not None:
        y = attend(*map(packing.pad, (q, k, v)), layer, mask, cache, None, dropout)
        return packing.pack(y)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads or kv_heads, T, head_dim)
    if cache is not None:
        k, v = cache.store(layer, k, v)  # (B, kv_heads, S, head_dim)
    B, heads, T, head_dim = q.shape
    groups = heads // k.size(1)  # query heads that share a key-value head
    if T == 1 and mask is not None:  # decoding: the group's heads act as more queries, no copy of k, v
        q = q.reshape(B, -1, groups, head_dim)
        if q.is_cuda:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:  # the CPU's kernel is made for many queries; with one, and in bf16, it takes four times as long as this
            scores = (q * head_dim**-0.5 @ k.mT).masked_fill(~mask, -torch.inf)
            y = scores.softmax(-1).to(v.dtype) @ v
        return y.reshape(B, 1, heads * head_dim)
    if groups > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # of CUDA's fast kernels only flash attention shares heads by itself; it takes no mask and no float32
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=groups > 1
    )
    return y.transpose(1, 2).flatten(2)  # (B, heads, T, head_dim) -> (B, T, heads * head_dim)


class GPT2Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.attn_dropout = c.heads, c.attn_dropout
        self.c_attn = nn.Linear(c.width, 3 * c.width)
        self.c_proj = nn.Linear(c.width, c.width)
        self.dropout = Dropout(c.resid_dropout)

    def forward(self, x, layer, *where):
        q, k, v = self.c_attn(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # 3 x (B, T, heads, head_dim)
        y = attend(q, k, v, layer, *where, self.attn_dropout if self.training else 0.0)
        return self.dropout(self.c_proj(y))


class GPT2MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.width, c.inner)
        self.c_proj = nn.Linear(c.inner, c.width)
        self.activation = ACTIVATIONS[c.activation]
        self.dropout = Dropout(c.resid_dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class GPT2Block(nn.Module):
    def __init__(self, c, layer: int):
        super().__init__()
        self.layer = layer
        self.ln_1 = nn.LayerNorm(c.width, eps=c.eps)
        self.attn = GPT2Attention(c)
        self.ln_2 = nn.LayerNorm(c.width, eps=c.eps)
        self.mlp = GPT2MLP(c)

    def forward(self, x, rotation, *where):  # of attention: mask, cache, packing
        x = x + self.attn(self.ln_1(x), self.layer, *where)
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

    def __init__(self, inverse_frequencies: torch.Tensor):
        super().__init__()
        self.exact = inverse_frequencies
        self.register_buffer("inverse_frequencies", inverse_frequencies.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # .to(), .bfloat16(), ... move the table with the model, but must not round it
        self.inverse_frequencies = self.exact.to(self.inverse_frequencies.device)
        return self

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine (B or 1, T, 1, head_dim / 2) in float32, for positions (B or 1, T); once for all layers."""
        angles = (positions[..., None].float() * self.inverse_frequencies).unsqueeze(2)
        return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn x (B, T, heads, head_dim); in float32, rounded once by the caller."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class LlamaAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, self.attn_dropout = c.head_dim, c.attn_dropout
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.eps)
            self.k_norm = RMSNorm(c.head_dim, c.eps)
        self.qk_norm = c.qk_norm

    def forward(self, x, layer, rotation, *where):
        q, k, v = (
            project(x).unflatten(2, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, T, heads, head_dim), k and v with kv_heads
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
        return self.o_proj(attend(q, k, v, layer, *where, self.attn_dropout if self.training else 0.0))


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
    def __init__(self, c, layer: int):
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(c.width, c.eps)
        self.self_attn = LlamaAttention(c)
        self.post_attention_layernorm = RMSNorm(c.width, c.eps)
        self.mlp = LlamaMLP(c)

    def forward(self, x, rotation, *where):  # of attention: mask, cache, packing
        x = x + self.self_attn(self.input_layernorm(x), self.layer, rotation, *where)
        return x + self.mlp(self.post_attention_layernorm(x))


def embedding(rows: int, width: int) -> nn.Embedding:
    """nn.Embedding, (rows, width), without its initialisation: for that torch imports a second's worth on the meta
    device."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class Decoder(nn.Module):
    """A decoder-only language model whose output is its last hidden state; the prediction head is applied on its own.

    `embed.weight` (V, D) are the token embeddings, `head_weight` (V, D) the prediction head (the same tensor if tied),
    `config` the Hugging Face config it came from, `limit` the number of positions. `recompute`, which may be set: keep
    of each block its input alone, and run it again in the backward pass (activation checkpointing; the same dropout).
    """

    def __init__(self, config: dict):
        super().__init__()
        c = read_config(config)
        gpt2 = c.family == "gpt2"
        self.config, self.limit, self.windows, self.recompute = copy.deepcopy(config), c.limit, c.windows, False
        self.embed = embedding(c.vocab_size, c.width)
        self.positions = embedding(c.limit, c.width) if gpt2 else None
        self.rotary = None if gpt2 else Rotary(c.inverse_frequencies)
        self.dropout = Dropout(c.embd_dropout if gpt2 else 0.0)
        self.blocks = nn.ModuleList((GPT2Block if gpt2 else LlamaBlock)(c, layer) for layer in range(c.layers))
        self.norm = nn.LayerNorm(c.width, eps=c.eps) if gpt2 else RMSNorm(c.width, c.eps)
        self.lm_head = None if c.tied else nn.Linear(c.width, c.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., D) -> (..., V)"""
        return F.linear(hidden, self.head_weight)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        real: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids (B, T) -> hidden states after the final norm (B, T, D).

        Padding belongs on the right, where causality hides it from every real token: attention_mask (B, T) is only
        checked to be of that kind, never used, and None saves the check (on CUDA, a wait for the device). States at
        padded positions mean nothing. Raises ValueError for other masks and for sequences beyond the position limit.
        real (N,): the positions of all real tokens in the flattened (B·T), ascending; given that, nothing but attention
        is computed at the others, and their states are 0.
        """
        T = input_ids.size(1)
        if T > self.limit:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's {self.limit} positions: shorten it")
        if attention_mask is not None and not torch.compiler.is_compiling():
            check_right_padded(attention_mask, input_ids)
        if cache is not None and cache.slots:  # decoding: one more token per sequence, each at its own position
            positions, n_keys = cache.lengths[:, None], cache.slots  # (B, 1)
        else:
            positions, n_keys = torch.arange(T, device=input_ids.device)[None], T  # (1, T)

        masks = {window: causal_mask(positions, n_keys, window) for window in set(self.windows)}
        packing = None if real is None else Packing(real, input_ids.shape)
        if packing is not None:
            input_ids, positions = packing.pack(input_ids), (real % T)[None]  # (1, N)

        x = self.embed(input_ids)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(positions)
        x = self.dropout(x)
        rotation = None if self.rotary is None else self.rotary(positions)
        for block, window in zip(self.blocks, self.windows, strict=True):
            where = rotation, masks[window], cache, packing
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
    """(B or 1, 1, T, S), True where the query at positions (B or 1, T) sees key s: itself and up to window - 1 before.

    None where that is the plain causal triangle, which needs no mask.
    """
    if positions.size(1) == n_keys and (window is None or window >= n_keys):
        return None
    back = positions[:, None, :, None] - torch.arange(n_keys, device=positions.device)  # how far back the key lies
    return back >= 0 if window is None else (back >= 0) & (back < window)


def check_right_padded(attention_mask: torch.Tensor, input_ids: torch.Tensor) -> None:
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}: not equal")
    real = attention_mask.bool()
    if (real[:, 1:] & ~real[:, :-1]).any():
        raise ValueError("attention_mask has a real token after padding: pad on the right, after all real tokens")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

# Hugging Face's prefix and its names for our modules. Everything inside a block has its name already.
GPT2_NAMES = ("transformer.", {"embed": "wte", "positions": "wpe", "blocks": "h", "norm": "ln_f"})
LLAMA_NAMES = ("model.", {"embed": "embed_tokens", "blocks": "layers", "norm": "norm"})
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                 "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip
# Constants that older versions of transformers saved with the weights: causal masks and rotary frequencies.
CONSTANTS = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)$")
# GPT-2's checkpoints keep these weights as [in, out]; nn.Linear wants [out, in].
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def hugging_face_names(m: Decoder) -> dict[str, str]:
    """{our parameter name: its name in a Hugging Face checkpoint}"""
    prefix, names = GPT2_NAMES if m.config["model_type"] == "gpt2" else LLAMA_NAMES

    def rename(ours: str) -> str:
        module, rest = ours.split(".", 1)
        return ours if module == "lm_head" else f"{prefix}{names[module]}.{rest}"

    return {ours: rename(ours) for ours, _ in m.named_parameters()}


def build_model(config: dict) -> Decoder:
    """A randomly initialised model for a Hugging Face config: N(0, initializer_range), biases 0, norms 1.

    As in GPT-2, whose projections into the residual stream are divided by √(2 layers). Seed with torch.manual_seed.
    """
    with torch.device("meta"):  # skip torch's own initialisation
        m = Decoder(config)
    try:
        m.to_empty(device="cpu")
    except RuntimeError as error:
        size = sum(parameter.numel() for parameter in m.parameters())
        raise ValueError(f"build_model: a model of {size:,} parameters does not fit into the memory") from error
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

    Weights are converted to dtype one tensor at a time, so the peak is the model itself. Without `body` only embedding
    and head are read and kept: such a model cannot be called. Raises FileNotFoundError for missing files; ValueError
    for configs, tensors or files that are not understood, incomplete or damaged, and for weights that are NaN or
    infinite.
    """
    file = Path(path) / "config.json"
    config = read_json(file)
    read_config(config, file)
    with torch.device("meta"):
        m = Decoder(config)
    if not body:
        m.blocks, m.positions, m.rotary, m.norm = nn.ModuleList(), None, None, None
    for name, tensor in read_tensors(m, path, body):
        owner, leaf = name.rsplit(".", 1)
        # a copy on purpose: what safetensors returns is mapped from the file and would change with it
        copied = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
        setattr(m.get_submodule(owner), leaf, nn.Parameter(copied))
    return m.to(device).eval()  # all that is left to move is the rotary table


def read_tensors(m: Decoder, path, body: bool = True):
    """Yield (our parameter name, tensor in our layout, mapped from the file) once for each parameter of m, in the order
    of the files. Raises as `load_model` does; for what is missing, after the last."""
    path, family = Path(path), m.config["model_type"]
    prefix = (GPT2_NAMES if family == "gpt2" else LLAMA_NAMES)[0]
    ours = {theirs: name for name, theirs in hugging_face_names(m).items()}
    missing, tied_head, embedding = set(ours), None, None
    for file in checkpoint_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if CONSTANTS.search(name):
                        continue
                    # a checkpoint saved without its head (GPT-2's on the hub) has no prefix
                    theirs = name if name in ours or name == "lm_head.weight" else prefix + name
                    if theirs == "lm_head.weight" and m.lm_head is None:
                        tied_head = tensors.get_tensor(name)  # compared below: the embedding may come later
                    elif theirs not in ours and not body:
                        continue
                    elif theirs not in missing:
                        why = "came twice" if theirs in ours else f"is not known for model_type {family}"
                        raise ValueError(f"{file}: tensor {name!r} {why}")
                    else:
                        missing.discard(theirs)
                        tensor = in_our_layout(m, ours[theirs], tensors.get_tensor(name), f"{file}: {name}")
                        embedding = tensor if ours[theirs] == "embed.weight" else embedding
                        yield ours[theirs], tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error
    if missing:
        raise ValueError(f"{path}: the checkpoint lacks {len(missing)} tensors: {', '.join(sorted(missing)[:8])}")
    if tied_head is not None and not torch.equal(tied_head.to(embedding.dtype), embedding):
        raise ValueError(f"{path}: lm_head.weight differs from the embedding, but config.json ties them: set "
                         "tie_word_embeddings to false")  # fmt: skip


def in_our_layout(m: Decoder, name: str, tensor: torch.Tensor, where: str) -> torch.Tensor:
    """A tensor of a checkpoint as the parameter `name` has it. Raises ValueError if it cannot be that."""
    expected = list(m.get_parameter(name).shape)
    in_out = m.config["model_type"] == "gpt2" and TRANSPOSED.search(name)
    if list(tensor.shape) != (expected[::-1] if in_out else expected):
        expected = expected[::-1] if in_out else expected
        raise ValueError(f"{where}: shape {list(tensor.shape)} in the file, {expected} by config.json")
    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where}: {tensor.dtype} weights (a quantised checkpoint?) are not supported")
    if not torch.stack(tensor.aminmax()).isfinite().all():  # a tenth of the time of copying it
        raise ValueError(f"{where}: has weights that are NaN or infinite; the checkpoint is damaged")
    return tensor.mT if in_out else tensor


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
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(f"{path}: no weights; expected model.safetensors, or model.safetensors.index.json and "
                                "its shards (pickled .bin checkpoints are not read)")  # fmt: skip
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: expected a weight_map of tensor names to file names")
    files = []
    for shard in sorted(set(weight_map.values())):
        if shard in ("", ".", "..") or "/" in shard or "\\" in shard:
            raise ValueError(f"{index}: shard {shard!r} is not a plain file name; it would be read from elsewhere")
        files.append(path / shard)
        if not files[-1].is_file():
            raise FileNotFoundError(f"{files[-1]} not found, but {index.name} lists it as a shard")
    return files


def save_model(m: Decoder, path) -> None:
    """Write config.json and model.safetensors for transformers' (and our) loader; a tied head is not written twice.

    Each file is written beside its place and moved there, so a crash leaves the old file or the new one. The dtype is
    the parameters'. Raises ValueError for parameters that are not a plain model's (merge adapters first).
    """
    path = Path(path)
    with torch.device("meta"):
        names = hugging_face_names(Decoder(m.config))
    parameters = dict(m.named_parameters())
    if set(parameters) != set(names):
        extra = sorted(set(parameters) ^ set(names))[:4]
        raise ValueError(f"save_model: not a plain model, parameters {extra} differ: merge adapters before saving")
    gpt2 = m.config["model_type"] == "gpt2"
    tensors = {}
    for ours, theirs in names.items():
        tensor = parameters[ours].detach()
        tensors[theirs] = (tensor.mT if gpt2 and TRANSPOSED.search(ours) else tensor).contiguous()
    config = {**m.config, "architectures": [ARCHITECTURES[m.config["model_type"]]]}
    # transformers loads in the dtype that the config states
    config["dtype" if "dtype" in config else "torch_dtype"] = str(m.embed.weight.dtype).removeprefix("torch.")

    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(path / "model.safetensors.tmp", path / "model.safetensors")
    (path / "config.json.tmp").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(path / "config.json.tmp", path / "config.json")


# ---------------------------------------------------------------------------------------------------------------------
# Generation


def sample(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, generator=None) -> torch.Tensor:
    """One token id per row of logits (B, V) -> (B,): greedy at temperature 0, else from softmax(logits / temperature).

    top_k > 0 keeps the k likeliest tokens; top_p < 1 then keeps the fewest likeliest tokens that hold that much mass.
    Raises FloatingPointError for logits that are not finite.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = logits.softmax(-1)
    if probabilities[:, 0].isnan().any():  # one logit that is inf or nan makes its whole row nan
        raise FloatingPointError("sample: the logits are not finite, there is nothing to draw from")
    if top_p < 1:
        likeliest, ids = probabilities.sort(dim=-1, descending=True)
        before = likeliest.cumsum(-1) - likeliest  # mass of all likelier tokens
        likeliest = likeliest.masked_fill(before >= top_p, 0.0)  # the first has 0 before it: one is always kept
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, likeliest)
    # the first token whose cumulative mass exceeds a uniform draw: a random number per row, where multinomial takes V
    mass = probabilities.cumsum(-1)
    whole = mass[:, -1:]
    draw = torch.rand(len(mass), 1, generator=generator, device=mass.device) * whole
    below = torch.nextafter(whole, torch.zeros_like(whole))  # so that a draw that was rounded up finds a token too
    return torch.searchsorted(mass, draw.minimum(below), right=True).squeeze(-1)


@torch.no_grad()
def generate(
    m: Decoder, prompts, max_new_tokens, eos_id, temperature=1.0, top_k=0, top_p=1.0, seed=None, vocabulary=None
) -> list[list[int]]:
    """Continue each prompt (a non-empty list of token ids, any lengths): the new ids only, a final eos_id included.

    A sequence ends at eos_id (None: never), after max_new_tokens (a number, or one per prompt), or when prompt and new
    ids fill all positions. Only ids below `vocabulary` are drawn (None: all rows of the head, also those that pad it).
    temperature 0 is greedy; seed=None draws from torch's global generator. Greedy results do not depend on the batch;
    sampled ones do, for a seed fixes the draws of the batch as a whole. Raises ValueError for impossible arguments.
    """
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    check_generation(m, prompts, max_new_tokens, temperature, top_k, top_p)
    device = m.embed.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    outputs = [[] for _ in prompts]
    budget = [min(most, m.limit - len(prompt)) for most, prompt in zip(max_new_tokens, prompts, strict=True)]
    rows = [i for i in range(len(prompts)) if budget[i] > 0]  # the prompts in the batch
    if not rows:
        return outputs

    was_training = m.training
    m.eval()
    try:
        longest = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i in rows], device=device)  # (B, T)
        real = [row * longest + at for row, i in enumerate(rows) for at in range(len(prompts[i]))]
        real = torch.tensor(real, device=device)
        lengths = torch.tensor([len(prompts[i]) for i in rows], device=device)  # (B,)
        cache = KVCache(lengths)
        hidden = m(ids, cache=cache, real=real)[torch.arange(len(rows), device=device), lengths - 1]  # (B, D)
        while True:
            tokens = sample(m.logits(hidden)[:, :vocabulary], temperature, top_k, top_p, generator)  # (B,)
            for i, token in zip(rows, tokens.tolist(), strict=True):
                if budget[i] > 0:
                    outputs[i].append(token)
                    budget[i] = 0 if token == eos_id else budget[i] - 1
            alive = [row for row, i in enumerate(rows) if budget[i] > 0]
            if not alive:
                return outputs
            if len(alive) <= 0.75 * len(rows):  # compacting copies the cache, so wait until it pays
                kept = torch.tensor(alive, device=device)
                cache.keep(kept)
                tokens, rows = tokens[kept], [rows[row] for row in alive]
            cache.make_room(max(len(prompts[i]) + len(outputs[i]) for i in rows))
            hidden = m(tokens[:, None], cache=cache)[:, -1]  # (B, D)
            cache.lengths = cache.lengths + 1
    finally:
        m.train(was_training)


def check_generation(m: Decoder, prompts, max_new_tokens, temperature, top_k, top_p) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {i} is empty; give it at least one token (the end-of-text id will do)")
        if len(prompt) > m.limit:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens, the model {m.limit} positions; cut it")
        if not 0 <= min(prompt) <= max(prompt) < len(m.embed.weight):
            raise ValueError(f"generate: prompt {i} has a token id outside the vocabulary of {len(m.embed.weight)}")
    if len(max_new_tokens) != len(prompts):
        raise ValueError(f"generate: {len(max_new_tokens)} max_new_tokens for {len(prompts)} prompts; give one number "
                         "for all, or one per prompt")  # fmt: skip
    least = min(max_new_tokens, default=0)
    if least < 0 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("generate: max_new_tokens, temperature and top_k must be >= 0 and 0 < top_p <= 1, got "
                         f"{least}, {temperature}, {top_k} and {top_p}")  # fmt: skip
