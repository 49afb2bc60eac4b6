"""runtime/tokenizer.py: ends, special tokens, and what can be wrong with a tokenizer's files."""

import json

import pytest
from helpers import CHAT_TEMPLATES, SENTENCES, byte_level, wordpiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from data import Example, tokenise
from runtime.run import tokenizer_of
from runtime.tokenizer import TextTokenizer, check_size, count_shared, read_tokenizer

NO_TEXT = byte_level({"a": 0, "b": 1})  # its template for a text has no place for one
NO_TEXT.post_processor = processors.TemplateProcessing(single="a", special_tokens=[("a", 0)])
CONFIG = {"model_type": "gpt2", "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}


@pytest.fixture(scope="module")
def student(trained_folder):
    return read_tokenizer(trained_folder / "student")


@pytest.fixture(scope="module")
def teacher(trained_folder):
    return read_tokenizer(trained_folder / "teacher")


def with_files(tmp_path, trained_folder, files, which="student"):
    """A copy of a tokenizer with these further files: {name: content}."""
    (tmp_path / "tokenizer.json").write_bytes((trained_folder / which / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"tokenizer_config.json": {"eos_token": "A"}, "generation_config.json": {"eos_token_id": 5}}, ["A", 5]),
        ({"tokenizer_config.json": {"eos_token": {"content": "B", "lstrip": False}}}, ["B"]),
        ({"tokenizer_config.json": {"eos_token": None}, "generation_config.json": {"eos_token_id": 5}}, [5]),
        # transformers before 4.34 wrote a changed end into the map alone
        ({"special_tokens_map.json": {"eos_token": "A"}, "tokenizer_config.json": {"eos_token": "B"}}, ["A", "B"]),
        ({"special_tokens_map.json": {"eos_token": {"content": "A"}}, "config.json": {"eos_token_id": 5}}, ["A", 5]),
        ({"special_tokens_map.json": {"eos_token": "A"},
          "tokenizer_config.json": {"eos_token": "B", "added_tokens_decoder": {}}}, ["B"]),
        ({"tokenizer_config.json": {}, "generation_config.json": {"eos_token_id": [7, 8]}, "config.json": {}}, [7, 8]),
        ({"generation_config.json": {"eos_token_id": [7, 0, 7]}, "config.json": {"eos_token_id": 6}}, [7, 0, 6]),
        ({"config.json": {"eos_token_id": [0, -1, None, 3, 10**6]}}, [0, 3]),  # unknown ones are never generated
    ],
)
def test_which_ids_are_ends(tmp_path, trained_folder, files, expected):
    """All that the files name, in this order; the first is end-of-text, whether or not it is special."""
    tokenizer = read_tokenizer(with_files(tmp_path, trained_folder, files))
    ids = [tokenizer.tokenizer.token_to_id(end) if isinstance(end, str) else end for end in expected]
    assert tokenizer.end_ids == ids and tokenizer.eos_id == ids[0] and tokenizer.bytes[ids[0]] is None


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, "no end-of-text token: add eos_token to tokenizer_config.json"),
        ({"config.json": {"eos_token_id": None}}, "no end-of-text token"),
        ({"tokenizer_config.json": {"eos_token": "<nowhere>"}}, "tokenizer_config.json: eos_token '<nowhere>' is not"),
        ({"config.json": {"eos_token_id": 50256}}, "config.json: eos_token_id 50256 is not in tokenizer.json"),
        ({"config.json": {"eos_token_id": -1}}, "eos_token_id -1 is not in"),
        ({"config.json": {"eos_token_id": []}}, "no end-of-text token"),
        ({"config.json": {"eos_token_id": [0, True]}}, "config.json: eos_token_id True is not in tokenizer.json"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json: expected a JSON object"),
        ({"tokenizer.json": "{"}, "tokenizer.json: cannot be read as a tokenizer"),
        ({"tokenizer.json": NO_TEXT.to_str()}, "tokenizer.json: cannot be read as a tokenizer"),
        *[({"tokenizer.json": byte_level({"a": 0, "b": 1}).to_str().replace('"b":1', f'"b":{index}')},
           f"tokenizer.json: 2 tokens have .* ids up to {index}: not a valid vocabulary") for index in (0, 2**24)],
    ],
)
def test_what_is_wrong_with_a_tokenizer_is_named(tmp_path, trained_folder, files, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        read_tokenizer(with_files(tmp_path, trained_folder, files))
    assert str(tmp_path) in str(caught.value)


def test_missing_and_unalignable_tokenizers_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: cannot be read as a tokenizer"):
        read_tokenizer(tmp_path)
    wordpiece().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(ValueError, match="tokenizer.json: cannot tell which bytes.*WordPiece") as caught:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_special_tokens_in_the_data_are_text(student, teacher):
    text = "a <|endoftext|></s><s> <unk> b"
    for tokenizer in (student, teacher):
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids and all(tokenizer.bytes[i] is not None for i in ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert teacher.encode("x")[0] != teacher.tokenizer.token_to_id("<s>")  # no special tokens are added


@pytest.mark.parametrize("metaspace", [True, False])
def test_unigram_finds_no_special_token_in_a_response(tmp_path, metaspace):
    """Its vocabulary has their names as pieces, which cost nothing."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((character, -9.0) for character in "ab<s/>unk|")]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("</", -3.0), ("<|a|>", 0.0)], unk_id=0))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>", "<|a|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    read, text = read_tokenizer(tmp_path), "a</s> b</ <|a|><unk></s>"
    assert not {0, 1, len(pieces) + 1} & set(read.encode(text))
    assert read.decode(read.encode(text)) == text
    assert [i for i in read.encode_prompt(text) if i in (0, 1, len(pieces) + 1)] == [1, len(pieces) + 1, 0, 1]


def test_texts_encoded_together_are_what_they_are_alone(tiny_task):
    """A special token's name is that token in a prompt, and text in a response."""
    tokenizers = [read_tokenizer(tiny_task / name) for name in ("student", "teacher")]
    ends = [tokenizer.tokenizer.id_to_token(tokenizer.eos_id) for tokenizer in tokenizers]
    texts = [f"The fox {end} and the owl number {number}." for number in range(600) for end in ends]
    examples = [Example("here", [text], prompt=text) for text in texts]
    rows, _ = tokenise(examples, *tokenizers, max_len=256, max_prompt_len=128)
    for text, row in zip(texts, rows, strict=True):
        for tokenizer, side in zip(tokenizers, (row.student, row.teacher), strict=True):
            assert side.prompt == tokenizer.encode_prompt(text)
            assert side.response == [*tokenizer.encode(text), tokenizer.eos_id]
    assert all(tokenizers[0].eos_id in row.student.prompt for row in rows[::2])
    assert all(tokenizers[0].eos_id not in row.student.response[:-1] for row in rows)


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path, trained_folder):
    tokenizer = Tokenizer.from_file(str(trained_folder / "student" / "tokenizer.json"))
    long, short = len(tokenizer.encode(SENTENCES[0] * 9).ids), len(tokenizer.encode("a").ids)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    ours = read_tokenizer(tmp_path)
    assert len(ours.encode(SENTENCES[0] * 9)) == long > 50 and len(ours.encode("a")) == short


def test_a_tokenizer_belongs_to_models_of_about_its_size(student):
    size = student.size
    assert size == student.tokenizer.get_vocab_size() == len(student.bytes)
    for rows in (size, size + 300, int(1.1 * size) + 1024):
        check_size(student, rows)
    few, many = ("together.*without one", (size - 1, 10)), ("together$", (int(1.1 * size) + 1025, 32000))
    for ending, rows in [(ending, rows) for ending, numbers in (few, many) for rows in numbers]:
        with pytest.raises(ValueError, match=f"ids up to {size - 1}, the model has {rows} .*not belong {ending}"):
            check_size(student, rows)


def test_special_tokens_without_an_embedding_are_left_out(tmp_path, trained_folder, capsys):
    """In their place their names are text. Others without one, and an end-of-text without one, are a mismatch."""
    source = trained_folder / "student"
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    rows, eos = tokenizer.get_vocab_size(), tokenizer.id_to_token(0)

    def read(*tokens, chat="none", in_vocabulary=False, **files):
        changed = Tokenizer.from_str(tokenizer.to_str())
        changed.add_tokens(list(tokens))
        content = json.loads(changed.to_str())
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        content["model"]["vocab"] |= added if in_vocabulary else {}
        files = {"tokenizer_config.json": {"eos_token": eos}, "config.json": {**CONFIG, "vocab_size": rows}, **files}
        return tokenizer_of(with_files(tmp_path, trained_folder, {**files, "tokenizer.json": content}), chat)

    pad, end = AddedToken("<pad>", special=True), AddedToken("<|im_end|>", special=True)
    found = read(pad, end, **{"generation_config.json": {"eos_token_id": [0, rows + 1]}})
    assert f"no embedding for <pad> ({rows}), <|im_end|> ({rows + 1}); these are left out" in capsys.readouterr().err
    assert found.size == rows and found.end_ids == [0] and found.tokenizer.get_vocab() == tokenizer.get_vocab()
    ids = found.encode_prompt("a<pad>b<|im_end|>")
    assert max(ids) < rows and found.decode(ids) == "a<pad>b<|im_end|>"
    assert read(pad, end, in_vocabulary=True).tokenizer.get_vocab() == tokenizer.get_vocab()
    (tmp_path / "generation_config.json").unlink()
    for tokens, chat, named in (
        ([AddedToken("photosynthesis")], "none", "photosynthesis"),
        ([pad, AddedToken("photosynthesis")], "none", "photosynthesis"),
        ([AddedToken("<|im_start|>", special=True), end], str(CHAT_TEMPLATES / "qwen2.5.jinja"), "<|im_start|>"),
    ):
        with pytest.raises(ValueError, match="do not belong together") as caught:
            read(*tokens, chat=chat)
        assert named in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="the first without one is '<pad>'"):
        read(pad, **{"tokenizer_config.json": {"eos_token": "<pad>"}})


@pytest.mark.parametrize("tokens, end, shared", [(["<end>", "<x>"], 2, 3), (["<x>", "<end>"], 3, 0)])
def test_end_of_text_is_among_the_shared_ids(tokens, end, shared):
    """Or none is shared: the same id behind one with two meanings would be a label without a column."""
    both = []
    for name in ("<x>", "<y>"):
        tokenizer = byte_level({"a": 0, "b": 1})
        tokenizer.add_special_tokens([token.replace("<x>", name) for token in tokens])
        both.append(TextTokenizer(None, tokenizer, [end]))
    assert count_shared(*both) == shared


def test_size_counts_ids_not_tokens(tmp_path):
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 9}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.add_tokens([AddedToken("<x>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert read_tokenizer(tmp_path).size == 10
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')  # a hole
    with pytest.raises(ValueError, match="eos_token_id 5 is not in tokenizer.json"):
        read_tokenizer(tmp_path)
