"""What can be wrong with the input of a run, found once, before any long work starts."""

import sys

from safetensors.torch import load_file
from torch import Tensor

from data import TextTokenizer


def choose_alignment(align: str, method: str, recipe: str, teacher: TextTokenizer, student: TextTokenizer) -> str:
    """`align` with "auto" resolved, checked against the method. Raises ValueError saying why it cannot be.

    Methods uld and mined pair tokens in their own way, which has the method's name.
    """
    if method in ("uld", "mined"):
        if align != "auto":
            how = {"uld": "position by position", "mined": "by edit distance"}[method]
            raise ValueError(f"--method {method} pairs tokens itself, {how}: --align {align} belongs to --method dskd")
        return method
    equal = teacher.vocabulary() == student.vocabulary() and teacher.eos_id == student.eos_id
    if align == "auto":
        align = "none" if equal or method == "kd" else {"v1": "cma", "v2": "eta"}[recipe]
    if method == "kd" and align != "none":
        raise ValueError(f"--method kd compares position by position, --align {align} belongs to --method dskd")
    if align == "none" and not equal:
        ends = [tokenizer.tokenizer.id_to_token(tokenizer.eos_id) for tokenizer in (teacher, student)]
        differ = "differ" if ends[0] == ends[1] else f"differ (end-of-text: {ends[0]!r} and {ends[1]!r})"
        raise ValueError(
            f"--method {method} --align none needs equal vocabularies; {teacher.directory} and {student.directory} "
            f"{differ}: use --method dskd with --align eta (recipe v2) or cma (recipe v1)"
        )
    if (recipe, align) in {("v1", "eta"), ("v2", "cma")}:
        other = {"eta": "v2", "cma": "v1"}[align]
        raise ValueError(f"--align {align} belongs to --recipe {other} (the papers pair v1 with cma, v2 with eta)")
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
        print(f"{file}: {' and '.join(unused)} belong to --align cma and are not used", file=sys.stderr)
    given = {name: value for name, value in given.items() if name not in unused}
    for name, value in given.items():
        if list(value.shape) != shapes.get(name):
            expected = ", ".join(f"{key} {shape}" for key, shape in shapes.items())
            raise ValueError(f"{file}: {name} {list(value.shape)} does not fit; expected {expected}")
    return given
