"""Scores of a trained student: generated responses against references, and held-out cross-entropy.

    python eval.py runs/a runs/b --data dolly                     the papers' protocol: 5 sampling seeds, T = 1
    python eval.py runs/a --data my_test.jsonl --greedy           one greedy response per prompt

Each directory is a run (its student/ is scored) or a model. Prints one table and writes eval-<data>.json beside each
scored model's directory. Rouge-L is the F-measure with Porter stemming, the maximum over an example's references, in
per cent; mean ± standard deviation over the seeds.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import Example, TextTokenizer, collate, cut_prompt, read_jsonl, tokenise
from hub import data_file, model_directory
from losses import gold_terms
from model import generate, load_model
from rouge import exact_match, rouge_l


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
) -> list[str]:
    """The model's response to each prompt, without end-of-text; temperature 0 is greedy."""
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # equal lengths together: little padding
    responses = [""] * len(ids)
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress, leave=False):
        chosen = order[start : start + batch_size]
        batch_seed = None if seed is None else seed * 1_000_003 + start
        new = generate(
            model, [ids[i] for i in chosen], max_new_tokens, tokenizer.eos_id, temperature, 0, top_p, batch_seed
        )
        for i, tokens in zip(chosen, new, strict=True):
            responses[i] = tokenizer.decode(tokens)
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
        hidden = model(side.input_ids).flatten(0, 1)[side.positions]
        for part, labels in zip(hidden.split(1024), side.labels.split(1024), strict=True):
            total += float(gold_terms(part, labels, model.head_weight)[0].sum())
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


def evaluate(
    directory: Path,
    examples: list[Example],
    seeds: list[int],
    greedy: bool = False,
    max_len: int = 512,
    max_prompt_len: int = 256,
    batch_size: int = 32,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Scores of the model in `directory`: {rouge_l: [per seed], exact_match: [...], cross_entropy, responses}."""
    tokenizer, model = TextTokenizer(directory), load_model(directory, dtype, device)
    tokenizer.check_model(model.embed.weight.shape[0])
    max_len = min(max_len, model.limit)
    prompts = [cut_prompt(example, [tokenizer], min(max_prompt_len, max_len - 1)) for example in examples]
    rows, _ = tokenise(examples, tokenizer, max_len=max_len, max_prompt_len=max_prompt_len)
    new_tokens = max_len - max(len(row.student.prompt) for row in rows)
    scores: dict = {"rouge_l": [], "exact_match": [], "responses": []}
    for seed in [None] if greedy else seeds:
        temperature = 0.0 if greedy else 1.0
        responses = respond(model, tokenizer, prompts, new_tokens, temperature, 1.0, seed, batch_size, progress=True)
        for name, value in score(responses, examples).items():
            scores[name].append(value)
        scores["responses"].append(responses)
    scores["cross_entropy"] = held_out_cross_entropy(model, rows, tokenizer.eos_id, device)
    return scores


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
    parser.add_argument("--data", required=True, help="named set or JSONL file; the valid split of a named set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 20, 30, 40, 50], help="sampling seeds")
    parser.add_argument("--greedy", action="store_true", help="one greedy response instead of sampling")
    parser.add_argument("--limit", type=int, help="only the first LIMIT examples")
    parser.add_argument("--max-len", type=int, default=512, help="tokens of prompt and response together")
    parser.add_argument("--max-prompt-len", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights while generating")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    models = []
    for name in options.directories:  # before anything is loaded: all of them must be there
        student = Path(name) / "student"
        models.append(model_directory(str(student if student.is_dir() else name)))
    examples = read_jsonl(*data_file(options.data, "valid"))[: options.limit]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    rows = [["model", "Rouge-L", "exact match", "cross-entropy"]]
    for name, directory in zip(options.directories, models, strict=True):
        scores = evaluate(
            directory, examples, options.seeds, options.greedy, options.max_len, options.max_prompt_len,
            options.batch_size, options.device, dtype,
        )  # fmt: skip
        rows.append([name, spread(scores["rouge_l"]), spread(scores["exact_match"]), f"{scores['cross_entropy']:.4f}"])
        report = {"model": str(directory), "data": options.data, "examples": len(examples), "greedy": options.greedy}
        report |= {"seeds": None if options.greedy else options.seeds, **scores}
        where = Path(name) if Path(name).is_dir() else Path(".")
        (where / f"eval-{Path(options.data).stem}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    print(table(rows))


if __name__ == "__main__":
    main()
