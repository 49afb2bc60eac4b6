"""Bad input by the hundred: mutants of one good checkpoint, tokenizer, data file and command line.

Each ends in correct work or in one clear line that names the file (or the option): never in a traceback from the depths
of a library, a hang, or a wrong result; what changes nothing must change nothing. FUZZ_SEED=7 tries other mutants, and
`python -m pytest -m slow tests/test_fuzz.py` a few thousand. Failures print the mutant. Hand-written cases are in
test_bad_input.py.
"""

import ast
import json
import os
import random
import shutil
import struct
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import lora
import model
import train
from data import tokenise
from model import load_model
from runtime import hub, strict
from runtime.formats import read_examples
from runtime.peft import load_adapter, save_adapter
from runtime.tokenizer import check_size, read_tokenizer
from scores.answers import answers_equal, final_answer, is_correct
from scores.programs import humaneval_program, mbpp_program

SEED = os.environ.get("FUZZ_SEED", "0")
ODD = [None, True, False, 0, 1, -1, 2, 3, 7, 10**12, 2**63, 10**30, 0.5, 4.0, -0.5, 1e-300, 1e300, float("nan"),
       float("inf"), "", "4", "relu", "\ud800", "é\0", "../x", [], [1], [None], [[]], {}, {"a": 1},
       {"content": []}]  # fmt: skip


def mutants(few, many):
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def generators(count, name):
    """A random generator for each of `count` mutants."""
    return (random.Random(f"{SEED} {name} {n}") for n in range(count))


def result(call, *names):
    """What call() returns; None if it was refused with one line that has one of the names."""
    try:
        return call()
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        assert type(error) in (ValueError, FileNotFoundError), f"a library's own {type(error).__name__}: {message}"
        assert any(str(name) in message for name in names), message
        assert "\n" not in message.strip() and len(message) < 900, message
        return None


def mutated_json(rng, text):
    """The text with one place of its tree changed."""
    tree = json.loads(text)
    holder, key, node = None, None, tree
    while isinstance(node, (dict, list)) and node and (holder is None or rng.random() < 0.75):
        holder, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = holder[key]
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["new", "", "é\0", *holder])] = holder[key]
    else:
        holder[key] = rng.choice(ODD)
    return json.dumps(tree), f"{kind} at {key!r}: {holder.get(key) if isinstance(holder, dict) else '...'!r:.60}"


def mutated_bytes(rng, content, within=None):
    """The bytes with an accident: cut off, a bit flipped, a piece dropped, doubled or overwritten."""
    end = min(within or len(content), len(content))
    at, size = rng.randrange(end), rng.choice([1, 1, 2, 8, 100])
    kind = rng.choice(["cut", "flip", "drop", "double", "overwrite"])
    changed = {
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :],
        "drop": content[:at] + content[at + size :],
        "double": content[: at + size] + content[at:],
        "overwrite": content[:at] + rng.randbytes(size) + content[at + size :],
    }[kind]
    return changed, f"{kind} {size} at {at}"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

GPT2 = {"model_type": "gpt2", "vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
LLAMA = {"model_type": "llama", "vocab_size": 20, "max_position_embeddings": 16, "hidden_size": 8,
         "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 4},
           "qwen2": {**LLAMA, "model_type": "qwen2"}, "qwen3": {**LLAMA, "model_type": "qwen3"}}  # fmt: skip
ROPE = [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn"}, {"type": "linear", "factor": 0},
        {"rope_type": []}, {"rope_type": "llama3"}, {"rope_type": "linear", "factor": "2"},
        {"rope_type": "linear", "factor": float("nan")}, {"rope_theta": -1}, {"rope_theta": "x"}, {"type": 3},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 1,
         "original_max_position_embeddings": 8}]  # fmt: skip
INPUT = torch.arange(14)[None]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model.save_model(model.build_model(config), root / name)
    return root


def open_model(directory):
    """As a run does."""
    strict.check_model(directory)
    return load_model(directory)


@torch.no_grad()
def hidden_of(directory):
    return load_model(directory)(INPUT)


@pytest.fixture
def spoilt(checkpoints, tmp_path):
    """spoilt(family): a fresh copy of a good checkpoint."""

    def make(family):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        return shutil.copytree(checkpoints / family, tmp_path / "model")

    return make


@mutants(60, 500)
def test_configs(count, checkpoints, spoilt):
    for rng in generators(count, "config"):
        family = rng.choice(list(CONFIGS))
        directory = spoilt(family)
        config = json.loads((directory / "config.json").read_text())
        used = [*model.FIELDS[family], *model.FIELDS[family], "model_type"]
        others = [*strict.ONLY, *sorted(strict.HARMLESS), "quantization_config", "new"]
        fields = rng.choices(used + others, k=rng.choice([1, 1, 2]))
        for field in fields:
            if rng.random() < 0.1:
                config.pop(field, None)
            else:
                config[field] = rng.choice(ODD + ROPE * ("rope" in field))
        print(family, {field: config.get(field, "removed") for field in fields})
        (directory / "config.json").write_text(json.dumps(config))
        loaded = result(lambda d=directory: open_model(d), directory)
        if loaded is None or loaded.limit < INPUT.size(1):
            assert loaded or not set(fields) <= strict.HARMLESS - {"model_type"}
            continue
        for field in fields:  # what was accepted is what such a field holds
            value = config.get(field)
            if field in strict.VALUES and value is not None:
                kinds = {int: [int], float: [int, float], bool: [bool], str: [str], list: [list], dict: [dict]}
                assert type(value) in kinds[strict.VALUES[field][0]] or field in strict.ONLY.keys() - set(used)
        loaded.train()(INPUT)
        hidden = loaded.eval()(INPUT)
        assert hidden.isfinite().all()
        if set(fields) <= strict.HARMLESS - {"model_type"}:
            assert torch.equal(hidden, hidden_of(checkpoints / family))
        model.save_model(loaded, directory.parent / "again")
        assert torch.equal(hidden_of(directory.parent / "again"), hidden)


def read_header(file):
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file, header, body, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


@mutants(40, 500)
def test_damaged_weights(count, checkpoints, spoilt):
    """Accidents in the header or the length of the file: it is refused, or (a note was hit) read as if nothing were."""
    for rng in generators(count, "bytes"):
        family = rng.choice(list(CONFIGS))
        file = spoilt(family) / "model.safetensors"
        header, body = read_header(file)
        if rng.random() < 0.5:
            text, what = mutated_json(rng, json.dumps(header))
            write_header(file, text.encode(), body, rng.choice([None, None, 0, 1, 2**40, 2**64 - 1]))
        else:
            content = file.read_bytes()
            content, what = mutated_bytes(rng, content, within=len(content) - len(body))
            file.write_bytes(content)
        print(family, what)
        loaded = result(lambda f=file: open_model(f.parent), file.parent)
        if loaded is not None:
            assert torch.equal(loaded(INPUT), hidden_of(checkpoints / family))


READABLE = {torch.float64: 1e-6, torch.float32: 0.0, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@mutants(40, 250)
def test_other_tensors(count, checkpoints, spoilt):
    for rng in generators(count, "tensors"):
        family = rng.choice(list(CONFIGS))
        file = spoilt(family) / "model.safetensors"
        tensors = load_file(file)
        name = rng.choice(list(tensors))
        tensor, near = tensors[name], None
        kind = rng.choice(["dtype", "shape", "missing", "extra", "value", "renamed", "tied"])
        if kind == "dtype":
            dtype = rng.choice([*READABLE, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
            tensors[name], near = tensor.to(dtype), READABLE.get(dtype)
        elif kind == "shape":
            others = tensor[None], tensor[:-1], tensor.flatten(), tensor[..., :1], tensor.new_zeros(0), torch.ones(())
            tensors[name] = rng.choice(others).clone()
            near = 0.0 if tensors[name].shape == tensor.shape else None
        elif kind == "missing":
            del tensors[name]
        elif kind == "extra":  # constants that old versions saved, and nothing else
            constant = rng.random() < 0.3
            tensors["transformer.h.0.attn.bias" if constant else rng.choice(["x", "", name + "_scale"])] = torch.ones(2)
            near = 0.0 if constant else None
        elif kind == "value":
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
        elif kind == "renamed":  # GPT-2's first files have no prefix
            tensors = {n.removeprefix("transformer.").removeprefix("model."): t for n, t in tensors.items()}
            near = 0.0
        else:
            other = rng.random() < 0.5
            embedding = tensors[next(n for n in tensors if "wte" in n or "embed_tokens" in n)]
            tensors["lm_head.weight"] = embedding + 1 if other else embedding.clone()
            near = 0.0 if family != "gpt2" or not other else None  # a head that is not tied is another head
        print(family, kind, name, tensors.get(name, tensor).dtype, list(tensors.get(name, tensor).shape))
        save_file(tensors, file, metadata={"format": "pt"})
        loaded = result(lambda f=file: open_model(f.parent), file.parent)
        assert (loaded is not None) == (near is not None)
        if loaded is not None:
            assert torch.allclose(loaded(INPUT), hidden_of(checkpoints / family), atol=10 * near, rtol=near)


@mutants(25, 150)
def test_shards(count, checkpoints, spoilt, tmp_path):
    """An index may point at files of its directory alone, and must find each tensor once."""
    for rng in generators(count, "shards"):
        directory = spoilt(rng.choice(["gpt2", "llama"]))
        family = json.loads((directory / "config.json").read_text())["model_type"]
        tensors = load_file(directory / "model.safetensors")
        names = list(tensors)
        (directory / "model.safetensors").unlink()
        shards = {f"model-{n}.safetensors": {name: tensors[name] for name in names[n::2]} for n in range(2)}
        outside = tmp_path / "model-1.safetensors"
        for shard, part in shards.items():
            save_file(part, directory / shard)
        save_file(shards["model-1.safetensors"], outside)
        places = {name: shard for shard, part in shards.items() for name in part}
        kind = rng.choice(["none", "place", "twice", "absent", "tree", "bytes", "weights"])
        text = json.dumps({"metadata": {}, "weight_map": places})
        if kind == "place":
            place = rng.choice([str(outside), "../model-1.safetensors", "./model-1.safetensors", "..", "", "a\0b", 3,
                                None, "\\\\host\\x", "~/x", "model-1.safetensors/", "no.safetensors"])  # fmt: skip
            text = json.dumps({"weight_map": {**places, rng.choice(names): place}})
            if rng.random() < 0.5:  # instead of the good one, not beside it
                moved = {name: place for name, shard in places.items() if shard == "model-1.safetensors"}
                text = json.dumps({"weight_map": {**places, **moved}})
        elif kind == "twice":
            save_file(tensors, directory / "model-1.safetensors")
        elif kind == "absent":
            (directory / rng.choice(list(shards))).unlink()
        elif kind == "tree":
            text, kind = mutated_json(rng, text)
        elif kind == "bytes":
            text, kind = mutated_bytes(rng, text.encode())
        elif kind == "weights":
            shard = directory / rng.choice(list(shards))
            shard.write_bytes(shard.read_bytes()[: rng.randrange(100)])
        print(family, kind)
        (directory / "model.safetensors.index.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        result(lambda d=directory: hub.missing_files(d, True), directory)
        loaded = result(lambda d=directory: open_model(d), directory)
        assert loaded is not None or kind != "none"
        assert loaded is None or kind not in ("place", "twice", "absent", "weights")
        if loaded is not None:
            assert torch.equal(loaded(INPUT), hidden_of(checkpoints / family))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

TEXTS = ["The fox.", " a  b\n\tc", "Größe 東京 🦊\0 </s><|endoftext|>", "\u2028é", "x" * 50, ""]


@pytest.fixture(scope="module")
def texts_of(tiny_task):
    """{name: what the good tokenizer makes of TEXTS}"""
    return {name: read_all(read_tokenizer(tiny_task / name)) for name in ("student", "teacher")}


def read_all(tokenizer):
    ids = [tokenizer.encode(text) for text in TEXTS] + [tokenizer.encode_prompt(text) for text in TEXTS]
    assert all(0 <= i < tokenizer.size for part in ids for i in part) and 0 <= tokenizer.eos_id < tokenizer.size
    assert len(tokenizer.bytes) == tokenizer.size and tokenizer.bytes[tokenizer.eos_id] is None
    return ids, [tokenizer.decode(part) for part in ids], [tokenizer.spell(part) for part in ids], tokenizer.eos_id


@mutants(40, 200)
def test_tokenizers(count, tiny_task, tmp_path, texts_of):
    for rng in generators(count, "tokenizer"):
        name = rng.choice(["student", "teacher"])
        for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(tiny_task / name / file, tmp_path / file)
        file = tmp_path / "tokenizer.json"
        text = file.read_text(encoding="utf-8")
        tree = json.loads(text)
        vocabulary, added = tree["model"]["vocab"], tree["added_tokens"]
        token = rng.choice(list(vocabulary))
        kind = rng.choice(["bytes", "tree", "tree", "parts", "id", "hole", "added", "added id", "kind", "normalizer"])
        if kind == "bytes":
            content, kind = mutated_bytes(rng, text.encode())
        elif kind == "tree":
            content, kind = mutated_json(rng, text)
        else:
            if kind == "parts":
                part = rng.choice(["model", "decoder", "pre_tokenizer", "normalizer", "added_tokens", "post_processor"])
                tree[part] = rng.choice([None, [], {}, *({"type": t} for t in ("ByteLevel", "Sequence", "WordPiece"))])
            elif kind == "id":
                vocabulary[token] = rng.choice([-1, 0, 5, 2**31, 2**32 - 1, 2**32, 10**6, 10**9, 1.5, "3", None])
            elif kind == "hole":
                del vocabulary[token]
            elif kind == "added":
                options = dict.fromkeys(["lstrip", "rstrip", "normalized", "single_word"], False)
                name_of_it = rng.choice(["<new>", "", token, "fox"])
                added.append({"id": len(vocabulary), "content": name_of_it, "special": rng.random() < 0.5, **options})
            elif kind == "added id":
                rng.choice(added)["id"] = rng.choice([7, 10**4, 10**9, 2**32 - 1])
            elif kind == "kind":
                tree["model"] = rng.choice([
                    {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                     "max_input_chars_per_word": 100, "vocab": vocabulary},
                    {"type": "WordLevel", "unk_token": "[UNK]", "vocab": vocabulary},
                    {"type": "Unigram", "unk_id": rng.choice([None, 0, 10**6]), "byte_fallback": True,
                     "vocab": [[t, -float(i)] for t, i in vocabulary.items()]},
                ])  # fmt: skip
            else:
                tree["normalizer"] = rng.choice([
                    {"type": "NFC"}, {"type": "Lowercase"}, {"type": "NFKC"},
                    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
                    {"type": "Strip", "strip_left": True, "strip_right": True},
                ])  # fmt: skip
            content = json.dumps(tree)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        if rng.random() < 0.3:
            other = tmp_path / rng.choice(["tokenizer_config.json", "config.json"])
            content, what = mutated_json(rng, other.read_text())
            other.write_text(content)
            kind += f", {other.name} {what}"
        print(name, kind)
        tokenizer = result(lambda: read_tokenizer(tmp_path), tmp_path)
        if tokenizer is None:
            continue
        assert tokenizer.size < 10**7
        read_all(tokenizer)
        result(lambda t=tokenizer: check_size(t, 900), tmp_path)
        if file.read_text(encoding="utf-8") == text and tokenizer.eos_id == texts_of[name][3]:
            assert read_all(tokenizer) == texts_of[name]


# ---------------------------------------------------------------------------------------------------------------------
# Data

GOOD = [{"prompt": "Which fox?", "output": "This fox. \u2028 Größe 🦊"},
        {"instruction": "Go", "input": "on", "output": "é"},
        {"instruction": "List", "output": ["one", "two"]}, {"prompt": "half", "output": "a", "end_of_text": False},
        {"question": "1+1?", "answer": "#### 2"},
        {"prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    pass\n", "test": "def check(f): pass"},
        {"text": "Do", "code": "x = 1", "test_list": ["assert x"]}]  # fmt: skip


def parts(examples):
    return [(e.prompt_text(), e.outputs, e.ends, e.code) for e in examples]


@mutants(60, 750)
def test_data(count, tmp_path, tiny_task):
    tokenizer = read_tokenizer(tiny_task / "student")
    file = tmp_path / "ex amples é.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in GOOD))
    good = parts(read_examples(file))
    for rng in generators(count, "data"):
        lines = [json.dumps(line, ensure_ascii=rng.random() < 0.5) for line in GOOD]
        end, same, n = "\n", False, rng.randrange(len(lines))
        kind = rng.choice(["harmless", "bytes", "tree", "tree", "tree", "line", "key twice", "encoding", "surrogate"])
        content = None
        if kind == "harmless":
            same, end = True, rng.choice(["\n", "\r\n", "\n\n", " \n\t\n"])
            lines[n] = json.dumps(dict(reversed(GOOD[n].items())) | {"other": [float("nan"), 10**400, {"output": 1}]})
            content = rng.choice([b"", b"\xef\xbb\xbf"]) + end.join(lines).encode() + rng.choice([b"", b"\n", b"\n \n"])
        elif kind == "bytes":
            content, kind = mutated_bytes(rng, ("\n".join(lines) + "\n").encode())
        elif kind == "tree":
            lines[n], kind = mutated_json(rng, lines[n])
        elif kind == "line":
            lines[n] = rng.choice(["[]", "3", "null", "NaN", '"x"', "{}", "[" * 100_000, '{"a":' * 100_000, "\0", "{",
                                   "}{", '{"prompt": "p", "output": [["a"]]}', '{"prompt": "p", "output": []}',
                                   "\ufeff{}", lines[0] + lines[0], "1" * 5000])  # fmt: skip
        elif kind == "key twice":
            lines[n] = '{"output": "another", ' + lines[n][1:] if n < 4 else '{"answer": "2", "answer": "3"}'
        elif kind == "encoding":
            name = rng.choice(["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7"])
            content = ("\n".join(lines) + "\n").encode(name, "replace")
        else:
            lines[n] = '{"prompt": "p", "output": "a\\ud800b"}' if n else '{"prompt": "\\udc00", "output": "a"}'
        content = (end.join(lines) + end).encode() if content is None else content
        print(kind, f"line {n + 1}: {lines[n]:.200}")
        file.write_bytes(content)
        examples = result(lambda: read_examples(file), f"{file}, line ", f"{file}: ")
        assert examples is not None or not same
        if examples is None:
            continue
        assert kind not in ("line", "key twice", "surrogate")
        if same:
            assert parts(examples) == good
        for example in examples:
            result(lambda e=example: tokenise([e], tokenizer, max_len=128, max_prompt_len=100), example.where)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

NUMBERS = ["-1", "0", "1", "2", "0.5", "1e-300", "1e300", "1e309", "-1e309", "nan", "-nan", str(2**31), str(10**30),
           "9" * 5000, "", " ", "1e3", "0x10", "1_0", "٣", "one", "--", "1,5"]  # fmt: skip
NUMERIC = [e.name for e in fields(train.Options) if e.metadata["choices"] or type(e.default) in (int, float)]
NUMERIC += ["lora_alpha", "lora_dropout", "max_prompt_len", "device"]  # whose default is None


def refusal(main, arguments, capsys):
    """What main(arguments) exits with, one line; None if it went through."""
    try:
        main(arguments)
    except SystemExit as error:
        message = error.code if isinstance(error.code, str) else capsys.readouterr().err.strip().splitlines()[-1]
        assert "error: " in message and "\n" not in message, message
        return message
    return None


@mutants(15, 125)
def test_options_of_training(count, tiny_task, tmp_path, capsys, monkeypatch):
    """Each run that is not refused trains for an update, or says which term or weight was not finite."""
    monkeypatch.chdir(tmp_path)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((tiny_task / "train.jsonl").read_text().splitlines(True)[:3]))
    for n, rng in enumerate(generators(count, "train")):
        method = rng.choice(["sft", "dskd", "dskd", "seqkd", "uld"])
        given = {"student": tiny_task / "student", "teacher": tiny_task / "teacher", "data": few, "method": method,
                 "max_steps": 1, "batch_size": 2, "max_len": 96, "device": "cpu", "out": tmp_path / "run"}  # fmt: skip
        odd = rng.choices(NUMERIC, k=rng.choice([1, 1, 2]))
        given |= {name: rng.choice(NUMBERS) for name in odd}
        if given["max_steps"] in ("0", str(2**31), str(10**30)):
            given["epochs"], given["max_steps"] = "1", 1
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        print(n, arguments)
        message = refusal(train.main, arguments, capsys)
        if message is None:
            saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
            assert all(tensor.isfinite().all() for tensor in saved.values())
        else:
            flags = ["--" + name.replace("_", "-") for name in odd] + ["--max-prompt-len"] * ("max_len" in odd)
            assert any(flag in message for flag in flags) or "update 1: " in message, message
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_weights_that_an_update_spoils_are_not_saved(tiny_task, tmp_path, capsys):
    arguments = [f"--student={tiny_task / 'student'}", f"--data={tiny_task / 'valid.jsonl'}", "--method=sft",
                 f"--out={tmp_path / 'run'}", "--max-len=96", "--device=cpu", "--max-steps=1",
                 "--lr=1e300"]  # fmt: skip
    assert "update 1: it left weights that are not finite" in refusal(train.main, arguments, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


@mutants(25, 150)
def test_options_of_evaluation(count, tiny_task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = shutil.copytree(tiny_task / "student", tmp_path / "student of mine")
    for rng in generators(count, "eval"):
        given = {"data": tiny_task / "test.jsonl", "seeds": 1, "limit": 1, "max_len": 64, "batch_size": 2}
        odd = rng.choice(["seeds", "limit", "max_len", "max_prompt_len", "batch_size", "device", "dtype", "task"])
        given[odd] = rng.choice(NUMBERS)
        arguments = [str(student), *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]
        print(arguments)
        message = refusal(evaluation.main, arguments, capsys)
        assert message is None or "--" + odd.replace("_", "-") in message, message


def odd_paths(root, good):
    """{kind: path}; those called "good ..." lead to `good`, a file or directory"""
    root.mkdir()
    for n, name in enumerate(["sp ace", "ünï-東京", "-dash", "a'b\"c", "perc%20ent"]):
        place = root / f"{n}{name}" if n != 2 else root / name
        (shutil.copytree if good.is_dir() else shutil.copy)(good, place)
        yield f"good {name}", place
    (root / "link").symlink_to(good)
    yield "good link", root / "link"
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nowhere")
    (root / "empty directory").mkdir()
    (root / "empty file").touch()
    (root / "binary").write_bytes(random.Random(SEED).randbytes(300))
    os.mkfifo(root / "fifo")
    for name in ("loop", "dangling", "empty directory", "empty file", "binary", "nowhere", "x" * 300, "empty file/x"):
        yield name, root / name
    yield "null", "/dev/null"
    yield "nothing", ""
    yield "dot", "."
    yield "NUL", "a\0b"
    if not good.is_dir():
        yield "fifo", root / "fifo"  # whatever it is, it must not wait for a writer


@pytest.mark.parametrize("option", ["student", "data", "projectors", "out",
                                    *(pytest.param(option, marks=pytest.mark.slow) for option in ("teacher", "valid"))])
def test_paths(option, tiny_task, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_file({"t2s.weight": torch.zeros(32, 48)}, tmp_path / "projectors.safetensors")
    good = {"student": tiny_task / "student", "teacher": tiny_task / "teacher", "data": tiny_task / "test.jsonl",
            "valid": tiny_task / "valid.jsonl", "projectors": tmp_path / "projectors.safetensors"}  # fmt: skip
    target = good.get(option, tmp_path / "here")
    for kind, path in odd_paths(tmp_path / "paths", target):
        given = {**good, option: path, "max_len": 96, "device": "cpu", "batch_size": 2}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        print(kind, arguments)
        if option == "out":
            if kind in ("dot", "nowhere") or kind.startswith("good"):
                continue  # fine places
            (tmp_path / "paths" / "empty directory").rmdir() if kind == "empty directory" else None
            message = refusal(train.main, [*arguments, "--max-steps=1"], capsys)
            assert (message is None) == (kind == "empty directory"), message
            continue
        run = ["--max-steps=1", f"--out={tmp_path / 'run'}"] if option == "valid" else ["--dry-run"]
        message = refusal(train.main, [*arguments, *run], capsys)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert (message is None) == kind.startswith("good"), message
        assert message is None or f"--{option}" in message or str(path)[:50] in message or repr(path)[:50] in message


# ---------------------------------------------------------------------------------------------------------------------
# What a run or peft left behind


@mutants(10, 37)
def test_resuming_from_a_damaged_run(count, tiny_task, tmp_path, capsys):
    arguments = [f"--student={tiny_task / 'student'}", f"--data={tiny_task / 'valid.jsonl'}", "--method=sft",
                 "--max-len=96", "--device=cpu", "--epochs=2", "--batch-size=8", "--seed=1"]  # fmt: skip
    train.main([*arguments, f"--out={tmp_path / 'good'}"])
    expected = load_file(tmp_path / "good" / "student" / "model.safetensors")
    state = tmp_path / "good" / "resume" / "state.safetensors"
    content, tensors, metadata = state.read_bytes(), load_file(state), read_header(state)[0]["__metadata__"]
    moment = next(name for name in tensors if name.endswith(".exp_avg"))
    for odd, about in [({"student.norm.bias": torch.ones(3)}, metadata), ({moment: None}, metadata),
                       ({"random.cpu": torch.ones(1)}, metadata), ({}, {**metadata, "step": "x"}),
                       ({}, None)]:  # fmt: skip
        changed = {name: tensor for name, tensor in {**tensors, **odd}.items() if tensor is not None}
        save_file(changed, state, metadata=about)
        message = refusal(train.main, [*arguments, f"--out={tmp_path / 'good'}", "--resume"], capsys)
        assert f"{state}: not readable" in message, message
    state.write_bytes(content)
    for rng in generators(count, "resume"):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "good", run)
        (run / "args.json").write_text((run / "args.json").read_text().replace(str(tmp_path / "good"), str(run)))
        file = run / rng.choice(["args.json", "log.jsonl", "resume/state.safetensors", "resume/state.safetensors"])
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            header, body = read_header(file)
            if rng.random() < 0.5:
                text, kind = mutated_json(rng, json.dumps(header))
                write_header(file, text.encode(), body)
            else:
                content, kind = mutated_bytes(rng, content, within=len(content) - len(body))
                file.write_bytes(content)
        elif rng.random() < 0.5 and file.suffix == ".json":
            text, kind = mutated_json(rng, content.decode())
            file.write_text(text)
        else:
            content, kind = mutated_bytes(rng, content)
            file.write_bytes(content)
        print(file.name, kind)
        message = refusal(train.main, [*arguments, f"--out={run}", "--resume"], capsys)
        assert message is None or str(run) in message, message
        if message is None:
            resumed = load_file(run / "student" / "model.safetensors")
            assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


@mutants(15, 75)
def test_adapters(count, checkpoints, tmp_path):
    for rng in generators(count, "adapter"):
        family = rng.choice(["gpt2", "llama"])
        torch.manual_seed(0)
        trained = lora.attach(load_model(checkpoints / family), 2, 4.0)
        for layer in lora.adapted_layers(trained).values():
            torch.nn.init.normal_(layer.lora_B)
        save_adapter(trained, tmp_path)
        file = tmp_path / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
        if file.suffix == ".json":
            if rng.random() < 0.5:
                content, kind = mutated_bytes(rng, file.read_bytes())
            else:
                text, kind = mutated_json(rng, file.read_text())
                content = text.encode()
            file.write_bytes(content)
        elif rng.random() < 0.5:
            header, body = read_header(file)
            text, kind = mutated_json(rng, json.dumps(header))
            write_header(file, text.encode(), body)
        else:
            tensors = load_file(file)
            name, kind = rng.choice(list(tensors)), rng.choice(["nan", "int", "float8", "shape", "missing", "extra"])
            tensor = tensors.pop(name)
            changed = {"nan": tensor * float("nan"), "int": tensor.to(torch.int8), "shape": tensor.mT.contiguous(),
                       "float8": tensor.to(torch.float8_e4m3fn), "extra": tensor}  # fmt: skip
            if kind != "missing":
                tensors[name] = changed[kind]
            if kind == "extra":
                tensors[name.replace("lora_", "dora_")] = tensor.clone()
            save_file(tensors, file)
        print(family, file.name, kind)
        loaded = result(lambda f=family: load_adapter(load_model(checkpoints / f), tmp_path), tmp_path)
        assert loaded is None or kind not in ("nan", "int", "float8", "shape", "missing", "extra")
        if loaded is not None and file.suffix != ".json":
            assert torch.equal(loaded.eval()(INPUT), trained.eval()(INPUT))


# ---------------------------------------------------------------------------------------------------------------------
# What a model writes, to be graded

PIECES = ["1", "1,", "12", "000", ".", "/", " ", "-", "a", "A b", "%", "^", "\\frac", "{", "}", "\\boxed{", "\\text{",
          "####", "\n", "$", "**", "\\", "(", ")", "e", "×", "10", "\\times", "```", "```python\n", "def f(", "=", "[",
          "'", ":", "print", "if ", "import ", "é", "٣", "²", "\0", "~", "{,}", "km/h", "_", " - ", "<think>",
          "</think>", "> ", "answer is ", "No, ", "### Response:", "<|", "|>", "    ", "return "]  # fmt: skip


@mutants(40, 500)
def test_grading_of_any_text(count):
    """Quickly, too: a pattern that backtracks, or a scan of the rest for every match, would be felt here."""
    for rng in generators(count, "grade"):
        alphabet = rng.sample(PIECES, rng.choice([1, 2, 3, 10]))
        text = "".join(rng.choices(alphabet, k=rng.choice([3, 30, 5000])))
        print(alphabet, len(text))
        answer = final_answer(text)
        assert is_correct(text, ["3"]) == (answer is not None and answers_equal(answer, "3"))
        assert answers_equal(text, text) and is_correct("<think></think>#### 3\nSo.\n" + text, ["3"])
        assert {*"".join(mbpp_program(text).split())} <= {*text}
        assert humaneval_program("def f(x):\n", "f", text).startswith("def f(x):\n")


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies padded to different numbers of rows, as 151936 and 152064 for 151646 tokens


@pytest.mark.parametrize("method", ["kd", "dskd", "seqkd"])
@pytest.mark.parametrize("rows", [(936, 964), (964, 936), (900, 1000)])
def test_padded_vocabularies(method, rows, tiny_task, tmp_path, capsys):
    """From the command line to the scores; the padding's rows are large, and yet never a prediction or a sample."""
    directories = {}
    for seed, (role, count) in enumerate(zip(("student", "teacher"), rows, strict=True)):
        directory = directories[role] = shutil.copytree(tiny_task / "twin", tmp_path / role)
        torch.manual_seed(seed)
        m = model.build_model({**load_model(directory).config, "vocab_size": count, "tie_word_embeddings": False})
        if method == "seqkd" and role == "teacher":
            m.lm_head.weight.data[900:] *= 100
        model.save_model(m, directory)
    arguments = [f"--student={directories['student']}", f"--teacher={directories['teacher']}", f"--method={method}",
                 f"--data={tiny_task / 'valid.jsonl'}", f"--out={tmp_path / 'run'}", "--max-len=96", "--device=cpu",
                 "--max-steps=2", "--batch-size=5"]  # fmt: skip
    train.main(arguments)
    saved = load_model(tmp_path / "run" / "student")
    assert saved.embed.weight.shape[0] == saved.head_weight.shape[0] == rows[0]
    evaluation.main([str(tmp_path / "run"), f"--data={tiny_task / 'test.jsonl'}", "--seeds", "1", "--max-len=96"])
    report = json.loads((tmp_path / "run" / "eval-test.json").read_text())
    assert report["cross_entropy"] < 20 and any(report["responses"][0])
    if method == "seqkd":
        answers = read_examples(tmp_path / "run" / "seqkd.jsonl")
        assert len(answers) == 10


def test_padding_is_never_sampled(tiny_task, tmp_path):
    m = load_model(tiny_task / "student")
    m = model.build_model({**m.config, "vocab_size": 964})
    tokenizer = read_tokenizer(tiny_task / "student")
    m.embed.weight.data[900:] *= 100
    ids = [tokenizer.encode("The fox")]
    assert max(model.generate(m, ids, 30, None, seed=0)[0]) >= 900
    [response] = evaluation.respond(m, tokenizer, ["The fox"], 30, 1.0, seed=0)
    expected = model.generate(m, ids, 30, tokenizer.eos_id, seed=0, vocabulary=900)
    assert response == tokenizer.decode(expected[0])


# ---------------------------------------------------------------------------------------------------------------------
# No way in

ROOT = Path(model.__file__).parent
SOURCES = sorted(
    file for file in ROOT.rglob("*.py") if file.relative_to(ROOT).parts[0] not in ("tests", ".venv", "runs")
)
UNPICKLERS = set("pickle cPickle _pickle dill cloudpickle joblib shelve marshal yaml importlib runpy code pty".split())
STARTERS = {"subprocess", "multiprocessing"}
NEEDED = {"sandbox.py": {"subprocess", "exec", "compile"},
          "bench.py": {"multiprocessing", "importlib"},  # for versions
          "paper.py": {"subprocess"}, "reproduce.py": {"subprocess"}}  # runs of train.py # fmt: skip


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_is_read_is_ever_run(file):
    """No pickle, no torch.load, no exec or eval, no other programs: but for the sandbox, which exists for that, and
    the benchmark, which starts itself."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name.split(".")[0] for name in names} & (UNPICKLERS | STARTERS)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__", "torch.load", "np.fromfile"):
                found.add(called)
            if called.startswith(("os.system", "os.popen", "os.exec", "os.spawn", "torch.hub", "torch.jit.load")):
                found.add(called)
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "np.load" and arguments.get("allow_pickle") != "False":
                found.add("np.load with pickles")
            if arguments.get("trust_remote_code", "False") != "False" or arguments.get("shell", "False") != "False":
                found.add("trust_remote_code or shell")
    assert found == NEEDED.get(file.name, set())
