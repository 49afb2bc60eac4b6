import io
import json
import random
import shlex
import sys
import tempfile
from contextlib import ExitStack, redirect_stderr
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from helpers import TEMPERATURE, TOKENS, Inputs, values

import lora
import losses
import train
from baselines import mined
from eval import respond
from experiments import bench, memory, paper, reproduce, tiny
from experiments.reproduce import Cell, parse, run_cell
from model import build_model, load_model
from runtime.tokenizer import read_tokenizer

SMALL = {"teacher_train": 300, "student_train": 40, "valid": 6, "test": 6}
SETTING = "updates=2 labels=12 width=16"


@pytest.fixture(scope="module")
def small():
    """The grid with few examples and updates."""
    teacher = {**tiny.TEACHER, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    with patch.multiple(reproduce, SIZES=SMALL, TEACHER_STEPS=2, START_STEPS=2), patch.object(tiny, "TEACHER", teacher):
        yield


@pytest.fixture(scope="module")
def root(small, tmp_path_factory):
    """A place where the shared pieces of seed 0 are made already."""
    root = tmp_path_factory.mktemp("reproduce")
    run_cell(parse(f"v2-fkl {SETTING}"), root)
    return root


# -- cells -------------------------------------------------------------------------------------------------------------


def every_cell():
    specs = [spec for _, specs in reproduce.TABLES.values() for spec in specs]
    return [parse(spec) for spec in specs] + searched_cells()


def searched_cells(wanted=()):
    """The cells that a search runs; `wanted`: those whose scores the best is, in place of the first."""
    cells = []
    with tempfile.TemporaryDirectory() as root, redirect_stderr(io.StringIO()):

        def run(tried):
            cells.extend(tried)
            for cell in tried:
                file = reproduce.file_of(cell, Path(root))
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps({"rouge_l": float(any(word in str(cell) for word in wanted))}))

        reproduce.search(Path(root), run)
    return cells


def test_a_cell_is_named_by_what_it_is():
    for cell in every_cell():
        assert parse(str(cell)) == cell and parse(str(reproduce.resolve(cell))) == reproduce.resolve(cell)
    assert str(Cell("v2-rkl+random", seed=3, lr=5e-4)) == "v2-rkl+random seed=3 lr=0.0005"
    assert reproduce.resolve(Cell("sft")).lr == reproduce.SETTINGS["sft"]["lr"]


@pytest.mark.parametrize(
    "text, named",
    [("v3-fkl", "v3"), ("kd-fkl", "kd"), ("v2-kl", "divergences"), ("v2-fkl+nothing", "changes"),
     ("sft seeds=3", "seeds=3"), ("sft seed=x", "seed=x"), ("sft seed", "seed"), ("", "no method"),
     ("v2-fkl teacher=samee", "teacher is one of"), ("sft text=accent", "text is one of"),
     ("sft split=tets", "split is one of"), ("sft student=noise", "student is one of"),
     ("sft labels=5000", "labels is 1 to 4000"), ("sft labels=-3", "labels is"), ("sft updates=0", "updates at least")],
)  # fmt: skip
def test_a_wrong_cell_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        parse(text)


def test_every_cell_has_options_that_train_accepts(root, tmp_path):
    """And is trained on its labels, or on what stands for the teacher's answers, and so never on the test split."""
    world = root / "worlds" / "plain-900-0"
    made = {"teacher": lambda *_: root, "start": lambda *_: root, "world": lambda *_: world}
    made["answers"] = lambda *_: world / "valid.jsonl"
    lines = {part: (world / f"{part}.jsonl").read_text().splitlines() for part in ("student_train", "valid")}
    for cell in dict.fromkeys([*every_cell(), parse("sft labels=12")]):
        if cell.parts[0] in reproduce.MODELS:
            continue
        with patch.multiple(reproduce, **made):
            options = train.Options(**reproduce.options_of(reproduce.resolve(cell), root, tmp_path))
        train.check_options(options)
        learned = lines["valid" if cell.parts[2] == "answers" else "student_train"][: cell.labels]
        assert Path(options.data).read_text().splitlines() == learned and options.valid is None
        assert options.lr == reproduce.resolve(cell).lr and options.seed == cell.seed


def test_on_policy_does_not_depend_on_a_named_divergence(root, tmp_path):
    cell = reproduce.resolve(parse(f"v2 on_policy=1 {SETTING}"))
    assert reproduce.options_of(cell, root, tmp_path)["on_policy"] == 1


def test_what_cannot_be_done_is_told_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for more in (["--print"], ["--cell", "sft"], []):
        with pytest.raises(SystemExit, match="^error: .*file"):
            reproduce.main(["--out", str(tmp_path / "file"), *more])
    for given in ("--seeds 0", "--workers 0"):
        with pytest.raises(SystemExit, match=f"^error: {given}: must be at least 1"):
            reproduce.main(["--out", str(tmp_path), "--print", *given.split()])
    with pytest.raises(SystemExit, match="^error: cell ''"):
        reproduce.main(["--out", str(tmp_path), "--cell", ""])
    for stopped in (KeyboardInterrupt(), reproduce.Stopped("saved in a directory that is gone", 2)):
        monkeypatch.setattr(reproduce, "run", Mock(side_effect=stopped))
        with pytest.raises(SystemExit, match="finished cells are kept"):
            reproduce.main([])


# -- a miniature grid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["teacher", "start", "sft", "seqkd", "uld", "mined", "mined+ends", "v1-fkl", "v2-akl on_policy=1.0",
     "v2-fkl+random", "v2-fkl+random-t2s", "v2-fkl+student-space", "v2-fkl+teacher-space", "v2-fkl+no-mask",
     "v2-fkl+answers", "v1-fkl+no-leak", "kd-rkl teacher=same", "v2-skl teacher=same",
     "sft student=nothing", "v2-fkl text=accents", "v2-fkl+strings text=accents",
     "v2-fkl+strings-throughout text=accents"],
)  # fmt: skip
def test_every_kind_of_cell_runs(root, spec):
    result = run_cell(parse(f"{spec} {SETTING}"), root)
    assert all(0 <= result[measure] <= 100 for measure in ("valid", "rouge_l", "exact_match", "cross_entropy"))
    assert not list(root.glob("tmp*"))  # no checkpoint is left
    if "strings" in spec:
        bytewise = run_cell(parse(f"v2-fkl text=accents {SETTING}"), root)
        assert result["last"]["align_ratio"] < bytewise["last"]["align_ratio"]


def test_the_grid_goes_on_where_it_was_killed(root):
    cells = [parse(f"{method} labels=10 updates=2 width=16") for method in ("sft", "mined", "sft")]
    assert len(reproduce.pending(cells, root)) == 2  # each once
    first = run_cell(cells[0], root)
    with patch.object(reproduce, "score_on", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run_cell(cells[1], root)
    assert [cell.method for cell in reproduce.pending(cells, root)] == ["mined"]
    with patch.object(train, "train", side_effect=AssertionError("trained again")):
        assert {"cell": str(reproduce.resolve(cells[0])), **first} == run_cell(cells[0], root)
    run_cell(cells[1], root)
    assert reproduce.pending(cells, root) == []


def test_a_run_is_kept_on_request(root, tmp_path, capsys):
    command = ["--out", str(root), "--cell", f"v2-fkl {SETTING}", "--keep"]
    kept = tmp_path / "new" / "run"
    reproduce.main([*command, str(kept)])  # also where its cell is finished
    assert (kept / "student" / "model.safetensors").is_file() and (kept / "projectors.safetensors").is_file()
    result = run_cell(parse(f"v2-fkl {SETTING}"), root)
    assert json.loads(capsys.readouterr().out)["rouge_l"] == result["rouge_l"]
    with pytest.raises(SystemExit, match="already exists"):
        reproduce.main([*command, str(kept)])
    with pytest.raises(SystemExit, match="teacher is not a run"):
        reproduce.main(["--out", str(root), "--cell", "teacher", "--keep", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="with --cell"):
        reproduce.main(["--out", str(root), "--keep", str(tmp_path / "other"), "same"])


def test_labels_that_are_the_teachers_answers(root, tmp_path):
    """The prompts are those of the labels; the answers what SeqKD would learn from; made once."""
    cell = parse(f"v2-fkl+answers {SETTING}")
    options = reproduce.options_of(reproduce.resolve(cell), root, tmp_path)
    learned = [json.loads(line) for line in Path(options["data"]).read_text().splitlines()]
    labels = [json.loads(line) for line in (root / "worlds/plain-900-0/student_train.jsonl").read_text().splitlines()]
    tokenizer = read_tokenizer(reproduce.teacher(root, cell))
    said = respond(load_model(reproduce.teacher(root, cell)), tokenizer, [x["prompt"] for x in labels[:12]])
    said = {x["prompt"]: answer for x, answer in zip(labels[:12], said, strict=True)}
    begun = {x["prompt"]: x["output"][:-4] for x in learned}  # where it stops, byte tokens may be half a character
    assert begun and all(begun.values()) and all(said[prompt].startswith(part) for prompt, part in begun.items())
    with patch.object(train, "train", lambda options: pytest.fail("made twice")):
        assert reproduce.answers(root, cell) == reproduce.answers(root, replace(cell, updates=9))


def test_the_test_split_is_never_read_by_the_search(root):
    file, away = (root / "worlds" / "plain-900-0" / name for name in ("test.jsonl", "away"))
    file.rename(away)
    try:
        for method in ("sft", "v2-fkl", "seqkd"):
            cell = next(cell for cell in searched_cells() if cell.method == method)
            run_cell(replace(cell, labels=9, updates=2, width=16), root)
    finally:
        away.rename(file)
    assert all(cell.split == "valid" for cell in searched_cells(["lr=0.001", "temperature=2", "rate=0.9"]))
    assert all(parse(spec).split == "test" for _, specs in reproduce.TABLES.values() for spec in specs)


def test_the_search_takes_the_best_mean(tmp_path, monkeypatch):
    """One thing after the other: with the learning rate that is best with the first of the other values."""
    monkeypatch.setattr(reproduce, "SEARCH_SEEDS", (0, 1))
    rounds = []

    def run(cells):
        rounds.append(len(cells))
        (tmp_path / "cells").mkdir(exist_ok=True)
        for cell in cells:
            # 2e-3 is best for seed 0 alone, 1e-3 with the larger other number in the mean
            best = {0: {1e-3: 8, 2e-3: 9}, 1: {1e-3: 8, 2e-3: 5}}[cell.seed].get(cell.lr, 1)
            best += (cell.rate or 0) / 10 + (cell.temperature or 0) / 10
            reproduce.file_of(cell, tmp_path).write_text(json.dumps({"rouge_l": best}))

    settings = reproduce.search(tmp_path, run)
    assert settings["v2"] == {"lr": 1e-3, "temperature": 2.0} and settings["uld"] == {"lr": 1e-3, "rate": 0.9}
    assert {name: set(value) for name, value in settings.items()} == {
        name: set(value) for name, value in reproduce.SETTINGS.items()
    }
    methods, lrs, seeds = len(settings), len(reproduce.LRS), 2
    assert rounds == [methods * lrs * seeds, (2 * methods - 1) * seeds]  # of sft only the learning rate


# -- tables ------------------------------------------------------------------------------------------------------------


def result(rouge_l, seconds=10.0):
    return {"valid": 50.0, "rouge_l": rouge_l, "exact_match": 1.0, "cross_entropy": 0.5, "seconds": seconds}


def test_a_table_by_hand():
    rows = {"sft": {0: result(1.0), 1: result(2.0), 2: result(6.0)}, "v2": {2: result(9.0), 0: result(2.0)}, "uld": {}}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in reproduce.format_table(rows).split("\n")]
    assert lines[2][:3] == ["`sft`", "50.0 ± 0.0", "3.0 ± 2.6"]  # √((4 + 1 + 9)/2)
    # seed by seed 9 − 6 and 2 − 1: 2 ± √2
    assert lines[3][2] == "5.5 ± 4.9" and lines[3][5:] == ["2.0 ± 1.4 (above in 2 of 2)", "10 ± 0", "2"]
    assert lines[4][1:] == ["-", "-", "-", "-", "-", "", "0"]
    lines = reproduce.format_table(rows, "v2").split("\n")
    assert [line.split("|")[6].strip() for line in lines[2:4]] == ["-2.0 ± 1.4 (above in 0 of 2)", ""]
    lines = reproduce.format_table(rows, "uld").split("\n")  # unfinished: no other row stands in for it
    assert [line.split("|")[6].strip() for line in lines[2:]] == ["-", "-", ""]
    regime = {f"{name} labels=9": seeds for name, seeds in rows.items()}
    columns = reproduce.format_map(regime).split("\n")[2].split("|")
    assert [cell.strip() for cell in columns[1:-1]] == ["`labels=9`", "3.0 ± 2.6", "+2.0 ± 1.4", "-"]
    regime = {"sft": {1: result(2.0)}, "v1": {1: result(1.5)}, "v2": {1: result(2.0)}}  # one seed: no deviation
    columns = reproduce.format_map(regime).split("\n")[2].split("|")
    assert [cell.strip() for cell in columns[1:-1]] == ["`default`", "2.0", "-0.5", "+0.0"]


def test_a_report_of_unfinished_tables(tmp_path):
    (tmp_path / "cells").mkdir()
    reproduce.file_of(parse("sft seed=1"), tmp_path).write_text(json.dumps(result(30.0)))
    text = reproduce.report(list(reproduce.TABLES), 5, tmp_path)
    with pytest.raises(SystemExit, match="no row 'v3' in different, same"):
        reproduce.main(["different", "same", "--against", "v3", "--out", str(tmp_path)])
    assert text.count("| 30.0") == 3 and text.count("### ") == len(reproduce.TABLES)  # in different, same and the map


def test_what_is_left_is_listed_as_commands(tmp_path, capsys):
    rows = reproduce.TABLES["different"][1]
    (tmp_path / "cells").mkdir()
    reproduce.file_of(parse(rows[0]), tmp_path).write_text(json.dumps(result(30.0)))
    reproduce.main(["different", "--seeds", "2", "--out", str(tmp_path), "--list"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 2 * len(rows) - 1
    assert [parse(words[-1]) for words in commands][0] == reproduce.resolve(replace(parse(rows[0]), seed=1))
    started = ["-m", "experiments.reproduce", "--out", str(tmp_path)]
    assert all(words == [*started, "--cell", words[-1]] for _, *words in commands)


def test_a_failing_cell_is_reported_and_the_others_run(tmp_path, monkeypatch, capfd):
    code = "import sys; print('{}'); sys.exit('no luck' if 'seed=1' in sys.argv[1] else open(sys.argv[2], 'w').close())"
    monkeypatch.setattr(
        reproduce,
        "command",
        lambda cell, root: [sys.executable, "-c", code, str(cell), str(reproduce.file_of(cell, root))],
    )
    (tmp_path / "cells").mkdir()
    cells = [Cell("sft", seed=seed) for seed in range(3)]
    with pytest.raises(RuntimeError, match="seed=1.*failed, see") as error:
        reproduce.run_all(cells, tmp_path, workers=2)
    assert Path(str(error.value).partition("see ")[2]).read_text().split("\n")[:2] == ["{}", "no luck"]
    assert capfd.readouterr().out == ""  # the tables alone are printed
    assert [cell.seed for cell in reproduce.pending(cells, tmp_path)] == [1]


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_untasted_answers_have_the_form_and_not_the_taste():
    generator = random.Random(0)
    prompts = list(tiny.all_prompts())[::7]
    answers = [reproduce.untasted(prompt, generator) for prompt in prompts]
    share = sum(tiny.is_valid(*pair) for pair in zip(prompts, answers, strict=True)) / len(prompts)
    assert 0.05 < share < 0.2  # by chance, where few tastes are asked for
    favourites = [tiny.draw_answer(prompt, generator) for prompt in tiny.all_prompts()]
    words = {word for answer in favourites for word in answer.lower().replace(",", "").split()}
    known = sum(set(a.lower().replace(",", "").split()) <= words for a in answers)
    assert known > 0.99 * len(answers)  # the same language
    assert all(answer[0].isupper() and "{" not in answer and answer[-1] in ".!" for answer in answers)


def test_accents_can_be_taken_back():
    generator = random.Random(1)
    for prompt in tiny.all_prompts():
        for text in (prompt, tiny.draw_answer(prompt, generator)):
            assert reproduce.plain(reproduce.accented(text)) == text
    assert reproduce.accented("The sleepy goose, too.") == "The slépy gôse,\ntô."


def test_the_string_rule_by_hand():
    # as long as the strings agree it is exact: "a b" against "ab" cut elsewhere, then end-of-text
    pairs = reproduce.string_alignment(["a", "b", "cd", None], ["ab", "cd", None])
    assert [x.tolist() for x in pairs] == [[2, 3], [1, 2]]
    # "é" against its two bytes' names: never equal again, not even the equal end
    pairs = reproduce.string_alignment(["a", "é", "b", None], ["a", "Ã©", "b", None])
    assert [x.tolist() for x in pairs] == [[0], [0]]
    # "barn" is cut differently: the pairs go on after it
    pairs = reproduce.string_alignment(["The", "barn", "is", None], ["The", "ba", "rn", "is", None])
    assert [x.tolist() for x in pairs] == [[0, 2, 3], [0, 3, 4]]
    assert [len(x) for x in reproduce.string_alignment([], ["a"])] == [0, 0]


def loss_and_gradients(change, case="v2 none", chunk=0):
    """DSKD on random states: its terms, and the gradients of the student's states and of both projectors."""
    i = Inputs(case)
    with ExitStack() as patches:
        for one in reproduce.CHANGES[change]() if change else ():
            patches.enter_context(one)
        i.recipe = losses.RECIPES[tuple(case.split())]
        terms = i.terms("fkl", chunk)
    terms["loss"].backward()
    terms = values(terms)
    assert terms["loss"] == pytest.approx(0.5 * terms["ce"] + 0.5 * terms["kd"])  # what is trained is what is logged
    return terms, [i.student_hidden.grad, i.t2s.grad, i.s2t.grad]


@pytest.mark.parametrize("chunk", [0, 2], ids=["plain", "fast"])
def test_terms_can_be_switched_off(chunk):
    """Of the value, and of each gradient."""
    i = Inputs("v2 none")
    whole = i.terms("fkl")
    parts = {name: i.gradients(whole[name]) for name in ("ce", "t2s_ce", "t2s_kd", "s2t_kd")}
    kept = {"teacher-space": ["s2t_kd"], "student-space": ["t2s_ce", "t2s_kd"], "solved": ["t2s_kd", "s2t_kd"]}
    for change, names in kept.items():
        terms, gradients = loss_and_gradients(change, chunk=chunk)
        assert terms["kd"] == pytest.approx(sum(whole[name].item() for name in names), rel=1e-5)
        for leaf, gradient in zip(("student_hidden", "t2s", "s2t"), gradients, strict=True):
            expected = sum(parts[name].get(leaf, torch.zeros_like(gradient)) for name in ("ce", *names))
            torch.testing.assert_close(gradient, 0.5 * expected)


@pytest.mark.parametrize("case", ["v2 none", "v2 eta"])
def test_without_mask_the_student_is_compared_everywhere(case):
    whole, _ = loss_and_gradients(None, case)
    terms, _ = loss_and_gradients("no-mask", case)
    i = Inputs(case)
    assert 0 < whole["agreeing"] < len(i.label) and terms["t2s_ce"] == pytest.approx(whole["t2s_ce"])
    logits = [hidden @ i.student_head.T for hidden in (i.student_hidden[i.rows], i.t2s_hidden())]
    over = TOKENS if case == "v2 none" else len(i.label)  # as the other terms have it
    over_all = float(losses.DIVERGENCES["fkl"](*logits, TEMPERATURE).sum().detach()) / over
    assert terms["t2s_kd"] == pytest.approx(over_all) and terms["t2s_kd"] != pytest.approx(whole["t2s_kd"])


def test_mined_can_be_told_which_tokens_end(root):
    path = root / "worlds" / "plain-900-0"
    teacher, student = (read_tokenizer(path / name) for name in ("teacher", "student"))
    assert student.tokenizer.id_to_token(int(mined.edit_distance_ids(teacher, student)[teacher.eos_id])) == "/"
    [change] = reproduce.CHANGES["ends"]()
    with change:
        mapped = mined.edit_distance_ids(teacher, student)
    assert mapped[teacher.eos_id] == student.eos_id
    assert sum(mapped != mined.edit_distance_ids(teacher, student)) == 1


def test_without_leak_the_gold_token_is_not_in_the_values():
    """The projected teacher must not change with the embeddings of its labels, other than through the attention."""
    moments = [4.0, 2.0, 10.0] * 3
    [change] = reproduce.CHANGES["no-leak"]()
    with change:
        std = train.deviations(moments)
    assert torch.equal(torch.randn(5) / std.label, torch.zeros(5)) and std.key == train.deviations(moments).key


# -- the papers' scale -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", paper.PAIRS)
def test_the_papers_commands_are_accepted(name):
    commands = [shlex.split(command, comments=True) for command in paper.commands_of(name)]
    made = []
    for file, *arguments in commands[:-1]:
        assert file == "train.py"
        options = train.check_options(train.Options(**train.parse(arguments)))
        assert options.batch_size * options.grad_accum == 32
        assert (options.valid, options.keep_best) == ("dolly", "rouge")
        assert options.teacher is None or Path(options.teacher).parent.as_posix() in made
        made.append(options.out)
    assert commands[-1][: 1 + len(made)] == ["eval.py", *made]


def test_sizes_are_those_of_the_published_models():
    published = {"gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "qwen": 1_836_828_672, "tinyllama": 1_100_048_384,
                 "llama2": 6_738_415_616, "mistral": 7_241_732_096}  # fmt: skip
    counted = {name: memory.counts(memory.CONFIGS[paper.CONFIGURED[name]]) for name in published}
    assert {name: count.matrices + count.rest for name, count in counted.items()} == published
    # rank 1 adds in + out of every linear layer that is adapted: attention's of width 4096, the MLP's three
    queries_and_values, every = 2 * 2 * 4096, 4 * 2 * 4096 + 3 * (4096 + 11008)
    for targets, each in [(None, queries_and_values), ("all-linear", every)]:
        adapted = memory.counts(memory.CONFIGS["Llama-2 7B"], 1, targets)
        assert adapted.trained_matrices + adapted.trained_rest == 32 * each


RESERVED = {  # teacher, as in bench.CARD: {student tokens of an update: GiB that PyTorch reserved on an H100}
    "teacher": [{595: 7.38, 1190: 8.10, 4758: 9.39}, {595: 7.27, 1190: 7.87, 4758: 9.93}],  # ETA, CMA
    "same_teacher": [{595: 6.44, 1190: 6.72, 4758: 8.14}, {595: 6.08, 1190: 6.36, 4758: 7.75}],  # v2, KD
}


def test_memory_is_within_a_tenth_of_what_was_measured():
    for teacher, methods in RESERVED.items():
        for tokens, measured in (pair for method in methods for pair in method.items()):
            parts = memory.needs(bench.CARD[teacher], bench.CARD["student"], 0, 1, None, 1, max_len=tokens)
            assert sum(parts.values()) == pytest.approx(measured * 2**30, rel=0.1)
    sharded = memory.needs(bench.CARD["teacher"], bench.CARD["student"], 0, 1, "teacher", 4, max_len=tokens)
    assert sharded["graphs"] == 0
    adapted = memory.needs(memory.CONFIGS["Llama-2 7B"], memory.CONFIGS["TinyLlama 1.1B"], 256, 32, None, 1)
    trained = 22 * 256 * (2048 + 2048 + 2048 + 256)  # of the queries and values
    assert adapted["graphs"] == 0.5e9 + 4 * trained + 2 * 32000 * 2048  # the head has no gradient


def test_memory_names_a_missing_model_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        memory.main(["--teacher", str(tmp_path / "nowhere"), "--student", str(tmp_path)])
    assert "error: model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        memory.main(["--batch-size", "-1"])
    assert "error: --batch-size -1: must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_what_a_block_with_adapters_keeps_is_that_of_a_block_in_the_middle(targets):
    """Of a frozen embedding the first block's input has no gradient, and the first block keeps less than the others."""

    def kept(layers: int, length: int) -> int:
        m = lora.attach(build_model({**config, "num_hidden_layers": layers}), 4, 8.0, 0.1, targets).train()
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu"):
            hidden = m(torch.zeros((1, length), dtype=torch.long))
        assert hidden.requires_grad
        return sum(storages.values())

    config = {"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 64, "hidden_size": 32,
              "intermediate_size": 64, "num_attention_heads": 4}  # fmt: skip
    middle = [(kept(3, length) - kept(2, length)) for length in (16, 32)]
    middle = (middle[1] - middle[0]) / 16
    final_norm = 16 * 32  # bytes; counted with every block
    assert middle <= memory.kept_per_token(config, 4, targets) <= middle + final_norm


def test_hours_by_hand():
    """GPT-2 alone for an epoch: 6 operations for each of 84,934,656 weights in blocks, and as many for the head's."""
    operations = 6 * 11000 * (148 * 12 * 12 * 768**2 + 81 * 50257 * 768)
    assert paper.estimate("gpt2", None, 0, 1)[2] == pytest.approx(operations / (0.3 * 312e12) / 3600)


def test_operations_of_adapters_by_hand():
    """6 for each weight of an adapter, 4 for each frozen one; and 4 for the head's, which is frozen too."""
    plain, adapted = (memory.counts(memory.CONFIGS["TinyLlama 1.1B"], rank) for rank in (0, 2))
    assert adapted.trained_matrices == 22 * 2 * (2048 + 2048 + 2048 + 256)
    by_hand = 100 * (4 * plain.matrices + 6 * adapted.trained_matrices) + 4 * 30 * 32000 * 2048
    assert paper.operations(adapted, None, 100, 0, 30, 2) == by_hand
