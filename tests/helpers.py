"""What several test files need: the inputs of every loss, tiny models, and the arguments and files of a run."""

import json
import math
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
import train
from baselines.mined import mined_loss
from baselines.uld import uld_loss
from fast import losses as fast_losses
from losses import RECIPES, Counts
from model import build_model, load_model, save_model
from runtime import run as checkpoint

CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"

# ---------------------------------------------------------------------------------------------------------------------
# Losses

N, M, K, d, D, V_S, V_T = 7, 9, 5, 3, 4, 8, 11
TOKENS, TEMPERATURE = 12.5, 1.5  # a mean over processes need not be a whole number
STUDENT_IDS, TEACHER_IDS = torch.tensor([0, 2, 3, 7]), torch.tensor([10, 1, 1, 4])  # MinED: 4 student tokens are meant
DIVERGENCES = list(losses.DIVERGENCES)
DSKD = [" ".join(names) for names in RECIPES]  # "v1 none", "v1 cma", ...
LEARN = ("student_hidden", "student_head", "t2s", "s2t")


class Inputs:
    """Random states, heads and projectors of one case, with labels that half of the tokens meet.

    A case is a method, or the recipe and the alignment of one kind of DSKD. The teacher is frozen, as in training.
    """

    def __init__(self, case: str, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.case, self.recipe, self.counts = case, RECIPES.get(tuple(case.split())), Counts(TOKENS)
        self.cma, paired = case == "v1 cma", case in ("uld", "mined", "v2 eta")
        self.student_hidden, self.student_head = random(N, d), random(V_S, d)
        self.teacher_hidden, self.teacher_head = random(M if self.cma or paired else N, D), random(V_T, D)
        self.t2s, self.s2t = random(d, D), random(D, d)
        self.t2s_weights, self.s2t_weights = random(N, M).softmax(1), random(M, N).softmax(1)
        self.rows, self.teacher_rows = slice(None), slice(None)
        if paired:  # K distinct ones, in any order
            self.rows, self.teacher_rows = torch.tensor([6, 0, 2, 3, 5]), torch.tensor([8, 1, 2, 4, 7])
        best = (self.student_hidden @ self.student_head.T).argmax(-1)
        self.gold = (best + torch.arange(N) % 2) % V_S  # every second one is the arg-max
        if self.recipe:
            best = (self.t2s_hidden() @ self.student_head.T).argmax(-1)
            self.label = (best + torch.arange(len(best)) % 2) % V_S
            self.counts = Counts(TOKENS, pairs=len(best), agreeing=-(-len(best) // 2))
            self.gold = self.label if self.recipe.labels == "gold" else self.gold
        for name in LEARN:
            getattr(self, name).requires_grad_()

    def arrays(self) -> dict:
        """Its tensors, for loops."""
        return {name: value.detach().numpy() for name, value in vars(self).items() if torch.is_tensor(value)}

    def aligned_teacher(self):
        return self.teacher_hidden[self.teacher_rows]

    def t2s_hidden(self):
        projected = self.aligned_teacher() @ self.t2s.T
        return self.t2s_weights @ projected if self.cma else projected

    def s2t_hidden(self):
        projected = self.student_hidden[self.rows] @ self.s2t.T
        return self.s2t_weights @ projected if self.cma else projected

    def arguments(self) -> dict:
        """Those of `dskd_loss`."""
        named = {
            name: getattr(self, name)
            for name in ("student_hidden", "gold", "rows", "label", "student_head", "teacher_head", "counts", "recipe")
        }
        return {**named, "t2s_hidden": self.t2s_hidden(), "s2t_hidden": self.s2t_hidden(),
                "teacher_hidden": self.aligned_teacher(), "temperature": TEMPERATURE}  # fmt: skip

    def terms(self, divergence="js", chunk=0, kd_rate=0.5) -> dict:
        """The loss of this case: the fast one, `chunk` tokens at a time, or the plain one (0)."""
        objective, chunk = (fast_losses, {"chunk": chunk}) if chunk else (losses, {})
        if self.recipe:
            return objective.dskd_loss(**self.arguments(), divergence=divergence, kd_rate=kd_rate, **chunk)
        if self.case == "sft":
            return objective.sft_loss(self.student_hidden, self.gold, self.student_head, self.counts, kd_rate, **chunk)
        states, heads = (self.student_hidden, self.gold), (self.student_head, self.teacher_head)
        if self.case == "kd":
            options = divergence, TEMPERATURE, kd_rate
            return objective.kd_loss(*states, self.teacher_hidden, *heads, self.counts, *options, **chunk)
        states += self.rows, self.aligned_teacher()
        if self.case == "uld":
            return uld_loss(*states, *heads, self.counts, kd_rate, **chunk)
        return mined_loss(*states, *heads, TEACHER_IDS, STUDENT_IDS, self.counts, TEMPERATURE, kd_rate, **chunk)

    def gradients(self, term) -> dict:
        """Of those that it reaches."""
        leaves = [getattr(self, name) for name in LEARN]
        gradients = torch.autograd.grad(term, leaves, retain_graph=True, allow_unused=True)
        return {name: g for name, g in zip(LEARN, gradients, strict=True) if g is not None and g.abs().max() > 0}


def values(terms: dict) -> dict[str, float]:
    return {name: term.item() for name, term in terms.items()}


def softmax(logits, temperature=1.0) -> list[float]:
    powers = [math.exp((z - max(logits)) / temperature) for z in map(float, logits)]
    return [power / sum(powers) for power in powers]


def cross_entropy(logits, label) -> float:
    return -math.log(softmax(logits)[int(label)])


def add_gold_by_loops(i: Inputs, logits: list, kd_rate: float, **terms: float) -> dict[str, float]:
    """`losses.add_gold`, token by token. logits: the student's, of each of the N."""
    ce = sum(cross_entropy(logits[n], i.gold[n]) for n in range(N)) / TOKENS
    correct = sum(int(logits[n].argmax()) == int(i.gold[n]) for n in range(N))
    assert 0 < correct < N  # so that it matters which
    return {"ce": ce, "correct": correct, **terms, "loss": (1 - kd_rate) * ce + kd_rate * terms.get("kd", 0)}


def divergence_by_loops(name, student_logits, teacher_logits, temperature=TEMPERATURE) -> float:
    """One token, from the papers' table, with nothing but math."""
    p, q = softmax(student_logits, temperature), softmax(teacher_logits, temperature)

    def kl(a, b):
        return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True))

    def mixture(weight):
        return [weight * y + (1 - weight) * x for x, y in zip(p, q, strict=True)]

    m, weight = mixture(0.5), adaptive_weight_by_loops(p, q)
    return {
        "fkl": kl(q, p),
        "rkl": kl(p, q),
        "js": (kl(q, m) + kl(p, m)) / 2,
        "skl": kl(q, mixture(0.1)),
        "srkl": kl(p, mixture(0.9)),
        "akl": weight * kl(q, p) + (1 - weight) * kl(p, q),
    }[name]


def adaptive_weight_by_loops(p, q, alpha=0.5) -> float:
    """g_h/(g_h + g_t), by walking up the teacher's probabilities."""
    mass, gap_tail, gap_head = 0.0, 0.0, 0.0
    for token in sorted(range(len(q)), key=lambda token: q[token]):
        mass += q[token]
        if mass <= alpha:
            gap_tail += abs(q[token] - p[token])
        else:
            gap_head += abs(q[token] - p[token])
    return gap_head / (gap_head + gap_tail)


class Largest(TorchDispatchMode):
    """Elements of the largest storage that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        given, made = ({x.untyped_storage().data_ptr(): x for x in tree_leaves(tree) if torch.is_tensor(x)}
                       for tree in ((args, kwargs), outputs))  # fmt: skip
        new = (x for storage, x in made.items() if storage not in given)
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in new)])
        return outputs


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "Le café était fermé à cause de la grève générale.",
    "Die Größe des Gebäudes überrascht viele Besucher.",
    "北京是中国的首都。上海很大。",
    "東京は日本の首都です。カタカナも。",
    "القاهرة هي عاصمة مصر.",
    "दिल्ली भारत की राजधानी है।",
    "I love pizza 🍕 and parties 🎉 with friends 👨‍👩‍👧.",
    "one\ttwo\t\tthree\n\n  four   five\r\nsix ",
    'def f(x):\n    return {"é": x[0] + 1}  # naïve\n',
]


def byte_level(vocabulary, **options) -> Tokenizer:
    """A byte-level tokenizer with this vocabulary and no merges."""
    tokenizer = Tokenizer(models.BPE(vocabulary, [], **options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def sentencepiece(vocabulary, **options) -> Tokenizer:
    """A SentencePiece-style tokenizer with this vocabulary and no merges."""
    tokenizer = Tokenizer(models.BPE(vocabulary, [], **options))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def wordpiece() -> Tokenizer:
    """One that cannot be aligned."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Models and runs

GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 40, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": None}  # fmt: skip
QWEN = {**LLAMA, "use_sliding_window": False, "sliding_window": 32, "max_window_layers": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2,
    "gpt2-odd": {**GPT2, "n_inner": 40, "activation_function": "relu", "tie_word_embeddings": False,
                 "layer_norm_epsilon": 1e-2},
    "llama": {**LLAMA, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
    "llama-multi-head": {**LLAMA, "num_key_value_heads": 6},
    "llama-tied-biases-head-dim": {**LLAMA, "head_dim": 6, "attention_bias": True, "mlp_bias": True,
                                   "tie_word_embeddings": True},
    "llama3-scaling": {**LLAMA, "head_dim": 16, "rope_theta": 1000.0, "rope_scaling": LLAMA3},
    "llama3-scaling-5": {**LLAMA, "head_dim": 16, "rope_parameters": {**LLAMA3, "rope_theta": 1000.0}},
    "qwen2-yarn": {**QWEN, "model_type": "qwen2", "head_dim": 16, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}},
    "mistral-window": {**LLAMA, "model_type": "mistral", "sliding_window": 5},
    "mistral-no-window": {**LLAMA, "model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "qwen2": {**QWEN, "model_type": "qwen2"},
    "qwen2-window": {**QWEN, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4},
    "qwen3": {**QWEN, "model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
    "qwen3-window": {**QWEN, "model_type": "qwen3", "head_dim": 4, "attention_bias": True, "use_sliding_window": True,
                     "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


def perturb(m, seed=0):
    """Random values everywhere, so that no bias is 0 and no norm 1, and logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return m.eval()


def random_model(config, seed=0):
    torch.manual_seed(seed)
    return perturb(build_model(config), seed)


def random_batch():
    """ids and mask (4, 14), right-padded, lengths 14, 9, 1, 2."""
    ids = torch.randint(0, 61, (4, 14), generator=torch.Generator().manual_seed(1))
    return ids, (torch.arange(14) < torch.tensor([[14], [9], [1], [2]])).long()


def make_model(source, directory, special_tokens=(), seed=0, **changes):
    """An untrained model like that in `source` but for some fields of its config.json, in `directory`: with the
    tokenizer that is there, else a copy of the source's, and these special tokens more."""
    config = json.loads((source / "config.json").read_text())
    if not directory.exists():
        shutil.copytree(source, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([*special_tokens])
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(seed)
    save_model(build_model({**config, "vocab_size": tokenizer.get_vocab_size(), **changes}), directory)
    return directory


def save_random(path, config=GPT2):
    """A valid directory to spoil; returns its config and tensors."""
    save_model(random_model(config), path)
    return json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")


def write(path, config, tensors):
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def arguments(task, out, **changed):
    """A command line for two updates on the tiny task, as a list."""
    options = {
        "teacher": task / "teacher", "student": task / "student", "data": task / "train.jsonl", "out": out,
        "max_steps": 2, "batch_size": 4, "max_len": 96, "max_prompt_len": 48, "log_every": 1, "device": "cpu",
        **changed,
    }  # fmt: skip
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [] if value is None else [flag, str(value)]
    return words


def load_run(words):
    """(options, pieces): a command line up to its first update."""
    o = train.check_options(train.Options(**train.settings(train.parse(words))))
    pieces = train.load(o)
    train.add_method(o, pieces)
    return o, pieces


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights_of(out) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "student" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def stopped_by_ctrl_c():
    """Within it a run ends right behind its first checkpoint, as by Ctrl-C twice."""
    save = checkpoint.save_checkpoint

    def save_and_stop(*things):
        save(*things)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit), match="^(130)?$"):
        patch.setattr(checkpoint, "save_checkpoint", save_and_stop)
        yield


def speaker(task, directory, files=None, says=(900, 902), special=True, text="The sky is blue."):
    """A model directory: after any token it says the first of `says`, after that the second. Its tokenizer is that of
    the tiny task's student with 900 (the text), 901 and 902, of which these two are special or not; `files`: entries of
    its other files, by their names."""
    files = files or {}
    shutil.copytree(task / "student", directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain = [AddedToken(token, special=False, normalized=False) for token in (text, "<turn>", "<stop>")]
    tokenizer.add_tokens(plain[:1])
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(plain[1:])
    tokenizer.save(str(directory / "tokenizer.json"))
    size = {"n_embd": 8, "n_head": 1, "n_positions": 1024, "tie_word_embeddings": False}
    m = load_model(make_model(task / "student", directory, **size, **files.get("config.json", {})))
    with torch.no_grad():
        for parameter in [*m.blocks.parameters(), *m.positions.parameters(), *m.lm_head.parameters()]:
            parameter.zero_()
        for name, parameter in m.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
        one, other = torch.eye(8)[:2] - 1 / 8  # directions of zero mean, as the norms leave them
        m.embed.weight[:] = one
        if says[0] != says[1]:
            m.embed.weight[says[0]] = other
        m.lm_head.weight[says[1]], m.lm_head.weight[says[0]] = 20 * other, 20 * one
    save_model(m, directory)
    if generation := files.get("generation_config.json"):
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def report_of(directory: Path, data: str) -> dict:
    """What eval.py wrote about a run, or here about a model that is no run."""
    here = f"eval-{str(directory).strip('/').replace('/', '-')}-{data}.json"
    return json.loads((directory / f"eval-{data}.json" if (directory / "student").is_dir() else Path(here)).read_text())
