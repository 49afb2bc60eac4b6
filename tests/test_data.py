"""data.py: the template, reading JSONL, cutting to fit, sampled responses, and batches."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import byte_level
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from align import exact_token_alignment
from data import (
    CutReport,
    Example,
    Row,
    Side,
    collate,
    cut_prompt,
    find_longest,
    replace_response,
    tokenise,
)
from experiments import tiny
from runtime.formats import read_examples
from runtime.tokenizer import TextTokenizer, read_tokenizer

TEXTS = [
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n\n\n### Input:\n\n\n### Response:\n",
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "Le café était fermé à cause de la grève. Die Größe überrascht.",
    "北京是中国的首都。東京は日本の首都です。",
    "def f(x):\n    return [x, 1]  # 🍕🎉\n",
]
MARKER = "\n\n### Response:\n"


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny.train_tokenizers(TEXTS, folder / "teacher", folder / "student")
    return folder


@pytest.fixture(scope="module")
def student(directories):
    return read_tokenizer(directories / "student")


@pytest.fixture(scope="module")
def teacher(directories):
    return read_tokenizer(directories / "teacher")


def raw(prompt, output):
    return Example("here", [output], prompt=prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Template


def test_template_is_the_papers_to_the_letter():
    assert Example("", ["x"], instruction="Name a colour.").prompt_text() == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nName a colour.\n\n### Response:\n"
    )
    assert Example("", ["x"], instruction="Sum up.", input="A {b}\nc").prompt_text() == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n"
        "\n### Instruction:\nSum up.\n\n### Input:\nA {b}\nc\n\n### Response:\n"
    )
    assert Example("", ["x"], instruction="{instruction} {0}").prompt_text().count("{instruction} {0}") == 1
    assert raw("as {it} is", "x").prompt_text() == "as {it} is"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def write(tmp_path, content):
    path = tmp_path / "some.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_both_forms(tmp_path):
    path = write(
        tmp_path,
        '{"prompt": "p ", "output": "o"}\n'
        '{"instruction": "i", "input": "", "output": "é", "id": 7}\n'
        '{"instruction": "i", "output": ["a", "b"]}\n'
        '{"instruction": "", "input": "n", "output": " "}',
    )
    first, second, third, fourth = read_examples(path)
    assert first == Example(f"{path}, line 1", ["o"], prompt="p ")
    assert second == Example(f"{path}, line 2", ["é"], instruction="i")
    assert third.outputs == ["a", "b"] and third.input == "" and third.prompt is None
    assert (fourth.instruction, fourth.input, fourth.outputs) == ("", "n", [" "])


def test_odd_characters_are_kept_and_lines_counted_by_newlines(tmp_path):
    odd = "a\u2028b\u2029c\x85d\u000be\x0cf\x1cg\x00h\u00a0\ufeff\r\n\ti"
    record = json.dumps({"prompt": odd, "output": odd}, ensure_ascii=False)
    assert "\u2028" in record and "\x85" in record
    path = write(tmp_path, b"\xef\xbb\xbf\r\n" + record.encode() + b"\r\n  \n\n" + record.encode() + b"\n\n")
    examples = read_examples(path)
    assert [example.where for example in examples] == [f"{path}, line 2", f"{path}, line 5"]
    assert all(example.prompt == odd and example.outputs == [odd] for example in examples)
    assert len(read_examples(write(tmp_path, '{"prompt": "p",\r"output": "o"}\r\n'))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Cutting to fit


def test_find_longest():
    for length in range(12):
        for limit in range(-1, length + 1):
            assert find_longest(length, lambda n, limit=limit: n <= limit) == limit


def lengths(row):
    return [len(side) for side in (row.student, row.teacher)]


def test_nothing_is_cut_when_it_fits_exactly(student, teacher):
    example = raw("Le café 🍕 et\n", "東京 overrun\n")
    [row], report = tokenise([example], student, teacher)
    assert row.student.response[-1] == student.eos_id and row.teacher.response[-1] == teacher.eos_id
    assert str(report) == "1 examples, none cut"
    exact, prompt = max(lengths(row)), max(len(row.student.prompt), len(row.teacher.prompt))
    [same], report = tokenise([example], student, teacher, max_len=exact, max_prompt_len=prompt)
    assert same == row and report == CutReport(examples=1)
    [shorter], report = tokenise([example], student, teacher, max_len=exact - 1, max_prompt_len=prompt)
    assert report.responses_cut == 1 and report.prompts_cut == 0 and max(lengths(shorter)) <= exact - 1
    assert shorter.student.response[-1] != student.eos_id and shorter.teacher.response[-1] != teacher.eos_id
    [shorter], report = tokenise([example], student, teacher, max_len=exact, max_prompt_len=prompt - 1)
    assert report.prompts_cut == 1 and report.prompt_characters > 0


def test_only_end_of_text_may_be_what_does_not_fit(student):
    example = raw("p", "the fox")
    [row], _ = tokenise([example], student)
    [cut], report = tokenise([example], student, max_len=len(row.student) - 1)
    assert cut.student.response == row.student.response[:-1]
    assert (report.responses_cut, report.response_characters) == (1, 0)


def random_text(rng, most):
    words = ["the fox ", "café", "Größe ", "北京", "首都です", "🍕", "👨‍👩‍👧", "\n", "\t", " ", "x", "وقت"]
    return "".join(rng.choice(words) for _ in range(rng.randint(1, most)))


def fits(tokenizers, text, limit):
    return all(len(tokenizer.encode(text)) <= limit for tokenizer in tokenizers)


def starts(ids, with_ids):
    return ids[: len(with_ids)] == with_ids


def test_cutting_of_random_texts(student, teacher):
    """Both models see the same text, which is as long as fits without cutting a token, and no longer."""
    rng, both = random.Random(0), (student, teacher)
    seen, inside_a_token, shorter_than_need_be = CutReport(), 0, 0
    for _ in range(150):
        example = raw(random_text(rng, 30), random_text(rng, 30))
        max_prompt_len = rng.randint(12, 60)
        max_len = max_prompt_len + rng.randint(12, 60)
        [row], report = tokenise([example], student, teacher, max_len, max_prompt_len)
        prompts, responses = (
            {tokenizer.decode(getattr(side, part)) for tokenizer, side in zip(both, (row.student, row.teacher))}  # noqa: B905
            for part in ("prompt", "response")
        )
        assert len(prompts) == len(responses) == 1  # the same text
        prompt, response = prompts.pop(), responses.pop()
        assert example.prompt.endswith(prompt) and example.outputs[0].startswith(response)
        assert max(lengths(row)) <= max_len and max(len(row.student.prompt), len(row.teacher.prompt)) <= max_prompt_len
        lost = len(example.prompt) - len(prompt), len(example.outputs[0]) - len(response)
        if lost[0]:
            assert not fits(both, example.prompt[lost[0] - 1 :], max_prompt_len)
        room = [max_len - len(side.prompt) for side in (row.student, row.teacher)]
        ended = [side.response[-1] == t.eos_id for side, t in zip((row.student, row.teacher), both, strict=True)]
        if lost[1]:
            text, longer = example.outputs[0], range(len(response) + 1, len(response) + 32)
            longer = [n for n in longer if all(len(t.encode(text[:n])) <= r for t, r in zip(both, room, strict=True))]
            between = [all(starts(t.encode(text), t.encode(text[:n])) for t in both) for n in (len(response), *longer)]
            inside_a_token += not between[0]  # where there is no place near by
            shorter_than_need_be += any(between[1:])  # where a merge lets a longer text fit again (`find_longest`)
        elif not any(ended):
            assert any(len(t.encode(response)) + 1 > space for t, space in zip(both, room, strict=True))
        assert ended in ([True, True], [False, False])
        whole = all(ended)
        assert report == CutReport(1, lost[0] > 0, not whole, *lost) and (lost[1] == 0 or not whole)
        seen.prompts_cut += lost[0] > 0
        seen.responses_cut += not whole
    assert 30 < seen.prompts_cut < 140 and 30 < seen.responses_cut < 140
    assert inside_a_token <= 2 and shorter_than_need_be <= 2


def test_a_response_that_was_cut_off_has_no_end_of_text(tmp_path, student):
    lines = [{"prompt": "p", "output": "abc"}, {"prompt": "p", "output": "abc", "end_of_text": False}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, report = tokenise(read_examples(tmp_path / "d.jsonl"), student)
    whole, cut = (row.student.response for row in rows)
    assert whole == [*cut, student.eos_id] and report.responses_cut == 0
    length = len(rows[1].student.prompt) + len(cut)
    rows, report = tokenise(read_examples(tmp_path / "d.jsonl"), student, max_len=length)  # no room for end-of-text
    assert rows[1].student.response == cut and len(rows[0].student.response) <= len(cut)
    assert report.responses_cut == 1


def test_cutting_of_random_template_prompts(student, teacher):
    """The input goes before the instruction, the answer marker never."""
    rng, both = random.Random(1), (student, teacher)
    empty = max(len(t.encode(Example("", ["x"]).prompt_text())) for t in both)
    cuts = {"none": 0, "input": 0, "instruction": 0}
    for _ in range(150):
        example = Example("", ["x"], instruction=random_text(rng, 12), input=rng.choice(["", random_text(rng, 30)]))
        limit = empty + rng.randint(0, 120)
        text = cut_prompt(example, list(both), limit).prompt_text()
        assert fits(both, text, limit) and text.endswith(MARKER)
        head, rest = text.removesuffix(MARKER).split("### Instruction:\n")
        kept, _, context = rest.partition("\n\n### Input:\n")
        assert example.instruction.startswith(kept) and example.input.startswith(context)
        assert ("paired with an input" in head) == bool(context)
        if text == example.prompt_text():
            cuts["none"] += 1
        elif kept == example.instruction:
            cuts["input"] += 1
            longer = Example("", ["x"], instruction=kept, input=example.input[: len(context) + 1])
            assert not fits(both, longer.prompt_text(), limit)
        else:
            cuts["instruction"] += 1
            longer = Example("", ["x"], instruction=example.instruction[: len(kept) + 1])
            assert context == "" and not fits(both, longer.prompt_text(), limit)
    assert min(cuts.values()) > 15, cuts


def test_of_several_system_messages_none_is_cut(tmp_path, student, teacher):
    """A system's and a developer's, or the record's own and that of its turns."""
    said = [("system", "Be brief."), ("developer", "No list."), ("user", "a " * 90), ("assistant", "b"), ("user", "c ")]
    record = {"messages": [{"role": role, "content": text} for role, text in [*said, ("assistant", "d")]]}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    [example] = read_examples(tmp_path / "d.jsonl")
    without = replace(example, history=example.history[:2])
    assert [turn["content"] for turn in without.history] == ["Be brief.", "No list."]
    limit = max(len(t.encode(without.prompt_text())) for t in (student, teacher))
    assert cut_prompt(example, [student, teacher], limit) == without
    assert cut_prompt(example, [student, teacher], limit - 1) == replace(without, instruction="c")


def test_a_shorter_text_with_more_tokens_does_not_fit(tmp_path):
    """"abcd" is two tokens, but ends inside one of the whole text; "abc" is three, for which there is no room."""
    vocabulary = {piece: i for i, piece in enumerate(["a", "b", "c", "d", "e", "f", "de", "cd", "bcd", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("d", "e"), ("c", "d"), ("b", "cd")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    [row], _ = tokenise([raw("f", "abcdef")], TextTokenizer(tmp_path, tokenizer, [9]), max_len=3, max_prompt_len=1)
    assert row.student == Side([5], [0, 1])


def test_other_tokens_of_the_same_number_are_not_the_same(tmp_path):
    """Without alignment."""
    both = [TextTokenizer(tmp_path, byte_level({"a": a, "b": 1 - a, "<eos>": 2}), [2]) for a in (0, 1)]
    assert len(tokenise([raw("a", "ab")], *both, align="cma")[0][0].teacher.response) == 3
    with pytest.raises(ValueError, match="or one lacks a token of it that the other has"):
        tokenise([raw("a", "ab")], *both, align="none")


def test_report_adds_up(student, teacher):
    examples = [raw("short", "short"), raw("a" * 100, "short"), raw("short", "b" * 200), raw("c" * 100, "d" * 200)]
    report = tokenise(examples, student, teacher, max_len=40, max_prompt_len=20)[1]
    assert str(report) == (
        f"4 examples; cut to fit: 2 prompts ({report.prompt_characters} characters), "
        f"2 responses ({report.response_characters} characters)"
    )


def test_what_cannot_fit_is_named(student, teacher):
    empty = len(student.encode(Example("", ["x"]).prompt_text()))
    template = Example("data.jsonl, line 7", ["x"], instruction="Name a colour.", input="red")
    with pytest.raises(ValueError, match=f"data.jsonl, line 7: the prompt does not fit.*--max-prompt-len {empty - 1}"):
        tokenise([template], student, max_len=500, max_prompt_len=empty - 1)
    assert tokenise([template], student, max_len=500, max_prompt_len=empty)[1].prompts_cut == 1
    family = Example("data.jsonl, line 8", ["👨‍👩‍👧" * 3], prompt="x" * 4)
    room = max(len(t.encode("xxxx")) for t in (student, teacher))
    with pytest.raises(ValueError, match=f"data.jsonl, line 8: no room for a response within --max-len {room + 1}"):
        tokenise([family], student, teacher, max_len=room + 1)
    with pytest.raises(ValueError, match="line 9: the prompt does not fit"):
        tokenise([Example("line 9", ["x"], prompt="🦊")], student, max_len=500, max_prompt_len=1)


@pytest.mark.parametrize("prompt, response, what", [("b", "a", "prompt"), ("a", "b", "response")])
def test_a_text_without_tokens_for_one_of_the_models_is_named(student, prompt, response, what):
    teacher = TextTokenizer(None, byte_level({"a": 0, "<end>": 1}), [1])
    with pytest.raises(ValueError, match=f"here: the {what} has no tokens"):
        tokenise([replace(raw(prompt, response), ends=False)], student, teacher)


def test_prompt_leaves_room_for_a_response(student):
    [row], report = tokenise([raw("x" * 50, "yy")], student, max_len=10, max_prompt_len=256)
    assert len(row.student.prompt) == 9 and len(row.student.response) == 1 and report.prompts_cut == 1


# ---------------------------------------------------------------------------------------------------------------------
# Sampled responses


def byte_ids(tokenizer, spelt: bytes) -> list[int]:
    """One token for each byte."""
    return [tokenizer.bytes.index(bytes([byte])) for byte in spelt]


def paired_bytes(row, student, teacher):
    """What the aligned pairs spell, checked to be the same on both sides; None is end-of-text."""
    pairs = list(zip(*row.pairs, strict=True))
    theirs = [teacher.spell(row.teacher.response)[i] for i, _ in pairs]
    ours = [student.spell(row.student.response)[j] for _, j in pairs]
    assert [token and token.lstrip(b" ") for token in ours] == [token and token.lstrip(b" ") for token in theirs]
    return ours


@pytest.mark.parametrize("align", ["eta", "cma"])
def test_a_sampled_response_is_read_by_the_teacher_as_text(student, teacher, align):
    gold = tokenise([raw("Say:", "the lazy dog")], student, teacher, align=align)[0][0]
    expected = tokenise([raw("Say:", "Le café: 東京")], student, teacher, align=align)[0][0]
    row = replace_response(gold, expected.student.response, student, teacher, 512, align)
    assert (row.student, row.teacher) == (expected.student, expected.teacher)
    assert row.student.response[-1] == student.eos_id and row.teacher.response[-1] == teacher.eos_id
    if align == "eta":
        assert all(np.array_equal(a, b) for a, b in zip(row.pairs, expected.pairs, strict=True))
        assert paired_bytes(row, student, teacher)[-1] is None  # end-of-text has its counterpart
    labels = collate([row], 0).student.labels
    assert labels.tolist() == row.student.response  # and is trained on

    cut = replace_response(gold, expected.student.response[:-1], student, teacher, 512, align)
    assert cut.student.response == expected.student.response[:-1]
    assert cut.teacher.response == expected.teacher.response[:-1]
    assert student.eos_id not in collate([cut], 0).student.labels


def test_the_student_keeps_the_tokens_that_it_sampled(student, teacher):
    """It would itself cut "the fox" into fewer tokens; the alignment is by bytes, so that it finds what coincides."""
    gold = tokenise([raw("Say:", "the lazy dog")], student, teacher, align="eta")[0][0]
    response = [*byte_ids(student, b"the"), *student.encode(" fox"), student.eos_id]
    assert student.encode("the fox") != response[:-1]
    row = replace_response(gold, response, student, teacher, 512, "eta")
    assert row.student.response == response
    assert row.teacher.response == [*teacher.encode("the fox"), teacher.eos_id]
    assert paired_bytes(row, student, teacher)[-2:] == [student.bytes[response[-2]], None]


def test_an_empty_response_is_end_of_text_on_both_sides(student, teacher):
    for align in ("eta", "cma"):
        gold = tokenise([raw("Say:", "the lazy dog")], student, teacher, align=align)[0][0]
        row = replace_response(gold, [student.eos_id], student, teacher, 512, align)
        assert (row.student.response, row.teacher.response) == ([student.eos_id], [teacher.eos_id])
        assert align == "cma" or [index.tolist() for index in row.pairs] == [[0], [0]]
        assert replace_response(gold, [], student, teacher, 512, align) is gold


@pytest.mark.parametrize("broken", [b"\xe9", b"\xff\xfe", b"\xf0\x9f\x8d", b"\xbf\xbd"])
def test_bytes_that_are_no_text(student, teacher, broken):
    """The teacher reads U+FFFD in their place; what stands around them is still aligned, end-of-text too."""
    gold = tokenise([raw("Say:", "the lazy dog")], student, teacher, align="eta")[0][0]
    before, after = student.encode("the lazy"), student.encode(" dog sleeps")
    response = [*before, *byte_ids(student, broken), *after, student.eos_id]
    row = replace_response(gold, response, student, teacher, 512, "eta")
    assert row.student.response == response
    text = teacher.decode(row.teacher.response)
    assert text.startswith("the lazy\ufffd") and text.endswith("\ufffd dog sleeps")
    whole = replace_response(gold, [*before, *after, student.eos_id], student, teacher, 512, "eta")
    found, expected = paired_bytes(row, student, teacher), paired_bytes(whole, student, teacher)
    assert [token for token in found if token is None or len(token) > 1] == [
        token for token in expected if token is None or len(token) > 1
    ]
    assert found[-1] is None and len(found) > 2


def test_a_character_that_the_length_cuts_in_two(student, teacher):
    """The teacher's text ends before it; followed by end-of-text, it is text that is wrong, and stays."""
    gold = tokenise([raw("Say:", "the lazy dog")], student, teacher, align="eta")[0][0]
    response = [*student.encode("the fox"), *byte_ids(student, "🍕".encode()[:3])]
    row = replace_response(gold, response, student, teacher, 512, "eta")
    assert row.student.response == response
    assert row.teacher.response == teacher.encode("the fox")
    row = replace_response(gold, [*response, student.eos_id], student, teacher, 512, "eta")
    assert row.teacher.response == [*teacher.encode("the fox\ufffd"), teacher.eos_id]
    # nothing but the beginning of a character: the teacher would have no token, so the gold response stays
    assert replace_response(gold, byte_ids(student, "🍕".encode()[:2]), student, teacher, 512, "eta") is gold


def test_sampled_special_tokens_spell_nothing(student, teacher):
    """With the roles changed: the SentencePiece vocabulary has <unk> and <s>, which are not end-of-text."""
    student, teacher = teacher, student
    gold = tokenise([raw("Say:", "the lazy dog")], student, teacher, align="eta")[0][0]
    start = student.tokenizer.token_to_id("<s>")
    words = student.encode("the lazy dog")
    response = [start, *words[:2], start, *words[2:], student.eos_id]
    assert student.spell(response)[::len(response) - 1] == [b"", None]
    row = replace_response(gold, response, student, teacher, 512, "eta")
    assert row.student.response == response
    assert row.teacher.response == gold.teacher.response
    expected = gold.pairs[1] + 1 + (gold.pairs[1] >= 2)
    assert row.pairs[1].tolist() == expected.tolist() and row.pairs[0].tolist() == gold.pairs[0].tolist()
    assert paired_bytes(row, student, teacher)[-1] is None
    assert replace_response(gold, [start, start], student, teacher, 512, "eta") is gold
    row = replace_response(gold, [start, student.eos_id], student, teacher, 512, "eta")
    assert [index.tolist() for index in row.pairs] == [[0], [1]]


@pytest.mark.parametrize("room", range(7))
def test_sampled_responses_fit_the_teacher_too(student, teacher, room):
    gold = tokenise([raw("Say:", "the lazy dog")], student, teacher, align="eta")[0][0]
    text = "the ßßß dog"  # few tokens for the student, several for the teacher
    response = [*student.encode(text), student.eos_id]
    theirs = [*teacher.encode(text), teacher.eos_id]
    max_len = len(gold.teacher.prompt) + room
    row = replace_response(gold, response, student, teacher, max_len, "eta")
    if room == 0:
        assert row is gold
        return
    assert room < len(theirs)
    assert 0 < len(row.teacher.response) <= room
    assert row.student.response == response[: len(row.student.response)]
    assert row.teacher.response == theirs[: len(row.teacher.response)]
    assert teacher.eos_id not in row.teacher.response and student.eos_id not in row.student.response
    if len(row.student.response) < len(response) - 1:  # (end-of-text may be all that does not fit)
        longer = student.decode(response[: len(row.student.response) + 1]).rstrip("\ufffd")
        assert len(teacher.encode(longer)) > room  # one token more would not have fitted


def test_with_one_vocabulary_the_teacher_sees_the_same_ids(student):
    gold = tokenise([raw("Say:", "the lazy dog")], student, student, align="none")[0][0]
    response = [*byte_ids(student, b"the\xe9"), student.eos_id]
    row = replace_response(gold, response, student, student, 512, "none")
    assert row.student.response == row.teacher.response == response and row.pairs is None
    row = replace_response(gold, response, student, student, len(gold.teacher.prompt) + 2, "none")
    assert row.student.response == row.teacher.response == response[:2]


# ---------------------------------------------------------------------------------------------------------------------
# Layout and batches


@pytest.fixture(scope="module")
def rows(student, teacher):
    examples = [
        raw("What is the fox?", "The quick brown café."),
        raw("北京", "東京です。"),
        raw("x", "y"),
        raw("Write a poem.", "a fox\njumps over 🍕 and then"),
    ]
    return tokenise(examples, student, teacher, align="eta")[0]


def test_training_takes_the_first_of_several_outputs(student):
    [row], _ = tokenise([Example("", ["first", "second"], prompt="p")], student)
    assert student.decode(row.student.response) == "first"


@pytest.mark.parametrize("token", [-1, 0])
def test_collate_against_a_loop(rows, token):
    """Padded with end-of-text, and with a token that is read too."""
    pads = rows[0].student.response[token], rows[0].teacher.response[token]
    batch = collate(rows, *pads)
    for name, padding in zip(("student", "teacher"), pads, strict=True):
        side, k, real = getattr(batch, name), 0, []
        width = max(len(getattr(row, name).prompt + getattr(row, name).response) for row in rows) - 1
        assert side.input_ids.shape == (len(rows), width) and side.input_ids.dtype == torch.int64
        assert side.lengths == [len(getattr(row, name).response) for row in rows]
        for example, row in enumerate(rows):
            sequence = getattr(row, name).prompt + getattr(row, name).response
            for position in range(width):
                if position < len(sequence) - 1:
                    assert side.input_ids[example, position] == sequence[position]
                    real.append(example * width + position)
                else:
                    assert side.input_ids[example, position] == padding
                if len(getattr(row, name).prompt) - 1 <= position < len(sequence) - 1:
                    assert side.positions[k] == example * width + position
                    assert side.labels[k] == sequence[position + 1]
                    assert side.inputs[k] == sequence[position]
                    k += 1
        assert len(side.positions) == len(side.labels) == k and side.real.tolist() == real


@pytest.mark.parametrize("width", [40, 300])
def test_collate_to_few_shapes(rows, width):
    """A width for all batches, and padding that counts as real up to a multiple of 128 tokens, if there is enough."""
    batch, expected = collate(rows, 0, 0, width), collate(rows, 0, 0)
    for side, other in ((batch.student, expected.student), (batch.teacher, expected.teacher)):
        T, real = other.input_ids.shape[1], torch.zeros(len(rows), width, dtype=torch.bool)
        assert torch.equal(side.input_ids[:, :T], other.input_ids) and not side.input_ids[:, T:].any()
        assert len(side.real) == min(-(-len(other.real) // 128) * 128, len(rows) * width)
        assert torch.equal(side.real, side.real.sort().values)
        real.view(-1)[side.real] = True
        assert not (real[:, 1:] & ~real[:, :-1]).any()  # no token without the ones before it
        of_other = (index // T * width + index % T for index in (other.real, other.positions))
        for found, wanted in zip((side.real, side.positions), of_other, strict=True):
            assert torch.equal(found[torch.isin(found, wanted)], wanted)
        assert len(side.positions) == len(other.positions) and torch.equal(side.labels, other.labels)
    assert len(collate([Row(Side([1] * 100, [2] * 29))], 0, 0, 300).student.real) == 128  # a multiple already


def test_pairs_are_offset_by_the_examples_before(rows, student, teacher):
    batch = collate(rows, 0, 0)
    pairs = list(zip(batch.teacher_index.tolist(), batch.student_index.tolist(), strict=True))
    expected, ratios, m, n = [], [], 0, 0
    for row in rows:
        a, b = exact_token_alignment(
            [teacher.bytes[i] for i in row.teacher.response], [student.bytes[i] for i in row.student.response]
        )
        expected += [(m + i, n + j) for i, j in zip(a.tolist(), b.tolist(), strict=True)]
        ratios.append(len(a) / len(row.student.response))
        m, n = m + len(row.teacher.response), n + len(row.student.response)
    assert pairs == expected and batch.align_ratios == ratios and len(set(ratios)) > 1
    for i, j in pairs:
        ours, theirs = teacher.bytes[batch.teacher.labels[i]], student.bytes[batch.student.labels[j]]
        assert ours == theirs or ours.removeprefix(b" ") == theirs  # the teacher's first has the dummy prefix
    ends = {(int(i), int(j)) for i, j in pairs if batch.student.labels[j] == student.eos_id}
    assert len(ends) == len(rows)  # every end-of-text is aligned


def test_rows_without_pairs_and_examples_without_a_pair():
    rows = [
        Row(Side([1], [2, 3]), Side([1], [2]), (np.array([], dtype=np.int64),) * 2),
        Row(Side([1], [4]), Side([1], [5, 6]), (np.array([1]), np.array([0]))),
    ]
    batch = collate(rows, 0)
    assert batch.align_ratios == [0.0, 1.0]
    assert batch.teacher_index.tolist() == [2] and batch.student_index.tolist() == [2]
    assert collate([Row(Side([1], [2]), Side([1], [2]))], 0).teacher_index is None
    alone = collate([Row(Side([1], [2]))], 0)
    assert alone.teacher is None and alone.teacher_index is None and alone.align_ratios == []


def test_batch_to_moves_every_tensor(rows):
    moved = collate(rows, 0, 0).to("meta")
    sides = [getattr(side, part) for side in (moved.student, moved.teacher)
             for part in ("input_ids", "real", "positions", "labels")]  # fmt: skip
    assert {t.device.type for t in [*sides, moved.teacher_index, moved.student_index]} == {"meta"}
