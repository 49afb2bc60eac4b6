"""DSKD v2 with exact token alignment as a `transformers.Trainer`, for two models with different tokenizers.

    python examples/trainer.py --student DIR --teacher DIR --data FILE.jsonl --steps 100

N student response tokens of a batch, M of the teacher's; A pairs aligned, K of them compared; widths d and D.
"""

import torch
from batch import collate, compare_vocabularies, load, parse_options, predicting_states
from torch import Tensor
from transformers import Trainer, TrainingArguments

from losses import RECIPES, Counts, dskd_loss, predict_tokens
from projector import Projectors


class DSKDTrainer(Trainer):
    """Trains on batches of `collate`; it does not evaluate. The projectors become part of the student, so that the
    Trainer trains, clips, synchronises and checkpoints them with it; delete them before you save the finished student.
    The losses read both heads whole, so neither FSDP nor DeepSpeed's ZeRO-3, which split them, can be used.
    If the student has `peft` adapters, a checkpoint holds only these: save and restore projectors.t2s separately.
    TrainingArguments of your own need remove_unused_columns=False and, with several processes, the two ddp_ of `main`.
    """

    def __init__(self, model, *args, teacher, tokenizers, **kwargs):
        student_head = model.get_output_embeddings().weight.detach()
        teacher_head = teacher.get_output_embeddings().weight
        student_shared, teacher_shared, student_token = compare_vocabularies(*tokenizers, len(teacher_head))
        model.projectors = Projectors(student_head[student_shared].float(), teacher_head[teacher_shared].float())
        super().__init__(model, *args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.teacher_head = self.teacher.get_output_embeddings().weight  # (V_t, D)
        self.student_shared = student_shared.to(self.args.device)
        self.student_token = student_token.to(self.args.device)
        # the losses of the micro-batches add up to that of the update: the Trainer must not divide by their number
        self.model_accepts_loss_kwargs = True
        self.terms: dict[str, Tensor] = {}  # this process's part of the current update, for the log

    @torch.no_grad()
    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of the next update, each with the teacher's states and predictions. The normalisers are
        totals over all of them; they do not depend on the student's states, so they are known before the first loss."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        projectors = self.model.projectors
        student_head = self.model.get_output_embeddings().weight  # (V_s, d)
        # s2t is not trained: it is solved again for the student's current head
        projectors.refresh_s2t(student_head[self.student_shared].float())
        totals = torch.zeros(3, device=device)
        with self.accelerator.autocast():
            for batch in batches:
                hidden = predicting_states(self.teacher, batch["teacher"])[batch["teacher"]["paired"]]  # (A, D)
                label = self.student_token[predict_tokens(hidden, self.teacher_head)]  # (A,)
                known = label >= 0  # eq. 14: only pairs where the student can say what the teacher predicts
                batch["teacher_hidden"] = hidden[known]  # (A, D) -> (K, D)
                batch["label"] = label[known]
                batch["rows"] = batch["student"]["paired"][known]
                predicted = predict_tokens(projectors.t2s(batch["teacher_hidden"]), student_head)
                agreeing = (predicted == batch["label"]).sum().item()
                totals += torch.tensor([len(batch["student"]["labels"]), len(batch["label"]), agreeing], device=device)
        # the processes average their gradients, so each divides by the mean of their totals
        totals = self.accelerator.reduce(totals, reduction="mean")
        self.counts = Counts(*totals.tolist())
        self.terms = {}
        return batches, totals[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A micro-batch's part of the update's loss."""
        projectors, rows = self.model.projectors, inputs["rows"]
        with self.accelerator.autocast():
            student_hidden = predicting_states(model, inputs["student"])  # (N, d)
            terms = dskd_loss(
                student_hidden=student_hidden,
                gold=inputs["student"]["labels"],
                rows=rows,
                t2s_hidden=projectors.t2s(inputs["teacher_hidden"]),  # (K, D) -> (K, d)
                label=inputs["label"],
                s2t_hidden=projectors.s2t(student_hidden[rows]),  # (K, d) -> (K, D)
                teacher_hidden=inputs["teacher_hidden"],
                student_head=self.model.get_output_embeddings().weight,
                teacher_head=self.teacher_head,
                counts=self.counts,
                recipe=RECIPES["v2", "eta"],
            )
        loss = terms.pop("loss")  # the Trainer logs it
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + term.detach().float()
        return loss

    def log(self, logs, *args, **kwargs):
        """The Trainer's numbers, and the terms of the last update: as in the loss, the mean of the processes' parts."""
        terms = self.accelerator.reduce(self.terms, reduction="mean")
        super().log({**{name: term.item() for name, term in terms.items()}, **logs}, *args, **kwargs)


def main(arguments: list[str] | None = None) -> None:
    o = parse_options(__doc__, arguments, out="runs/trainer")
    student, teacher, tokenizers, rows = load(o)
    args = TrainingArguments(
        output_dir=o.out,
        max_steps=o.steps,
        learning_rate=5e-4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=10,
        save_strategy="no",
        remove_unused_columns=False,  # the names in the rows are not those of the model's arguments
        ddp_find_unused_parameters=False,  # the heads and the projectors are used outside the model's forward
        ddp_broadcast_buffers=False,  # the inverse behind s2t, as large as the teacher's head, is the same everywhere
        report_to="none",
    )
    data = {"train_dataset": rows, "data_collator": collate}
    trainer = DSKDTrainer(student, args, **data, teacher=teacher, tokenizers=tokenizers)
    trainer.train()
    del trainer.model.projectors
    trainer.save_model(o.out)
    tokenizers[0].save_pretrained(o.out)


if __name__ == "__main__":
    main()
