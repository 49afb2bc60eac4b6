"""A model may have several ends: each ends what it writes, and what it is trained on ends with the first of them."""

import pytest
import torch
from helpers import arguments, report_of, speaker

import eval as evaluation
import model
import train
from baselines.seqkd import read_recipe
from data import replace_response, tokenise
from experiments import tiny
from runtime.formats import read_examples
from runtime.options import Options
from runtime.strict import check_options
from runtime.tokenizer import read_tokenizer

pytestmark = pytest.mark.usefixtures("own_folder")  # eval.py writes reports into it

ANSWER, TURN, STOP = 900, 901, 902  # added to the tiny student's vocabulary, behind its end-of-text, 0
WAYS = {  # where the files call STOP an end, beside end-of-text, or TURN
    "generation_config.json": {"generation_config.json": {"eos_token_id": [TURN, STOP]}},
    "config.json": {"config.json": {"eos_token_id": [0, STOP]}},
    "config.json alone": {"config.json": {"eos_token_id": STOP}},
    "one in each": {"generation_config.json": {"eos_token_id": TURN}, "config.json": {"eos_token_id": STOP}},
    "config.json besides": {"generation_config.json": {"eos_token_id": 0}, "config.json": {"eos_token_id": STOP}},
}


def test_generation_ends_at_each_of_several():
    m = model.build_model({**tiny.STUDENT, "n_embd": 16, "n_layer": 1, "n_head": 2})
    prompts = [[5, 6, 7], [9], [11, 12]]
    endless = model.generate(m, prompts, 30, None, temperature=1.0, seed=1)
    ends = [endless[0][3], endless[1][7], endless[2][20]]

    def cut(new, ends):
        return next((new[: i + 1] for i, token in enumerate(new) if token in ends), new)

    alone = [model.generate(m, [prompt], 30, None, temperature=0)[0] for prompt in prompts]
    for several in (ends, set(ends), tuple(ends), ends[:1], []):
        found = [model.generate(m, [prompt], 30, several, temperature=0)[0] for prompt in prompts]
        assert found == [cut(new, several) for new in alone]
    first = alone[0][2]
    assert model.generate(m, prompts, 30, [first, 10**6], temperature=0) == [cut(new, [first]) for new in alone]
    assert model.generate(m, prompts, 30, first, temperature=0) == [cut(new, [first]) for new in alone]


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_response_ends_wherever_the_files_name_its_end(tiny_task, tmp_path, capsys, way, special):
    directory = speaker(tiny_task, tmp_path / "model", WAYS[way], special=special)
    (tmp_path / "sky.jsonl").write_text('{"prompt": "What color is it?\\n", "output": "The sky is blue."}\n')
    for sampling in (["--greedy"], ["--seeds", "1"]):
        evaluation.main([str(directory), "--data", str(tmp_path / "sky.jsonl"), "--device", "cpu", *sampling])
        report = report_of(directory, "sky-greedy" if sampling == ["--greedy"] else "sky")
        assert (report["rouge_l"], report["responses"]) == ([100.0], [["The sky is blue."]])
        assert report["not_ended"] == [0]


@pytest.mark.parametrize("special", [True, False])
def test_a_response_may_quote_ends(tiny_task, tmp_path, special):
    """Also where the vocabulary does not mark them as special: else the label would end in its midst."""
    tokenizer, text = read_tokenizer(speaker(tiny_task, tmp_path / "model", WAYS["generation_config.json"],
                                             special=special)), "Write <stop>, not <turn>."  # fmt: skip
    assert {TURN, STOP} < {*tokenizer.end_ids} and not {*tokenizer.end_ids} & {*tokenizer.encode(text)}
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert {TURN, STOP} < {*tokenizer.encode_prompt(text)}


def test_what_the_teacher_ended_with_becomes_the_students_end(tiny_task, tmp_path):
    teacher = speaker(tiny_task, tmp_path / "model", WAYS["config.json"], says=(ANSWER, STOP))
    options = {"method": "seqkd", "teacher": teacher, "student": tiny_task / "twin", "data": tiny_task / "valid.jsonl"}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    answers = read_examples(tmp_path / "run" / "seqkd.jsonl")
    assert len(answers) == 10 and {(e.outputs[0], e.ends) for e in answers} == {("The sky is blue.", True)}
    twin = read_tokenizer(tiny_task / "twin")
    assert tokenise(answers, twin)[0][0].student.response == [*twin.encode("The sky is blue."), twin.eos_id]
    assert read_recipe(tmp_path / "run" / "seqkd.jsonl")["ends"] == [0, STOP]


@pytest.mark.parametrize("teacher", ["teacher", "same"])
def test_what_a_student_samples_ends_with_end_of_text(tiny_task, tmp_path, teacher):
    """Its gold responses do: another of its ends in their place would teach it to end in two ways."""
    student = speaker(tiny_task, tmp_path / "model", WAYS["one in each"])
    theirs = student if teacher == "same" else tiny_task / teacher
    data = str(tiny_task / "train.jsonl")
    o = check_options(Options(student=str(student), teacher=str(theirs), data=data, on_policy=1.0, device="cpu",
                              out=str(tmp_path / "run"), max_len=96))  # fmt: skip
    pieces = train.load(o)
    train.add_method(o, pieces)
    sampled, tokens = train.sample_rows(o, pieces, pieces.rows[:4], step=0)
    end = pieces.teacher_tokenizer.eos_id
    answer = [ANSWER] if teacher == "same" else pieces.teacher_tokenizer.encode("The sky is blue.")
    assert tokens == 8
    for row in sampled:
        assert row.student.response == [ANSWER, 0] and row.teacher.response == [*answer, end]
        assert teacher == "same" or [index[-1] for index in row.pairs] == [len(answer), 1]  # the two ends are aligned
    cut = replace_response(pieces.rows[0], [ANSWER], pieces.student_tokenizer, pieces.teacher_tokenizer, 96, "cma")
    assert (cut.student.response, cut.teacher.response[-1] == end) == ([ANSWER], False)


@pytest.mark.parametrize("way", [*WAYS, "no file"])
def test_the_student_keeps_its_ends(tiny_task, tmp_path, way):
    """In samples.txt, in its files, and for `transformers`, which knows those of generation_config.json alone."""
    transformers = pytest.importorskip("transformers")
    files = {"config.json": {"eos_token_id": 50256}} if way == "no file" else WAYS[way]  # as it was copied
    said = (ANSWER, 0) if way == "no file" else (ANSWER, STOP)
    student = speaker(tiny_task, tmp_path / "model", files, says=said)
    options = {"method": "sft", "teacher": None, "student": student, "max_steps": 1, "lr": 1e-9}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    responses = (tmp_path / "run" / "samples.txt").read_text().split("### response\n")[1:]
    assert {response.split("\n")[0] for response in responses} == {"The sky is blue."} and len(responses) == 5
    out = tmp_path / "run" / "student"
    tokenizer, theirs = read_tokenizer(out), transformers.AutoModelForCausalLM.from_pretrained(out)
    assert sorted(tokenizer.end_ids) == sorted(read_tokenizer(student).end_ids)
    assert tokenizer.eos_id == 0 and said[1] in tokenizer.end_ids
    assert theirs.generation_config.eos_token_id in ([*tokenizer.end_ids], tokenizer.eos_id)
    prompt = torch.tensor([tokenizer.encode_prompt("Who?")])
    new = theirs.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    assert new == list(said) == model.generate(model.load_model(out), prompt.tolist(), 9, tokenizer.end_ids, 0)[0]


@pytest.mark.parametrize("rules", [
    {"repetition_penalty": 50.0, "no_repeat_ngram_size": 1, "suppress_tokens": [ANSWER]},
    {"exponential_decay_length_penalty": [1, 9.0], "guidance_scale": 9.0, "encoder_repetition_penalty": 50.0,
     "watermarking_config": {"bias": 90.0}},
    {"num_beams": 2, "min_length": 9, "min_new_tokens": 9, "begin_suppress_tokens": [ANSWER], "forced_bos_token_id": 5,
     "forced_eos_token_id": 5, "bad_words_ids": [[ANSWER]], "sequence_bias": [[[ANSWER], -90.0]]},
])  # fmt: skip
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_the_student_keeps_no_rule_that_its_base_was_to_generate_by(tiny_task, tmp_path, file, rules):
    """Qwen2.5-Instruct's generation_config.json has a repetition_penalty: the answer would be another. Older versions
    of transformers wrote such rules into config.json, and newer ones still follow them there."""
    transformers = pytest.importorskip("transformers")
    files = {file: {"eos_token_id": [0, STOP], "top_p": 0.8, "do_sample": True, **rules}}
    student = speaker(tiny_task, tmp_path / "model", files, says=(ANSWER, ANSWER))
    options = {"method": "sft", "teacher": None, "student": student, "max_steps": 1, "lr": 1e-9}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    new = theirs.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 2:].tolist()
    assert all(getattr(theirs.generation_config, name, None) != value for name, value in rules.items())
    assert new == [ANSWER] * 4 and theirs.generation_config.top_p == (0.8 if file == "generation_config.json" else None)
