"""Chat formats: rendered as the families' own templates do, told apart for teacher and student, cut, ended, evaluated.

SmolLM2's template is the one of its checkpoint's tokenizer_config.json, to the letter. Those of Qwen2.5-Instruct and
Llama-3.2-Instruct are written down from memory of the published ones, without the parts about tools.
"""

import json
import random
import shutil

import pytest
import torch
from helpers import arguments, log_of, make_model

import eval as evaluation
import model
import train
from baselines import seqkd
from data import CodeTask, Example, cut_prompt, read_jsonl, tokenise
from runtime.chat import CHATS
from runtime.formats import read_examples
from runtime.run import chat_of
from runtime.tokenizer import read_tokenizer
from scores.tasks import DataSet

TEMPLATES = {
    "qwen2.5": "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + "
    "'<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant') "
    "%}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
    "llama3.2": "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{{- 'Cutting Knowledge Date: December 2023\\n' }}"
    "{{- 'Today Date: ' + date_string + '\\n\\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
    "message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
    "smollm2": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
NAMES = sorted({token for chat in CHATS.values() for token in chat.special_tokens()})
MESSAGES = [
    "What is the capital of France?",
    ' two lines,\n\nand {braces} % \'"\\n" {{ message }} \n',
    "naïve café 🍕 北京\u2028",
    "\n\t x",
]


@pytest.fixture(scope="module")
def chatting(tiny_task, tmp_path_factory):
    """The tiny task's teacher and student with the special tokens of all formats, their end-of-text unchanged, as base
    models have it; both with room for a template."""
    root = tmp_path_factory.mktemp("chat")
    for seed, (name, field) in enumerate({"teacher": "max_position_embeddings", "student": "n_positions"}.items()):
        make_model(tiny_task / name, root / name, NAMES, seed, **{field: 512})
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(tiny_task / name, root / name)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# The formats


@pytest.mark.parametrize("chat", CHATS)
def test_prompts_are_what_the_familys_template_renders(chatting, chat):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    ours = read_tokenizer(chatting / "student", chat)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(chatting / "student" / "tokenizer.json"), bos_token="<|begin_of_text|>",
        chat_template=TEMPLATES[chat],
    )  # fmt: skip
    for message in MESSAGES:
        turns = [{"role": "user", "content": message}]
        more = {"add_generation_prompt": True, "date_string": "26 Jul 2024"}
        text = ours.prompt_text(Example("", ["x"], prompt=message))
        assert theirs.apply_chat_template(turns, tokenize=False, **more) == text
        assert theirs.apply_chat_template(turns, return_dict=False, **more) == ours.encode_prompt(text)
        # and the response stands where the template has the assistant's turn, with the token that ends it
        whole = theirs.apply_chat_template([*turns, {"role": "assistant", "content": "Paris."}], tokenize=False,
                                           date_string="26 Jul 2024")  # fmt: skip
        assert whole.rstrip("\n") == text + "Paris." + CHATS[chat].end


def test_what_becomes_the_message(tmp_path):
    def message(**fields):
        return CHATS["qwen2.5"].message(Example("", ["x"], **fields))

    assert message(prompt=" as it\nis ") == " as it\nis "
    assert message(instruction="Sum up.") == "Sum up." and message(input="b") == "b"
    assert message(instruction="Sum up.", input="A {b}") == "Sum up.\n\nA {b}"
    task = {"prompt": "def one():\n    'one'\n", "entry_point": "one", "canonical_solution": "x", "test": "y"}
    exercise = {"text": "Write one.", "code": "def one(): return 1", "test_list": ["assert one() == 1"]}
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, [task, exercise, {"question": "1+1?", "answer": "2"}])))
    _, mbpp, gsm8k = examples = read_examples(tmp_path / "f.jsonl")
    messages = [CHATS["smollm2"].message(example) for example in examples]
    assert messages[0] == "Complete this Python function:\n\n```python\ndef one():\n    'one'\n```"
    assert messages[1].endswith("pass these tests:\n\nassert one() == 1") and mbpp.prompt.endswith("[BEGIN]\n")
    assert messages[2] == "1+1?" and "### Response" in gsm8k.prompt_text()
    assert "### Response" not in CHATS["smollm2"].prompt_text(gsm8k)


def test_the_end_of_a_turn_ends_a_response(chatting):
    for chat in CHATS.values():
        tokenizer, end = read_tokenizer(chatting / "student", chat.name), chat.end
        assert tokenizer.tokenizer.id_to_token(tokenizer.eos_id) == end and tokenizer.bytes[tokenizer.eos_id] is None
        [row], _ = tokenise([Example("", [f"It is {end} so"], prompt="What?")], tokenizer)
        assert row.student.response[-1] == tokenizer.eos_id not in row.student.response[:-1]  # its name is plain text
        assert tokenizer.decode(row.student.response) == f"It is {end} so"
        assert row.student.prompt.count(tokenizer.eos_id) == 2  # of the system and the user


def test_a_format_without_its_tokens_or_a_second_one_is_refused(tiny_task, chatting):
    with pytest.raises(ValueError, match=r"qwen2.5 needs the special token <\|im_start\|>, which this tokenizer does"):
        read_tokenizer(tiny_task / "student", "qwen2.5")
    for chat in CHATS:
        tokenizer = read_tokenizer(chatting / "student", chat)
        once = tokenizer.prompt_text(Example("line 3", ["x"], prompt="Say <|im_start|>."))
        with pytest.raises(ValueError, match="line 3: the prompt is in a chat format already"):
            tokenise([Example("line 3", ["x"], prompt=once)], tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Two models, two formats


@pytest.mark.parametrize("formats", [("none", "qwen2.5"), ("llama3.2", "none"), ("smollm2", "llama3.2")])
def test_both_see_the_same_text_in_their_own_format(chatting, formats):
    """Random examples, cut to random lengths (test_data.py: what goes first): every wrapper survives, one response for
    both."""
    both = [read_tokenizer(chatting / name, chat) for name, chat in zip(("student", "teacher"), formats, strict=True)]
    rng, words = random.Random(0), ["the fox ", "café ", "北京", "🍕", "\n", "owl "]
    empty = max(len(t.encode_prompt(t.prompt_text(Example("", ["x"])))) for t in both)
    cut = {True: 0, False: 0}

    def some(most):
        return "q" + "".join(rng.choice(words) for _ in range(rng.randint(0, most))) + "q"

    for turn in range(60):
        example = Example("", [some(20)], prompt=some(40)) if turn % 3 == 0 else (
            Example("", [some(20)], instruction=some(25), input=rng.choice(["", some(30)])))  # fmt: skip
        limit = empty + rng.randint(4, 80)
        shorter = cut_prompt(example, both, limit)
        [row], report = tokenise([example], *both, max_len=limit + 30, max_prompt_len=limit)
        for tokenizer, side in zip(both, (row.student, row.teacher), strict=True):
            before, after = tokenizer.prompt_text(Example("", ["x"], prompt="\x00")).split("\x00")
            text = tokenizer.prompt_text(shorter)
            assert side.prompt == tokenizer.encode_prompt(text) and len(side.prompt) <= limit
            assert text.startswith(before if example.prompt else before[:20]) and text.endswith(after)
            assert tokenizer.chat or example.prompt or text.endswith("\n\n### Response:\n")
        assert both[0].decode(row.student.response) == both[1].decode(row.teacher.response)
        ends = {side.response[-1] == t.eos_id for side, t in zip((row.student, row.teacher), both, strict=True)}
        assert len(ends) == 1
        assert report.prompts_cut == (shorter != example) == (report.prompt_characters > 0)
        cut[shorter != example] += 1
    assert min(cut.values()) > 10, cut


def test_nothing_but_the_wrapper_is_an_error(chatting):
    tokenizer = read_tokenizer(chatting / "student", "qwen2.5")
    wrapper = len(tokenizer.encode_prompt(tokenizer.prompt_text(Example("", ["x"], prompt=""))))
    assert cut_prompt(Example("", ["x"], prompt="a b cx"), [tokenizer], wrapper + 1).prompt == "x"
    for limit in (wrapper, wrapper - 1, 3):
        with pytest.raises(ValueError, match=f"line 8: the prompt does not fit into --max-prompt-len {limit}"):
            cut_prompt(Example("line 8", ["x"], prompt="a b c"), [tokenizer], limit)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

LONG = {"max_len": 420, "max_prompt_len": 340}


def test_a_student_trained_in_a_format_keeps_it(chatting, tmp_path, capsys):
    """transformers stops at the end of its turn; evaluation, a further run and --resume know the format."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    options = {"method": "sft", "teacher": None, "student_chat": "qwen2.5", **LONG}
    train.main(arguments(chatting, out, **options))
    assert chat_of(out / "student") == "qwen2.5" and chat_of(chatting / "student") == "none" == chat_of("gpt2")
    assert chat_of(out / "resume") == "none"
    tokenizer = read_tokenizer(out / "student", "qwen2.5")
    assert read_tokenizer(out / "student").eos_id == tokenizer.eos_id != read_tokenizer(chatting / "student").eos_id
    assert transformers.AutoTokenizer.from_pretrained(out / "student").eos_token == "<|im_end|>"
    served = transformers.GenerationConfig.from_pretrained(out / "student")
    assert tokenizer.eos_id in (served.eos_token_id if type(served.eos_token_id) is list else [served.eos_token_id])

    capsys.readouterr()
    short = ["--data", str(chatting / "test.jsonl"), "--limit", "2", "--greedy", "--device", "cpu", "--max-len", "400"]
    plain = (out, ["--chat", "none"], "none")
    for directory, more, chat in [(out, [], "qwen2.5"), (out / "student", [], "qwen2.5"), plain]:
        evaluation.main([str(directory), *short, *more])
        err = capsys.readouterr().err
        assert ("in the chat format qwen2.5" in err) == (chat == "qwen2.5")
        assert ("ends turns (<|im_end|>), but no --chat is given" in err) == (chat == "none")
        assert json.loads((directory / "eval-test.json").read_text())["chat"] == chat

    train.main(arguments(chatting, tmp_path / "next", teacher=out / "student", **LONG))
    record = json.loads((tmp_path / "next" / "args.json").read_text())
    assert (record["teacher_chat"], record["student_chat"]) == ("qwen2.5", "none")
    train.main(arguments(chatting, out, **{**options, "student_chat": None}, resume=True))
    with pytest.raises(SystemExit, match="--resume: --student-chat is 'none', but .* was started with 'qwen2.5'"):
        train.main(arguments(chatting, out, **{**options, "student_chat": "none"}, resume=True))


def test_the_teachers_format_changes_what_it_says(chatting, capsys):
    def terms(**options):
        train.main(arguments(chatting, None, dry_run=True, **LONG, **options))
        return json.loads(capsys.readouterr().out)

    plain, taught = terms(), terms(teacher_chat="llama3.2")
    both = terms(teacher_chat="llama3.2", student_chat="smollm2")
    assert taught["ce"] == pytest.approx(plain["ce"], rel=1e-5) != pytest.approx(both["ce"], rel=1e-5)
    assert abs(taught["kd"] / plain["kd"] - 1) > 1e-4
    assert plain["align_ratio"] == taught["align_ratio"] == both["align_ratio"]  # responses alone are aligned
    assert plain["student_tokens"] == both["student_tokens"] and plain["teacher_tokens"] == both["teacher_tokens"]
    with pytest.raises(SystemExit, match="--teacher-chat belongs to a teacher"):
        train.main(arguments(chatting, None, method="sft", teacher=None, teacher_chat="qwen2.5"))


@pytest.mark.parametrize("options", [{"on_policy": 1}, {"recipe": "v1"}])
def test_methods_run_in_two_formats(chatting, tmp_path, options):
    options |= {"teacher_chat": "qwen2.5", "student_chat": "llama3.2", **LONG, "max_len": 360}
    train.main(arguments(chatting, tmp_path / "run", **options))
    assert all(torch.tensor(value).isfinite() for value in log_of(tmp_path / "run")[-1].values())
    assert "<|start_header_id|>" in (tmp_path / "run" / "samples.txt").read_text()


def test_the_teachers_answers_go_into_the_students_format(chatting, tmp_path, monkeypatch):
    asked, generate = [], model.generate

    def spy(m, prompts, *rest):
        asked.extend(prompts)
        return generate(m, prompts, *rest)

    monkeypatch.setattr(seqkd, "generate", spy)
    lines = [{"instruction": "Sum up.", "input": "The fox", "output": "x"}, {"prompt": "Who?", "output": "y"}]
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"method": "seqkd", "teacher_chat": "qwen2.5", "data": tmp_path / "two.jsonl", "seqkd_temperature": 1.0}
    train.main(arguments(chatting, tmp_path / "run", **options, **LONG))
    teacher = read_tokenizer(chatting / "teacher", "qwen2.5")
    gold, answers = read_jsonl(tmp_path / "two.jsonl"), read_jsonl(tmp_path / "run" / "seqkd.jsonl")
    assert sorted(asked) == sorted(teacher.encode_prompt(teacher.prompt_text(example)) for example in gold)
    assert [(e.prompt, e.instruction, e.input) for e in answers] == [(e.prompt, e.instruction, e.input) for e in gold]


def test_exercises_and_sums_are_asked_in_the_format(chatting, tmp_path, monkeypatch):
    asked = []

    def respond(m, tokenizer, prompts, *arguments, **options):
        asked.extend(prompts)
        return ["It is 2."]

    monkeypatch.setattr(evaluation, "respond", respond)
    sums = [Example("", ["#### 2"], instruction="1+1?")]
    tokenizer, m = read_tokenizer(chatting / "student", "smollm2"), model.load_model(chatting / "student")
    assert evaluation.evaluate(m, tokenizer, DataSet("sums", "math", sums), [1], max_len=500)["accuracy"] == [100.0]
    code = CodeTask("assert one() == 1", "one")
    exercise = Example("", ["    return 1"], prompt="def one():\n    'one'\n", code=code)
    asked += tokenizer.fit_prompts([exercise], 250)
    assert "1+1?" in asked[0] and "Complete this Python function" in asked[1]
    assert all(prompt.startswith("<|im_start|>system") and prompt.endswith("assistant\n") for prompt in asked)


def test_a_format_that_nobody_knows(tiny_task):
    with pytest.raises(ValueError, match="no chat format is called 'relu', only none, qwen2.5, llama3.2, smollm2"):
        read_tokenizer(tiny_task / "student", "relu")
