"""Score trained students: respond to the prompts of test sets, score the responses, compare the models in a table.

    python eval.py runs/a runs/b --data dolly self-inst vicuna    the papers' protocol: 5 sampling seeds, T = 1
    python eval.py runs/a --data my_test.jsonl --greedy           one greedy response per prompt
    python eval.py runs/a --data gsm8k_test.jsonl                 accuracy of the final answers
    python eval.py runs/a --data humaneval.jsonl --run-code       pass@1: runs the programs, see scores/sandbox.py
    python eval.py runs/a --prompt "Why is the sky blue?"         its answer; without a text, answers each line you type

Each directory is a run (its student/ is scored) or a model. The data decide which score is computed, in per cent:

rouge   Rouge-L: F-measure with Porter stemming, the maximum over an example's references
math    if the references end in `#### x`, contain \\boxed{x} or are a number: accuracy, the share of correct answers
code    if the examples have tests: pass@1, the share of programs that pass all of them, with one sample per seed

The table shows means ± standard deviations over the seeds (the average over sets is taken for each seed first). With
several models, a second one shows differences from the first model, ± standard errors over the prompts. When a set is
done, all responses are written to eval-<data>.json in the run (with --greedy, eval-<data>-greedy.json); for a
directory that is not a run, to eval-<model>-<data>.json in the current directory. "Not ended" counts the responses,
over all seeds, that reached the limit of new tokens before the model ended them.

A response has at most --max-len minus --max-prompt-len tokens (512 - 256; for math and code 1024 - 512), however long
the prompts of a set are. Prompts longer than --max-prompt-len are cut and counted; the official runs drop such examples
and average over fewer.
"""

import sys
from pathlib import Path
from statistics import fmean

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from data import Example, collate, tokenise
from fast.cache import model_digest
from fast.cpu import by_onednn, packed
from fast.cuda import graphed
from losses import logits_under
from model import generate, hidden_at, load_model
from runtime.evaluation import parse, read_lines
from runtime.formats import read_examples
from runtime.hub import data_file
from runtime.load import find_model
from runtime.report import report_file, write_report
from runtime.run import chat_of, run_of, tokenizer_of
from runtime.tokenizer import TextTokenizer, escape_what_cannot_be_printed, say_if_forgotten
from scores.answers import grade
from scores.programs import program_of, run_programs
from scores.rouge import exact_match, rouge_l, tokenize
from scores.tables import compare, describe
from scores.tasks import MEASURES, DataSet, check_sets, share_tokens, task_of

# ---------------------------------------------------------------------------------------------------------------------
# Respond


def respond(
    model,
    tokenizer: TextTokenizer,
    prompts: list[str],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
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
    with packed(model), graphed(model):
        for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress, leave=False):
            chosen = order[start : start + batch_size]
            batch_seed = None if seed is None else seed * 1_000_003 + start  # no two seeds share a batch's draws
            new = generate(
                model, [ids[i] for i in chosen], max_new_tokens, tokenizer.end_ids, temperature, seed=batch_seed,
                vocabulary=tokenizer.size,  # not the rows that only pad the head
            )  # fmt: skip
            for i, tokens in zip(chosen, new, strict=True):
                responses[i] = tokenizer.decode(tokens)
                if unfinished is not None and (not tokens or tokens[-1] not in tokenizer.end_ids):
                    unfinished.add(i)
    return responses


# ---------------------------------------------------------------------------------------------------------------------
# Score


@torch.no_grad()
def held_out_cross_entropy(model, rows: list, eos_id: int, device="cpu", batch_size: int = 16) -> float:
    """Mean cross-entropy per response token, in nats, over tokenised rows; restores the model's train or eval mode."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    rows = sorted(rows, key=lambda row: len(row.student))
    for start in range(0, len(rows), batch_size):
        side = collate(rows[start : start + batch_size], eos_id).student.to(device)
        hidden = hidden_at(model, side)
        for part, labels in zip(hidden.split(1024), side.labels.split(1024), strict=True):
            total += float(cross_entropy(logits_under(part, model.head_weight), labels, reduction="sum"))
        tokens += len(side.labels)
    model.train(training)
    return total / tokens


def score(responses: list[str], examples: list[Example], task: str = "rouge", unfinished=()) -> dict:
    """The task's scores in per cent, means over the examples: {rouge_l, exact_match}, {accuracy} or {pass_at_1}.

    `each`: the first of these for each response. `details`, for the last two: for each response, the part that was
    graded and the result. unfinished: the indices of the responses that did not end.
    """
    references = [example.outputs for example in examples]
    if task == "rouge":
        measures = {"rouge_l": rouge_l, "exact_match": exact_match}
        each = {name: [100 * x for x in map(measure, responses, references)] for name, measure in measures.items()}
        return {name: fmean(values) for name, values in each.items()} | {"each": each["rouge_l"]}
    ended = [i not in unfinished for i in range(len(responses))]
    if task == "math":
        details = list(map(grade, responses, references, ended))
    else:
        programs = [
            program_of(response, example.prompt, example.code.entry_point, end)
            for response, example, end in zip(responses, examples, ended, strict=True)
        ]
        details = run_programs(programs, [example.code.tests for example in examples], ended)
    each = [100.0 * detail["passed"] for detail in details]
    return {MEASURES[task]: fmean(each), "each": each, "details": details}


def evaluate(
    model, tokenizer, data: DataSet, seeds: list, max_len=512, max_prompt_len=256, batch_size=32, device="cpu"
) -> dict:
    """Everything measured for a model on a set: the scores, `each`, `responses`, their `details`, and the number
    `not_ended`.

    These are lists with an entry per seed (None: greedy). Also the `cross_entropy` on the first references, and for
    Rouge-L the number of examples whose references have no token that it counts (`no_reference_tokens`).
    """
    prompts = tokenizer.fit_prompts(data.examples, max_prompt_len)
    rows, cut = tokenise(data.examples, tokenizer, max_len=max_len, max_prompt_len=max_prompt_len)
    new_tokens = max_len - max_prompt_len  # the same for every set and --limit, whatever room the prompts leave
    cuts = {"prompts_cut": cut.prompts_cut, "references_cut": cut.responses_cut}  # the latter for cross_entropy alone
    report: dict = {**cuts, "new_tokens": new_tokens, "responses": [], "details": []}
    if data.task == "rouge":
        report["no_reference_tokens"] = sum(not any(map(tokenize, example.outputs)) for example in data.examples)
    for seed in seeds:
        unfinished: set[int] = set()
        responses = respond(
            model, tokenizer, prompts, new_tokens, 0.0 if seed is None else 1.0, seed=seed, batch_size=batch_size,
            progress=True, unfinished=unfinished,
        )  # fmt: skip
        scores = {"details": [], **score(responses, data.examples, data.task, unfinished)}
        for name, value in {"responses": responses, "not_ended": len(unfinished), **scores}.items():
            report.setdefault(name, []).append(value)
    report["cross_entropy"] = held_out_cross_entropy(model, rows, tokenizer.eos_id, device)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Compare


def main(arguments: list[str] | None = None) -> None:
    escape_what_cannot_be_printed()
    try:
        run(parse(arguments, __doc__))
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # the table of the finished sets has been printed
        sys.exit(130)


def run(options) -> None:
    """Print every model's answers to --prompt; or score every model on every set, write reports, and print tables."""
    # all must exist before any is loaded
    models = {name: find_model(name, "student") for name in options.directories}
    if options.prompt:
        return answer(options, models)
    sets = read_sets(options)
    files = [report_file(name, data, options.greedy) for name in models for data in sets]
    if repeated := [file for file in files if files.count(file) > 1]:
        raise ValueError(f"two of the models would write the same file {repeated[0]}; rename one, or leave it out")
    results: dict[tuple[str, str], dict] = {}
    try:
        for name, directory in models.items():
            weights = model_digest(directory)  # before the weights are loaded: a run may still be changing them
            model, tokenizer = open_model(directory, options)
            for data in sets:
                lengths = share_tokens(data.task, options.max_len, options.max_prompt_len, model.limit)
                with by_onednn(options.device):
                    how = options.batch_size, options.device
                    scores = evaluate(model, tokenizer, data, options.seeds, *lengths, *how)
                results[name, data.name] = scores = {**scores, "bos": tokenizer.prefix, "weights": weights}
                file = write_report(name, directory, data, options, scores)
                print(f"{name}, {data.name}: {describe(scores, data, tokenizer.chat, file)}", file=sys.stderr)
    finally:  # the results so far, also after an error or Ctrl-C
        if results:
            print(compare(sets, results))


def open_model(directory: Path, options) -> tuple:
    tokenizer = tokenizer_of(directory, options.chat, options.bos)
    say_if_forgotten(tokenizer, "--chat", chat_of(directory) == "none", options.bos is None)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    return load_model(directory, dtype, options.device), tokenizer


def answer(options, models: dict[str, Path]) -> None:
    """Print the responses to --prompt, or to each line of standard input; prompts are formatted as in training."""
    opened = []
    for name, directory in models.items():
        model, tokenizer = open_model(directory, options)
        form = "{}" if tokenizer.chat else (run_of(directory) or {}).get("prompts", "{}")
        lengths = share_tokens("rouge", options.max_len, options.max_prompt_len, model.limit)
        opened.append((f"{name}: " if len(models) > 1 else "", model, tokenizer, form, *lengths))
    for text in read_lines() if options.prompt is True else [options.prompt]:
        text.encode()  # raises ValueError: bytes that are not UTF-8 arrive here as lone surrogates
        for name, model, tokenizer, form, max_len, limit in opened:
            example = Example("--prompt", [""], prompt=form.replace("{}", text))
            prompts = tokenizer.fit_prompts([example], limit)
            if prompts != [tokenizer.prompt_text(example)]:
                print(f"note: {name}the prompt is cut to {limit} tokens (--max-prompt-len)", file=sys.stderr)
            for seed in options.seeds:
                temperature = 0.0 if seed is None else 1.0
                print(name + respond(model, tokenizer, prompts, max_len - limit, temperature, seed=seed)[0], flush=True)


def read_sets(options) -> list[DataSet]:
    """Read all sets before any is evaluated, so that an error in one shows at once."""
    sets = []
    for name in options.data:
        everything = read_examples(*data_file(name, "test"))
        examples, title = everything[: options.limit], Path(name).stem
        if len(examples) < len(everything):  # its own name, so that its report does not replace the whole set's
            title += f"-first-{options.limit}"
        sets.append(DataSet(title, task_of(examples, name, options.task), examples))
        share_tokens(sets[-1].task, options.max_len, options.max_prompt_len)
    check_sets(sets, options.run_code)
    return sets


if __name__ == "__main__":
    main()
