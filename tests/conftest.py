"""What tests share: one thread, a cache of their own, and a prepared tiny task: data, tokenizers, untrained models."""

import json
import os
import shutil

import pytest
import torch
from helpers import SENTENCES, byte_level
from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers

import model
import train
from experiments import tiny


def pytest_configure(config):
    """A card is for the tests that are marked so. The others hold a CPU's numbers, some bit by bit, and on a card would
    wait for the compiler in every run."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models of a few thousand parameters lose more by waiting for a second thread than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Vocabulary maps are kept in the user's cache: not in that of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def short_ends_of_runs():
    """What costs a run of a few updates the most is its end: samples of 128 tokens, and the wait for the disk, which is
    for the case that the power fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAMPLE_TOKENS", 8)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """What is written into the current directory goes there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory):
    """A directory with teacher/ and student/, tokenizers of `helpers.SENTENCES`: SentencePiece-style and byte-level."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.train_tokenizers(SENTENCES, str(folder / "teacher"), str(folder / "student"))
    return folder


@pytest.fixture(scope="session")
def trained(trained_folder):
    """These two, and a byte-level one that changes the text."""
    nfc, alphabet = byte_level({}), sorted(pre_tokenizers.ByteLevel.alphabet())
    nfc.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    nfc.train_from_iterator(SENTENCES[2:], trainer)
    return {
        "sentencepiece": Tokenizer.from_file(str(trained_folder / "teacher" / "tokenizer.json")),
        "byte-level": Tokenizer.from_file(str(trained_folder / "student" / "tokenizer.json")),
        "nfc": nfc,
    }


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory):
    """A directory with train.jsonl (40 examples), valid.jsonl (10), test.jsonl (10), teacher/ and student/ of different
    vocabularies, twin/, a wider model with the student's tokenizer, and dropout/, the student with dropout."""
    root = tmp_path_factory.mktemp("tiny")
    data = tiny.make_data(seed=0, teacher_train=2000, student_train=40, valid=10, test=10, reading=0)
    texts = [text for example in data["teacher_train"] for text in example.values()]
    tiny.train_tokenizers(texts, str(root / "teacher"), str(root / "student"))
    for part, name in (("student_train", "train"), ("valid", "valid"), ("test", "test")):
        lines = (json.dumps(example) + "\n" for example in data[part])
        (root / f"{name}.jsonl").write_text("".join(lines))
    small_student = {**tiny.STUDENT, "n_embd": 32, "n_layer": 1}
    small_teacher = {**tiny.TEACHER, "hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 64}
    shutil.copytree(root / "student", root / "twin")
    for seed, (name, config) in enumerate(
        [("teacher", small_teacher), ("student", small_student), ("twin", {**small_student, "n_embd": 48})]
    ):
        torch.manual_seed(seed)
        model.save_model(model.build_model(config), root / name)
    shutil.copytree(root / "student", root / "dropout")
    config = {**model.load_model(root / "student").config, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    (root / "dropout" / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def small_task(monkeypatch):
    """The embedded task with 300 examples for its teacher, 40 for its student, 11 to test on, and smaller models."""
    make_data = tiny.make_data
    monkeypatch.setattr(tiny, "make_data", lambda seed: make_data(seed, 300, 40, 11, 11, reading=40))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    monkeypatch.setattr(tiny, "TEACHER", {**tiny.TEACHER, **small})
    monkeypatch.setattr(tiny, "STUDENT", {**tiny.STUDENT, "n_embd": 16, "n_layer": 1})
