"""The device that a command computes on, and why."""

import re
import sys
from pathlib import Path

import torch

CARDS = Path("/proc/driver/nvidia/gpus")  # where NVIDIA's driver for Linux lists all cards, usable by torch or not

def choose_device(index: int = 0) -> tuple[str, str]:
    """cuda or cpu, and why: cuda if this torch can compute on that card."""
    cards = [file.read_text() for file in CARDS.glob("*/information")]
    version = f"this torch ({torch.__version__})"
    if torch.cuda.is_available() and index < torch.cuda.device_count():
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        built = [(kind, int(n)) for kind, n in re.findall(r"(sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list()))]
        # code for sm_80 runs on 8.0 to 8.9, and the driver compiles compute_80 for every later card
        fits = {"sm": range(10 * major, 10 * major + minor + 1), "compute": range(10 * major + minor + 1)}
        if torch.version.hip or any(n in fits[kind] for kind, n in built):
            return "cuda", name
        return "cpu", f"{version} is not built for the {name} here, of compute capability {major}.{minor}"
    if torch.cuda.is_available():
        return "cpu", f"torch sees only {torch.cuda.device_count()} CUDA card(s)"
    if cards:
        name = cards[0].partition("Model:")[2].splitlines()[0].strip()
        hidden = "CUDA_VISIBLE_DEVICES hides it, or the driver is too old"
        why = f"cannot use it: {hidden}" if torch.version.cuda else "is built without CUDA"
        return "cpu", f"there is an {name} here, but {version} {why}"
    if torch.backends.mps.is_available():
        return "cpu", "Apple's mps has no float64, in which projectors are solved"
    return "cpu", "torch sees no CUDA card"


def computes_bf16(device: str) -> bool:
    """Whether this CUDA device has instructions for bfloat16. Those before Ampere only emulate it."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(torch.device(device))[0] >= 8


def say_device(asked: str | None, device: str) -> None:
    """One line on standard error: the device, and why it was chosen."""
    kind, why = choose_device(torch.device(device).index or 0)
    if asked and device == "cpu" and kind == "cuda":
        why = f"--device; there is an {why} here"
    print(f"device: {device} ({why})", file=sys.stderr)
