"""A CUDA device for a machine without one: its tensors compute on the CPU, say that they are on cuda:0, and refuse what
CUDA refuses.

    with pretended_cuda() as card:
        train.main([..., "--device", "cuda"])
    card.waits    # {operation: how often the processor waited for the device}

Raises where tensors of both devices meet in one operation (numbers, tensors without a dimension, may be the CPU's), and
for `.numpy()`. An index from the CPU, which CUDA does take, is refused too: it has to be copied first, with a wait.
What would be captured as a CUDA graph runs when it would be replayed.
Not seen: what autocast casts, the dtypes and layouts that a kernel lacks, streams, what a graph refuses.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
ATEN = torch.ops.aten
WAITS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN._unique2}  # their result's size is not known
MOVES = {"to", "cpu", "cuda", "pin_memory", "tolist", "numpy", "__array__"}
counted = Counter()


class OnCard(torch.Tensor):
    """A tensor "on" cuda:0, whose numbers are those of a CPU tensor, `held`. PyTorch itself takes it for one on the CPU
    that has no numbers, so that nothing gets at them but through here."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            requires_grad=held.requires_grad,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held.detach()

    device = property(lambda self: CUDA)
    is_cuda = True
    is_cpu = False

    def __repr__(self):
        return f"OnCard({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function.overloadpacket
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        crossing = name is ATEN.copy_
        strangers = [x for x in inputs if not isinstance(x, OnCard) and (x.dim() or x is inputs[0])]
        if strangers and not crossing:
            shapes = [tuple(x.shape) for x in strangers]
            raise RuntimeError(f"{name}: tensors on cuda:0 and, of shape {shapes}, on the CPU in one operation")
        if name in WAITS or (name is ATEN.index and has_mask(args)):
            counted[str(name)] += 1
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        args_held, kwargs_held = tree_map_only(OnCard, lambda x: x.held, (args, kwargs))
        outputs = function(*args_held, **kwargs_held)
        before = {id(x.held): x for x in inputs if isinstance(x, OnCard)}  # what was written in place stays what it was
        if crossing and not isinstance(args[0], OnCard):
            counted["copy_"] += 1
            return args[0]
        return tree_map_only(torch.Tensor, lambda x: before[id(x)] if id(x) in before else cls(x), outputs)


def has_mask(args) -> bool:
    return any(x is not None and x.dtype == torch.bool for x in args[1])


class Card(TorchFunctionMode):
    """Sends what is made for, or moved to, "cuda" there."""

    waits = counted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        own = args[0] if args else None
        if isinstance(own, torch.Tensor) and name in MOVES:
            return move(function, name, own, args[1:], kwargs)
        if name == "scaled_dot_product_attention" and isinstance(own, OnCard):
            with self:
                return attend(*args, **kwargs)
        if is_cuda(kwargs.get("device")):
            made = function(*args, **{**kwargs, "device": "cpu"})
            return tree_map_only(torch.Tensor, OnCard, made) if not isinstance(own, OnCard) else made
        return function(*args, **kwargs)


def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
    """PyTorch's makes tensors of its own, which would be on no device here."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=CUDA).tril() if is_causal else attn_mask
    p = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.nn.functional.dropout(p, dropout_p) @ v


def is_cuda(device) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def move(function, name: str, own, args: tuple, kwargs: dict):
    """`.to(...)` and its like; a move that asks for a gradient is not needed, and has none."""
    here, pinned = isinstance(own, OnCard), name == "pin_memory"
    if name in ("numpy", "__array__") and here:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
    if name == "tolist" and here:
        counted["tolist"] += 1
        return own.held.tolist()
    places = [x for x in (*args, *kwargs.values()) if isinstance(x, (str, torch.device))]
    places += [x.device for x in args if isinstance(x, torch.Tensor)]
    target = "cpu" if name == "cpu" else "cuda" if name == "cuda" else str(places[0]) if places else None
    if pinned or target is None or target.startswith("meta"):
        return own if pinned else function(own, *args, **kwargs)
    there = is_cuda(target)
    if there == here and name != "to":
        return own
    cast = {key: value for key, value in kwargs.items() if key in ("dtype", "copy", "memory_format")}
    cast.update(("dtype", x) for x in args if isinstance(x, torch.dtype))
    if there == here:  # stays where it is, with its gradient
        return function(own, **cast) if cast else own
    if here and own.dim():  # numbers PyTorch itself moves, to where it takes them to be
        counted["to the CPU"] += 1
    held = (own.held if here else own.detach()).clone().to(**cast) if cast else (own.held if here else own.detach())
    return OnCard(held.clone()) if there else held.clone()


class Generator(torch.Generator):
    """A CPU's, whatever device it is for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@contextmanager
def pretended_cuda():
    """Meanwhile there is one CUDA device. Yields it; its `waits` are counted anew."""
    state = {"cuda": torch.get_rng_state()}
    cuda = {"is_available": lambda: True, "device_count": lambda: 1, "get_rng_state": lambda device: state["cuda"],
            "set_rng_state": lambda value, device: state.update(cuda=value),
            "get_device_name": lambda index: "pretended", "get_device_capability": lambda index: (9, 0),
            "get_arch_list": lambda: ["sm_90"], "is_current_stream_capturing": lambda: False}  # fmt: skip
    counted.clear()
    precision = torch.get_float32_matmul_precision()
    one_thread = patch("train.prefetch", iter)  # a mode is its thread's own
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # as where a device's tensors differ in kind
    no_graphs = patch("fast.cuda.capture", lambda run, device: run)
    # PyTorch's optimisers ask it for a stream (in 2.11, is_current_stream_capturing above), which takes a driver where
    # PyTorch is built with CUDA
    no_stream = patch("torch.accelerator.current_accelerator", lambda check_available=False: None)
    patches = patch.multiple(torch.cuda, **cuda), patch("torch.Generator", Generator), one_thread, no_graphs, no_stream
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        card = stack.enter_context(Card())
        try:
            yield card
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch.set_float32_matmul_precision(precision)
