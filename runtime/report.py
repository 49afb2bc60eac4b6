"""What a run reports: the scores and the model card of its student, and the commands that come next."""

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from statistics import fmean

from data import Example
from model import read_json
from runtime import parallel
from runtime.hub import DATASETS, MODELS, repository_of
from runtime.options import Options
from runtime.presets import flags, settings, shorten
from runtime.run import KEPT_BY, chat_of, read_log, run_of, write_text

MARK = "<!-- train.py and eval.py write this file again as long as this line is in it -->"
MEASURES = ("rouge_l", "exact_match", "accuracy", "pass_at_1", "cross_entropy")  # of eval-NAME.json


def base_model(o) -> str | None:
    """The hub's name of the model that a run's student started from, even through several runs; None without one."""
    run = run_of(o.student)
    return None if o.from_scratch else run.get("base_model") if run else repository_of(o.student)


def read_scores(out: Path, record: dict, weights: str | None) -> list[str]:
    """A line for each score in the run directory of the student with digest `weights`; scores that eval.py wrote for an
    earlier checkpoint are left out."""
    log, step = read_log(out / "log.jsonl"), record.get("best", {}).get("step")  # step of the checkpoint in student/
    log = [line for line in log if step in (None, line["step"])]
    valid = {name: line[name] for line in log for name in KEPT_BY.values() if name in line}
    lines = [f"- {record['valid']}, held out: {name} {value:.4g}" for name, value in valid.items()]
    for report in map(read_json, sorted(out.glob("eval-*.json"))):
        if "greedy" not in report:  # another tool's file
            continue
        if weights and report.get("weights", weights) != weights:  # not in older reports
            continue
        scores = {name: report[name] for name in MEASURES if name in report}
        means = (f"{name} {fmean(x) if isinstance(x, list) else x:.4g}" for name, x in scores.items())
        how = "greedy" if report["greedy"] else f"sampled with seeds {report['seeds']}"
        lines.append(f"- {report['data']}, {report['examples']} examples, {how}: {', '.join(means)}")
    return lines


def report_file(name: str, data, greedy: bool) -> Path:
    """eval-<data>.json in the run's directory, or eval-<data>-greedy.json. For a directory that is not a run,
    eval-<model>-<data>.json in the current directory, because a model's own may be shared or published."""
    end = f"{data.name}{'-greedy' * greedy}.json"
    if (Path(name) / "student").is_dir():
        return Path(name) / f"eval-{end}"
    return Path(f"eval-{name.strip('/').replace('/', '-')}-{end}")


def write_report(name: str, directory: Path, data, options, scores: dict) -> Path:
    """Write `report_file` on a model and a set (DataSet of scores/tasks.py); update the model card if this is a run."""
    report = {"model": str(directory), "data": data.name, "task": data.task, "examples": len(data.examples)}
    report["chat"] = options.chat or chat_of(directory) or "none"
    report |= {"greedy": options.greedy, "seeds": None if options.greedy else options.seeds, **scores}
    path = report_file(name, data, options.greedy)
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False))
    if (Path(name) / "args.json").is_file():
        write_card(Path(name), scores["weights"])
    return path


def write_card(out: Path, weights: str | None = None) -> None:
    """Write student/README.md from args.json, log.jsonl and the evaluations in the run, unless it was edited.
    weights: the student's `fast.cache.model_digest`, which tells its scores from those of an earlier checkpoint."""
    file, record = out / "student" / "README.md", read_json(out / "args.json")
    if file.is_file() and MARK not in file.read_text(encoding="utf-8"):
        return
    base, method = record.get("base_model"), record["method"]
    how = f"{method} {record['recipe']}" if method == "dskd" else method
    origin = f"`{base or record['student']}`" + " (its config.json alone)" * record["from_scratch"]
    taught = "" if method == "sft" else f", teacher `{MODELS.get(record['teacher'], record['teacher'])}`"
    data = DATASETS.get(record["data"], [None])[0]
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "base_model": base,
            "datasets": data and [data], "tags": ["knowledge-distillation", how.replace(" ", "-")]}  # fmt: skip
    matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items() if value)
    record = {"processes": 1, **record}  # older runs do not name it
    names = ["max_steps" if record["max_steps"] else "epochs"]
    names += "batch_size grad_accum processes lr max_len seed".split()
    settings = ", ".join(f"{name} {record[name]}" for name in names)
    start = f"torchrun --nproc_per_node={record['processes']}" if record["processes"] > 1 else "python"
    options = {entry.name: record.get(entry.name, entry.default) for entry in fields(Options) if entry.name != "device"}
    scores = "\n".join(read_scores(out, record, weights)) or "None yet; `eval.py` adds its scores here."
    text = f"""---
{matter}
# license: to be filled in. See "Licence" below.
---
{MARK}

# {out.resolve().name}

{origin}, trained with `{how}`{taught}, on `{data or record["data"]}`.
Settings: {settings}. Papers: [DSKD](https://arxiv.org/abs/2406.17328), [v2](https://arxiv.org/abs/2504.11426).

## Licence

Check the licences of the base model {origin}, the teacher and the data, and what they require
of a model made from them. Then name this model's licence above, as `license:`.

## Scores

{scores}

## Training

    {start} train.py {flags(shorten(options))}
"""
    write_text(file, text)


def prompt_form(example: Example) -> str:
    """The form of prompts like this example's, with {} for the user's text."""
    if example.prompt is None:
        return Example("", [], instruction="{}").prompt_text()
    return "{}" + example.prompt[len(example.prompt.rstrip()) :]


def say_next(given: dict, o: Options, line: dict) -> None:
    """After a run, print on standard error its last losses and scores, and the commands for its student."""
    losses = ", ".join(f"{name} {line[name]:.4f}" for name in ("loss", "ce", "kd", *KEPT_BY.values()) if name in line)
    test = o.data if o.data in DATASETS else "TEST.jsonl"
    further = settings(given)  # a directory as student has no recipe
    for name in ("resume", "from_scratch"):
        further.pop(name, None)
    further |= {"student": f"{o.out}/student", "out": f"{o.out}-2"} | ({"teacher": o.teacher} if o.teacher else {})
    if (projectors := Path(o.out) / "projectors.safetensors").is_file():
        further["projectors"] = str(projectors)
    if line:  # a run that was already finished has none
        print(f"after {line['step']} updates: {losses}", file=sys.stderr)
    print(f"""score it:       python eval.py {shlex.quote(o.out)} --data {shlex.quote(test)}
talk to it:     python eval.py {shlex.quote(o.out)} --prompt "..."
train further:  {parallel.launcher()} train.py {flags(further)}""", file=sys.stderr)  # fmt: skip
