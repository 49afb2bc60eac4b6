"""The papers' analyses as pictures, each with its numbers as a markdown table: python -m experiments.analyse ...

    simulate                                                     why the two models should share a head
    structure --teacher DIR --student DIR [DIR ...] --data FILE   how alike their hidden states are
    alignment --teacher DIR --student DIR --data FILE --line N    which tokens of a response align
        [--projectors FILE]                     and, after a run with --recipe v1 --align cma, where attention looks
    knowledge --teacher DIR --student DIR [DIR ...] --data FILE   what the projected teacher knows

The first three need matplotlib (requirements-dev.txt). A DIR is a run, whose student/ is taken, or a model, by name or
directory.

The simulation is v1's (arXiv 2406.17328 §2.2): points in the plane stand for hidden states, the teacher's are fixed,
and the student's, and they alone, move down the gradient of a divergence between the two softmax distributions. That
is done once with a head for each (vanilla KD) and once with the teacher's head for both (DSKD). The paper's exact
constants are not known here; these are ours, so that curves can be compared in shape and order, not in value:

- per repetition 32 states, teacher N((2, 2), 1), student N((−2, −2), 0.5²); both settings start from the same ones
- two heads with entries N(0, 1/2), never trained; a vocabulary of 16, so that a head of rank 2 cannot produce any
  distribution it likes (at 3 tokens it can: `--vocabulary 3`); temperature 1
- 1000 steps of Adam at 0.02, on the sum over states, which are independent of each other and so are the repetitions

The representation structure (v1's analysis) of n hidden states h_1 ... h_n is two matrices that do not change when the
space is rotated, so that models of different widths can be compared by the mean absolute difference of the entries:

    cosine         C_ij = h_i·h_j / (|h_i| |h_j|)
    inner product  P_ij = h_i·h_j / mean_k |h_i·h_k|    each row relative to its mean size, so that scale drops out too

(The paper, as far as we know it, divides a row by its sum; without |·| a row that sums to nearly 0 would outweigh all
others, and with the mean instead of the sum the distance does not shrink as 1/n with the length of a response.)

A response's states are those of its exactly aligned positions (ETA, before the filter on the teacher's predictions),
which are all of them where the vocabularies are equal.
"""

import argparse
import statistics
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from distill import hidden_at
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, normalize

from align import cross_model_attention
from data import Batch, Row, collate, read_jsonl, tokenise
from losses import DIVERGENCES
from model import load_model
from runtime.hub import data_file, model_directory
from runtime.run import tokenizer_of
from runtime.strict import check_model
from scores.tables import table

# Okabe and Ito's colours, told apart with any kind of colour vision
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"

# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def simulate(
    divergence: str, vocabulary: int = 16, states: int = 32, repetitions: int = 100, steps: int = 1000, seed: int = 0
) -> dict[str, Tensor]:
    """Student states moved towards a teacher's distribution; setting 0 is a head for each, setting 1 the shared head.

    Returns {losses (steps + 1, 2, R) means over P states, teacher (R, P, 2), start (R, P, 2), student (2, R, P, 2),
    heads (2, R, V, 2) the student's in each setting; the second is also the teacher's}. One seed draws the same points
    for every divergence.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    teacher = 2 + gaussian(repetitions, states, 2)
    start = -2 + 0.5 * gaussian(repetitions, states, 2)
    heads = gaussian(2, repetitions, vocabulary, 2) / 2**0.5
    teacher_logits = (teacher @ heads[1].mT).expand(2, -1, -1, -1)  # (R, P, 2) x (R, 2, V) -> (2, R, P, V)
    student = start.repeat(2, 1, 1, 1).requires_grad_()
    optimiser = torch.optim.Adam([student], lr=0.02)
    losses = []
    for step in range(steps + 1):
        per_state = DIVERGENCES[divergence](student @ heads.mT, teacher_logits, 1.0)  # (2, R, P)
        losses.append(per_state.detach().mean(-1))
        if step < steps:
            optimiser.zero_grad()
            per_state.sum().backward()
            optimiser.step()
    moved = student.detach()
    return {"losses": torch.stack(losses), "teacher": teacher, "start": start, "student": moved, "heads": heads}


def structure(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The representation structure of n states, (..., n, d) -> cosines (..., n, n), inner products (..., n, n)."""
    directions = normalize(hidden.float(), dim=-1)
    products = hidden.float() @ hidden.float().mT
    size = products.abs().mean(-1, keepdim=True).clamp_min(torch.finfo(products.dtype).tiny)
    return directions @ directions.mT, products / size


def structure_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean absolute difference of both structures, (..., n, D) and (..., n, d) -> (..., 2): cosine, inner product."""
    pairs = zip(structure(teacher), structure(student), strict=True)
    return torch.stack([(ours - theirs).abs().mean((-1, -2)) for theirs, ours in pairs], dim=-1)


@torch.no_grad()
def example_distances(teacher, student, rows: list[Row], pads: tuple[int, int], device="cpu", size: int = 16) -> Tensor:
    """The structure distance of each example with at least two aligned positions, (E, 2).

    rows: tokenised with align="eta"; all positions align where the vocabularies are equal. pads: any valid id of the
    student and of the teacher.
    """
    distances = []
    for first in range(0, len(rows), size):
        batch = collate(rows[first : first + size], *pads).to(device)
        teacher_hidden = hidden_at(teacher, batch.teacher)[batch.teacher_index]  # (A, D)
        student_hidden = hidden_at(student, batch.student)[batch.student_index]  # (A, d)
        lengths = [len(row.pairs[0]) for row in rows[first : first + size]]
        sides = zip(teacher_hidden.split(lengths), student_hidden.split(lengths), strict=True)
        distances += [structure_distance(*states).cpu() for states in sides if len(states[0]) > 1]
    return torch.stack(distances) if distances else torch.empty(0, 2)


@torch.no_grad()
def knowledge(
    teacher, student, rows: list[Row], pads: tuple[int, int], t2s: dict[str, Tensor], device="cpu", size: int = 16
) -> dict[str, Tensor]:
    """{who: (3,)}: mean entropy, mean cross-entropy with the gold token, both in nats, and accuracy at the aligned
    positions, of teacher, projected teacher (the teacher's states through t2s under the student's head) and student.

    rows, pads: as for `example_distances`. t2s: {weight (d, D), bias (d,) if there is one}; empty: not projected.
    """
    sums, count = {}, 0
    for first in range(0, len(rows), size):
        batch = collate(rows[first : first + size], *pads).to(device)
        sides = (teacher, batch.teacher, batch.teacher_index), (student, batch.student, batch.student_index)
        (theirs, their_gold), (ours, gold) = ((hidden_at(m, side)[at], side.labels[at]) for m, side, at in sides)
        read = {"teacher": (theirs, teacher.head_weight, their_gold), "student": (ours, student.head_weight, gold)}
        if t2s:
            projected = linear(theirs, t2s["weight"].to(theirs), t2s["bias"].to(theirs) if "bias" in t2s else None)
            read["projected teacher"] = projected, student.head_weight, gold
        for who, (hidden, head, labels) in read.items():
            log_p = (hidden @ head.T).float().log_softmax(-1)
            entropy, right = -(log_p.exp() * log_p).sum(-1), log_p.argmax(-1) == labels
            found = torch.stack([entropy, -log_p.gather(1, labels[:, None])[:, 0], right.float()]).double().sum(1).cpu()
            sums[who] = sums.get(who, 0) + found
        count += len(gold)
    return {who: total / count for who, total in sums.items()}


@torch.no_grad()
def attention(teacher, student, batch: Batch, projectors: dict[str, Tensor]) -> Tensor:
    """CMA's teacher-to-student weights (N, M) of one example, each row a distribution over the teacher's positions.

    projectors: {query.weight (2D, 2d), query.bias (2D,) if there is one}. The keys' standard deviation is that of this
    example alone; in training it is that of the whole update.
    """
    ours, theirs = batch.student, batch.teacher
    query = torch.cat([student.embed.weight[ours.inputs], student.embed.weight[ours.labels]], -1)  # (N, 2d)
    key = torch.cat([teacher.embed.weight[theirs.inputs], teacher.embed.weight[theirs.labels]], -1)  # (M, 2D)
    weight, expected = projectors.get("query.weight"), (key.shape[1], query.shape[1])
    if weight is None or weight.shape != expected:
        found = "no query.weight" if weight is None else f"query.weight {list(weight.shape)}"
        raise ValueError(f"--projectors: {found}, expected {list(expected)}; --recipe v1 --align cma trains one")
    query = linear(query, weight.float(), projectors.get("query.bias"))
    return cross_model_attention(query, key / key.std(), ours.example, theirs.example)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def new_figure(width: float, height: float):
    """An empty figure, in inches, with small plain type."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"pictures need matplotlib ({error}): pip install -r requirements-dev.txt") from error
    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}
    matplotlib.rcParams.update({**look, "axes.titlesize": 10, "axes.titlelocation": "left", "figure.titlesize": 10})
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, out: str, name: str) -> None:
    path = Path(out) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    from PIL import Image  # comes with matplotlib

    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size
    print(f"\n{path}")


def draw_simulation(runs: dict[str, dict[str, Tensor]]):
    """Above, one repetition's states before and after (the first divergence); below, every divergence's loss."""
    figure = new_figure(8.4, 7.2)
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.6])
    first = next(iter(runs))
    run = runs[first]
    after = [("student, before", run["start"][0], INK), ("with its own head", run["student"][0, 0], ORANGE),
             ("with the shared head", run["student"][1, 0], BLUE)]  # fmt: skip
    above.suptitle(f"Hidden states of one repetition, {first}", x=0.01, ha="left", fontweight="bold")
    for axis, (name, points, colour) in zip(above.subplots(1, 3, sharex=True, sharey=True), after, strict=True):
        axis.scatter(*run["teacher"][0].T, s=34, facecolors="none", edgecolors=GREY, linewidths=1)
        axis.scatter(*points.T, s=9, color=colour)
        axis.set_title(name, color=colour)
        axis.set_aspect("equal")
        axis.tick_params(labelsize=7, colors=GREY)
    top = run["teacher"][0][run["teacher"][0, :, 1].argmax()]
    above.axes[0].annotate("teacher", top, (-7, -3), textcoords="offset points", color=GREY, ha="right")
    title = "Loss over the steps, mean and standard deviation of the repetitions"
    below.suptitle(title, x=0.01, ha="left", fontweight="bold")
    for axis, (name, run) in zip(below.subplots(2, 3, sharex=True).flat, runs.items(), strict=True):
        for setting, (label, colour) in enumerate([("different heads", ORANGE), ("shared head", BLUE)]):
            losses = run["losses"][:, setting]  # (steps + 1, R)
            mean, deviation = losses.mean(1), losses.std(1)
            axis.plot(mean, color=colour, linewidth=1.6)
            axis.fill_between(range(len(mean)), mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
            if name == first:
                end = len(mean) - 1, mean[-1] + deviation[-1]
                axis.annotate(label, end, (0, 3), textcoords="offset points", color=colour, ha="right")
        axis.set_title(name)
        axis.set_ylim(bottom=0)
        axis.margins(x=0)
    return figure


def draw_structure(distances: dict[str, Tensor]):
    """Per student, how the distances of the examples are spread: median, quartiles, 5th and 95th percentile."""
    figure = new_figure(8, 1.1 + 0.4 * len(distances))
    axes = figure.subplots(1, 2, sharey=True)
    for measure, (axis, name) in enumerate(zip(axes, ["cosine", "inner product"], strict=True)):
        axis.boxplot(
            [values[:, measure].numpy() for values in distances.values()], orientation="horizontal", whis=(5, 95),
            showfliers=False, widths=0.5, medianprops={"color": ORANGE, "linewidth": 2}, boxprops={"color": BLUE},
            whiskerprops={"color": BLUE}, capprops={"color": BLUE},
        )  # fmt: skip
        axis.set_title(f"{name} distance")
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=5)
        axis.spines["left"].set_visible(False)
        axis.tick_params(left=False)
    axes[0].set_yticks(range(1, len(distances) + 1), list(distances))
    axes[0].invert_yaxis()
    return figure


def shown(token: bytes | None) -> str:
    """A token's bytes as a label: visible spaces and line ends, hexadecimal where they are no text of their own."""
    if token is None:
        return "end"
    try:
        text = token.decode().replace(" ", "␣").replace("\n", "↵")
    except UnicodeDecodeError:
        return token.hex(" ").upper()
    # the default font has no glyphs for most of what lies beyond
    return "".join(c if c.isprintable() and ord(c) < 0x2E80 else f"U+{ord(c):X}" for c in text)


def draw_alignment(teacher: list[bytes | None], student: list[bytes | None], pairs, line: int = 72):
    """Both token rows over each other, a token as wide as its bytes, and a line per aligned pair.

    Aligned tokens are blue, others orange. Goes on in a new row of the picture at the first pair beyond `line` bytes.
    """
    from matplotlib.patches import Rectangle

    sides, pairs = [teacher, student], list(zip(*(index.tolist() for index in pairs), strict=True))
    widths = [[3 if token is None else len(token) for token in tokens] for tokens in sides]  # 3: the word "end"
    left = [[0, *accumulate(side)] for side in widths]
    if pairs:  # where they begin to agree is one place in both: a dummy leading space sticks out on the left
        shift = left[0][pairs[0][0] + 1] - left[1][pairs[0][1] + 1]
        left[0] = [x - shift for x in left[0]]
    cuts = [(0, 0)]  # the first teacher and student token of each row of the picture
    for pair in pairs[:-1]:  # the last pair is end-of-text, which needs no row of its own
        if left[1][pair[1] + 1] - left[1][cuts[-1][1]] > line and pair > cuts[-1]:
            cuts.append(pair)
    parts = list(pairwise([*cuts, (len(teacher), len(student))]))

    extent = max(left[row][end[row]] - left[1][begin[1]] for begin, end in parts for row in (0, 1))
    figure = new_figure(0.8 + 0.115 * extent, 0.2 + 0.9 * len(parts))
    for axis, (begin, end) in zip(figure.subplots(len(parts), 1, squeeze=False).flat, parts, strict=True):
        origin = left[1][begin[1]]
        for row, name in enumerate(["teacher", "student"]):
            aligned = {pair[row] for pair in pairs}
            axis.text(-1.6, 1 - row, name, ha="right", va="center", fontsize=8, color=GREY)
            for i in range(begin[row], end[row]):
                x, width, label = left[row][i] - origin, widths[row][i], shown(sides[row][i])
                colour = BLUE if i in aligned else ORANGE
                box = Rectangle((x + 0.1, 0.78 - row), max(width - 0.2, 0.1), 0.44, fc=colour + "22", ec=colour)
                axis.add_patch(box)
                size = min(8.0, 10.0 * width / max(len(label), 1))
                axis.text(x + width / 2, 1 - row, label, ha="center", va="center", fontsize=size, parse_math=False)
        for pair in pairs:
            if begin <= pair < end:
                half = widths[1][pair[1]] / 2  # from the right end: the dummy space belongs to the teacher's token
                ends = [left[row][pair[row] + 1] - origin - half for row in (0, 1)]
                axis.plot(ends, [0.78, 0.22], color=BLUE, linewidth=1)
        axis.set(xlim=(-7, extent + 0.2), ylim=(-0.3, 1.3))
        axis.axis("off")
    return figure


def draw_attention(weights: Tensor, teacher: list[bytes | None], student: list[bytes | None], pairs):
    """CMA's weights as a heat map, student tokens downwards; the exactly aligned pairs are framed."""
    from matplotlib.patches import Rectangle

    figure = new_figure(1.9 + 0.2 * len(teacher), 1.0 + 0.2 * len(student))
    axis = figure.subplots()
    image = axis.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    for i, j in zip(*(index.tolist() for index in pairs), strict=True):
        axis.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.2))
    axis.set_xticks(range(len(teacher)), map(shown, teacher), rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(student)), map(shown, student), fontsize=8, parse_math=False)
    axis.set(xlabel="teacher's token", ylabel="student's token")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="attention weight", fraction=0.04, pad=0.02).outline.set_visible(False)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def find(name: str, weights: bool = True) -> Path:
    """The model directory of a run, preset, hub repository or directory."""
    student = Path(name) / "student"
    directory = model_directory(str(student if student.is_dir() else name), weights)
    check_model(directory, weights)
    return directory


def run_simulation(o: argparse.Namespace) -> None:
    sizes = {"vocabulary": o.vocabulary, "states": 32, "repetitions": o.repetitions, "steps": o.steps, "seed": o.seed}
    for name, least in {"vocabulary": 2, "repetitions": 2, "steps": 1}.items():
        if sizes[name] < least:
            raise ValueError(f"--{name} {sizes[name]}: must be at least {least}")
    runs = {divergence: simulate(divergence, **sizes) for divergence in DIVERGENCES}
    measures = ["last loss", "cosine distance", "inner product distance"]
    rows = [["", *(f"{measure}, {heads}" for measure in measures for heads in ("different heads", "shared head"))]]
    for divergence, run in runs.items():
        structures = structure_distance(run["teacher"].expand_as(run["student"]), run["student"])  # (2, R, 2)
        columns = [*run["losses"][-1], *structures[..., 0], *structures[..., 1]]  # 6 x (R,)
        rows.append([divergence, *(f"{column.mean():.2g} ± {column.std():.2g}" for column in columns)])
    print(table(rows))
    save(draw_simulation(runs), o.out, "simulation.png")


def aligned(o: argparse.Namespace):
    """(name, teacher, student, their rows, aligned, and padding ids) of each student of the command line."""
    teacher_directory, students = find(o.teacher), {name: find(name) for name in o.student}
    examples = read_jsonl(*data_file(o.data, "test"))[: o.limit]
    teacher = load_model(teacher_directory, device=o.device).eval()
    teacher_tokenizer = tokenizer_of(teacher_directory)
    teacher_tokenizer.check_model(teacher.embed.weight.shape[0])
    for name, directory in students.items():
        student, tokenizer = load_model(directory, device=o.device).eval(), tokenizer_of(directory)
        tokenizer.check_model(student.embed.weight.shape[0])
        max_len = min(o.max_len, teacher.limit, student.limit)
        rows, _ = tokenise(examples, tokenizer, teacher_tokenizer, max_len, max_len // 2, align="eta")
        yield name, teacher, student, rows, (tokenizer.eos_id, teacher_tokenizer.eos_id)


def run_structure(o: argparse.Namespace) -> None:
    distances, lines = {}, [["student", "examples", "cosine", "inner product"]]
    for name, teacher, student, rows, pads in aligned(o):
        distances[name] = example_distances(teacher, student, rows, pads, o.device)
        if not len(distances[name]):
            raise ValueError(f"{name}: no example of {o.data} has two aligned positions to compare")
        means = [f"{statistics.fmean(column):.4f}" for column in distances[name].T.tolist()]
        lines.append([name, f"{len(distances[name])} of {len(rows)}", *means])
    print(table(lines))
    save(draw_structure(distances), o.out, "structure.png")


def run_knowledge(o: argparse.Namespace) -> None:
    lines = [["", "entropy", "cross-entropy", "accuracy, %"]]
    for name, teacher, student, rows, pads in aligned(o):
        if not any(len(row.pairs[0]) for row in rows):
            raise ValueError(f"{name}: no example of {o.data} has an aligned position")
        file = Path(name) / "projectors.safetensors"
        projectors = read_projectors(file) if file.is_file() else {}
        through_attention = "query.weight" in projectors  # CMA's t2s is for mixtures of states, not for single ones
        t2s = {} if through_attention else {key[4:]: x for key, x in projectors.items() if key.startswith("t2s.")}
        shape = student.head_weight.shape[1], teacher.head_weight.shape[1]
        if t2s and ("weight" not in t2s or t2s["weight"].shape != shape):
            found = list(t2s["weight"].shape) if "weight" in t2s else "missing"
            raise ValueError(f"{file}: t2s.weight {found}, expected {list(shape)}: another teacher's")
        for who, (entropy, nats, right) in knowledge(teacher, student, rows, pads, t2s, o.device).items():
            lines.append([f"{name}: {who}", f"{entropy:.3f}", f"{nats:.3f}", f"{100 * right:.1f}"])
    print(table(lines))


def read_projectors(file) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error


def run_alignment(o: argparse.Namespace) -> None:
    path, first, last = data_file(o.data, "test")
    example = next((e for e in read_jsonl(path, first, last) if e.where == f"{path}, line {o.line}"), None)
    if example is None:
        raise ValueError(f"--line {o.line}: {path} has no example on that line (lines count from 1)")
    teacher_directory, student_directory = (find(name, bool(o.projectors)) for name in (o.teacher, o.student))
    both = teacher_directory, student_directory
    teacher, student = (tokenizer_of(directory) for directory in both)
    (row,), _ = tokenise([example], student, teacher, o.max_len, o.max_len // 2, align="eta")
    theirs = [teacher.bytes[i] for i in row.teacher.response]
    ours = [student.bytes[i] for i in row.student.response]
    head, cells = ["teacher tokens", "student tokens", "aligned pairs"], [len(theirs), len(ours), len(row.pairs[0])]
    weights = None
    if o.projectors:
        models = [load_model(directory) for directory in (teacher_directory, student_directory)]
        for model, tokenizer in zip(models, (teacher, student), strict=True):
            tokenizer.check_model(model.embed.weight.shape[0])
        projectors = read_projectors(o.projectors)
        weights = attention(*models, collate([row], student.eos_id, teacher.eos_id), projectors)
        on_pairs = weights[row.pairs[1], row.pairs[0]]  # (A,)
        hits = (weights.argmax(-1)[row.pairs[1]] == torch.from_numpy(row.pairs[0])).sum()
        head += ["attention on the aligned token", "uniform attention", "largest on the aligned token"]
        cells += [f"{on_pairs.mean():.3f}", f"{1 / len(theirs):.3f}", f"{hits} of {len(on_pairs)}"]
    print(table([head, [str(cell) for cell in cells]]))
    save(draw_alignment(theirs, ours, row.pairs), o.out, "alignment.png")
    if weights is not None:
        save(draw_attention(weights, theirs, ours, row.pairs), o.out, "attention.png")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="simulate | structure | alignment | knowledge")

    simulation = commands.add_parser("simulate", help="different heads against a shared head (v1 §2.2)")
    simulation.set_defaults(run=run_simulation)
    simulation.add_argument("--vocabulary", type=int, default=16, help="tokens that the heads predict")
    simulation.add_argument("--repetitions", type=int, default=100)
    simulation.add_argument("--steps", type=int, default=1000)
    simulation.add_argument("--seed", type=int, default=0)

    structures = commands.add_parser("structure", help="distance of the hidden states' structure from the teacher's")
    structures.set_defaults(run=run_structure)

    known = commands.add_parser("knowledge", help="how sure and how right teacher, projected teacher and student are")
    known.set_defaults(run=run_knowledge)
    for command in (structures, known):
        command.add_argument("--student", nargs="+", required=True, help="runs or models")
        command.add_argument("--limit", type=int, help="only the first LIMIT examples")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    alignment = commands.add_parser("alignment", help="one response's exact alignment, and attention")
    alignment.set_defaults(run=run_alignment)
    alignment.add_argument("--student", required=True, help="run or model")
    alignment.add_argument("--line", type=int, required=True, help="line of the file, from 1")
    alignment.add_argument("--projectors", help="projectors.safetensors of the student's run (recipe v1, cma)")

    for command in (structures, known, alignment):
        command.add_argument("--teacher", required=True, help="run or model")
        command.add_argument("--data", required=True, help="named set (its test split) or JSONL file")
        command.add_argument("--max-len", type=int, default=512, help="tokens of prompt and response, half for prompts")
    for command in (simulation, structures, alignment):
        command.add_argument("--out", default="figures", help="folder for the pictures (default: figures)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    o = make_parser().parse_args(arguments)
    try:
        if o.run is not run_knowledge:
            new_figure(1, 1)  # a missing matplotlib is told before the work, not after it
        o.run(o)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
