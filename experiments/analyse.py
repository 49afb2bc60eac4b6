"""The papers' analyses as pictures, each with its numbers as a markdown table: python -m experiments.analyse ...

    simulate                                                     why the two models should share a head
    structure --teacher DIR --student DIR [DIR ...] --data FILE   how similar their hidden states are
    alignment --teacher DIR --student DIR --data FILE --line N    which tokens of a response align
        [--projectors FILE]                     and, after a run with --recipe v1 --align cma, where attention looks
    knowledge --teacher DIR --student DIR [DIR ...] --data FILE   what the projected teacher knows
    curves RUN [RUN ...]                                         losses and held-out scores of runs over their updates

All but `knowledge` need matplotlib (requirements-dev.txt). A DIR is a run, which stands for its student/, or a model,
by name or directory.

The simulation is v1's (arXiv 2406.17328 §2.2). Points in the plane represent hidden states. The teacher's are fixed;
only the student's move, down the gradient of a divergence between the two softmax distributions. This is done once with
a head for each (vanilla KD) and once with the teacher's head for both (DSKD). We do not know the paper's constants and
chose these, so curves can be compared in shape and order, but not in value:

- per repetition 32 states, teacher N((2, 2), 1), student N((−2, −2), 0.5²); both settings start from the same states
- two heads with entries N(0, 1/2), never trained; a vocabulary of 16, so that a head of rank 2 cannot produce every
  distribution (with 3 tokens it can: `--vocabulary 3`); temperature 1
- 1000 steps of Adam at 0.02, on the sum over the states; states and repetitions do not influence each other

The representation structure (v1's analysis) of n hidden states h_1 ... h_n is two matrices that do not change when the
space is rotated. So models of different widths can be compared, by the mean absolute difference of the entries:

    cosine         C_ij = h_i·h_j / (|h_i| |h_j|)
    inner product  P_ij = h_i·h_j / mean_k |h_i·h_k|    each row relative to its mean size, so that scale drops out too

(The paper, as far as we know, divides a row by its sum. Without |·| a row that sums to nearly 0 would outweigh all
others; with the mean instead of the sum, the distance does not shrink as 1/n with the length of a response.)

A response's states are those at its exactly aligned positions (ETA, before the filter on the teacher's predictions); if
the vocabularies are equal, these are all positions.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy, linear, normalize

from align import ResponseTokens, cross_model_attention, deviations, teacher_moments
from data import Batch, Row, collate, tokenise
from losses import DIVERGENCES
from model import Decoder, hidden_at, load_model
from runtime.device import choose_device
from runtime.formats import read_examples
from runtime.hub import data_file
from runtime.load import find_model
from runtime.run import read_log, tokenizer_of
from runtime.show import show_pairs, show_token
from runtime.strict import check_device, check_values, read_projectors
from runtime.tokenizer import TextTokenizer
from scores.tables import table

# Okabe and Ito's colours, which can be told apart with any kind of colour vision
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8C8C8C", "#222222"
CURVES = "loss ce kd t2s_ce t2s_kd s2t_kd t2s_agreement align_ratio accuracy valid_ce valid_rouge_l".split()
COLOURS = {"before": INK, "different heads": ORANGE, "shared head": BLUE}

# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def simulate(
    divergence: str, vocabulary: int = 16, states: int = 32, repetitions: int = 100, steps: int = 1000, seed: int = 0
) -> dict[str, Tensor]:
    """Move student states towards a teacher's distribution; setting 0 has a head for each, setting 1 a shared head.

    Returns {losses (steps + 1, 2, R): means over P states, teacher (R, P, 2), start (R, P, 2), student (2, R, P, 2),
    heads (2, R, V, 2): the student's in each setting; the second is also the teacher's}. A seed gives the same points
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


@dataclass
class Pair:
    """A teacher, a student, and examples tokenised for both with align="eta"."""

    teacher: Decoder
    student: Decoder
    rows: list[Row]
    ends: tuple[int, int]  # end-of-text of the student and of the teacher, for padding
    device: str = "cpu"

    @torch.no_grad()
    def aligned_states(self, size: int) -> Iterator[tuple[list[Tensor], list[Tensor], list[int]]]:
        """For `size` examples at a time, at the A aligned positions: states of teacher and student (A, D), (A, d),
        their gold tokens (A,), and how many of the A each example has."""
        for first in range(0, len(self.rows), size):
            rows = self.rows[first : first + size]
            batch = collate(rows, *self.ends).to(self.device)
            sides = [(self.teacher, batch.teacher, batch.teacher_index)]
            sides.append((self.student, batch.student, batch.student_index))
            states = [hidden_at(model, side)[index] for model, side, index in sides]
            yield states, [side.labels[index] for _, side, index in sides], [len(row.pairs[0]) for row in rows]


def example_distances(pair: Pair, size: int = 16) -> Tensor:
    """The structure distance of each example with at least two aligned positions, (E, 2)."""
    distances = [torch.empty(0, 2)]
    for states, _, lengths in pair.aligned_states(size):
        examples = zip(*(x.split(lengths) for x in states), strict=True)
        distances += [structure_distance(*both).cpu()[None] for both in examples if len(both[0]) > 1]
    return torch.cat(distances)


@torch.no_grad()
def knowledge(pair: Pair, t2s: dict[str, Tensor], size: int = 16) -> dict[str, Tensor]:
    """{who: (3,)}: mean entropy, mean cross-entropy with the gold token, both in nats, and accuracy at the aligned
    positions, of teacher, student and projected teacher (the teacher's states through t2s under the student's head).

    t2s: {t2s.weight (d, D), t2s.bias (d,) if there is one}; empty: not projected.
    """
    found: dict[str, list[Tensor]] = {}
    student_head = pair.student.head_weight
    for (theirs, ours), (their_gold, gold), _ in pair.aligned_states(size):
        read = {"teacher": (theirs, pair.teacher.head_weight, their_gold), "student": (ours, student_head, gold)}
        if t2s:
            read["projected teacher"] = linear(theirs, t2s["t2s.weight"], t2s.get("t2s.bias")), student_head, gold
        for who, (hidden, head, labels) in read.items():
            logits = (hidden @ head.T).float()
            entropy = Categorical(logits=logits).entropy()
            nats, right = cross_entropy(logits, labels, reduction="none"), logits.argmax(-1) == labels
            found.setdefault(who, []).append(torch.stack([entropy, nats, right.float()], 1).double().cpu())  # (A, 3)
    return {who: torch.cat(parts).mean(0) for who, parts in found.items()}


@torch.no_grad()
def attention(teacher: Decoder, student: Decoder, batch: Batch, query: Callable) -> Tensor:
    """CMA's teacher-to-student weights (N, M) of one example, each row a distribution over the teacher's positions.

    query: the run's projector, 2d -> 2D. The values are the rows of an identity matrix, so that the result is the
    weights themselves. The keys' standard deviation is this example's; in training it is the whole update's.
    """
    models = (student, batch.student), (teacher, batch.teacher)
    ours, theirs = (
        ResponseTokens(side.inputs, side.labels, side.lengths, m.embed.weight, hidden_at(m, side)) for m, side in models
    )
    projectors = SimpleNamespace(query=query, t2s=lambda value: torch.eye(len(value)), s2t=nn.Identity())
    return cross_model_attention(ours, theirs, projectors, deviations(teacher_moments(theirs)))[0]


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def new_figure(width: float, height: float):
    """An empty figure of this size in inches, with small plain type."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"pictures need matplotlib ({error}): pip install -r requirements-dev.txt") from error
    matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
                                "axes.spines.right": False, "legend.frameon": False})  # fmt: skip
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def draw_simulation(runs: dict[str, dict[str, Tensor]]):
    """Top row: the states of one repetition before and after, for the first divergence. Below: the loss with every
    divergence, mean and standard deviation over the repetitions."""
    figure = new_figure(8.4, 7.2)
    axes = figure.subplots(3, 3)
    first, run = next(iter(runs.items()))
    states = {"before": run["start"][0], "different heads": run["student"][0, 0], "shared head": run["student"][1, 0]}
    for axis, (name, student) in zip(axes[0], states.items(), strict=True):
        axis.scatter(*run["teacher"][0].T, s=34, facecolors="none", edgecolors=GREY, label="teacher")
        axis.scatter(*student.T, s=9, color=COLOURS[name], label="student")
        axis.set(title=f"states, {first}: {name}", aspect="equal", xlim=(-5, 5), ylim=(-5, 5))
    axes[0, 0].legend(loc="upper left")
    for axis, (name, run) in zip(axes[1:].flat, runs.items(), strict=True):
        for setting, heads in enumerate(["different heads", "shared head"]):
            losses = run["losses"][:, setting]  # (steps + 1, R)
            mean, deviation = losses.mean(1), losses.std(1)
            axis.plot(mean, color=COLOURS[heads], label=heads)
            axis.fill_between(range(len(mean)), mean - deviation, mean + deviation, color=COLOURS[heads], alpha=0.2)
        axis.set(title=f"loss over the steps, {name}", ylim=(0, None))
    axes[1, 0].legend()
    return figure


def draw_curves(logs: dict[str, list[dict]], keys: list[str]):
    """A panel for each key, with a line for each run that has it; the legend is below."""
    rows = -(-len(keys) // 3)
    figure = new_figure(9, 0.3 * len(logs) + 2 * rows)
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for axis, key in zip(axes, [*keys, *[""] * (3 * rows - len(keys))], strict=True):
        for name, lines in logs.items():
            points = [(line["step"], line[key]) for line in lines if key in line]
            axis.plot(*zip(*points, strict=True), label=name) if points else axis.plot([], [])
        axis.set(title=key)
        axis.set_visible(bool(key))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left")
    return figure


def draw_structure(distances: dict[str, Tensor]):
    """For each student, the distribution of the examples' distances: median, quartiles, 5th and 95th percentile."""
    figure = new_figure(8, 1.1 + 0.4 * len(distances))
    axes = figure.subplots(1, 2, sharey=True)
    for measure, (axis, name) in enumerate(zip(axes, ["cosine", "inner product"], strict=True)):
        columns = [values[:, measure].numpy() for values in distances.values()]
        axis.boxplot(columns, tick_labels=list(distances), orientation="horizontal", whis=(5, 95), showfliers=False)
        axis.set(title=f"{name} distance", xlim=(0, None))
    axes[0].invert_yaxis()
    return figure


def draw_attention(weights: Tensor, teacher: list[bytes | None], student: list[bytes | None], pairs):
    """CMA's weights as a heat map, student tokens downwards; the exactly aligned pairs are framed."""
    from matplotlib.patches import Rectangle

    figure = new_figure(1.9 + 0.2 * len(teacher), 1.0 + 0.2 * len(student))
    axis = figure.subplots()
    image = axis.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*(index.tolist() for index in pairs), strict=True):
        axis.add_patch(Rectangle((i - 0.5, j - 0.5), 1, 1, fill=False, edgecolor=ORANGE))
    axis.set_xticks(range(len(teacher)), map(show_token, teacher), rotation=90, fontsize=8, parse_math=False)
    axis.set_yticks(range(len(student)), map(show_token, student), fontsize=8, parse_math=False)
    axis.set(xlabel="teacher's token", ylabel="student's token")
    figure.colorbar(image, label="attention weight", fraction=0.04)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def load(name: str, role: str, device: str) -> tuple[Decoder, TextTokenizer]:
    directory = find_model(name, role)
    return load_model(directory, device=device).eval(), tokenizer_of(directory)


def projectors_of(file: Path, student: Decoder, teacher: Decoder) -> dict[str, Tensor]:
    """The projectors of a run with these two models. Raises ValueError for a file of another teacher or kind."""
    try:
        given = read_projectors(file, student.head_weight.shape[1], teacher.head_weight.shape[1], "cma")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    return {name: tensor.to(student.head_weight) for name, tensor in given.items()}


def run_simulation(o: argparse.Namespace) -> None:
    runs = {name: simulate(name, o.vocabulary, 32, o.repetitions, o.steps, o.seed) for name in DIVERGENCES}
    measures = ["last loss", "cosine distance", "inner product distance"]
    rows = [["", *(f"{measure}, {heads}" for measure in measures for heads in ("different heads", "shared head"))]]
    for divergence, run in runs.items():
        structures = structure_distance(run["teacher"].expand_as(run["student"]), run["student"])  # (2, R, 2)
        columns = [*run["losses"][-1], *structures[..., 0], *structures[..., 1]]  # 6 x (R,)
        rows.append([divergence, *(f"{column.mean():.2g} ± {column.std():.2g}" for column in columns)])
    print(table(rows))
    save(draw_simulation(runs), Path(o.out) / "simulation.png")


def pairs(o: argparse.Namespace) -> Iterator[tuple[str, Pair]]:
    """Each student of the command line, by its name there, with the teacher and the examples."""
    examples = read_examples(*data_file(o.data, "test"))[: o.limit]
    teacher, teacher_tokenizer = load(o.teacher, "teacher", o.device)
    for name in o.student:
        student, tokenizer = load(name, "student", o.device)
        max_len = min(o.max_len, teacher.limit, student.limit)
        rows, _ = tokenise(examples, tokenizer, teacher_tokenizer, max_len, max_len // 2, align="eta")
        yield name, Pair(teacher, student, rows, (tokenizer.eos_id, teacher_tokenizer.eos_id), o.device)


def run_curves(o: argparse.Namespace) -> None:
    logs = {name: read_log(Path(name) / "log.jsonl") for name in o.runs}
    if empty := [name for name, lines in logs.items() if not lines]:
        raise ValueError(f"{empty[0]}: no update is logged yet")
    keys = [key for key in CURVES if any(key in line for lines in logs.values() for line in lines)]
    rows = [["", *keys]]
    for name, lines in logs.items():
        last = {key: f"{line[key]:.4f}" for line in lines for key in keys if key in line}
        rows.append([name, *(last.get(key, "-") for key in keys)])
    print(table(rows))
    save(draw_curves(logs, keys), Path(o.out) / "curves.png")


def run_structure(o: argparse.Namespace) -> None:
    distances, lines = {}, [["student", "examples", "cosine", "inner product"]]
    for name, pair in pairs(o):
        distances[name] = example_distances(pair)
        means = [f"{mean:.4f}" for mean in distances[name].mean(0).tolist()]
        lines.append([name, f"{len(distances[name])} of {len(pair.rows)}", *means])
    print(table(lines))
    save(draw_structure(distances), Path(o.out) / "structure.png")


def run_knowledge(o: argparse.Namespace) -> None:
    lines = [["", "entropy", "cross-entropy", "accuracy, %"]]
    for name, pair in pairs(o):
        file = Path(name) / "projectors.safetensors"
        t2s = projectors_of(file, pair.student, pair.teacher) if file.is_file() else {}
        if "query.weight" in t2s:  # CMA's t2s is trained on mixtures of states, not on single ones
            t2s = {}
        for who, (entropy, nats, right) in knowledge(pair, t2s).items():
            lines.append([f"{name}: {who}", f"{entropy:.3f}", f"{nats:.3f}", f"{100 * right:.1f}"])
    print(table(lines))


def run_alignment(o: argparse.Namespace) -> None:
    path, first, last = data_file(o.data, "test")
    example = next((e for e in read_examples(path, first, last) if e.where == f"{path}, line {o.line}"), None)
    if example is None:
        raise ValueError(f"--line {o.line}: {path} has no example on that line (lines count from 1)")
    roles = {"teacher": o.teacher, "student": o.student}
    directories = [find_model(name, role, bool(o.projectors)) for role, name in roles.items()]
    teacher, student = map(tokenizer_of, directories)
    models = [load_model(directory) for directory in directories] if o.projectors else []  # in eval mode
    max_len = min([o.max_len, *(m.limit for m in models)])
    (row,), _ = tokenise([example], student, teacher, max_len, max_len // 2, align="eta")
    theirs, ours = teacher.spell(row.teacher.response), student.spell(row.student.response)
    figures = {"teacher tokens": len(theirs), "student tokens": len(ours), "aligned pairs": len(row.pairs[0])}
    if o.projectors:
        given = projectors_of(o.projectors, models[1], models[0])
        if "query.weight" not in given:
            raise ValueError(f"--projectors {o.projectors}: no query.weight; --recipe v1 --align cma trains one")
        query = partial(linear, weight=given["query.weight"], bias=given.get("query.bias"))
        weights = attention(*models, collate([row], student.eos_id, teacher.eos_id), query)
        at_teacher, at_student = map(torch.from_numpy, row.pairs)
        hits = (weights.argmax(-1)[at_student] == at_teacher).sum()
        figures["attention on the aligned token"] = f"{weights[at_student, at_teacher].mean():.3f}"
        figures["uniform attention"] = f"{1 / len(theirs):.3f}"
        figures["largest on the aligned token"] = f"{hits} of {len(at_teacher)}"
        save(draw_attention(weights, theirs, ours, row.pairs), Path(o.out) / "attention.png")
    print(table([list(figures), [str(figure) for figure in figures.values()]]) + "\n")
    print(show_pairs(theirs, ours, row.pairs))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="simulate | structure | alignment | knowledge | curves")

    simulation = commands.add_parser("simulate", help="different heads compared with a shared head (v1 §2.2)")
    simulation.set_defaults(run=run_simulation)
    simulation.add_argument("--vocabulary", type=int, default=16, help="number of tokens that the heads predict")
    simulation.add_argument("--repetitions", type=int, default=100)
    simulation.add_argument("--steps", type=int, default=1000)
    simulation.add_argument("--seed", type=int, default=0)

    structures = commands.add_parser("structure", help="distance of the hidden states' structure from the teacher's")
    structures.set_defaults(run=run_structure)
    known = commands.add_parser("knowledge", help="entropy and accuracy of teacher, projected teacher and student")
    known.set_defaults(run=run_knowledge)
    alignment = commands.add_parser("alignment", help="one response's exact alignment, and attention")
    alignment.set_defaults(run=run_alignment)
    alignment.add_argument("--line", type=int, required=True, help="line of the file, from 1")
    alignment.add_argument("--projectors", help="projectors.safetensors of the student's run (recipe v1, cma)")

    curves = commands.add_parser("curves", help="losses and held-out scores of several runs, in one picture")
    curves.set_defaults(run=run_curves)
    curves.add_argument("runs", nargs="+", metavar="RUN", help="run directories")

    for command in (structures, known, alignment):
        command.add_argument("--teacher", required=True, help="run or model")
        several = None if command is alignment else "+"
        command.add_argument("--student", nargs=several, required=True, help="run or model")
        command.add_argument("--data", required=True, help="named set (its test split) or JSONL file")
        command.add_argument("--max-len", type=int, default=512, help="tokens of prompt and response; half for prompts")
    for command in (structures, known):
        command.add_argument("--limit", type=int, help="only the first LIMIT examples")
        command.add_argument("--device", default=choose_device()[0])
    for command in (simulation, structures, alignment, curves):
        command.add_argument("--out", default="figures", help="folder for the pictures (default: figures)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    o = make_parser().parse_args(arguments)
    at_least = {"vocabulary": 2, "repetitions": 1, "steps": 1, "seed": 0, "line": 1, "max_len": 2, "limit": 1}
    try:
        check_values(vars(o), {name: least for name, least in at_least.items() if name in o}, {})
        if o.run is not run_knowledge:
            new_figure(1, 1)  # report a missing matplotlib before the work, not after it
        if "device" in o:
            check_device(o.device)
        o.run(o)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
