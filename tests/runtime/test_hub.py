"""hub.py: names to files, without any network. What needs the hub's client runs in a process of its own, because that
client reads its environment when it is imported."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from helpers import SENTENCES, arguments, load_run
from safetensors.torch import load_file

from model import load_model
from runtime import hub
from runtime.hub import DATASETS, MODELS, data_file, model_directory
from runtime.load import find_model
from runtime.tokenizer import read_tokenizer

ROOT = Path(hub.__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put(directory, *files):
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        (directory / file).write_text("{}")
    return directory


def put_index(directory, *shards):
    weight_map = {f"tensor{n}": shard for n, shard in enumerate(shards)}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# ---------------------------------------------------------------------------------------------------------------------
# Local files


def test_local_directory(tmp_path):
    put(tmp_path, "config.json", "tokenizer.json", "model.safetensors")
    assert model_directory(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").unlink()
    assert model_directory(str(tmp_path), weights=False) == tmp_path
    put(tmp_path, "a.safetensors", "b.safetensors")
    put_index(tmp_path, "a.safetensors", "b.safetensors", "a.safetensors")
    assert model_directory(str(tmp_path)) == tmp_path


def test_a_directory_comes_before_a_preset(tmp_path, monkeypatch):
    put(tmp_path / "gpt2", "config.json", "tokenizer.json", "model.safetensors")
    (tmp_path / "dolly").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert model_directory("gpt2") == Path("gpt2")
    assert data_file("dolly", "valid") == (Path("dolly"), 0, None)


@pytest.mark.parametrize(
    "files, weights, missing",
    [
        ((), True, ["config.json", "tokenizer.json", "model.safetensors (or"]),
        (("config.json", "model.safetensors"), True, ["tokenizer.json"]),
        (("tokenizer.json", "model.safetensors"), True, ["config.json"]),
        (("config.json", "tokenizer.json"), True, ["model.safetensors (or model.safetensors.index.json and its"]),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), True, ["model.safetensors (or"]),
        (("config.json", "tokenizer.json", "pytorch_model-00001-of-00002.bin"), True, ["model.safetensors (or"]),
        (("config.json",), False, ["tokenizer.json"]),
    ],
)
def test_missing_files_are_named(tmp_path, files, weights, missing):
    put(tmp_path, *files)
    with pytest.raises(FileNotFoundError) as caught:
        model_directory(str(tmp_path), weights)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: no {missing[0]}")
    for file in ("config.json", "tokenizer.json", "model.safetensors (or"):
        assert (f"no {file}" in message) == any(file in named for named in missing)
    assert ("pickled weights" in message) == any(file.startswith("pytorch_model") for file in files)
    assert ("--from-scratch" in message) == missing[0].startswith("model.safetensors")  # nothing else is missing


@pytest.mark.parametrize("kind", ["pickled weights", "older tokenizer files", "both"])
def test_other_layouts_are_converted_by_the_command_that_is_named(tmp_path, tiny_task, monkeypatch, kind):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    source, directory = tiny_task / "student", tmp_path / "of mine"
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("model.safetensors", "tokenizer.json"))
    if kind != "both":
        shutil.copy(source / {"pickled weights": "tokenizer.json"}.get(kind, "model.safetensors"), directory)
    if kind != "older tokenizer files":
        tensors = load_file(source / "model.safetensors")
        torch.save(tensors, directory / "pytorch_model.bin")
    if kind != "pickled weights":
        vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]
        (directory / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
        (directory / "merges.txt").write_text("\n".join(" ".join(pair) for pair in vocabulary["merges"]))
        (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(FileNotFoundError, match="are not read") as caught:
        model_directory(str(directory))
    words = shlex.split(str(caught.value))  # as a shell reads them
    commands = [index for index, word in enumerate(words) if word == "-c"]
    assert len(commands) == 1 + (kind == "both")
    for index in commands:
        monkeypatch.setattr(sys, "argv", ["-c", words[index + 2].rstrip(";")])
        exec(words[index + 1], {})
    assert find_model(str(directory), "student") == directory
    assert torch.equal(load_model(directory).embed.weight, load_model(source).embed.weight)
    before, after = (read_tokenizer(path, rows=900).encode(SENTENCES[0]) for path in (source, directory))
    assert before == after


def test_a_repository_without_these_files_is_converted_by_the_command_that_is_named(tmp_path, tiny_task, monkeypatch):
    """As microsoft/DialoGPT-small, which has pytorch_model.bin, vocab.json and merges.txt: none of them is fetched."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    source, old = tiny_task / "student", put(tmp_path / "old", "config.json")
    shutil.copy(source / "config.json", old)
    fetched = shutil.copytree(old, tmp_path / "snapshot")
    monkeypatch.setattr(hub, "find_snapshot", lambda repository, kind, files, name: fetched)
    with pytest.raises(FileNotFoundError, match="no tokenizer.json; if owner/old .* owner/old DIR, and give DIR$"):
        find_model("owner/old", "student")
    shutil.copy(source / "tokenizer.json", fetched)
    with pytest.raises(FileNotFoundError, match="no model.safetensors .*; if owner/old has") as caught:
        find_model("owner/old", "student")
    words = shlex.split(str(caught.value))
    torch.save(load_file(source / "model.safetensors"), old / "pytorch_model.bin")
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]
    (old / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (old / "merges.txt").write_text("\n".join(" ".join(pair) for pair in vocabulary["merges"]))
    monkeypatch.setattr(sys, "argv", ["-c", str(old), str(tmp_path / "new")])
    exec(words[words.index("-c") + 1], {})
    new = find_model(str(tmp_path / "new"), "student")
    assert torch.equal(load_model(new).embed.weight, load_model(source).embed.weight)


def test_what_reading_a_sentencepiece_model_needs_is_named(tmp_path):
    """Without these packages, transformers 5 asks for tiktoken, which does not help."""
    put(tmp_path, "config.json", "model.safetensors", "tokenizer.model")
    with pytest.raises(FileNotFoundError, match="convert once: .*; this needs the packages sentencepiece and"):
        model_directory(str(tmp_path))


def test_a_run_is_its_student(tmp_path):
    run, student = put(tmp_path / "run", "args.json"), tmp_path / "run" / "student"
    with pytest.raises(FileNotFoundError, match="no config.json.*a run without a checkpoint: continue it with"):
        model_directory(str(run))
    put(student, "config.json", "tokenizer.json", "model.safetensors")
    assert model_directory(str(run)) == student
    put(run, "config.json", "tokenizer.json", "model.safetensors")  # a model that happens to have such a folder
    assert model_directory(str(run)) == run
    put(tmp_path / "trainer" / "checkpoint-500", "config.json")
    with pytest.raises(FileNotFoundError, match="no config.json.*there is a model in .*trainer/checkpoint-500"):
        model_directory(str(tmp_path / "trainer"))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1, "b": "c"}}'])
def test_malformed_index_is_named(tmp_path, content):
    put(tmp_path, "config.json", "tokenizer.json")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="model.safetensors.index.json: expected a JSON object with a weight_map"):
        model_directory(str(tmp_path))


@pytest.mark.parametrize(
    "name, hint",
    [("runs/qwen-gtp2", "; did you mean runs/qwen-gpt2?"), ("runs/x", ""), ("here/qwen", ""), ("a/b/c", ""),
     ("a/model.safetensors", ""), ("a/model.gguf", ""), ("a/model.pt", ""), ("a/model.pth", ""), ("a/x.jsonl", ""),
     ("./gpt2-of-mine", ""), ("/nowhere/model", ""), ("~/model", "")],
)  # fmt: skip
def test_a_mistyped_path_is_not_looked_up(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "here")
    if hint:
        put(tmp_path / "runs" / "qwen-gpt2")
    monkeypatch.setattr(hub, "find_snapshot", lambda *where: pytest.fail("it was"))
    with pytest.raises(FileNotFoundError, match="no such directory") as caught:
        model_directory(name)
    assert repr(name) in str(caught.value) and str(caught.value).endswith(f"on the hub){hint}")


def test_an_unsupported_model_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    directory = put(tmp_path, "config.json", "tokenizer.json")  # all that is there yet
    (directory / "config.json").write_text('{"model_type": "gemma2"}')
    monkeypatch.setattr(hub, "find_snapshot", lambda repository, kind, files, name: directory)
    with pytest.raises(ValueError, match="'gemma2' is not supported"):
        find_model("google/gemma-2-9b", "teacher")


UNKNOWN = [(model_directory, ("gpt3",), ["tiny", *MODELS])]
UNKNOWN += [(data_file, (name, "train"), DATASETS) for name in ("dolly2", "absent.jsonl", "a/b")]


@pytest.mark.parametrize("find, arguments, known", UNKNOWN)
def test_an_unknown_name_is_answered_with_those_that_are_known(find, arguments, known):
    with pytest.raises(FileNotFoundError) as caught:
        find(*arguments)
    assert all(name in str(caught.value) for name in [repr(arguments[0]), *known])


@pytest.mark.parametrize("name", hub.BY_HAND)
def test_sets_that_the_hub_has_as_parquet_only(name, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"'{name}': .*only as parquet.* or the original.*--data FILE"):
        data_file(name, "test")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("{}")
    assert data_file(name, "test") == (Path(name), 0, None)


def test_split_that_a_set_does_not_have():
    for split in ("train", "valid"):
        with pytest.raises(ValueError, match=f"'vicuna' has no {split} split, only test"):
            data_file("vicuna", split)


def test_named_sets_are_split_as_in_the_papers(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **where: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "raw.jsonl", "valid.jsonl")
    put(tmp_path / "11_", "valid.jsonl")
    raw, valid, long = (tmp_path / file for file in ("raw.jsonl", "valid.jsonl", "11_/valid.jsonl"))
    assert data_file("dolly", "train") == (raw, 1000, None)
    assert data_file("dolly", "valid") == (raw, 0, 1000)
    assert data_file("dolly", "test") == (valid, 0, None)
    assert data_file("self-inst", "test") == data_file("vicuna", "test") == (valid, 0, None)
    assert data_file("sinst", "test") == (long, 0, None) and data_file("uinst", "test") == (long, 0, 10_000)
    valid.unlink()
    with pytest.raises(FileNotFoundError, match="'dolly': .* MiniLLM/dolly has valid.jsonl; give the path"):
        data_file("dolly", "test")
    assert data_file("dolly", "train") == (raw, 1000, None)


def test_a_run_holds_dollys_dev_set_out(tiny_task, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **where: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"prompt": "a", "output": "dev" if n < 1000 else "train"}) + "\n" for n in range(1003))
    (tmp_path / "raw.jsonl").write_text("".join(lines))
    options = {"method": "sft", "teacher": None, "data": "dolly", "valid": "dolly"}
    _, pieces = load_run(arguments(tiny_task, tmp_path / "run", **options))
    assert [example.outputs[0] for example in pieces.examples] == ["train"] * 3
    assert [example.outputs[0] for example in pieces.valid] == ["dev"] * 1000


# ---------------------------------------------------------------------------------------------------------------------
# Cache, offline

PROBE = """
import sys, json
from runtime import hub
for call in json.loads(sys.argv[1]):
    try:
        found = getattr(hub, call[0])(*call[1:])
        print("found", found[0] if isinstance(found, tuple) else found)
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " // "))
"""


def probe(home, *calls, **environment):
    """What each call of a function of hub.py gives in a process with this cache and no network, a line each."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(calls)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls)
    return lines


def snapshot(home, repository, kind="model"):
    """The folder of a cached repository, laid out as the hub's client does."""
    folder = home / "hub" / f"{kind}s--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return put(folder / "snapshots" / COMMIT)


def test_offline_with_an_empty_cache(tmp_path):
    models = [("gpt2",), ("gpt2", False), ("someone/some-model",), ("some/b@d",)]
    full, unweighted, other, invalid = probe(tmp_path, *(("model_directory", *arguments) for arguments in models))
    dolly, uinst = probe(tmp_path, ("data_file", "dolly", "train"), ("data_file", "uinst", "test"))
    for line, name, repository in [(full, "gpt2", MODELS["gpt2"]), (other, "someone/some-model", "someone/some-model")]:
        assert line.startswith(f"FileNotFoundError '{name}' is not a directory, is not in the local cache, and the hub")
        assert "config.json, tokenizer.json, tokenizer_config.json, generation_config.json, special_tok" in line
        assert "special_tokens_map.json, chat_template.jinja, model.safetensors" in line
        assert f"of {repository} on a machine that can, and give its path instead of the name" in line
    assert "chat_template.jinja (to train or score, also the weights) of" in unweighted and "also" not in full
    assert invalid.startswith("FileNotFoundError 'some/b@d' is neither a directory nor the name of a repository")
    for line, name, file, repository in [
        (dolly, "dolly", "raw.jsonl", "MiniLLM/dolly"),
        (uinst, "uinst", "11_/valid.jsonl", "MiniLLM/uinst"),
    ]:
        assert line.startswith(f"FileNotFoundError '{name}' is not a file, is not in the local cache, and the hub")
        assert f"Download {file} of {repository} on" in line and "--data FILE" in line


def test_cached_snapshot_is_found_offline(tmp_path):
    model = put(snapshot(tmp_path, MODELS["gpt2"]), "config.json", "tokenizer.json", "model.safetensors")
    unweighted = put(snapshot(tmp_path, MODELS["qwen"]), "config.json", "tokenizer.json")
    sharded = put(snapshot(tmp_path, MODELS["llama2"]), "config.json", "tokenizer.json", "s1.safetensors")
    put_index(sharded, "s1.safetensors")
    dolly = put(snapshot(tmp_path, "MiniLLM/dolly", "dataset"), "raw.jsonl")
    uinst = put(snapshot(tmp_path, "MiniLLM/uinst", "dataset") / "11_", "valid.jsonl")
    expected = {
        ("model_directory", "gpt2"): model,
        ("model_directory", MODELS["gpt2"]): model,
        ("model_directory", "qwen", False): unweighted,
        ("model_directory", "llama2"): sharded,
        ("data_file", "dolly", "valid"): dolly / "raw.jsonl",
        ("data_file", "uinst", "test"): uinst / "valid.jsonl",
    }
    assert probe(tmp_path, *expected) == [f"found {path}" for path in expected.values()]


def test_incomplete_snapshot_is_not_trusted(tmp_path):
    sharded = put(snapshot(tmp_path, MODELS["llama2"]), "config.json", "tokenizer.json", "model-1.safetensors")
    put_index(sharded, *(f"model-{n}.safetensors" for n in (1, 2, 3)))
    put(snapshot(tmp_path, MODELS["gpt2"]), "config.json", "model.safetensors")
    put(snapshot(tmp_path, MODELS["qwen"]), "config.json", "tokenizer.json", "tokenizer_config.json")
    snapshot(tmp_path, "MiniLLM/dolly", "dataset")
    calls = [("model_directory", "llama2"), ("model_directory", "gpt2"), ("model_directory", "qwen"),
             ("data_file", "dolly", "valid")]  # fmt: skip
    shard, tokenizer, weights, raw = probe(tmp_path, *calls)
    assert shard.startswith(f"FileNotFoundError {sharded}: no model-2.safetensors and no model-3.safetensors")
    assert "pickled weights" in weights and "pickled weights" not in shard  # of which others are there
    assert tokenizer.startswith("FileNotFoundError") and "no tokenizer.json" in tokenizer
    assert weights.startswith("FileNotFoundError") and "no model.safetensors (or" in weights
    assert raw.startswith("FileNotFoundError 'dolly': neither the cache nor the repository MiniLLM/dolly has raw.jsonl")


def test_incomplete_snapshot_is_fetched_anew(tmp_path, monkeypatch):
    """Only a complete snapshot is used without asking the hub."""
    import huggingface_hub

    cached, calls = put(tmp_path / "cached", "config.json", "tokenizer.json"), []

    def download(repo_id, repo_type, allow_patterns, local_files_only=False):
        calls.append(local_files_only)
        assert (repo_id, repo_type) == (MODELS["gpt2"], "model")
        assert all(file.endswith((".json", ".safetensors", ".jinja")) for file in allow_patterns)
        assert any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in allow_patterns)
        if not local_files_only:
            put(cached, "model.safetensors")
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert model_directory("gpt2") == cached and calls == [True, False]
    assert model_directory("gpt2") == cached and calls == [True, False, True]


def test_a_file_of_a_cached_set_that_is_not_there_yet_is_fetched(tmp_path, monkeypatch):
    """Who has trained on Dolly has its raw.jsonl alone."""
    import huggingface_hub

    cached = put(tmp_path / "cached", "raw.jsonl")

    def download(allow_patterns, local_files_only=False, **where):
        if not local_files_only:
            put(cached, *allow_patterns)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert data_file("dolly", "test") == (cached / "valid.jsonl", 0, None)


@pytest.mark.parametrize("damage", ["nothing", "model.safetensors", "config.json", "more/model.safetensors"])
def test_downloads_are_verified(tmp_path, monkeypatch, damage):
    """The client's cache names a file by the checksum that the hub has announced: SHA-256, or git's for small files."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    contents = {"model.safetensors": b"weights" * 300_000, "config.json": b"{}", "tokenizer.json": b"{} ",
                "more/model.safetensors": b"more"}  # fmt: skip
    names = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    names["config.json"] = "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # `printf {} | git hash-object --stdin`
    names["tokenizer.json"] = "W/another-server"
    folder, blobs = snapshot(tmp_path, MODELS["gpt2"]), tmp_path / "blobs"

    def download(local_files_only=False, **where):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        for name, content in contents.items():
            blob = blobs / names[name]
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content[:-1] + b"?" if name == damage else content)
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(blob)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    if damage == "nothing":
        assert model_directory("gpt2") == folder
    else:
        with pytest.raises(ValueError, match=f"{damage}: damaged in the download.*remove {blobs / names[damage]}"):
            model_directory("gpt2")


@pytest.mark.parametrize(
    "error, expected",
    [("GatedRepoError", "is gated: accept its licence"), ("RepositoryNotFoundError", "there is no public model repos"),
     ("OSError", r"downloading failed \(OSError: no space left\)"),
     ("RuntimeError", r"downloading failed \(RuntimeError: no space left\)")],
)  # fmt: skip
def test_failed_downloads_say_why(tmp_path, monkeypatch, error, expected):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error, None) or {"OSError": OSError, "RuntimeError": RuntimeError}[error]

    def download(local_files_only=False, **where):
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        failure = kind.__new__(kind, "no space left")
        Exception.__init__(failure, "no space left")
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"'llama2'.*{expected}.*Download config.json") as caught:
        model_directory("llama2")
    assert MODELS["llama2"] in str(caught.value) and isinstance(caught.value.__cause__, kind)
