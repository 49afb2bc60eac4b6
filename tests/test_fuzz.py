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
from helpers import arguments, make_model
from safetensors.torch import load_file, save_file

import eval as evaluation
import lora
import model
import train
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
# Files

INPUT = torch.arange(14)[None]
TEXTS = ["The fox.", " a  b\n\tc", "Größe 東京 🦊\0 </s><|endoftext|>", "\u2028é", "x" * 50, ""]
GOOD = [{"prompt": "Which fox?", "output": "This fox. \u2028 Größe 🦊"},
        {"instruction": "Go", "input": "on", "output": "é"},
        {"instruction": "List", "output": ["one", "two"]}, {"prompt": "half", "output": "a", "end_of_text": False},
        {"question": "1+1?", "answer": "#### 2"},
        {"prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    pass\n", "test": "def check(f): pass"},
        {"text": "Do", "code": "x = 1", "test_list": ["assert x"]}]  # fmt: skip


def mutate(rng, file):
    """Spoil a file: a value in its JSON, or some bytes; of a safetensors file only in the header, since the rest are
    numbers like any others."""
    content = file.read_bytes()
    whole_json = file.suffix == ".json" and rng.random() < 0.7
    if file.suffix == ".jsonl" and rng.random() < 0.7:
        lines = content.decode().splitlines()
        n = rng.randrange(len(lines))
        lines[n], what = mutated_json(rng, lines[n])
        content = "\n".join(lines).encode()
    elif whole_json:
        text, what = mutated_json(rng, content.decode())
        content = text.encode()
    elif file.suffix == ".safetensors":
        header, body = read_header(file)
        if rng.random() < 0.5:
            text, what = mutated_json(rng, json.dumps(header))
            write_header(file, text.encode(), body, rng.choice([None, None, 0, 1, 2**40, 2**64 - 1]))
            content = file.read_bytes()
        else:
            content, what = mutated_bytes(rng, content, within=len(content) - len(body))
    else:
        content, what = mutated_bytes(rng, content)
    file.write_bytes(content)
    print(file.name, what)


def read_header(file):
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file, header: bytes, body, length=None):
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + body)


@torch.no_grad()
def open_model(directory):
    """What a run does, and the states; those of a copy are the same, and training changes nothing about them."""
    hub.missing_files(directory, True)
    strict.check_model(directory)
    m = load_model(directory)
    if m.limit < INPUT.size(1):
        return None
    m.train()(INPUT)
    hidden = m.eval()(INPUT)
    assert hidden.isfinite().all()
    model.save_model(m, directory / "again")
    assert torch.equal(load_model(directory / "again")(INPUT), hidden)
    return hidden


def open_tokenizer(directory):
    tokenizer = read_tokenizer(directory)
    ids = [tokenizer.encode(text) for text in TEXTS] + [tokenizer.encode_prompt(text) for text in TEXTS]
    assert all(0 <= i < tokenizer.size for part in ids for i in part) and 0 <= tokenizer.eos_id < tokenizer.size
    assert len(tokenizer.bytes) == tokenizer.size < 10**7 and tokenizer.bytes[tokenizer.eos_id] is None
    result(lambda: check_size(tokenizer, 900), directory)
    return ids, [tokenizer.decode(part) for part in ids], [tokenizer.spell(part) for part in ids], tokenizer.eos_id


def open_data(directory):
    return [(e.prompt_text(), e.outputs, e.ends, e.code) for e in read_examples(directory / "examples é.jsonl")]


def open_adapter(directory):
    return load_adapter(load_model(directory.parent / "gpt2"), directory).eval()(INPUT)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory, tiny_task):
    """{kind: (directory, function that reads it, names of the files to spoil)}"""
    root = tmp_path_factory.mktemp("good")
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "hidden_size": 8,
             "max_position_embeddings": 16, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    kinds = {}
    for seed, family in enumerate(model.FIELDS):
        config = {name: value for name, value in sizes.items() if name in model.FIELDS[family]}
        torch.manual_seed(seed)
        model.save_model(model.build_model({"model_type": family, **config}), root / family)
        kinds[family] = root / family, open_model, ["config.json", "model.safetensors"]
    names = list(load_file(root / "llama" / "model.safetensors"))
    shards = {f"model-{n}.safetensors": names[n::2] for n in range(2)}
    (root / "shards").mkdir()
    shutil.copy(root / "llama" / "config.json", root / "shards")
    for shard, part in shards.items():
        tensors = load_file(root / "llama" / "model.safetensors")
        save_file({name: tensors[name] for name in part}, root / "shards" / shard)
    places = {name: shard for shard, part in shards.items() for name in part}
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    kinds["shards"] = root / "shards", open_model, ["model.safetensors.index.json", *shards]
    adapted = lora.attach(load_model(root / "gpt2"), 2, 4.0)
    for layer in lora.adapted_layers(adapted).values():
        torch.nn.init.normal_(layer.lora_B)
    save_adapter(adapted, root / "adapter")
    kinds["adapter"] = root / "adapter", open_adapter, ["adapter_config.json", "adapter_model.safetensors"]
    for name in ("student", "teacher"):
        kinds[f"{name}'s tokenizer"] = tiny_task / name, open_tokenizer, ["tokenizer.json", "tokenizer.json",
                                                                         "tokenizer_config.json", "config.json"]
    (root / "data").mkdir()
    (root / "data" / "examples é.jsonl").write_text("".join(json.dumps(line) + "\n" for line in GOOD))
    kinds["data"] = root / "data", open_data, ["examples é.jsonl"]
    return kinds


KINDS = [*model.FIELDS, "shards", "adapter", "student's tokenizer", "teacher's tokenizer", "data"]


@pytest.mark.parametrize("kind", KINDS)
@mutants(30, 500)
def test_spoilt_files(count, kind, good_files, tmp_path):
    """Refused by name or, if it is weights that the accident has not touched, read as if nothing were."""
    source, read, names = good_files[kind]
    shutil.copytree(good_files["gpt2"][0], tmp_path / "gpt2")
    expected, accepted = read(shutil.copytree(source, tmp_path / "whole")), 0
    for rng in generators(count, kind):
        directory = tmp_path / "spoilt"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, directory)
        file = directory / rng.choice(names)
        before = file.read_bytes()
        mutate(rng, file)
        found = result(lambda d=directory: read(d), directory)
        accepted += found is not None
        if found is not None and (file.suffix == ".safetensors" or file.read_bytes() == before):
            assert torch.equal(found, expected) if torch.is_tensor(found) else found == expected
    assert accepted < count


# ---------------------------------------------------------------------------------------------------------------------
# Command lines

NUMBERS = ["-1", "0", "1", "2", "0.5", "1e-300", "1e300", "1e309", "-1e309", "nan", "-nan", str(2**31), str(10**30),
           "9" * 5000, "", " ", "1e3", "0x10", "1_0", "٣", "one", "--", "1,5"]  # fmt: skip
NUMERIC = [e.name for e in fields(train.Options) if e.metadata["choices"] or type(e.default) in (int, float)]
NUMERIC += ["lora_alpha", "lora_dropout", "max_prompt_len", "device"]  # whose default is None


def refusal(main, words, capsys):
    """What main(words) exits with, one line; None if it went through."""
    try:
        main(words)
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
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        print(n, words)
        message = refusal(train.main, words, capsys)
        if message is None:
            saved = load_file(tmp_path / "run" / "student" / "model.safetensors")
            assert all(tensor.isfinite().all() for tensor in saved.values())
        else:
            flags = ["--" + name.replace("_", "-") for name in odd] + ["--max-prompt-len"] * ("max_len" in odd)
            assert any(flag in message for flag in flags) or "update 1: " in message, message
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_weights_that_an_update_spoils_are_not_saved(tiny_task, tmp_path, capsys):
    words = arguments(tiny_task, tmp_path / "run", method="sft", max_steps=1, lr=1e300)
    assert "update 1 left weights that are not finite" in refusal(train.main, words, capsys)
    assert not list(tmp_path.rglob("*.safetensors"))


@mutants(25, 150)
def test_options_of_evaluation(count, tiny_task, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = shutil.copytree(tiny_task / "student", tmp_path / "student of mine")
    for rng in generators(count, "eval"):
        given = {"data": tiny_task / "test.jsonl", "seeds": 1, "limit": 1, "max_len": 64, "batch_size": 2}
        odd = rng.choice(["seeds", "limit", "max_len", "max_prompt_len", "batch_size", "device", "dtype", "task"])
        given[odd] = rng.choice(NUMBERS)
        words = [str(student), *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]
        print(words)
        message = refusal(evaluation.main, words, capsys)
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
        words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        print(kind, words)
        if option == "out":
            if kind in ("dot", "nowhere") or kind.startswith("good"):
                continue  # fine places
            (tmp_path / "paths" / "empty directory").rmdir() if kind == "empty directory" else None
            message = refusal(train.main, [*words, "--max-steps=1"], capsys)
            assert (message is None) == (kind == "empty directory"), message
            continue
        run = ["--max-steps=1", f"--out={tmp_path / 'run'}"] if option == "valid" else ["--dry-run"]
        message = refusal(train.main, [*words, *run], capsys)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert (message is None) == kind.startswith("good"), message
        assert message is None or f"--{option}" in message or str(path)[:50] in message or repr(path)[:50] in message


# ---------------------------------------------------------------------------------------------------------------------
# What a run or peft left behind


@mutants(10, 37)
def test_resuming_from_a_damaged_run(count, tiny_task, tmp_path, capsys):
    options = {"method": "sft", "data": tiny_task / "valid.jsonl", "max_steps": 4, "batch_size": 8, "seed": 1}
    train.main(arguments(tiny_task, tmp_path / "good", **options))
    expected = load_file(tmp_path / "good" / "student" / "model.safetensors")
    state = tmp_path / "good" / "resume" / "state.safetensors"
    content, tensors, metadata = state.read_bytes(), load_file(state), read_header(state)[0]["__metadata__"]
    moment = next(name for name in tensors if name.endswith(".exp_avg"))
    for odd, about in [({"student.norm.bias": torch.ones(3)}, metadata), ({moment: None}, metadata),
                       ({"random.cpu": torch.ones(1)}, metadata), ({}, {**metadata, "step": "x"}),
                       ({}, None)]:  # fmt: skip
        changed = {name: tensor for name, tensor in {**tensors, **odd}.items() if tensor is not None}
        save_file(changed, state, metadata=about)
        message = refusal(train.main, arguments(tiny_task, tmp_path / "good", **options, resume=True), capsys)
        assert f"{state}: not readable" in message, message
    state.write_bytes(content)
    for rng in generators(count, "resume"):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "good", run)
        (run / "args.json").write_text((run / "args.json").read_text().replace(str(tmp_path / "good"), str(run)))
        mutate(rng, run / rng.choice(["args.json", "log.jsonl", "resume/state.safetensors"]))
        message = refusal(train.main, arguments(tiny_task, run, **options, resume=True), capsys)
        assert message is None or str(run) in message, message
        if message is None:
            resumed = load_file(run / "student" / "model.safetensors")
            assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())


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
        assert {*"".join(mbpp_program(text).split())} <= {*text, *"try: except BaseException: pass"}
        assert humaneval_program("def f(x):\n", "f", text).startswith("def f(x):\n")


# ---------------------------------------------------------------------------------------------------------------------
# Vocabularies padded to different numbers of rows, as 151936 and 152064 for 151646 tokens


def test_padded_vocabularies(tiny_task, tmp_path):
    """From the command line to the scores; the padding's rows are large, and yet never a prediction or a sample."""
    directories = {}
    for seed, (role, count) in enumerate([("student", 964), ("teacher", 1000)]):
        directory = directories[role] = tmp_path / role
        make_model(tiny_task / "twin", directory, seed=seed, vocab_size=count, tie_word_embeddings=False)
    teacher = load_model(directory)
    teacher.lm_head.weight.data[900:] *= 100
    model.save_model(teacher, directory)
    train.main(arguments(tiny_task, tmp_path / "run", method="seqkd", data=tiny_task / "valid.jsonl", **directories))
    saved = load_model(tmp_path / "run" / "student")
    assert saved.embed.weight.shape[0] == saved.head_weight.shape[0] == 964
    evaluation.main([str(tmp_path / "run"), f"--data={tiny_task / 'test.jsonl'}", "--seeds", "1", "--max-len=96"])
    report = json.loads((tmp_path / "run" / "eval-test.json").read_text())
    assert report["cross_entropy"] < 20 and any(report["responses"][0])
    assert len(read_examples(tmp_path / "run" / "seqkd.jsonl")) == 10


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
