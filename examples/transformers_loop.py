"""DSKD v2 with exact token alignment in a plain loop, for two `transformers` models with different tokenizers.

    python examples/transformers_loop.py --student DIR --teacher DIR --data FILE.jsonl --steps 100

N student response tokens of a batch, M of the teacher's; A pairs aligned, K of them compared; widths d and D.
"""

import json

import torch
from batch import collate, compare_vocabularies, load, parse_options, predicting_states

from losses import RECIPES, Counts, dskd_loss, predict_tokens
from projector import Projectors


def compute_terms(student, teacher, projectors: Projectors, student_shared, student_token, batch: dict) -> dict:
    """The loss terms of an update on this one batch; call backward() on the term "loss"."""
    student_head = student.get_output_embeddings().weight  # (V_s, d)
    teacher_head = teacher.get_output_embeddings().weight  # (V_t, D)
    with torch.no_grad():
        teacher_hidden = predicting_states(teacher, batch["teacher"])[batch["teacher"]["paired"]]  # (M, D) -> (A, D)
        label = student_token[predict_tokens(teacher_hidden, teacher_head)]  # (A,)
        known = label >= 0  # eq. 14: only pairs where the student can say what the teacher predicts
        teacher_hidden = teacher_hidden[known]  # (A, D) -> (K, D)
        label = label[known]
        rows = batch["student"]["paired"][known]
        # s2t is not trained: it is solved again for the student's current head
        projectors.refresh_s2t(student_head[student_shared].float())
    student_hidden = predicting_states(student, batch["student"])  # (N, d)
    t2s_hidden = projectors.t2s(teacher_hidden)  # (K, D) -> (K, d)
    s2t_hidden = projectors.s2t(student_hidden[rows])  # (K, d) -> (K, D)
    agreeing = (predict_tokens(t2s_hidden, student_head) == label).sum().item()
    counts = Counts(tokens=len(student_hidden), pairs=len(label), agreeing=agreeing)
    return dskd_loss(
        student_hidden=student_hidden, gold=batch["student"]["labels"], rows=rows, t2s_hidden=t2s_hidden, label=label,
        s2t_hidden=s2t_hidden, teacher_hidden=teacher_hidden, student_head=student_head, teacher_head=teacher_head,
        counts=counts, recipe=RECIPES["v2", "eta"],
    )  # fmt: skip


def distil(student, teacher, tokenizers, rows: list[dict], steps: int, batch_size: int, lr: float) -> Projectors:
    """Train on the rows in order and print a line per update; returns the projectors."""
    student_head = student.get_output_embeddings().weight
    teacher_head = teacher.get_output_embeddings().weight
    student_shared, teacher_shared, student_token = compare_vocabularies(*tokenizers, len(teacher_head))
    student_token = student_token.to(student.device)
    projectors = Projectors(student_head[student_shared].float(), teacher_head[teacher_shared].float())
    trained = [*student.parameters(), *projectors.t2s.parameters()]  # s2t is solved, and the teacher is frozen
    optimizer = torch.optim.AdamW(trained, lr=lr)
    student.train()  # `from_pretrained` leaves dropout and gradient checkpointing off
    for step in range(steps):
        first = step * batch_size % len(rows)
        batch = collate(rows[first : first + batch_size], student.device)
        terms = compute_terms(student, teacher, projectors, student_shared, student_token, batch)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"step": step + 1, **{name: term.item() for name, term in terms.items()}}))
    return projectors


def main(arguments: list[str] | None = None) -> None:
    o = parse_options(__doc__, arguments, out="runs/transformers_loop")
    student, teacher, tokenizers, rows = load(o)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student.to(device)
    teacher.to(device)
    distil(student, teacher, tokenizers, rows, o.steps, batch_size=4, lr=5e-4)
    student.save_pretrained(o.out)
    tokenizers[0].save_pretrained(o.out)


if __name__ == "__main__":
    main()
