"""Several processes, one per device: what `torchrun --nproc_per_node=N train.py ...` adds to a run of one process.

Every process holds the student, takes its share of each update's examples and computes its part of the loss, which is
normalised by the totals of all processes. So after the last backward pass the parts of the gradient *add up* to the
gradient of one process with the same examples, and nothing is averaged anywhere.

A model that is too large for that is sharded (FSDP2): each process keeps 1/N of the matrices of every block, of their
gradients and of their optimiser state, and holds the whole matrices only of the block that is being computed. Embedding
and head stay whole on every process, because the losses and projectors read them outside the forward pass. So do norms
and biases, which are small, and float32 under autocast.

Without torchrun, every function here does nothing, or what a single process needs.
"""

import json
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from model import Decoder, read_json, read_tensors

# Some long waits are normal: for the teacher's answers (SeqKD), for a checkpoint. torchrun notices a process that has
# died, whatever this limit is.
LONGEST_WAIT = timedelta(days=2)


by_torchrun = dist.is_torchelastic_launched  # whether torchrun started this process


def launcher() -> str:
    """The beginning of a command that runs on as many processes as this one."""
    if not by_torchrun():
        return "python"
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    meet = f"--nnodes={machines} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 " if machines != "1" else ""
    return f"torchrun {meet}--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"


def rank() -> int:
    """The number of this process; process 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def session() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. Only process 0 prints. Only the first process that fails
    reports its error, since the others could only say that this process is gone."""
    if not by_torchrun():
        yield
        return
    local, on_cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if on_cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # from here on, "cuda" means this device
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
            leave(error.code)  # all processes were told to stop, and have reported it
        try:
            first = store.add("failed", 1) == 1
        except dist.DistError:  # the process that held the store is already gone
            first = False
        if not first:
            time.sleep(20)  # torchrun ends this process when it finds the first one dead, and repeats that one's error
            sys.exit(1)
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if isinstance(error, SystemExit) and file:  # the user's mistake: torchrun repeats only the message
            message = {"message": str(error.code), "extraInfo": {"timestamp": str(int(time.time()))}}
            Path(file).write_text(json.dumps({"message": message}))
        else:
            get_error_handler().record_exception(error)
        raise
    sys.stdout, sys.stderr = outputs
    dist.destroy_process_group()


def leave(status: int = 0) -> None:
    """End a process of torchrun without finalising the interpreter: a gloo thread that frees a tensor after that would
    abort the process. (FSDP keeps the process group alive, so there is no way to wait for that thread.)"""
    if by_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def add_up(numbers: list) -> list:
    """The sums of these numbers over all processes, each with its type; exact for integers below 2^53."""
    if world() == 1:
        return numbers
    numbers = [number.item() if isinstance(number, Tensor) else number for number in numbers]
    sums = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, through gloo
    dist.all_reduce(sums)
    return [type(number)(value) for number, value in zip(numbers, sums.tolist(), strict=True)]


def highest(number: int) -> int:
    """The highest of the numbers that the processes have."""
    return int(gather(torch.tensor(number)).max())


def wait_for_all() -> None:
    add_up([0])


def gather(tensor: Tensor) -> Tensor:
    """A CPU tensor of each process, stacked: (N, *shape)."""
    parts = [tensor] * world()
    if world() > 1:
        parts = [torch.empty_like(tensor) for _ in parts]
        dist.all_gather(parts, tensor)
    return torch.stack(parts)


@contextmanager
def main_first() -> Iterator[None]:
    """Process 0 runs the body before all others, so that they find the files that it writes."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def seed_process(seed: int, step: int) -> None:
    """Seed this process's own random draws, from update `step` on."""
    torch.manual_seed(random.Random(f"{seed} process {rank()} {step}").getrandbits(63))


# ---------------------------------------------------------------------------------------------------------------------
# Data parallel: each process's share of the examples, and the sum of the gradients


def share(items: list, process: int) -> list:
    """A process's share of a list that all processes have; the sizes differ by one at most."""
    return items[process :: world()]


def start_alike(parameters: list[nn.Parameter]) -> None:
    """Give all processes the parameters of process 0, since a solution or a draw may differ in its last bit."""
    for parameter in parameters:
        if world() > 1 and not isinstance(parameter, DTensor):
            dist.broadcast(parameter.data, 0)


def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over all processes, in place, once per update. (Those of sharded weights are already summed.)

    DistributedDataParallel would average them. It also needs the whole loss in a module's forward pass, and needs all
    batches of all processes to use the same parameters, but here some processes may have fewer examples.
    """
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """Scale the gradients, whole and sharded, so that their joint norm is at most `largest`; returns the norm that they
    had. Raises FloatingPointError if it is not finite."""

    def exact(gradient: Tensor) -> Tensor:
        """A tensor of the same norm. On a CPU a float32 sum of 10^8 squares, added one by one, loses 1%: row by row."""
        return gradient if gradient.is_cuda else torch.linalg.vector_norm(gradient, dim=-1)

    parts = split_by_placement(parameters)
    norms = [get_total_norm([exact(p.grad) for p in part if p.grad is not None]) for part in parts]
    norm = get_total_norm([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])
    found = float(norm)
    if not math.isfinite(found):
        raise FloatingPointError(f"the gradient's norm is {found}")
    for part in parts:
        clip_grads_with_norm_(part, largest, norm)
    return found


def split_by_placement(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole and sharded parameters in separate lists, as fused and foreach kernels need them; no list is empty."""
    parts = [[p for p in parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True)]
    return [part for part in parts if part]


def all_finite(parameters: list[nn.Parameter]) -> bool:
    """Whether no parameter has a NaN or an infinity on any process."""
    parts = [local_part(p.detach()) for p in parameters]
    spoilt = any(not torch.stack(part.aminmax()).isfinite().all() for part in parts if part.numel())
    return not highest(spoilt)


# ---------------------------------------------------------------------------------------------------------------------
# Sharded models (FSDP2)


def shard(model: nn.Module, device: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Shard the matrices of a model's blocks, in place, over all processes; the rest moves to the device unchanged.

    The model may be whole on the CPU, and then moves to the device block by block; or on the meta device, to be filled.
    dtype: in which a block's matrices are gathered; with autocast its dtype, or autocast would keep a copy of them all.
    Each process's part keeps its own dtype, and gradients are summed in float32.
    """
    options = {"mesh": init_device_mesh(torch.device(device).type, (world(),)), "reshard_after_forward": True}
    if dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    sharded = {p for p in model.blocks.parameters() if p.dim() >= 2}
    whole = set(model.parameters()) - sharded
    for block in model.blocks:
        fully_shard(block, ignored_params=whole, **options)
        block.set_gradient_divide_factor(1.0)  # sums, not means: see the top of this file
        block.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    # FSDP warns that gradients would be wrong if the model's output were changed in place; nothing here does that.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    fully_shard(model, ignored_params=whole, **options)  # shards nothing more, but links the blocks to each other
    blocks = [*model.blocks]
    for block, next_back in zip(blocks, blocks[:1] + blocks, strict=False):
        # By default FSDP prefetches in reverse order of all passes since the last update, even those that sampled or
        # scored; a process without prompts made none, and would wait for other weights. (The first block gets itself.)
        block.set_modules_to_backward_prefetch([next_back])
    return model if any(p.is_meta for p in whole) else model.to(device)


def load_sharded(path, dtype: torch.dtype, device: str) -> nn.Module:
    """`load_model` for a sharded model: keeps only this process's part of each tensor of the checkpoint."""
    with torch.device("meta"):
        m = Decoder(read_json(path / "config.json")).to(dtype)
    shard(m, device).to_empty(device=device)
    with torch.no_grad():
        for name, tensor in read_tensors(m, path):
            copy_into(m.get_parameter(name), tensor)
    return m.eval()


def compile_model(model: nn.Module, graphs: bool = False) -> nn.Module:
    """Compile the model; a sharded one block by block, because its weights are gathered and freed between the blocks.
    graphs: with a CUDA graph for every shape, so that the CPU need not launch a thousand kernels per update."""
    if is_sharded(model):
        for block in model.blocks:
            block.compile(dynamic=True)
        return model
    if not graphs:
        return torch.compile(model, dynamic=True)
    import torch._inductor.config as inductor  # takes a second

    inductor.triton.cudagraph_dynamic_shape_warn_limit = None
    return torch.compile(model, dynamic=True, mode="reduce-overhead")


def uses_graphs(o) -> bool:
    """Whether an update runs as CUDA graphs: if all batches have equally many examples, so that `data.collate` can keep
    the shapes few. Not in float32: attention has no packed kernel there, so a fixed width costs more than it gains."""
    few_shapes = o.dtype == "bf16" and not o.tokens_per_batch and not o.shard
    return bool(o.compile) and torch.device(o.device).type == "cuda" and few_shapes


def make_gradients(model: nn.Module) -> None:
    """Create gradients of 0, which backward passes then add to. A gradient that a backward pass creates lies in a CUDA
    graph's memory, which the next forward pass overwrites."""
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a whole tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_into(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Copy a whole tensor into a parameter, or this process's part of it into a sharded one; returns the parameter."""
    if isinstance(parameter, DTensor):  # every process has the whole tensor, so there is nothing to send
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return parameter.copy_(tensor)


def gather_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The weights of a module by name, and the optimiser's state as "optimizer.NAME.KEY", on the CPU of process 0. The
    other processes get nothing, but all must call this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(module, options=options)
    if optimizer.state:  # before the first update torch would create a state, by an update with gradients of 0
        states = get_optimizer_state_dict(module, optimizer, options=options).get("state", {})
        for name, state in states.items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return tensors


@contextmanager
def gather_parameters(model: nn.Module) -> Iterator[None]:
    """Inside this context every process holds all weights of a sharded model, in the dtype of `shard`, so that it can
    generate and score at its own pace, without waiting for other processes. The weights must not change."""
    if not is_sharded(model):
        yield
        return
    model.set_reshard_after_forward(False)
    for block in model.blocks:
        block.unshard()
    try:
        with torch.compiler.set_stance("force_eager"):  # as in a single process: lengths and cache sizes vary too much
            yield
    finally:
        model.set_reshard_after_forward(True)
        for block in model.blocks:
            block.reshard()
