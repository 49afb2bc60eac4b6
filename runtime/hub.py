"""From a name to files: presets of models and data sets, a local path first, then the local cache, then a download."""

import os
import shlex
from difflib import get_close_matches
from pathlib import Path

from model import checkpoint_files

MODELS = {  # preset: repository on the Hugging Face hub
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "qwen": "Qwen/Qwen1.5-1.8B",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "llama2": "meta-llama/Llama-2-7b-hf",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}

# The papers' splits: they report scores on valid.jsonl; Dolly's dev set is the beginning of its raw.jsonl. We could not
# list these repositories, so the file names are those that the official code reads (dolly's valid.jsonl has 500 lines).
# If a file does not exist, the error names it.
DATASETS = {  # name: (repository, {split: (file, first, last)}): the lines [first, last) from 0; None: the end
    "dolly": (
        "MiniLLM/dolly",
        {"train": ("raw.jsonl", 1000, None), "valid": ("raw.jsonl", 0, 1000), "test": ("valid.jsonl", 0, None)},
    ),
    "self-inst": ("MiniLLM/self-inst", {"test": ("valid.jsonl", 0, None)}),
    "vicuna": ("MiniLLM/Vicuna", {"test": ("valid.jsonl", 0, None)}),
    "sinst": ("MiniLLM/sinst", {"test": ("11_/valid.jsonl", 0, None)}),
    "uinst": ("MiniLLM/uinst", {"test": ("11_/valid.jsonl", 0, 10_000)}),
}

# The hub has these only as parquet, and reading that needs another package
BY_HAND = {  # name: (repository with the JSONL original, file in it)
    "gsm8k": ("https://github.com/openai/grade-school-math", "grade_school_math/data/test.jsonl"),
    "humaneval": ("https://github.com/openai/human-eval", "data/HumanEval.jsonl.gz"),
    "mbpp": ("https://github.com/google-research/google-research", "mbpp/mbpp.jsonl"),
}

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
               "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")


def model_directory(name: str, weights: bool = True) -> Path:
    """The local directory of a model. `name` is a directory (of a model or a run), a preset, or a hub repository
    `owner/model`. Only JSON and safetensors files (and a chat template) are ever downloaded, and no code in them runs.
    Raises FileNotFoundError with the missing files, and ValueError for a damaged download."""
    repository = None if os.path.isdir(name) else repository_of(name)
    if os.path.isdir(name):
        directory = Path(name)
        if not (directory / "config.json").is_file() and (directory / "student" / "config.json").is_file():
            directory /= "student"  # of a run
    elif repository:
        files = [*MODEL_FILES, *WEIGHT_FILES] if weights else list(MODEL_FILES)
        directory = find_snapshot(repository, "model", files, name)
    elif "/" in name or os.path.exists(name):
        beside = sorted(path.name for path in Path(name).parent.glob("*/"))
        near = [f"{Path(name).parent}/{other}" for other in get_close_matches(Path(name).name, beside)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise FileNotFoundError(f"model {name!r}: no such directory (a path is not looked up on the hub){hint}")
    else:
        presets = ", ".join(sorted(["tiny", *MODELS]))
        raise FileNotFoundError(f"model {name!r} is neither a directory nor a preset; presets: {presets}")
    missing = missing_files(directory, weights)
    if missing:
        why = explain_missing(directory, missing, repository)
        raise FileNotFoundError(f"{directory}: no {' and no '.join(missing)}{why}")
    return directory


def explain_missing(directory: Path, missing: list[str], repository: str | None) -> str:
    """What the directory has instead of these files, and how to turn it into a model directory. For a hub repository,
    whose other files have not been fetched, how to turn what it may have into one."""

    def convert(kind: str) -> str:
        code = f"import sys; from transformers import {kind} as T; T.from_pretrained(sys.argv[1])"
        code += ".save_pretrained(sys.argv[1])"
        return f'; if you trust them, convert once: python -c "{code}" {shlex.quote(str(directory))}'

    files, said = {file.name for file in directory.iterdir()}, ""
    inside = sorted(str(file.parent) for file in directory.glob("*/config.json"))
    if missing[0] == "config.json" and inside:
        said += f"; there is a model in {' and in '.join(inside[:4])}"
    elif missing[0] == "config.json" and "args.json" in files:
        said += "; it is a run without a checkpoint: continue it with --resume"
    if missing[-1] not in MODEL_FILES and any(file.startswith("pytorch_model") for file in files):
        said += f"; its pickled weights (pytorch_model.bin) are not read{convert('AutoModelForCausalLM')}"
    if missing[0] not in MODEL_FILES:
        said += "; a student --from-scratch needs no weights"
    pieces = any(file.endswith(".model") for file in files)  # SentencePiece's
    if "tokenizer.json" in missing and (pieces or files & {"vocab.json", "merges.txt"}):
        said += f"; its older tokenizer files are not read{convert('AutoTokenizer')}"
        said += "; this needs the packages sentencepiece and protobuf" * pieces
    if repository and missing[0] != "config.json" and not missing[-1].endswith(".safetensors"):  # more than a shard
        code = "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T"
        code += "; [x.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for x in (M, T)]"
        said += f"; if {repository} has pickled weights or older tokenizer files, and you trust them, convert once (a "
        said += f'tokenizer.model needs the packages sentencepiece and protobuf): python -c "{code}" {repository} DIR'
        said += ", and give DIR"
    return said


def repository_of(name: str) -> str | None:
    """The hub repository that a preset or `owner/model` stands for; None for a name that can only be a mistyped path:
    it begins with an existing directory (or runs/, ./, /, ~), has more slashes, or ends like weights or data."""
    owner, _, model = name.partition("/")
    is_path = not model or "/" in model or owner == "runs" or name.startswith((".", "/", "~")) or Path(owner).is_dir()
    is_file = Path(name).suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jsonl")
    return MODELS.get(name, None if is_path or is_file else name)


def missing_files(directory: Path, weights: bool) -> list[str]:
    """The files that a model directory lacks: config.json, tokenizer.json, the weights (in one file or in shards)."""
    missing = [file for file in MODEL_FILES[:2] if not (directory / file).is_file()]
    single, index = (directory / file for file in WEIGHT_FILES[:2])
    if not weights or single.is_file():
        return missing
    if not index.is_file():
        return [*missing, "model.safetensors (or model.safetensors.index.json and its shards)"]
    try:
        return missing + [shard.name for shard in checkpoint_files(directory) if not shard.is_file()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected a JSON object with a weight_map of tensor names to file names") from error


def data_file(name: str, split: str) -> tuple[Path, int, int | None]:
    """The JSONL file of a data set and the lines [first, last), from 0, that make up `split`: (path, first, last).
    `name` is a named set or a file; a file has no splits, and is used as a whole."""
    if os.path.isfile(name):
        return Path(name), 0, None
    if name in BY_HAND:
        repository, file = BY_HAND[name]
        raise FileNotFoundError(
            f"{name!r}: the hub has this set only as parquet; download that (pyarrow reads it) or the original, {file} "
            f"of {repository}, and give its path instead of the name: --data FILE"
        )
    if name not in DATASETS:
        names = ", ".join([*DATASETS, *BY_HAND])
        raise FileNotFoundError(f"data {name!r} is neither a file nor a named set; named sets: {names}")
    repository, splits = DATASETS[name]
    if split not in splits:
        raise ValueError(f"data set {name!r} has no {split} split, only {', '.join(splits)}")
    file, first, last = splits[split]
    path = find_snapshot(repository, "dataset", [file], name) / file
    if not path.is_file():
        where = f"neither the cache nor the repository {repository}"
        raise FileNotFoundError(f"{name!r}: {where} has {file}; give the path of a JSONL file")
    return path, first, last


def find_snapshot(repository: str, kind: str, files: list[str], name: str) -> Path:
    """The local folder with these files of a hub repository: from the cache, or else downloaded with progress bars.
    The hub's client checks only the sizes of what it downloads; `verify_checksums` checks the contents."""
    from huggingface_hub import errors, snapshot_download

    request = {"repo_id": repository, "repo_type": kind, "allow_patterns": files}
    try:
        cached = Path(snapshot_download(**request, local_files_only=True))
        lacking = missing_files(cached, WEIGHT_FILES[0] in files) if kind == "model" else []
        if not lacking and (cached / files[0]).is_file():
            return cached
    except errors.LocalEntryNotFoundError:
        pass  # not in the cache: fetch it
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a directory nor the name of a repository: {error}") from error
    try:
        downloaded = Path(snapshot_download(**request))
    except Exception as error:  # the names of the HTTP library's exceptions differ from version to version
        if isinstance(error, errors.GatedRepoError):
            why = f": the repository {repository} is gated: accept its licence on the hub and run `hf auth login`, or:"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = f": there is no public {kind} repository {repository}."
        else:
            offline = isinstance(error, errors.LocalEntryNotFoundError)
            why = "the hub cannot be reached" if offline else f"downloading failed ({type(error).__name__}: {error})"
            why = f" is not a {'file' if kind == 'dataset' else 'directory'}, is not in the local cache, and {why}."
        option = "--data FILE.jsonl" if kind == "dataset" else "its path instead of the name"
        wanted = ", ".join(files) + " (to train or score, also the weights)" * (files == list(MODEL_FILES))
        by_hand = f"Download {wanted} of {repository} on a machine that can, and give {option}."
        raise FileNotFoundError(f"{name!r}{why} {by_hand}") from error
    verify_checksums(downloaded)
    return downloaded


def verify_checksums(folder: Path) -> None:
    """Raises ValueError if the content of a snapshot's file does not match its name in the cache, which is the checksum
    that the hub announced: the SHA-256 of a large file, the git hash of a small one."""
    from huggingface_hub.utils import sha

    for link in sorted(path for path in folder.rglob("*") if path.is_symlink() and path.is_file()):
        blob = link.resolve()
        if len(blob.name) not in (40, 64) or set(blob.name) - set("0123456789abcdef"):
            continue  # a name that another kind of server gave
        with open(blob, "rb") as stream:
            digest = sha.sha_fileobj(stream).hex() if len(blob.name) == 64 else sha.git_hash(stream.read())
        if digest != blob.name:
            raise ValueError(f"{link}: damaged in the download (wrong checksum); remove {blob} and try again")
