"""Shared by both examples: loading two models and their tokenizers, rows of a file, batches of rows, and states.

B examples of a batch, N response tokens in them in a model's own tokenizer, A aligned pairs, d the model's width.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[1]))  # in the repository, the method's files are one folder up
from align import exact_token_alignment, prediction_map, token_bytes, vocabulary_overlap


def parse_options(description: str, arguments: list[str] | None, out: str) -> argparse.Namespace:
    """The command line, the same for both examples."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="directory of a model and its tokenizer")
    parser.add_argument("--teacher", required=True, help="the same for the teacher")
    parser.add_argument("--data", required=True, help='JSONL file, lines {"prompt": ..., "output": ...}')
    parser.add_argument("--steps", type=int, default=100, help="updates (default: 100)")
    parser.add_argument("--out", default=out, help=f"where the student is saved (default: {out})")
    return parser.parse_args(arguments)


def load(o: argparse.Namespace) -> tuple:
    """(student, teacher, (student's tokenizer, teacher's), rows): the models in float32, the teacher frozen."""
    both = o.student, o.teacher
    # this class takes tokenizer.json as it is; AutoTokenizer may build its own version of it
    tokenizers = tuple(PreTrainedTokenizerFast.from_pretrained(directory) for directory in both)
    configs = (AutoConfig.from_pretrained(directory).get_text_config() for directory in both)
    limits = [getattr(config, "max_position_embeddings", 512) for config in configs]  # BLOOM and Mamba have none
    rows = read_rows(o.data, *tokenizers, max_len=min(512, *limits))
    student, teacher = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for directory in both)
    for directory, model in zip(both, (student, teacher), strict=True):
        check_head(directory, model.eval())
    return student, teacher.requires_grad_(False), tokenizers, rows


@torch.no_grad()
def check_head(directory: str, model: nn.Module) -> None:
    """Raises ValueError if the logits are not states @ headᵀ, as the losses assume."""
    output = model(input_ids=torch.arange(8)[None], output_hidden_states=True)
    logits = output.hidden_states[-1] @ model.get_output_embeddings().weight.T
    if not torch.allclose(logits, output.logits, rtol=0, atol=1e-3 * logits.abs().max()):
        raise ValueError(f"{directory}: its logits are not just states times head: there is a scale (then scale the "
                         "states instead), or a bias or soft-capping (which the losses do not support)")  # fmt: skip


def compare_vocabularies(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, teacher_rows: int):
    """(student_shared, teacher_shared, student_token): each model's ids of the tokens that both vocabularies have, in
    the same order; and for each row of the teacher's head, the student's id of that token, or -1 if it has none."""
    tokenizers = teacher.backend_tokenizer, student.backend_tokenizer
    ends = teacher.eos_token_id, student.eos_token_id
    teacher_shared, student_shared = vocabulary_overlap(*tokenizers, *ends)
    student_token = prediction_map(*tokenizers, *ends, size=teacher_rows)
    return torch.tensor(student_shared), torch.tensor(teacher_shared), torch.tensor(student_token)


def read_rows(
    file: str, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, max_len: int
) -> list[dict]:
    """One row per line {"prompt", "output"} of a JSONL file: prompt and response in each model's tokens, and which
    response tokens are paired. Lines with an empty output, or of more than `max_len` tokens, are left out."""
    tokenizers = {"student": student, "teacher": teacher}
    spelling = {model: token_bytes(tokenizer.backend_tokenizer) for model, tokenizer in tokenizers.items()}
    rows = []
    lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    for number, example in ((n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()):
        row, spelt = {}, {}
        if not {"prompt", "output"} <= example.keys():
            raise ValueError(f'{file}, line {number}: needs "prompt" and "output"')
        if not example["output"]:
            continue
        for model, tokenizer in tokenizers.items():
            # as in train.py without --bos, nothing is put before the prompt; and "</s>" inside a response is text
            prompt = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
            response = tokenizer(example["output"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if not prompt or tokenizer.eos_token_id is None:
                raise ValueError(f"{file}, line {number}: the {model} needs a prompt of at least one token, to predict "
                                 "the response's first, and a tokenizer with end-of-text")  # fmt: skip
            response = response + [tokenizer.eos_token_id]
            row[model] = prompt, response
            # None is end-of-text, in both vocabularies; other special tokens spell nothing
            spelt[model] = [None if i == tokenizer.eos_token_id else spelling[model][i] or b"" for i in response]
        teacher_index, student_index = exact_token_alignment(spelt["teacher"], spelt["student"])
        row["paired"] = {"student": student_index.tolist(), "teacher": teacher_index.tolist()}
        if max(len(row[model][0] + row[model][1]) for model in tokenizers) <= max_len:
            rows.append(row)
    if not rows:
        raise ValueError(f"{file}: no line has an output and fits into {max_len} tokens of both models")
    return rows


def collate(rows: list[dict], device: str = "cpu") -> dict[str, dict[str, Tensor]]:
    """{"student": ..., "teacher": ...}: for each model what it reads, where it predicts, and what is paired."""
    return {model: collate_side(rows, model, device) for model in ("student", "teacher")}


def collate_side(rows: list[dict], model: str, device: str) -> dict[str, Tensor]:
    """input_ids, attention_mask (B, T); labels (N,), the response tokens of all rows; positions (N,), where in the
    flattened (B·T) each is predicted; paired (A,), which of the N are in a pair."""
    texts = [torch.tensor(prompt + response) for prompt, response in (row[model] for row in rows)]
    input_ids = pad_sequence(texts, batch_first=True)
    attention_mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    positions, labels, paired = [], [], []
    for i, row in enumerate(rows):
        prompt, response = row[model]
        # the shift: a position predicts the next token, so the last prompt token predicts the first response token
        first = i * input_ids.shape[1] + len(prompt) - 1
        positions += range(first, first + len(response))
        # indices of pairs count from the start of a response, which in the batch follows the responses before it
        paired += [len(labels) + index for index in row["paired"][model]]
        labels += response
    side = {"labels": labels, "positions": positions, "paired": paired}
    side = {name: torch.tensor(values, dtype=torch.long, device=device) for name, values in side.items()}
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device), **side}


def predicting_states(model: nn.Module, side: dict[str, Tensor]) -> Tensor:
    """(N, d) the states that predict the response tokens. The last of `hidden_states` comes after the final norm: it is
    what the head reads. The losses compute the logits that they need, so the model computes only one position's."""
    read = {"input_ids": side["input_ids"], "attention_mask": side["attention_mask"]}
    output = model(**read, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    return output.hidden_states[-1].flatten(0, 1)[side["positions"]]  # (B, T, d) -> (B·T, d) -> (N, d)
