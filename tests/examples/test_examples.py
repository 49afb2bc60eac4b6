"""The examples: their losses, their gradients, what they train."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import train
from align import vocabulary_overlap
from projector import Projectors

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ["transformers_loop", "trainer"]
CONCEPTS = ["align", "losses", "projector"]


@pytest.fixture(scope="module")
def task(tiny_task, tmp_path_factory):
    """A directory with student/ and teacher/, those of the tiny task as transformers writes them, and data.jsonl. The
    teacher's head has more rows than its tokenizer. The student's head repeats, with noise, the teacher's: then t2s is
    right about a part of the pairs, as with real models."""
    root = tmp_path_factory.mktemp("examples")
    lines = (tiny_task / "train.jsonl").read_text()  # and an empty response, which is left out
    (root / "data.jsonl").write_text('{"prompt": "Yes?", "output": ""}\n' + lines)
    names = "teacher", "student"
    both = [Tokenizer.from_file(str(tiny_task / name / "tokenizer.json")) for name in names]
    teacher, student = (transformers.AutoModelForCausalLM.from_pretrained(tiny_task / name) for name in names)
    torch.manual_seed(0)
    teacher.resize_token_embeddings(both[0].get_vocab_size() + 5, mean_resizing=False)
    teacher_ids, student_ids = map(torch.tensor, vocabulary_overlap(*both))
    head = student.get_output_embeddings().weight
    with torch.no_grad():
        teacher.lm_head.weight *= 30  # a teacher with opinions: the terms are no small differences of like numbers
        head[student_ids] = teacher.lm_head.weight[teacher_ids] @ torch.randn(teacher.lm_head.in_features, 32) / 7
        head += 0.05 * torch.randn_like(head)
    for name, model in zip(names, (teacher, student), strict=True):
        shutil.copytree(tiny_task / name, root / name)
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def options(task):
    return ["--student", task / "student", "--teacher", task / "teacher", "--data", task / "data.jsonl"]


@pytest.fixture(scope="module")
def examples():
    """The examples' modules, as they lie in the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        yield {name: importlib.import_module(name) for name in ["batch", *EXAMPLES]}


def run(arguments: list, folder: Path) -> str:
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).state_dict()


@pytest.mark.slow
def test_everything_copied_alone(task, options, tmp_path):
    """The doctests run and both examples train with nothing of the repository but the copied files."""
    folder = tmp_path / "mine" / "alone"
    folder.mkdir(parents=True)
    for file in [*(ROOT / f"{name}.py" for name in CONCEPTS), *(ROOT / "examples").glob("*.py")]:
        shutil.copy(file, folder)
    script = f"""
        import doctest, importlib, pathlib, sys
        for name in {CONCEPTS}:
            result = doctest.testmod(importlib.import_module(name))
            assert result.attempted and not result.failed, name
        for name in {EXAMPLES}:
            importlib.import_module(name).main([*sys.argv[1:], "--out", name])
        for name in {[*CONCEPTS, "batch", *EXAMPLES]}:
            assert pathlib.Path(sys.modules[name].__file__).parent == pathlib.Path.cwd(), name
    """
    code = "\n".join(line[8:] for line in script.splitlines())
    run(["-c", code, *options, "--steps", 3], folder)
    for name in EXAMPLES:
        check_student(task, folder / name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_trains_and_saves_the_student(examples, task, options, tmp_path, name):
    examples[name].main([*map(str, options), "--steps", "3", "--out", str(tmp_path / name)])
    check_student(task, tmp_path / name)


def check_student(task: Path, out: Path) -> None:
    """All weights of the student in `out` have changed, and its tokenizer has not."""
    before, after = weights(task / "student"), weights(out)
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[key], before[key]) for key in before), out
    read = [transformers.PreTrainedTokenizerFast.from_pretrained(path) for path in (task / "student", out)]
    assert read[0]("A fox.")["input_ids"] == read[1]("A fox.")["input_ids"]


def test_first_loss_equals_dry_run(examples, options, tmp_path, capsys):
    """The loop on the same models and lines as train.py."""
    examples["transformers_loop"].main([*map(str, options), "--steps", "1", "--out", str(tmp_path / "out")])
    ours = json.loads(capsys.readouterr().out.splitlines()[0])
    train.main([*map(str, options), "--batch-size", "4", "--device", "cpu", "--dry-run"])
    expected = json.loads(capsys.readouterr().out)
    for name in ("loss", "ce", "kd", "t2s_ce", "t2s_kd", "s2t_kd"):
        assert ours[name] == pytest.approx(expected[name], rel=1e-5), name
    assert 0 < expected["t2s_agreement"] < 1 and expected["t2s_kd"] > 0  # else the comparison says little


def test_a_model_may_have_no_longest_text(examples, task, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(task / "student" / file, tmp_path)
    config = transformers.BloomConfig(vocab_size=600, hidden_size=8, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    both = ["--student", str(tmp_path), "--teacher", str(task / "teacher"), "--data", str(task / "data.jsonl")]
    student, *_, rows = examples["batch"].load(examples["batch"].parse_options("", both, out=""))
    assert student.config.model_type == "bloom" and rows


def test_what_would_give_a_wrong_number_is_refused(examples, loaded, tmp_path):
    student, teacher, tokenizers, _ = loaded
    batch, file = examples["batch"], tmp_path / "data.jsonl"
    teacher.lm_head.bias = torch.nn.Parameter(torch.ones(len(teacher.lm_head.weight)))
    with pytest.raises(ValueError, match="DIR: its logits"):
        batch.check_head("DIR", teacher)
    file.write_text('{"prompt": "", "output": "A fox."}')
    with pytest.raises(ValueError, match="line 1: the student needs a prompt"):
        batch.read_rows(file, *tokenizers, max_len=100)
    tokenizers[1].eos_token = None
    file.write_text('{"prompt": "Yes?", "output": "A fox."}')
    with pytest.raises(ValueError, match="line 1: the teacher needs .* end-of-text"):
        batch.read_rows(file, *tokenizers, max_len=100)


class Recorder(transformers.TrainerCallback):
    """The gradient of each update, before the optimizer takes it."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **others):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@pytest.fixture
def loaded(examples, options):
    """(student, teacher, tokenizers, rows)"""
    return examples["batch"].load(examples["batch"].parse_options("", [*map(str, options)], out=""))


def make_trainer(examples, loaded, rows: list, out: Path, **settings):
    """A Trainer whose updates are over two micro-batches of two rows, for two epochs, and its recorder."""
    student, teacher, tokenizers, _ = loaded
    args = transformers.TrainingArguments(
        out, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, max_grad_norm=0.0,
        logging_steps=1, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False,
        disable_tqdm=True, ddp_find_unused_parameters=False, **settings,
    )  # fmt: skip
    recorder = Recorder()
    trainer = examples["trainer"].DSKDTrainer(
        student, args, train_dataset=rows, data_collator=examples["batch"].collate, callbacks=[recorder],
        teacher=teacher, tokenizers=tokenizers,
    )  # fmt: skip
    return trainer, recorder


def update_of_loop(examples, loaded, rows: list) -> tuple[dict, dict]:
    """The terms and the gradient that the loop has on these rows as one batch, named as the Trainer's."""
    student, teacher, tokenizers, _ = loaded
    head, teacher_head = student.get_output_embeddings().weight.detach(), teacher.get_output_embeddings().weight
    student_shared, teacher_shared, token = examples["batch"].compare_vocabularies(*tokenizers, len(teacher_head))
    student.projectors = Projectors(head[student_shared], teacher_head[teacher_shared])
    batch = examples["batch"].collate(rows)
    student.zero_grad()
    terms = examples["transformers_loop"].compute_terms(
        student, teacher, student.projectors, student_shared, token, batch
    )
    terms["loss"].backward()
    gradient = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return {name: term.item() for name, term in terms.items()}, gradient


def check_gradients(gradient: dict, expected: dict):
    assert gradient.keys() == expected.keys() and "projectors.t2s.weight" in expected
    for name in expected:
        torch.testing.assert_close(gradient[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("count", [4, 3, 2])
def test_accumulated_update_equals_one_batch(examples, loaded, tmp_path, count):
    """The Trainer's update over two micro-batches, of which the second may be smaller or missing, has the terms and the
    gradient of the loop's update on all rows as one batch."""
    rows = loaded[3][:count]
    trainer, recorder = make_trainer(examples, loaded, rows, tmp_path, learning_rate=0.0)
    trainer.train()
    terms, gradient = update_of_loop(examples, loaded, rows)
    assert len(recorder.gradients) == 2  # nothing moves between the two
    for step in range(2):
        check_gradients(recorder.gradients[step], gradient)
        logged = trainer.state.log_history[step]
        assert logged["loss"] == pytest.approx(terms["loss"], abs=1e-4)  # the Trainer rounds it
        for name in terms.keys() - {"loss"}:
            assert logged[name] == pytest.approx(terms[name], rel=1e-5), name
    assert len([logged for logged in trainer.state.log_history if "loss" in logged]) == 2  # and none in the summary


@pytest.mark.parametrize("name", EXAMPLES)
def test_student_and_t2s_are_trained_alone(examples, loaded, tmp_path, name):
    student, teacher, tokenizers, rows = loaded
    student_before, teacher_before = ([p.detach().clone() for p in model.parameters()] for model in (student, teacher))
    head, teacher_head = student.get_output_embeddings().weight, teacher.get_output_embeddings().weight
    student_shared, teacher_shared, _ = examples["batch"].compare_vocabularies(*tokenizers, len(teacher_head))
    start = Projectors(head.detach()[student_shared], teacher_head[teacher_shared])
    if name == "trainer":
        trainer, _ = make_trainer(examples, loaded, rows[:12], tmp_path, learning_rate=1e-2)
        trainer.train()
        projectors = student.projectors
        del student.projectors
    else:
        projectors = examples[name].distil(student, teacher, tokenizers, rows, steps=3, batch_size=4, lr=1e-2)
    assert student.training  # with its dropout, although `load` gives it without
    assert not any(torch.equal(p, old) for p, old in zip(student.parameters(), student_before, strict=True))
    assert all(torch.equal(p, old) for p, old in zip(teacher.parameters(), teacher_before, strict=True))
    assert not torch.equal(projectors.t2s.weight, start.t2s.weight)
    # s2t moves too, but by no gradient: it follows the student's head
    assert not torch.equal(projectors.s2t.weight, start.s2t.weight)
    assert projectors.s2t.weight.grad is None and not projectors.s2t.weight.requires_grad


@pytest.mark.slow
def test_two_processes_equal_one_batch(examples, options, loaded, tmp_path):
    """Two processes of the Trainer, started by torchrun, have the gradient of the loop on all their rows at once, and
    log its terms; the counts are a mean over processes."""
    code = f"""
        import json, os, sys
        sys.path[:0] = {[str(Path(__file__).parent), str(ROOT / "examples"), str(ROOT)]}
        import batch, test_examples, trainer
        from safetensors.torch import save_file
        loaded = batch.load(batch.parse_options("", {[*map(str, options)]}, out=""))
        trainer, recorder = test_examples.make_trainer(
            {{"batch": batch, "trainer": trainer}}, loaded, loaded[3][:8], ".", learning_rate=0.0,
        )
        trainer.train()
        save_file(recorder.gradients[0], f"{{trainer.args.process_index}}.safetensors")
        with open(f"{{trainer.args.process_index}}.json", "w") as file:
            json.dump(trainer.state.log_history[0], file)
        os._exit(0)  # see `runtime.parallel.leave`: a thread of gloo may abort a process that ends in the usual way
    """
    (tmp_path / "process.py").write_text("\n".join(line[8:] for line in code.splitlines()))
    run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "process.py"], tmp_path)
    terms, expected = update_of_loop(examples, loaded, loaded[3][:8])
    terms |= {name: terms[name] / 2 for name in ("correct", "agreeing")}
    for process in range(2):
        logged = json.loads((tmp_path / f"{process}.json").read_text())
        assert {name: logged[name] for name in terms} == pytest.approx(terms, rel=1e-4)
        gradient = load_file(tmp_path / f"{process}.safetensors")
        check_gradients({name.removeprefix("module."): value for name, value in gradient.items()}, expected)
