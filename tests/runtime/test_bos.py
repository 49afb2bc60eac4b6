"""--bos: what begins each prompt, for which model, and that the student's files say so, by `transformers`' word."""

import json
import shutil

import numpy as np
import pytest
from helpers import CHAT_TEMPLATES, arguments, report_of
from tokenizers import Tokenizer, pre_tokenizers, processors

import eval as evaluation
import model
import train
from baselines import seqkd
from data import Example, tokenise
from experiments import tiny
from runtime.formats import read_examples
from runtime.options import Options
from runtime.run import tokenizer_of
from runtime.serving import write_as_trained
from runtime.strict import check_options
from runtime.tokenizer import read_tokenizer

pytestmark = pytest.mark.usefixtures("own_folder")  # eval.py writes reports into it

TEXTS = ["The fox", " begins with a space", "  two", "", "\n\nlines", "1,250 and 42", "é 東京 🦊", "a <s> b", "</s>x"]
BEGIN = "<|begin_of_text|>"
KINDS = {  # how a tokenizer.json begins a text: its tokens, by the kind of model whose files these are
    "llama": ["<s>"],
    "llama, rebuilt by its class": ["<s>"],  # what the hub has: transformers 5 does not read tokenizer.json for it
    "llama3": [BEGIN],
    "both ends": ["[CLS]", "[MASK]"],
    "gpt2": [],
    "gpt2, rebuilt by its class": [],  # SmolLM2's case
}


@pytest.fixture(scope="module")
def kinds(tiny_task, tmp_path_factory):
    """{kind: directory}: an untrained model with such a tokenizer."""
    root, directories = tmp_path_factory.mktemp("kinds"), {}
    for kind in KINDS:
        llama = kind.startswith("llama") and kind != "llama3"
        directory = directories[kind] = root / kind.replace(", ", "-").replace(" ", "-")
        shutil.copytree(tiny_task / ("teacher" if llama else "student"), directory)
        config = json.loads((directory / "tokenizer_config.json").read_text())
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        if kind == "llama3":
            tokenizer.add_special_tokens([BEGIN])
            template = processors.TemplateProcessing(
                single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, 900)]
            )
            tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
            config["bos_token"] = BEGIN
        elif kind == "both ends":
            tokenizer.add_special_tokens(["[CLS]", "[MASK]", "[SEP]"])
            tokenizer.post_processor = processors.TemplateProcessing(
                single="[CLS] [MASK] $A [SEP]", special_tokens=[("[CLS]", 900), ("[MASK]", 901), ("[SEP]", 902)]
            )
        elif kind == "gpt2, rebuilt by its class":
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
            config["tokenizer_class"] = "GPT2Tokenizer"
        elif kind == "llama, rebuilt by its class":
            config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        shape = json.loads((directory / "config.json").read_text())
        shape["vocab_size"] = tokenizer.get_vocab_size()
        model.save_model(model.build_model(shape), directory)
    return directories


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_students_files_say_what_it_was_trained_with(kinds, tiny_task, tmp_path, kind, bos):
    transformers = pytest.importorskip("transformers")
    options = {"method": "sft", "teacher": None, "student": kinds[kind], "max_steps": 1, "bos": bos or None}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    student = tmp_path / "run" / "student"
    theirs, saved = transformers.AutoTokenizer.from_pretrained(student), tokenizer_of(student)
    before = Tokenizer.from_file(str(kinds[kind] / "tokenizer.json"))
    begin = [before.token_to_id(token) for token in KINDS[kind]] if bos else []
    assert len(begin) == bos * len(KINDS[kind]) and None not in begin
    for text in TEXTS:
        expected = begin + before.encode(text, add_special_tokens=False).ids
        assert theirs(text)["input_ids"] == saved.encode_prompt(text) == expected
    assert theirs.eos_token == before.id_to_token(saved.eos_id)
    assert "token_type_ids" not in theirs("x")  # which the models do not take
    config = json.loads((student / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is bool(begin) and config["add_eos_token"] is False

    # those are the ids of training
    o = check_options(Options(student=str(kinds[kind]), data=str(tiny_task / "train.jsonl"), method="sft", device="cpu",
                      bos=bos or None, max_len=96, out=str(tmp_path / "other")))  # fmt: skip
    pieces = train.load(o)
    for row, example in zip(pieces.rows, read_examples(o.data), strict=True):
        assert theirs(example.prompt)["input_ids"] == row.student.prompt
        assert row.student.response == [*saved.encode(example.outputs[0]), saved.eos_id]


def test_a_pair_of_texts_is_encoded_as_before(kinds, tiny_task, tmp_path):
    """Whoever gives `transformers` two texts gets the begin-of-text of both or of neither, and their types."""
    for bos in (False, True):
        tokenizer = read_tokenizer(kinds["llama3"], bos=bos)
        shutil.copytree(kinds["llama3"], tmp_path / str(bos))
        write_as_trained(tokenizer, tmp_path / str(bos))
        found = Tokenizer.from_file(str(tmp_path / str(bos) / "tokenizer.json")).encode("The fox", "a dog")
        whole = tokenizer.tokenizer.encode("The fox", "a dog")
        kept = [i for i, name in enumerate(whole.tokens) if bos or name != BEGIN]
        assert (found.ids, found.type_ids) == ([whole.ids[i] for i in kept], [whole.type_ids[i] for i in kept])
        assert found.offsets == [whole.offsets[i] for i in kept]


def test_names_that_the_class_knew_are_written_down(tiny_task, tmp_path):
    """GPT-2's tokenizer_config.json names neither its class nor a token; the class written there has no defaults."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(tiny_task / "student", tmp_path / "gpt2")
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    write_as_trained(read_tokenizer(tmp_path / "gpt2"), tmp_path / "gpt2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    assert (theirs.bos_token, theirs.eos_token, theirs.model_max_length) == ("<|endoftext|>", "<|endoftext|>", 128)
    config = json.loads((tmp_path / "gpt2" / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # transformers 4 adds one that no model takes
    assert not (tmp_path / "gpt2" / "special_tokens_map.json").exists()  # it had none, and needs none


def test_both_models_get_their_own_and_only_prompts_change(kinds, tiny_task):
    examples = read_examples(tiny_task / "train.jsonl")

    def rows(bos, **lengths):
        both = (read_tokenizer(kinds[kind], bos=bos) for kind in ("llama3", "llama"))
        return tokenise(examples, *both, align="eta", **lengths)

    (plain, _), (begun, report) = rows(False), rows(True)
    assert report.prompts_cut == 0
    for row, other in zip(plain, begun, strict=True):
        assert other.student.prompt == [900, *row.student.prompt] and other.teacher.prompt == [1, *row.teacher.prompt]
        assert (other.student.response, other.teacher.response) == (row.student.response, row.teacher.response)
        assert all(np.array_equal(a, b) for a, b in zip(row.pairs, other.pairs, strict=True))

    # it takes one token of the room
    longest = max(len(side.prompt) for row in plain for side in (row.student, row.teacher))
    most = max(len(s.prompt) + len(s.response) for row in plain for s in (row.student, row.teacher))
    assert rows(False, max_prompt_len=longest)[1].prompts_cut == 0 < rows(True, max_prompt_len=longest)[1].prompts_cut
    assert rows(False, max_len=most)[1].responses_cut == 0 < rows(True, max_len=most)[1].responses_cut
    for row in rows(True, max_len=most, max_prompt_len=longest)[0]:
        assert (row.student.prompt[0], row.teacher.prompt[0]) == (900, 1)
        assert max(len(side.prompt) + len(side.response) for side in (row.student, row.teacher)) <= most


@pytest.mark.parametrize("chat, twice", [("llama3.2", True), ("qwen2.5", False)])
def test_a_chat_format_that_begins_so_by_itself_gets_no_second_one(tiny_task, tmp_path, chat, twice):
    transformers = pytest.importorskip("transformers")
    shutil.copytree(tiny_task / "student", tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    names = [BEGIN, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(names)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 900)])
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    config = {"bos_token": BEGIN, "eos_token": "<|eot_id|>"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    ours = read_tokenizer(tmp_path / "base", str(CHAT_TEMPLATES / f"{chat}.jinja"), bos=True)
    text = ours.prompt_text(Example("", ["x"], prompt="Who?"))
    assert text.startswith(BEGIN) == twice and "Who?" in text
    assert ours.encode_prompt(text).count(900) == 1 and ours.encode_prompt(text)[0] == 900
    shutil.copytree(tmp_path / "base", tmp_path / "student")
    write_as_trained(ours, tmp_path / "student")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "student")
    assert theirs(text)["input_ids"] == ours.encode_prompt(text)
    assert theirs("Who?")["input_ids"] == ([] if twice else [900]) + ours.encode("Who?")


def test_a_prompt_that_begins_so_already_is_an_error(kinds, tmp_path, tiny_task):
    lines = ({"prompt": prompt, "output": "I"} for prompt in ("Who is <s>?", "<s> Who?"))
    (tmp_path / "marked.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"method": "sft", "teacher": None, "student": kinds["llama"], "data": tmp_path / "marked.jsonl"}
    with pytest.raises(SystemExit, match="line 2: the prompt begins with <s>, which would appear twice, .* --no-bos"):
        train.main(arguments(tiny_task, tmp_path / "run", bos=True, **options))
    train.main(arguments(tiny_task, tmp_path / "run", **options))


def test_any_id_of_the_vocabulary_may_begin_a_text(kinds, tmp_path):
    directory = shutil.copytree(kinds["gpt2"], tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for index in (0, 900):
        tokenizer.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", index)])
        tokenizer.save(str(directory / "tokenizer.json"))
        if index == 0:
            assert tokenizer_of(directory, bos=True).prefix == [0]
    with pytest.raises(ValueError, match=r"tokenizer.json: its post-processor adds ids \[900\], but .* lacks one"):
        tokenizer_of(directory, bos=True)


def test_evaluation_and_later_runs_know_it(kinds, tiny_task, tmp_path, capsys):
    """From the student's files; a run from before --bos had none, whatever the files that it copied say."""

    def evaluate(directory, *more):
        evaluation.main([str(directory), "--data", str(tiny_task / "test.jsonl"), "--greedy", "--device", "cpu", *more])
        report = report_of(directory, "test-greedy")
        tokenizer = read_tokenizer(kinds["llama"], bos=report["bos"] == [1])
        rows, _ = tokenise(read_examples(tiny_task / "test.jsonl"), tokenizer)
        expected = evaluation.held_out_cross_entropy(model.load_model(student), rows, 0)
        assert report["cross_entropy"] == pytest.approx(expected, rel=1e-5) and report["bos"] in ([], [1])
        return bool(report["bos"]), "add it with --bos" in capsys.readouterr().err

    options = {"method": "sft", "teacher": None, "student": kinds["llama"]}
    student = kinds["llama"]
    assert evaluate(student) == (False, True) and evaluate(student, "--bos") == (True, False)
    assert evaluate(student, "--no-bos") == (False, False)
    for name, bos in (("plain", None), ("begun", True)):
        train.main(arguments(tiny_task, tmp_path / name, bos=bos, **options))
        assert ("add it with --bos" in capsys.readouterr().err) == (not bos)
        student = tmp_path / name / "student"
        assert evaluate(tmp_path / name) == evaluate(student) == (bool(bos), False)
        assert evaluate(student, "--no-bos") == (False, False)
    before = shutil.copytree(tmp_path / "plain", tmp_path / "before")
    record = json.loads((before / "args.json").read_text())
    del record["bos"]
    (before / "args.json").write_text(json.dumps(record))
    shutil.copy(kinds["llama"] / "tokenizer.json", before / "student" / "tokenizer.json")
    student = before / "student"
    assert evaluate(before)[0] is False

    def prompts(teacher, **more):
        o = Options(student=str(kinds["llama3"]), teacher=str(teacher), data=str(tiny_task / "train.jsonl"),
                    out=str(tmp_path / "next"), device="cpu", max_len=96, **more)  # fmt: skip
        row = train.load(check_options(o)).rows[0]
        return row.teacher.prompt[0] == 1, row.student.prompt[0] == 900

    begun = tmp_path / "begun" / "student"
    assert prompts(begun) == (True, False) and prompts(kinds["llama"]) == (False, False)
    assert prompts(begun, bos=True) == (True, True) and prompts(begun, bos=False) == (False, False)
    with pytest.raises(SystemExit, match="--resume: --bos is True, but .* was started with None"):
        train.main(arguments(tiny_task, tmp_path / "plain", bos=True, resume=True, **options))
    train.main(arguments(tiny_task, tmp_path / "begun", **{**options, "max_steps": 2}, resume=True))


@pytest.mark.parametrize("options", [{"on_policy": 1, "recipe": "v2"}, {"recipe": "v1"}, {"method": "seqkd"}])
def test_whatever_generates_begins_so_too(kinds, tiny_task, tmp_path, monkeypatch, options):
    asked, generate = {"train": [], "seqkd": [], "eval": []}, model.generate

    def spy(name):
        def generate_and_note(m, prompts, *rest, **more):
            asked[name] += [prompt[:2] for prompt in prompts]
            return generate(m, prompts, *rest, **more)

        return generate_and_note

    for name, module in (("train", train), ("seqkd", seqkd), ("eval", evaluation)):
        monkeypatch.setattr(module, "generate", spy(name))
    both = {"teacher": kinds["llama"], "student": kinds["llama3"]}
    common = {"bos": True, "max_len": 60, "data": tiny_task / "valid.jsonl", **both}
    train.main(arguments(tiny_task, tmp_path / "run", **common, **options))
    on_policy, answers = "on_policy" in options, options.get("method") == "seqkd"
    assert (len(asked["train"]), len(asked["seqkd"])) == (8 * on_policy, 10 * answers)
    if answers:  # so that answers to other prompts are not taken
        assert seqkd.read_recipe(tmp_path / "run" / "seqkd.jsonl")["bos"] == [1]
    for name, begin in (("train", 900), ("seqkd", 1), ("eval", 900)):  # eval: samples.txt
        assert all(first == begin != second for first, second in asked[name])
    assert len(asked["eval"]) == 5 and BEGIN not in (tmp_path / "run" / "samples.txt").read_text()


def test_the_teachers_stage_and_the_embedded_task_take_it(kinds, tiny_task, small_task, tmp_path, monkeypatch, capsys):
    options = {"teacher": kinds["llama"], "teacher_sft": True, "bos": True, "max_steps": 1}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    assert tokenizer_of(tmp_path / "run" / "teacher" / "student").prefix == [1]
    assert tokenizer_of(tmp_path / "run" / "student").prefix == []  # GPT-2's: there is nothing to add

    begun, respond = [], evaluation.respond

    def spy(m, tokenizer, *rest, **more):
        begun.append(tokenizer.prefix)
        return respond(m, tokenizer, *rest, **more)

    monkeypatch.setattr(tiny, "respond", spy)
    train.main(["--bos", "--max-steps", "1", "--batch-size", "2", "--out", str(tmp_path / "tiny"), "--device", "cpu"])
    assert begun == [[1]] * 2 + [[]] * 8  # on both tests: the teacher, the student before, its twins, distilled
    assert "note:" not in capsys.readouterr().err
