"""Chat templates: rendered as `transformers` does, told apart for teacher and student, cut, ended, saved, evaluated.

tests/chat_templates has the published ones, some without their parts about tools.
"""

import json
import random
import re
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import CHAT_TEMPLATES, arguments, log_of, report_of
from tokenizers import AddedToken, Tokenizer

import eval as evaluation
import model
import train
from baselines import seqkd
from data import CodeTask, Example, cut_prompt, tokenise
from experiments import tiny
from runtime.chat import ChatTemplate
from runtime.formats import read_examples
from runtime.run import chat_of
from runtime.serving import write_as_trained
from runtime.tokenizer import read_tokenizer
from scores.programs import program_of
from scores.tasks import DataSet

pytestmark = pytest.mark.usefixtures("own_folder")  # eval.py writes reports into it

SOURCES = {file.stem: file.read_text(encoding="utf-8") for file in sorted(CHAT_TEMPLATES.glob("*.jinja"))}
QWEN, LLAMA, SMOLLM = (str(CHAT_TEMPLATES / f"{name}.jinja") for name in ("qwen2.5", "llama3.2", "smollm2"))
BEGINS = {"llama3.2": "<|begin_of_text|>", "gemma3": "<bos>", "mistral": "<s>"}
ENDS = dict.fromkeys(SOURCES, "<|im_end|>") | {"llama3.2": "<|eot_id|>", "gemma3": "<end_of_turn>", "mistral": "</s>"}
BEGINS["deepseek-r1-distill"], ENDS["deepseek-r1-distill"] = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
NAMES = {*BEGINS.values(), *ENDS.values(), "<start_of_turn>", "[INST]", "[/INST]", "<｜User｜>", "<｜Assistant｜>"}
NAMES |= {mark for source in SOURCES.values() for mark in re.findall(r"<\|\w+\|>", source)}
TEXTS = [
    "What is the capital of France?",
    ' two lines,\n\nand {braces} % \'"\\n" {{ message }} <b> \n',
    "naïve 🍕 北京\u2028",
    "\n\t x",
]


def turns(*texts, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = [Example("", ["x"], prompt=text) for text in TEXTS] + [
    Example("", ["x"], instruction="Sum up.", input="A {b}", history=[{"role": "system", "content": " Be brief. "}]),
    Example("", ["x"], prompt="And now?", history=turns("Who?", "<think>\nhm\n</think>\n\nI.", "Where?", "Here.\n")),
    Example("", ["x"], prompt="And now?", history=[{"role": "system", "content": "Be é."}, *turns("Who?", "I.")]),
]  # fmt: skip


def give_template(directory, source, **config):
    (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))


@pytest.fixture(scope="module")
def chatting(tiny_task, tmp_path_factory):
    """The tiny task's teacher and student with the special tokens of all templates and without any of these, as base
    models are; `qwen`, the teacher with Qwen3's."""
    root = tmp_path_factory.mktemp("chat")
    for seed, (name, config) in enumerate([("teacher", tiny.TEACHER), ("student", tiny.STUDENT)]):
        shutil.copytree(tiny_task / name, root / name)
        tokenizer = Tokenizer.from_file(str(root / name / "tokenizer.json"))
        tokenizer.add_special_tokens(sorted(NAMES))
        tokenizer.save(str(root / name / "tokenizer.json"))
        torch.manual_seed(seed)
        small = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "max_position_embeddings": 512}
        small = small if name == "teacher" else {"n_embd": 32, "n_layer": 1, "n_positions": 512}
        config = {**config, **small, "vocab_size": tokenizer.get_vocab_size(with_added_tokens=True)}
        model.save_model(model.build_model(config), root / name)
    shutil.copytree(root / "teacher", root / "qwen")
    give_template(root / "qwen", SOURCES["qwen3"])
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(tiny_task / name, root / name)
    return root


@pytest.fixture
def base(chatting, tmp_path):
    """The student's tokenizer alone."""
    return shutil.copytree(chatting / "student", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Templates


@pytest.mark.parametrize("name", SOURCES)
def test_prompts_are_what_transformers_renders(base, name):
    transformers = pytest.importorskip("transformers")
    end = ENDS[name] if "eos_token" in SOURCES[name] or "end▁of" in ENDS[name] else "<|endoftext|>"
    tokens = {"bos_token": BEGINS.get(name, "<|endoftext|>"), "eos_token": end}
    give_template(base, SOURCES[name], **tokens)
    ours = read_tokenizer(base, "own")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(base / "tokenizer.json"), chat_template=SOURCES[name], **tokens
    )
    more = {"enable_thinking": False, "date_string": "26 Jul 2024"}
    for example in CONVERSATIONS:
        said = [*example.history, {"role": "user", "content": example.prompt or "Sum up.\n\nA {b}"}]
        text = ours.prompt_text(example)
        assert theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True, **more) == text
        ids = theirs.apply_chat_template(said, return_dict=False, add_generation_prompt=True, **more)
        assert ids == ours.encode_prompt(text)
        # and the response stands where the template has the assistant's turn, with the token that ends it
        said.append({"role": "assistant", "content": "Paris."})
        whole = theirs.apply_chat_template(said, tokenize=False, **more)
        if name != "deepseek-r1-distill":  # which asks for a thought first
            assert whole.startswith(text + "Paris." + ENDS[name]) or (name, said[0]["role"]) == ("mistral", "system")
    assert ours.names([ours.eos_id]) == ENDS[name]
    [row], _ = tokenise([Example("", [f"It is {ENDS[name]} so"], prompt="What?")], ours)
    assert row.student.response[-1] == ours.eos_id not in row.student.response[:-1]  # its name is plain text
    assert ours.decode(row.student.response) == f"It is {ENDS[name]} so"


def test_what_else_templates_use():
    """transformers' own filter, loop controls and tag; a date that stays; tokens that are not there; the sandbox."""
    source = (
        "{% for m in messages %}\n    {% if loop.last %}{% break %}{% endif %}\n{{ m | tojson }}{% endfor %}\n"
        "{%- generation %}{{ messages[-1].content }}{% endgeneration %}{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}"
    )
    said = turns("<é>", "b")
    assert ChatTemplate(source, {}, "mine").render(said) == '{"role": "user", "content": "<é>"}b2024-07-26'
    assert ChatTemplate(source, {"bos_token": "^"}, "mine").render(said).endswith("b^2024-07-26")
    assert ChatTemplate("{{ tools is none and documents is none }}", {}, "mine").render(said) == "True"
    for bad in ("raise_exception('no\nway')", "''.__class__.__mro__", "messages.append(1)", "1/0"):
        with pytest.raises(ValueError, match="^mine cannot render these turns: [^\n]+$"):
            ChatTemplate(f"{{{{ {bad} }}}}", {}, "mine").render(said)


@pytest.mark.parametrize("name", ["gemma3", "mistral"])  # one asks for begin-of-text, the other also for the end
@pytest.mark.parametrize("config", [{"chat_template": "old"}, {"tokenizer_class": "GPT2Tokenizer"}], ids=str)
def test_tokens_that_no_file_names_are_those_of_the_class(base, name, config):
    """As with GPT-2's files from the hub: prompts are those that `transformers` renders, before and after training."""
    transformers = pytest.importorskip("transformers")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    said, more = turns("Who?", "I.", "Where?"), {"tokenize": False, "add_generation_prompt": True}
    theirs = transformers.AutoTokenizer.from_pretrained(base)
    expected = theirs.apply_chat_template(said, chat_template=SOURCES[name], **more)
    assert expected.startswith("<|endoftext|>")
    tokenizer = read_tokenizer(base, str(CHAT_TEMPLATES / f"{name}.jinja"))
    write_as_trained(tokenizer, base)
    saved = transformers.AutoTokenizer.from_pretrained(base).apply_chat_template(said, **more)
    assert tokenizer.chat.render(said) == saved == read_tokenizer(base, "own").chat.render(said) == expected
    assert "chat_template" not in json.loads((base / "tokenizer_config.json").read_text())  # the one before


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_class_without_names_of_its_own_knows_no_other_tokens(base, name):
    transformers = pytest.importorskip("transformers")
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    (base / "begin.jinja").write_text("{{ bos_token }}.")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(base)
    assert theirs.apply_chat_template(turns("x"), chat_template="{{ bos_token }}.", tokenize=False) == "."
    assert read_tokenizer(base, str(base / "begin.jinja")).chat.render([]) == "."


@pytest.mark.parametrize("more, begin", [({}, "<map>"), ({"added_tokens_decoder": {}}, "<config>"),
                                         ({"added_tokens_decoder": {}, "bos_token": None}, "")])  # fmt: skip
def test_of_two_files_that_name_a_token_the_later_one_counts(base, more, begin):
    """special_tokens_map.json, or tokenizer_config.json from transformers 4.34 on; as for the end-of-text."""
    (base / "special_tokens_map.json").write_text('{"bos_token": "<map>"}')
    config = {"eos_token": "<|endoftext|>", "bos_token": "<config>", **more}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "begin.jinja").write_text("{{ bos_token }}")
    assert read_tokenizer(base, str(base / "begin.jinja")).chat.render([]) == begin


def test_the_end_is_the_first_special_token_behind_an_answer(base):
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("~", special=False)])
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "own.jinja").write_text("{% for turn in messages %}{{ turn.content }}~<|im_end|><|im_start|>{% endfor %}")
    read = read_tokenizer(base, str(base / "own.jinja"))
    assert [read.names([end]) for end in read.end_ids] == ["<|im_end|>", "<|endoftext|>"]


def test_every_file_that_names_the_end_gets_the_new_one(base):
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        (base / file).write_text('{"eos_token": "<|endoftext|>"}')
    write_as_trained(read_tokenizer(base, QWEN), base)
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        assert json.loads((base / file).read_text())["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize("chat, empty_thought", [("own", True), ("thinking", False)])
def test_thinking_is_off_unless_asked_for_and_serving_knows(chatting, tmp_path, chat, empty_thought):
    """The saved template says what the student was trained with to who renders it without a word about thinking."""
    transformers = pytest.importorskip("transformers")
    tokenizer = read_tokenizer(chatting / "qwen", chat)
    text = tokenizer.prompt_text(CONVERSATIONS[0])
    assert text.endswith("<|im_start|>assistant\n" + "<think>\n\n</think>\n\n" * empty_thought)
    shutil.copytree(chatting / "qwen", tmp_path / "saved")
    write_as_trained(tokenizer, tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    said = turns(CONVERSATIONS[0].prompt)
    assert theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True) == text
    for name, thinking in (("own", False), ("thinking", True)):
        again = read_tokenizer(tmp_path / "saved", name).prompt_text(CONVERSATIONS[0])
        assert again == read_tokenizer(chatting / "qwen", name).prompt_text(CONVERSATIONS[0])
        more = {"add_generation_prompt": True, "enable_thinking": thinking}
        assert theirs.apply_chat_template(said, tokenize=False, **more) == again


@pytest.mark.parametrize(
    "name, chat, response, note",
    [
        ("qwen3", "own", "\n<think>\nhm\n</think>\n\nBlue.", "has already written </think>: use --chat thinking"),
        ("deepseek-r1-distill", "own", "<think>\nhm", "has already written <think>: remove <think> from the data"),
        ("qwen3", "thinking", "<think>\nhm\n</think>\n\nBlue.", ""), ("qwen3", "own", "Blue.", ""),
        ("qwen2.5", "own", "<think>\nhm\n</think>\n\nBlue.", ""),
    ],
)  # fmt: skip
def test_a_second_thought_is_noticed(base, capsys, name, chat, response, note):
    give_template(base, SOURCES[name])
    tokenise([Example("", [response], prompt="Name a color.")] * 2, read_tokenizer(base, chat), max_prompt_len=400)
    said = capsys.readouterr().err
    assert said.count("responses begin with <think>, but its chat template") == bool(note) and note in said


def test_where_a_template_is_found(base):
    config = json.loads((base / "tokenizer_config.json").read_text())

    def found(**more):
        (base / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
        return read_tokenizer(base, "own").prompt_text(Example("", ["x"], prompt="q"))

    several = [{"name": name, "template": f"{name} {{{{ messages[-1].content }}}}"} for name in ("tool_use", "default")]
    assert found(chat_template="one {{ messages[-1].content }}") == "one q"
    assert found(chat_template=several) == "default q" == found(chat_template={"default": several[1]["template"]})
    for nothing in (None, several[:1], [], ["one"]):
        with pytest.raises(ValueError, match="base: no chat template in .* give the path of one"):
            found(chat_template=nothing)
    (base / "chat_template.jinja").write_text("file {{ messages[-1].content }}")
    assert found(chat_template=several) == "file q"
    (base / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja: not UTF-8"):
        found()


def test_what_is_no_template_or_does_not_take_the_turns_is_named(chatting, base):
    for chat, message in [
        ("relu", "base: the chat template 'relu' is neither own, thinking, none nor the path of a template"),
        ("qwen2.5", "base: the chat template 'qwen2.5' .* no longer built in.* own "),
        (str(chatting / "student"), "nor the path of a template or of a model directory with one;"),
        ("thinking", "base: no chat template"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_tokenizer(base, chat)
    for source, message in [("{% if %}", "base's chat template cannot render"), ("{{ 1/0 }}", "by zero")]:
        (base / "chat_template.jinja").write_text(source)
        with pytest.raises(ValueError, match=message):
            read_tokenizer(base, "own")
    gemma = read_tokenizer(base, str(CHAT_TEMPLATES / "gemma3.jinja"))
    with pytest.raises(ValueError, match="line 2: the chat template .*gemma3.jinja cannot render .* must alternate"):
        tokenise([Example("line 2", ["x"], prompt="a", history=turns("b"))], gemma)
    once = gemma.prompt_text(CONVERSATIONS[0])
    with pytest.raises(ValueError, match="line 3: the prompt is in a chat format already; .*--chat none"):
        tokenise([Example("line 3", ["x"], prompt=once)], gemma)
    zephyr = "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"  # TinyLlama-Chat's too
    with pytest.raises(ValueError, match="line 5: the prompt is in a chat format already"):
        tokenise([Example("line 5", ["x"], prompt=zephyr)], gemma)
    for name, source in SOURCES.items():
        chat = ChatTemplate(source, {"bos_token": BEGINS.get(name, ""), "eos_token": ENDS[name]}, name)
        with pytest.raises(ValueError, match="line 4: the prompt is in a chat format already"):
            chat.prompt_text(Example("line 4", ["x"], prompt=chat.render(turns("Who?"))))


def test_what_becomes_the_message(tmp_path):
    chat = ChatTemplate(SOURCES["smollm2"], {}, "smollm2's")

    def message(**fields):
        return chat.message(Example("", ["x"], **fields))

    assert message(prompt=" as it\nis ") == " as it\nis "
    assert message(instruction="Sum up.") == "Sum up." and message(input="b") == "b"
    assert message(instruction="Sum up.", input="A {b}") == "Sum up.\n\nA {b}"
    task = {"prompt": "def one():\n    'one'\n", "entry_point": "one", "canonical_solution": "x", "test": "y"}
    exercise = {"text": "Write one.", "code": "def one(): return 1", "test_list": ["assert one() == 1"]}
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, [task, exercise, {"question": "1+1?", "answer": "2"}])))
    _, mbpp, gsm8k = examples = read_examples(tmp_path / "f.jsonl")
    messages = [chat.message(example) for example in examples]
    assert messages[0] == "Complete this Python function:\n\n```python\ndef one():\n    'one'\n```"
    assert messages[1].endswith("pass these tests:\n\nassert one() == 1") and mbpp.prompt.endswith("[BEGIN]\n")
    assert messages[2] == "1+1?" and "### Response" in gsm8k.prompt_text()
    assert "### Response" not in chat.prompt_text(gsm8k)


# ---------------------------------------------------------------------------------------------------------------------
# Two models, two templates


@pytest.mark.parametrize("formats", [("none", QWEN), (LLAMA, "none"), (SMOLLM, LLAMA)])
def test_both_see_the_same_text_in_their_own_format(chatting, formats):
    """Random examples, cut to random lengths: the turns before go first, then the context; every wrapper survives, one
    response for both."""
    both = [read_tokenizer(chatting / name, chat) for name, chat in zip(("student", "teacher"), formats, strict=True)]
    rng, words = random.Random(0), ["the fox ", "café ", "北京", "🍕", "\n", "owl "]
    brief = [{"role": "system", "content": "brief"}]
    empty = max(len(t.encode_prompt(t.prompt_text(Example("", ["x"], history=brief)))) for t in both)
    cuts = {"none": 0, "history": 0, "input": 0, "instruction": 0, "prompt": 0}

    def some(most):
        return "q" + "".join(rng.choice(words) for _ in range(rng.randint(0, most))) + "q"

    for turn in range(60):
        said = [some(3) for _ in range(rng.choice([0, 2, 6, 6]))]
        system = rng.choice([[], brief])
        before = {"history": system + turns(*said)}
        example = Example("", [some(20)], prompt=some(40), **before) if turn % 3 == 0 else (
            Example("", [some(20)], instruction=some(25), input=rng.choice(["", some(30)]), **before))  # fmt: skip
        limit = empty + rng.randint(4, 80)
        shorter = cut_prompt(example, both, limit)
        [row], report = tokenise([example], *both, max_len=limit + 30, max_prompt_len=limit)
        for tokenizer, side in zip(both, (row.student, row.teacher), strict=True):
            probe = Example("", ["x"], prompt="\x00", history=system)
            before, after = tokenizer.prompt_text(probe).split("\x00")
            text = tokenizer.prompt_text(shorter)
            assert side.prompt == tokenizer.encode_prompt(text) and len(side.prompt) <= limit
            assert text.startswith(before if example.prompt and shorter.history == system else before[:20]) or (
                not tokenizer.chat and not example.prompt)  # fmt: skip
            assert text.endswith(after)
            assert tokenizer.chat or example.prompt or text.endswith("\n\n### Response:\n")
            assert all(turn["content"].strip() in text for turn in shorter.history)
        assert both[0].decode(row.student.response) == both[1].decode(row.teacher.response)
        ends = {side.response[-1] == t.eos_id for side, t in zip((row.student, row.teacher), both, strict=True)}
        assert len(ends) == 1
        assert report.prompts_cut == (shorter != example) == (report.prompt_characters > 0)
        lost = len(example.history) - len(shorter.history)
        assert lost % 2 == 0 and shorter.history == system + example.history[len(system) + lost :]
        if lost:  # not one turn more than it must be
            longer = replace(example, history=system + example.history[len(system) + lost - 2 :])
            assert any(len(t.encode_prompt(t.prompt_text(longer))) > limit for t in both)
        parts = "prompt", "input", "instruction"
        changed = [part for part in parts if getattr(shorter, part) != getattr(example, part)]
        assert not changed or shorter.history == system
        cuts[changed[-1] if changed else "history" if lost else "none"] += 1
        if "prompt" in changed:
            assert example.prompt.endswith(shorter.prompt)
        assert example.input.startswith(shorter.input) and example.instruction.startswith(shorter.instruction)
        assert shorter.input == "" or "instruction" not in changed
    assert min(cuts.values()) > 3, cuts


def test_nothing_but_the_wrapper_is_an_error(chatting):
    tokenizer = read_tokenizer(chatting / "student", QWEN)
    wrapper = len(tokenizer.encode_prompt(tokenizer.prompt_text(Example("", ["x"], prompt=""))))
    assert cut_prompt(Example("", ["x"], prompt="a b cx"), [tokenizer], wrapper + 1).prompt == "x"
    for limit in (wrapper, wrapper - 1, 3):
        with pytest.raises(ValueError, match=f"line 8: the prompt does not fit into --max-prompt-len {limit}"):
            cut_prompt(Example("line 8", ["x"], prompt="a b c"), [tokenizer], limit)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

LONG = {"max_len": 420, "max_prompt_len": 340}


def test_a_student_trained_in_a_format_keeps_it(chatting, tmp_path, capsys):
    """transformers stops at the end of its turn; evaluation, a further run and --resume know the template."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    options = {"method": "sft", "teacher": None, "student_chat": QWEN, "max_steps": 40, "lr": 1e-2, **LONG}
    train.main(arguments(chatting, out, **options))
    assert "qwen2.5.jinja, not the model's own\n" in capsys.readouterr().err  # all of its marks are tokens
    assert chat_of(out / "student") == "own" and chat_of(chatting / "student") is None
    tokenizer, ours = read_tokenizer(out / "student", "own"), model.load_model(out / "student")
    assert read_tokenizer(out / "student").eos_id == tokenizer.eos_id != read_tokenizer(chatting / "student").eos_id
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "student")
    fast = transformers.AutoTokenizer.from_pretrained(out / "student")
    assert fast.eos_token == "<|im_end|>"
    ended = 0
    for example in read_examples(chatting / "test.jsonl")[:5]:
        ids = tokenizer.encode_prompt(tokenizer.prompt_text(example))
        assert fast.apply_chat_template(turns(example.prompt), add_generation_prompt=True, return_dict=False) == ids
        [new] = model.generate(ours, [ids], 30, tokenizer.eos_id, temperature=0)
        output = theirs.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, pad_token_id=0)[0]
        assert output[len(ids) :].tolist() == new
        ended += new[-1] == tokenizer.eos_id
    assert ended >= 3

    short = ["--data", str(chatting / "test.jsonl"), "--limit", "2", "--greedy", "--device", "cpu", "--max-len", "400"]
    plain = (out, ["--chat", "none"], "none")
    for directory, more, chat in [(out, [], "own"), (out / "student", ["--chat"], "own"), plain]:
        evaluation.main([str(directory), *short, *more])
        err = capsys.readouterr().err
        assert ("2 examples in " in err and "student's chat template" in err) == (chat == "own")
        assert ("prompts are not in the model's chat template; use it with --chat own" in err) == (chat == "none")
        assert report_of(directory, "test-first-2-greedy")["chat"] == chat

    train.main(arguments(chatting, tmp_path / "next", teacher=out / "student", **LONG))
    record = json.loads((tmp_path / "next" / "args.json").read_text())
    assert (record["teacher_chat"], record["student_chat"]) == ("own", "none")
    train.main(arguments(chatting, out, **{**options, "student_chat": None}, resume=True))
    with pytest.raises(SystemExit, match="--student-chat is 'none', but .* was started with '.*qwen2.5.jinja'"):
        train.main(arguments(chatting, out, **{**options, "student_chat": "none"}, resume=True))

    # a run of the time when formats had names
    record = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps({**record, "student_chat": "qwen2.5"}))
    with pytest.raises(SystemExit, match="student: the chat template 'qwen2.5' .* no longer built in.* own"):
        evaluation.main([str(out), *short])
    evaluation.main([str(out), *short, "--chat", "own"])
    with pytest.raises(SystemExit, match="no longer built in"):
        train.main(arguments(chatting, out, **{**options, "student_chat": None}, resume=True))
    train.main(arguments(chatting, out, **options, resume=True))  # the tokens are what they were
    (out / "args.json").write_text(json.dumps({**record, "student_chat": "qwen2.5"}))
    with pytest.raises(SystemExit, match="--resume: the examples .* are not those"):
        train.main(arguments(chatting, out, **{**options, "student_chat": SMOLLM}, resume=True))


@pytest.mark.parametrize(
    "name, options, note",
    [
        ("qwen", {}, "prompts are not in the model's chat template; use it with --student-chat own\n"),
        ("qwen", {"student_chat": "none"}, "prompts are not in the model's chat template"),
        ("qwen", {"student_chat": "own"}, None), ("qwen", {"chat": "thinking"}, None), ("student", {}, None),
        ("qwen", {"chat": SMOLLM}, "smollm2.jinja, not the model's own\n"),
        ("bare", {"student_chat": SMOLLM}, "not the model's own; its vocabulary lacks <|im_start|>, <|im_end|>\n"),
        *[(f"lost {end}", {}, f"its end-of-text {end} looks like the end of a turn, but it has no chat template\n")
          for end in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")],
        ("bare", {"student_chat": str(CHAT_TEMPLATES / "mistral.jinja")}, "its vocabulary lacks [INST], [/INST]\n"),
        ("run", {}, None),  # which was trained without its template
    ],
)  # fmt: skip
def test_a_note_on_prompts_not_in_the_own_template(
    chatting, tiny_task, tmp_path, capsys, monkeypatch, name, options, note
):
    student = tiny_task / "twin" if name == "bare" else chatting / name
    if name.startswith("lost"):
        student = shutil.copytree(chatting / "student", tmp_path / "lost")
        (student / "tokenizer_config.json").write_text(json.dumps({"eos_token": name.split()[1]}))
    if name == "run":
        monkeypatch.chdir(shutil.copytree(chatting / "qwen", tmp_path / "run" / "student"))
        student = "."
        (tmp_path / "run" / "args.json").write_text('{"student_chat": "none"}')
    lengths = {"max_len": 128, "max_prompt_len": 120} if name == "bare" else LONG
    options = {"student": student, "method": "sft", "teacher": None, "dry_run": True, **lengths, **options}
    train.main(arguments(chatting, None, **options))
    lines = [line + "\n" for line in capsys.readouterr().err.splitlines()]
    begun = options.get("chat", options.get("student_chat", "none")) != "none"  # by the template
    notes = [line for line in lines if line.startswith("note: ") and (begun or "--bos" not in line)]
    assert len(notes) == (note is not None) and all(note in line and str(student) in line for line in notes)


def test_the_teachers_format_changes_what_it_says(chatting, capsys):
    def terms(**options):
        train.main(arguments(chatting, None, dry_run=True, **LONG, **options))
        return json.loads(capsys.readouterr().out)

    plain, taught = terms(), terms(teacher_chat=LLAMA)
    both = terms(teacher_chat=LLAMA, student_chat=SMOLLM)
    assert taught["ce"] == pytest.approx(plain["ce"], rel=1e-5) != pytest.approx(both["ce"], rel=1e-5)
    assert abs(taught["kd"] / plain["kd"] - 1) > 1e-6
    assert plain["align_ratio"] == taught["align_ratio"] == both["align_ratio"]  # responses alone are aligned
    assert plain["student_tokens"] == both["student_tokens"] and plain["teacher_tokens"] == both["teacher_tokens"]
    assert terms(chat=SMOLLM) == terms(teacher_chat=SMOLLM, student_chat=SMOLLM)
    assert terms(chat=SMOLLM, teacher_chat=LLAMA) == both
    with pytest.raises(SystemExit, match="--teacher-chat needs a teacher"):
        train.main(arguments(chatting, None, method="sft", teacher=None, teacher_chat=QWEN))


@pytest.mark.parametrize("options", [{"on_policy": 1}, {"recipe": "v1"}, {"method": "uld"}, {"method": "mined"}])
def test_methods_run_in_two_formats(chatting, tmp_path, options):
    options |= {"teacher": chatting / "qwen", "teacher_chat": "own", "student_chat": LLAMA, **LONG, "max_len": 360}
    train.main(arguments(chatting, tmp_path / "run", **options))
    assert all(torch.tensor(value).isfinite() for value in log_of(tmp_path / "run")[-1].values())
    assert "<|start_header_id|>" in (tmp_path / "run" / "samples.txt").read_text()


def test_one_family_with_two_ends_needs_one_format(chatting, tmp_path):
    """As a chat model and the base model of its family."""
    options = {"method": "kd", "teacher": chatting / "qwen", "student": chatting / "teacher", "max_steps": 1, **LONG}
    with pytest.raises(SystemExit, match="end-of-text: '<.im_end.>' and '</s>'; if nothing else .* --chat DIR gives"):
        train.main(arguments(chatting, tmp_path / "two", **options, teacher_chat="own"))
    train.main(arguments(chatting, tmp_path / "one", **options, chat=chatting / "qwen"))
    assert log_of(tmp_path / "one")[-1]["kd"] < 1e-6  # the weights are the same, and now the prompts are too


def test_the_teachers_answers_go_into_the_students_format(chatting, tmp_path, monkeypatch):
    asked, generate = [], model.generate

    def spy(m, prompts, *rest):
        asked.extend(prompts)
        return generate(m, prompts, *rest)

    monkeypatch.setattr(seqkd, "generate", spy)
    before = {"system": "Be brief.", "history": [["a", "b"]]}
    lines = [
        {"instruction": "Sum up.", "input": "The fox", "output": "x", **before}, {"prompt": "Who?", "output": "y"}
    ]  # fmt: skip
    (tmp_path / "two.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {"method": "seqkd", "teacher_chat": QWEN, "data": tmp_path / "two.jsonl", "seqkd_temperature": 1.0}
    train.main(arguments(chatting, tmp_path / "run", **options, **LONG))
    assert seqkd.read_recipe(tmp_path / "run" / "seqkd.jsonl")["student_chat"] is None  # the teacher's is no matter
    teacher = read_tokenizer(chatting / "teacher", QWEN)
    gold, answers = read_examples(tmp_path / "two.jsonl"), read_examples(tmp_path / "run" / "seqkd.jsonl")
    assert sorted(asked) == sorted(teacher.encode_prompt(teacher.prompt_text(example)) for example in gold)
    assert [e.prompt_text() for e in answers] == [e.prompt_text() for e in gold]
    assert [(e.prompt, e.history) for e in answers] == [(e.prompt, e.history) for e in gold] and gold[0].history


def test_exercises_and_sums_are_asked_in_the_format(chatting, tmp_path, monkeypatch):
    asked = []

    def respond(m, tokenizer, prompts, *arguments, **options):
        asked.extend(prompts)
        return [reply for prompt in prompts for word, reply in REPLIES.items() if word in prompt]

    REPLIES = {"1+1": "It is 2.", "Complete this": "```python\ndef one():\n    return 1\n```", "expert": "[BEGIN]"}
    monkeypatch.setattr(evaluation, "respond", respond)
    code = CodeTask("assert one() == 1", "one")
    sums = [Example("", ["#### 2"], instruction="1+1?")]
    exercise = Example("", ["    return 1"], prompt="def one():\n    'one'\n", code=code)
    tokenizer, m = read_tokenizer(chatting / "student", SMOLLM), model.load_model(chatting / "student")
    scores = evaluation.evaluate(m, tokenizer, DataSet("sums", "math", sums), [1], max_len=500)
    assert scores["accuracy"] == [100.0]
    [response] = respond(m, tokenizer, tokenizer.fit_prompts([exercise], 250))
    assert seqkd.write_prompt(exercise, tokenizer) == {"prompt": tokenizer.chat.message(exercise)}
    assert "return 1" in program_of(response, exercise.prompt, code.entry_point)  # without running it
    assert all(prompt.startswith("<|im_start|>system") and prompt.endswith("assistant\n") for prompt in asked)
