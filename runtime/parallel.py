"""Several processes, one per device: what `torchrun --nproc_per_node=N train.py ...` adds to a run of one.

Every process holds the student, takes its share of each update's examples, and makes its part of the loss, which is
normalised by the totals of all. So the parts of the gradient *add up* to the gradient of one process with the same
examples: they are summed after the last backward pass, and nothing is averaged anywhere.

A model too large for that is sharded (FSDP2): of the matrices of each block, their gradients and optimiser state, a
process holds its 1/N, and gets the rest of the one block that is being computed, for as long as that takes. Embedding
and head stay whole on every process, since the losses and projectors read them outside the forward pass; so do norms
and biases, which are small, and float32 under autocast.

With one process, and no torchrun, every function here does nothing, or what one process would do.
"""

import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import Decoder, read_json, read_tensors

# Some waits are long and in order: for the teacher's answers of SeqKD, for a checkpoint. A process that has died is
# noticed by torchrun, not by this.
LONGEST_WAIT = timedelta(days=2)


def rank() -> int:
    """Which process this is; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


@contextmanager
def session() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. Only process 0 prints; of an error only the first process
    that has it tells, for what the others then meet is that this one has gone."""
    if not by_torchrun():
        yield
        return
    local, on_cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if on_cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # from here on "cuda" means this one
    store, number, count = next(dist.rendezvous("env://"))
    store.set_timeout(timedelta(minutes=5))
    options = {"store": store, "rank": number, "world_size": count, "timeout": LONGEST_WAIT}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", **options)
    outputs = sys.stdout, sys.stderr
    try:
        if number > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
        yield
        wait_for_all()
    except BaseException as error:
        sys.stdout, sys.stderr = outputs
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            leave(error.code)  # all of them were told to stop, and have said so
        try:
            first = store.add("failed", 1) == 1
        except dist.DistError:  # whoever kept the store has gone already
            first = False
        if not first:
            # torchrun repeats at its end the error of the process that it finds dead first, and ends the others then.
            time.sleep(20)
            sys.exit(1)
        get_error_handler().record_exception(error)
        raise
    sys.stdout, sys.stderr = outputs
    dist.destroy_process_group()


def leave(status: int = 0) -> None:
    """End a process of torchrun at once, without taking the interpreter apart: a thread of gloo that then lets go of a
    tensor wants the interpreter for it, and aborts the process. (It cannot be waited for: FSDP keeps the group.)"""
    if by_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def add_up(numbers: list) -> list:
    """The sums of these numbers over all processes, each of its own type; exact for integers below 2^53."""
    if world() == 1:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, through gloo: no wait for the device
    dist.all_reduce(sums)
    return [type(number)(value) for number, value in zip(numbers, sums.tolist(), strict=True)]


def highest(number: int) -> int:
    """The highest of the numbers that the processes have."""
    return int(gather(torch.tensor(number)).max())


def wait_for_all() -> None:
    add_up([0])


@contextmanager
def main_first() -> Iterator[None]:
    """Process 0 does this before all others: what it leaves in a file, they find there."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def seed_process(seed: int, step: int) -> None:
    """Random draws of this process's own, from update `step` on."""
    torch.manual_seed(random.Random(f"{seed} process {rank()} {step}").getrandbits(63))


def gather(tensor: Tensor) -> Tensor:
    """A CPU tensor of each process, stacked: (N, *shape)."""
    parts = [torch.empty_like(tensor) for _ in range(world())]
    if world() == 1:
        return tensor[None]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Data parallel: the share of the examples, and what is made of the gradients


def share(items: list, process: int) -> list:
    """A process's part of a list that all of them have; the sizes differ by one at most."""
    return items[process :: world()]


def start_alike(parameters: list[nn.Parameter]) -> None:
    """The parameters of process 0 for all, so that a solution or a draw that differs in its last bit does no harm."""
    for parameter in parameters:
        if world() > 1 and not isinstance(parameter, DTensor):
            dist.broadcast(parameter.data, 0)


def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in place, once per update. (Those of sharded weights are summed already.)

    Plain all-reduce in place of the DistributedDataParallel wrapper: that one averages, wants the whole loss in a
    module's forward pass and the same parameters used by every micro-batch of every process, for hiding the
    communication behind the last backward pass. Here processes may have fewer examples, and a loss is a function.
    """
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """Scale the gradients so that the norm of all of them together is at most `largest`; returns what it was."""
    if not any(isinstance(p, DTensor) for p in parameters):
        return float(torch.nn.utils.clip_grad_norm_(parameters, largest))
    norm = gradient_norm(parameters)
    for p in parameters:
        if p.grad is not None:
            local(p.grad).mul_(min(1.0, largest / (norm + 1e-6)))
    return norm


def gradient_norm(parameters: list[nn.Parameter]) -> float:
    """Of whole gradients, which are the same everywhere, and of the parts of sharded ones, which are added up."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]  # whole, sharded
    for gradient in gradients:
        norm = torch.linalg.vector_norm(local(gradient), dtype=torch.float64)
        squares[isinstance(gradient, DTensor)] = squares[isinstance(gradient, DTensor)].to(norm.device) + norm**2
    whole, sharded = (float(square) for square in squares)
    return (whole + add_up([sharded])[0]) ** 0.5


def all_finite(parameters: list[nn.Parameter]) -> bool:
    """Whether no parameter has a NaN or an infinity on any process."""
    parts = [local(p.detach()) for p in parameters]
    spoilt = any(not torch.stack(part.aminmax()).isfinite().all() for part in parts if part.numel())
    return not highest(spoilt)


# ---------------------------------------------------------------------------------------------------------------------
# Sharded models (FSDP2)


def shard(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Shard the matrices of a model's blocks, in place, over all processes; the rest moves to the device as it is.

    The model is whole on the CPU, and then one block at a time on the device; or on the meta device, to be filled.
    dtype: what a block's matrices are put together in. With autocast that is its own, or it would keep a copy of all of
    them for the backward pass. Each process keeps its part as it is, and gradients are summed in float32.
    """
    options = {"mesh": init_device_mesh(torch.device(device).type, (world(),)), "reshard_after_forward": True}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    sharded = {p for p in model.blocks.parameters() if p.dim() >= 2}
    whole = set(model.parameters()) - sharded
    for block in model.blocks:
        fully_shard(block, ignored_params=whole, **options)
        block.set_gradient_divide_factor(1.0)  # sums: see the head of this file
        block.set_force_sum_reduction_for_comms(True)  # gloo knows no other kind
    fully_shard(model, ignored_params=whole, **options)  # only so that the blocks know of each other
    return model if any(p.is_meta for p in whole) else model.to(device)


def load_sharded(path, dtype: torch.dtype, device: str) -> nn.Module:
    """`load_model` for a sharded model: of every tensor of the checkpoint only this process's part is ever kept."""
    with torch.device("meta"):
        m = Decoder(read_json(path / "config.json")).to(dtype)
    shard(m, device).to_empty(device=device)
    with torch.no_grad():
        for name, tensor in read_tensors(m, path):
            copy_into(m.get_parameter(name), tensor)
    return m.eval()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that is here; a whole one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on all processes: all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this process's part of it into a sharded one."""
    if isinstance(parameter, DTensor):
        parts = tensor.chunk(world())  # by rows, as FSDP2 does; there may be fewer rows than processes
        tensor = parts[rank()] if rank() < len(parts) else tensor[:0]
    local(parameter).copy_(tensor)


def like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, on the CPU, placed as a parameter of its shape is."""
    placed = torch.empty_like(parameter, dtype=tensor.dtype)
    copy_into(placed, tensor)
    return placed


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Meanwhile every process has all weights of a sharded model, in the dtype of `shard`, and its forward pass waits
    for nobody: to generate, each at its own pace, and to score. Needs room for them; must not change them."""
    if not is_sharded(model):
        yield
        return
    model.set_reshard_after_forward(False)
    for block in model.blocks:
        block.unshard()
    try:
        with torch.compiler.set_stance("force_eager"):  # as one process does: lengths and caches of every size
            yield
    finally:
        model.set_reshard_after_forward(True)
        for block in model.blocks:
            block.reshard()


def alike(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole and sharded parameters apart, as fused optimisers want them; no empty list."""
    parts = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    return [part for part in parts if part]
