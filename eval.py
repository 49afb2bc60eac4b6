"""Scores of trained students: generated responses against references, answers or tests, and held-out cross-entropy.

    python eval.py runs/a runs/b --data dolly self-inst vicuna    the papers' protocol: 5 sampling seeds, T = 1
    python eval.py runs/a --data my_test.jsonl --greedy           one greedy response per prompt
    python eval.py runs/a --data gsm8k_test.jsonl                 accuracy of the final answers
    python eval.py runs/a --data humaneval.jsonl --run-code       pass@1: runs what the model wrote, see sandbox.py

Each directory is a run (its student/ is scored) or a model. What is scored follows from the data: tests make it `code`,
references that end in `#### x` or hold \\boxed{x} make it `math`, all else is `rouge`. Prints one table, and writes
eval-<data>.json beside each scored model's directory, with all responses, as soon as that set is done.

rouge   Rouge-L: F-measure with Porter stemming, the maximum over an example's references
math    accuracy: final answers equal to the reference's
code    pass@1: programs that pass all tests of their task; with several seeds, the mean over one sample each
All in per cent; mean ± standard deviation over the seeds. The average over sets is taken for each seed first. "Not
ended" counts the responses of all seeds that the budget of new tokens cut off before the model ended them.

A response has at most --max-len minus --max-prompt-len tokens (512 - 256), however long the prompts of a set are. A
prompt that is longer than --max-prompt-len is cut, and the report says how many were; the official runs drop such
examples instead, and so average over fewer.
"""

import argparse
import json
import os
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from data import CHATS, Example, TextTokenizer, collate, cut_prompt, read_jsonl, tokenise
from fast.cpu import by_onednn, packed
from losses import logits_under
from model import generate, hidden_at, load_model
from runtime.hub import data_file, model_directory
from runtime.run import chat_of, tokenizer_of, write_text
from runtime.strict import check_model
from scores.answers import final_answer, is_correct
from scores.programs import humaneval_program, mbpp_program
from scores.rouge import exact_match, rouge_l, tokenize

MEASURES = {"rouge": "rouge_l", "math": "accuracy", "code": "pass_at_1"}  # task: what its table shows
TITLES = {"rouge_l": "Rouge-L", "accuracy": "accuracy", "pass_at_1": "pass@1", "exact_match": "exact match"}
MAX_LEN = {"rouge": 512, "math": 1024, "code": 1024}  # tokens of prompt and response together; half for the prompt


def respond(
    model,
    tokenizer: TextTokenizer,
    prompts: list[str],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    batch_size: int = 32,
    progress: bool = False,
    unfinished: set[int] | None = None,
) -> list[str]:
    """The model's response to each prompt, without its end; temperature 0 is greedy.

    unfinished: the indices of the responses that did not end within max_new_tokens are added to this set.
    """
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # equal lengths together: little padding
    responses = [""] * len(ids)
    with packed(model):
        for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress, leave=False):
            chosen = order[start : start + batch_size]
            batch_seed = None if seed is None else seed * 1_000_003 + start
            new = generate(
                model, [ids[i] for i in chosen], max_new_tokens, tokenizer.end_ids, temperature, 0, top_p, batch_seed,
                tokenizer.size,  # not the rows that only pad the head
            )  # fmt: skip
            for i, tokens in zip(chosen, new, strict=True):
                responses[i] = tokenizer.decode(tokens)
                if unfinished is not None and (not tokens or tokens[-1] not in tokenizer.end_ids):
                    unfinished.add(i)
    return responses


@torch.no_grad()
def held_out_cross_entropy(model, rows: list, eos_id: int, device="cpu", batch_size: int = 16) -> float:
    """Mean cross-entropy per response token, in nats, over tokenised rows; the model is left in its mode."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    rows = sorted(rows, key=lambda row: len(row.student.prompt) + len(row.student.response))
    for start in range(0, len(rows), batch_size):
        side = collate(rows[start : start + batch_size], eos_id).student.to(device)
        hidden = hidden_at(model, side)
        for part, labels in zip(hidden.split(1024), side.labels.split(1024), strict=True):
            total += float(cross_entropy(logits_under(part, model.head_weight), labels, reduction="sum"))
        tokens += len(side.labels)
    model.train(training)
    return total / tokens


def score(responses: list[str], examples: list[Example]) -> dict[str, float]:
    """{rouge_l, exact_match}, both in per cent, averaged over the examples."""
    pairs = list(zip(responses, examples, strict=True))
    return {
        "rouge_l": 100 * statistics.fmean(rouge_l(response, example.outputs) for response, example in pairs),
        "exact_match": 100 * statistics.fmean(exact_match(response, example.outputs) for response, example in pairs),
    }


def score_math(responses: list[str], examples: list[Example], unfinished=()) -> tuple[dict[str, float], list[dict]]:
    """{accuracy} in per cent, and for each response what was taken as its answer and whether it is right.

    unfinished: the indices of the responses that did not end; their last number is not taken for an answer.
    """
    details = []
    for i, (response, example) in enumerate(zip(responses, examples, strict=True)):
        ended = i not in unfinished
        passed = is_correct(response, example.outputs, ended)
        details.append({"answer": final_answer(response, ended), "passed": passed, "ended": ended})
    return {"accuracy": 100 * statistics.fmean(detail["passed"] for detail in details)}, details


def score_code(responses: list[str], examples: list[Example], unfinished=()) -> tuple[dict[str, float], list[dict]]:
    """{pass_at_1} in per cent, and for each response the program made of it and what became of that. Runs them all."""
    from scores.sandbox import run_python  # here, for it needs a Unix

    ends = [i not in unfinished for i in range(len(responses))]
    programs = list(map(program_of, responses, examples, ends))

    def run_one(program: str, example: Example, ended: bool) -> dict:
        outcome = run_python(program, example.code.tests)
        told = {"passed": outcome.passed, "status": outcome.status, "reason": outcome.reason}
        return {**told, "program": program, "ended": ended}

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(run_one, programs, examples, ends)
        details = list(tqdm(done, desc="run tests", total=len(examples), disable=len(examples) < 20, leave=False))
    return {"pass_at_1": 100 * statistics.fmean(detail["passed"] for detail in details)}, details


def program_of(response: str, example: Example, ended: bool = True) -> str:
    """The program to be tested: HumanEval's continues the prompt, MBPP's stands alone."""
    if example.code.entry_point:
        return humaneval_program(example.prompt, example.code.entry_point, response, ended)
    return mbpp_program(response, ended)


def task_of(examples: list[Example], name: str, asked: str | None = None) -> str:
    """rouge, math or code: what is asked for, or what all the examples are. Raises ValueError where that cannot be."""
    with_tests = sum(example.code is not None for example in examples)
    if 0 < with_tests < len(examples) and asked != "rouge":
        raise ValueError(f"{name}: {with_tests} of {len(examples)} examples have tests; evaluate them as two files")
    if asked == "code" and not with_tests:
        raise ValueError(f"{name}: --task code needs tests (the fields of HumanEval or MBPP), these examples have none")
    if asked == "math":
        for example in examples:
            if example.code is not None:
                raise ValueError(f"{example.where}: --task math needs an answer, this example has tests")
            if not all(final_answer(output) or output.strip() for output in example.outputs):
                raise ValueError(f"{example.where}: the output has no final answer, which --task math needs")
    if asked:
        return asked
    if with_tests:
        return "code"
    marked = (output for example in examples for output in example.outputs)
    return "math" if all(is_marked(output) for output in marked) else "rouge"


def is_marked(output: str) -> bool:
    """Whether a reference says where its final answer is: a last line `#### x`, or \\boxed{x}."""
    return output.rstrip().rpartition("\n")[2].lstrip().startswith("#### ") or "\\boxed{" in output


@dataclass
class DataSet:
    name: str
    task: str
    examples: list[Example]


def evaluate(
    model,
    tokenizer: TextTokenizer,
    examples: list[Example],
    seeds: list[int],
    greedy: bool = False,
    max_len: int = 512,
    max_prompt_len: int = 256,
    batch_size: int = 32,
    device: str = "cpu",
    task: str = "rouge",
) -> dict:
    """The model's scores, each a list with a value per seed, its `responses` and their `details`, lists per seed of a
    list per example, how many responses were `not_ended` (per seed), and its `cross_entropy` on the first references;
    for Rouge-L also how many examples have no reference with a token that it counts (`no_reference_tokens`). For a
    model that has fewer positions both lengths shrink, in proportion."""
    if model.limit < max_len:
        max_len, max_prompt_len = model.limit, max(1, max_prompt_len * model.limit // max_len)
        print(f"note: the model's {max_len} positions are {max_prompt_len} tokens of a prompt, and the response's "
              f"{max_len - max_prompt_len}", file=sys.stderr)  # fmt: skip
    prompts = [cut_prompt(example, [tokenizer], max_prompt_len) for example in examples]
    rows, cut = tokenise(examples, tokenizer, max_len=max_len, max_prompt_len=max_prompt_len)
    new_tokens = max_len - max_prompt_len  # not what the longest prompt leaves: the same in every set, with any --limit
    scores: dict = {"prompts_cut": cut.prompts_cut, "new_tokens": new_tokens, "responses": [], "details": []}
    scores["not_ended"] = []
    if task == "rouge":
        scores["no_reference_tokens"] = sum(not any(map(tokenize, example.outputs)) for example in examples)
    for seed in [None] if greedy else seeds:
        temperature = 0.0 if greedy else 1.0
        unfinished: set[int] = set()
        responses = respond(
            model, tokenizer, prompts, new_tokens, temperature, 1.0, seed, batch_size, progress=True,
            unfinished=unfinished,
        )  # fmt: skip
        if task == "rouge":
            values, details = score(responses, examples), []
        else:
            values, details = (score_math if task == "math" else score_code)(responses, examples, unfinished)
        for name, value in values.items():
            scores.setdefault(name, []).append(value)
        scores["responses"].append(responses)
        scores["details"].append(details)
        scores["not_ended"].append(len(unfinished))
    scores["cross_entropy"] = held_out_cross_entropy(model, rows, tokenizer.eos_id, device)
    return scores


def compare(sets: list[DataSet], results: dict[tuple[str, str], dict]) -> str:
    """The table of all (model, set) scored so far; a column per set, or for a single set all that was measured."""
    models = list(dict.fromkeys(model for model, _ in results))
    measures = [MEASURES[data.task] for data in sets]
    if len(sets) == 1:
        shown = [name for name in TITLES if all(name in scores for scores in results.values())]
        rows = [["model", *(TITLES[name] for name in shown), "cross-entropy", "not ended"]]
        for model in models:
            scores = results[model, sets[0].name]
            values = [spread(scores[name]) + mark(scores, name) for name in shown]
            rows.append([model, *values, f"{scores['cross_entropy']:.4f}", not_ended([scores])])
        return table(rows) + notes(sets, results)
    averaged = len(set(measures)) == 1  # Rouge-L and pass@1 have no common mean
    titles = [f"{data.name} {TITLES[name]}" for data, name in zip(sets, measures, strict=True)]
    rows = [["model", *titles, *(["average"] if averaged else []), "not ended"]]
    for model in models:
        found = [results.get((model, data.name)) for data in sets]
        values = [scores and scores[name] for scores, name in zip(found, measures, strict=True)]
        marks = [mark(scores or {}, name) for scores, name in zip(found, measures, strict=True)]
        row = [model, *(spread(value) + star if value else "-" for value, star in zip(values, marks, strict=True))]
        if averaged:
            row.append(spread([statistics.fmean(seed) for seed in zip(*values, strict=True)]) if all(values) else "-")
        rows.append([*row, not_ended(list(filter(None, found)))])
    return table(rows) + notes(sets, results)


def not_ended(found: list[dict]) -> str:
    """How many of all responses, with all seeds, were cut off by the budget of new tokens."""
    return f"{sum(sum(s['not_ended']) for s in found)} of {sum(len(r) for s in found for r in s['responses'])}"


def mark(scores: dict, name: str) -> str:
    """What stands beside a Rouge-L that some examples make 0 whatever the responses are."""
    return "*" if name == "rouge_l" and scores.get("no_reference_tokens") else ""


def notes(sets: list[DataSet], results: dict[tuple[str, str], dict]) -> str:
    """What the marks of the table mean."""
    without = {name: scores["no_reference_tokens"] for (_, name), scores in results.items() if mark(scores, "rouge_l")}
    return "".join(
        f"\n* {data.name}: the references of {without[data.name]} of {len(data.examples)} examples have no token that "
        "Rouge-L counts (a-z, 0-9), so that these examples score 0 whatever the response is"
        for data in sets if data.name in without
    )  # fmt: skip


def spread(values: list[float]) -> str:
    """mean ± standard deviation"""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def table(rows: list[list[str]]) -> str:
    """A markdown table; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in padded]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", help="runs or model directories")
    parser.add_argument("--data", required=True, nargs="+", help="named sets (their test split) or JSONL files")
    parser.add_argument("--task", choices=list(MEASURES), help="what to score, where it shall not follow from the data")
    parser.add_argument("--run-code", action="store_true", help="run generated programs (pass@1), in a sandbox")
    help = "prompts in this chat format (default: the one that a run was trained with, else none)"
    parser.add_argument("--chat", choices=["none", *CHATS], help=help)
    help = "begin prompts as the model's tokenizer begins a text (default: as a run was trained, else not)"
    parser.add_argument("--bos", action=argparse.BooleanOptionalAction, help=help)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="sampling seeds")
    parser.add_argument("--greedy", action="store_true", help="one greedy response instead of sampling")
    parser.add_argument("--limit", type=int, help="only the first LIMIT examples")
    parser.add_argument("--max-len", type=int, help="tokens of prompt and response; default 512, math and code 1024")
    parser.add_argument("--max-prompt-len", type=int, help="tokens of the prompt; default half of --max-len")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights while generating")
    options = parser.parse_args(arguments)
    try:
        check(options)
        run(options)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # the table of what is done was printed
        sys.exit(130)


def check(options: argparse.Namespace) -> None:
    """Raises ValueError naming an option whose value makes no sense."""
    for name, value in vars(options).items():
        if value in ("", [], [[]]) or isinstance(value, list) and "" in value:  # argparse makes [] of "--limit=--"
            raise ValueError(f"--{name.replace('_', '-')} is empty; leave it out for the default")
    least_and_below = {"limit": (1, 2**31), "max_len": (2, 2**31), "max_prompt_len": (1, 2**31),
                       "batch_size": (1, 2**31), "seeds": (0, 2**32)}  # fmt: skip
    for name, (least, below) in least_and_below.items():
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not least <= value < below:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {value}: must be at least {least} and below {below}")
    check_device(options.device)


def check_device(name: str) -> torch.device:
    """The device of that name. Raises ValueError unless it is one that can be used here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: not a device; use cuda, cuda:1, cpu, ...") from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {name}: only cuda and cpu are supported (the projectors are solved in float64)")
    cuda_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= cuda_devices:
        raise ValueError(f"--device {name}: there is no CUDA device of that name here; use --device cpu")
    return device


def run(options: argparse.Namespace) -> None:
    models = {}
    for name in options.directories:  # before anything is loaded: all of them must be there
        student = Path(name) / "student"
        models[name] = model_directory(str(student if student.is_dir() else name))
        check_model(models[name])
    sets = read_sets(options)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    results: dict[tuple[str, str], dict] = {}
    try:
        for name, directory in models.items():
            tokenizer = tokenizer_of(directory, options.chat, options.bos)
            tokenizer.say_if_forgotten("--chat", options.bos is None)
            model = load_model(directory, dtype, options.device)
            tokenizer.check_model(model.embed.weight.shape[0])
            for data in sets:
                with by_onednn(options.device):
                    scores = evaluate(
                        model, tokenizer, data.examples, options.seeds, options.greedy, *lengths(options, data.task),
                        options.batch_size, options.device, data.task,
                    )  # fmt: skip
                scores["bos"] = tokenizer.prefix
                results[name, data.name] = scores
                where = write_report(name, directory, data, options, scores)
                cut = f", {scores['prompts_cut']} prompts cut to fit" if scores["prompts_cut"] else ""
                if any(scores["not_ended"]):
                    cut += f", {not_ended([scores])} responses did not end within {scores['new_tokens']} tokens"
                chat = f" in the chat format {tokenizer.chat}" if tokenizer.chat != "none" else ""
                print(f"{name}, {data.name}: {len(data.examples)} examples{chat}{cut}; {where}", file=sys.stderr)
                if data.task == "code":
                    ends = Counter(detail["status"] for details in scores["details"] for detail in details)
                    print(", ".join(f"{count} {end}" for end, count in sorted(ends.items())), file=sys.stderr)
    finally:  # also of what an error or Ctrl-C left undone
        if results:
            print(compare(sets, results))


def read_sets(options: argparse.Namespace) -> list[DataSet]:
    """All sets, before any is evaluated, so that what is wrong with one shows at once."""
    sets = []
    for name in options.data:
        examples = read_jsonl(*data_file(name, "test"))[: options.limit]
        sets.append(DataSet(Path(name).stem, task_of(examples, name, options.task), examples))
        lengths(options, sets[-1].task)
    repeated = [name for name, count in Counter(data.name for data in sets).items() if count > 1]
    if repeated:
        raise ValueError(f"two sets are named {repeated[0]!r}, and would write the same file; rename one of them")
    programs = [data.name for data in sets if data.task == "code"]
    if programs and not options.run_code:
        raise ValueError(
            f"{programs[0]}: scoring code means running what a model wrote on this machine, in a process with limits "
            "that is no perfect jail (sandbox.py says what it lacks); add --run-code, or score it with --task rouge"
        )
    if programs:
        from scores.sandbox import check, describe_guards

        print(describe_guards(check()), file=sys.stderr)
    return sets


def lengths(options: argparse.Namespace, task: str) -> tuple[int, int]:
    """(tokens of prompt and response together, tokens of the prompt). Raises ValueError if a response has no room."""
    max_len = options.max_len or MAX_LEN[task]
    max_prompt_len = options.max_prompt_len or max_len // 2
    if max_prompt_len >= max_len:
        raise ValueError(
            f"--max-prompt-len {max_prompt_len} leaves no token of --max-len {max_len} for the response; make the "
            "first smaller or the second larger"
        )
    return max_len, max_prompt_len


def write_report(name: str, directory: Path, data: DataSet, options: argparse.Namespace, scores: dict) -> Path:
    """eval-<data>.json in the run's directory; for a model that is no directory, here and with its name."""
    report = {"model": str(directory), "data": data.name, "task": data.task, "examples": len(data.examples)}
    report["chat"] = options.chat or chat_of(directory)
    report |= {"greedy": options.greedy, "seeds": None if options.greedy else options.seeds, **scores}
    file = f"eval-{data.name}.json" if Path(name).is_dir() else f"eval-{name.replace('/', '-')}-{data.name}.json"
    path = Path(name) / file if Path(name).is_dir() else Path(file)
    write_text(path, json.dumps(report, indent=1, ensure_ascii=False))
    return path


if __name__ == "__main__":
    main()
