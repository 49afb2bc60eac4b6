"""Tables in Markdown: scores, mean ± standard deviation over the sampling seeds, and differences between models."""

import statistics
from collections import Counter

from scores.tasks import MEASURES, DataSet

TITLES = {"rouge_l": "Rouge-L", "accuracy": "accuracy", "pass_at_1": "pass@1", "exact_match": "exact match"}


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def spread(values: list[float], digits: int = 2, sign: str = "") -> str:
    """mean ± standard deviation (of a sample: n − 1)"""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{deviation}"


def compare(sets: list[DataSet], results: dict[tuple[str, str], dict]) -> str:
    """The table of all (model, set) scored so far: a column per set, or all measures of a single set."""
    single, columns = len(sets) == 1, [(data, MEASURES[data.task]) for data in sets]
    if single:
        columns = [(sets[0], name) for name in TITLES if all(name in scores for scores in results.values())]
    averaged = not single and len({name for _, name in columns}) == 1  # Rouge-L and pass@1 have no common mean
    head = [TITLES[name] if single else f"{data.name} {TITLES[name]}" for data, name in columns]
    rows = [["model", *head, *["cross-entropy"] * single, *["average"] * averaged, "not ended"]]
    for model in dict.fromkeys(model for model, _ in results):
        found = [(results.get((model, data.name)), name) for data, name in columns]
        row = [model, *(spread(scores[name]) + mark(scores, name) if scores else "-" for scores, name in found)]
        if single:
            row.append(f"{results[model, sets[0].name]['cross_entropy']:.4f}")
        if averaged:
            complete = [scores[name] for scores, name in found] if all(scores for scores, _ in found) else []
            row.append(spread([statistics.fmean(seed) for seed in zip(*complete, strict=True)]))
        rows.append([*row, count_unfinished([scores for (name, _), scores in results.items() if name == model])])
    return table(rows) + notes(sets, results) + differences(sets, results)


def differences(sets: list[DataSet], results: dict[tuple[str, str], dict]) -> str:
    """The table of the differences from the first model, prompt by prompt; empty if there is no other."""
    first, *others = dict.fromkeys(model for model, _ in results)
    rows = [[f"difference from {first}", *(f"{data.name} {TITLES[MEASURES[data.task]]}" for data in sets)]]
    for model in others:
        both = ([results.get((one, data.name), {}).get("each") for one in (model, first)] for data in sets)
        rows.append([model, *(difference(*each) if all(each) else "-" for each in both)])
    note = "± standard error over the prompts: what other prompts might change, but not what another training might"
    return f"\n\n{table(rows)}\n{note}" if others else ""


def difference(ours: list[list[float]], theirs: list[list[float]]) -> str:
    """The mean difference ± its standard error over the prompts; each list has a list of their scores per seed."""
    both = zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    gaps = [statistics.fmean(a) - statistics.fmean(b) for a, b in both]
    error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.2f}{error}"


def count_unfinished(found: list[dict]) -> str:
    """How many of all responses, over all seeds, reached the limit of new tokens without an end."""
    return f"{sum(sum(s['not_ended']) for s in found)} of {sum(len(r) for s in found for r in s['responses'])}"


def describe(scores: dict, data: DataSet, chat, file) -> str:
    """For one model and one set: what was scored and where the report is; for programs, also how they ended."""
    line = f"{len(data.examples)} examples" + (f" in {chat.name}" if chat else "")
    if scores["prompts_cut"]:
        line += f", {scores['prompts_cut']} prompts cut to fit"
    if scores["references_cut"]:
        line += f", {scores['references_cut']} references cut to fit (for the cross-entropy only)"
    if any(scores["not_ended"]):
        line += f", {count_unfinished([scores])} responses did not end within {scores['new_tokens']} tokens"
    line += f"; {file}"
    if data.task == "code":
        ends = Counter(detail["status"] for details in scores["details"] for detail in details)
        line += "\n" + ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    return line


def mark(scores: dict, name: str) -> str:
    """The mark of a Rouge-L with examples that score 0 whatever the response is."""
    return "*" if name == "rouge_l" and scores.get("no_reference_tokens") else ""


def notes(sets: list[DataSet], results: dict[tuple[str, str], dict]) -> str:
    """The footnotes that explain the marks of the table."""
    without = {name: scores["no_reference_tokens"] for (_, name), scores in results.items() if mark(scores, "rouge_l")}
    return "".join(
        f"\n* {data.name}: the references of {without[data.name]} of {len(data.examples)} examples have no token that "
        "Rouge-L counts (a-z, 0-9), so these examples score 0 whatever the response is"
        for data in sets if data.name in without
    )  # fmt: skip
