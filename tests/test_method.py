"""One update of every method on tiny random models: what must be 0, what must not matter, what must move."""

import copy
import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import pad

import train
from baselines.mined import edit_distance_alignment, edit_distance_map, token_spellings
from data import Example, tokenise
from experiments import plain_step, tiny
from losses import DIVERGENCES, predict_tokens
from model import TRANSPOSED, build_model, hidden_at, hugging_face_names
from runtime.strict import choose_alignment
from runtime.tokenizer import read_tokenizer

TEXTS = [
    ("Who is the red fox?", "The fox is a friend of the old owl."),
    ("Where?", "In the barn, near the café."),
    ("Name a colour that the owl likes.", "red"),
    ("What does the shy fox do at night in the barn?", "It dances in the night, and the owl is the band: hoo, hoo!"),
    ("Who is the owl?", "The owl is the friend of the fox."),
]
GPT2 = {"model_type": "gpt2", "n_positions": 128, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0,
        "eos_token_id": 0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": 1,
         "eos_token_id": 2, "tie_word_embeddings": False}  # fmt: skip
# method, recipe, align; with the teacher of the student's own vocabulary unless aligned
METHODS = {
    "sft": ("sft", "v2", "none"),
    "kd": ("kd", "v2", "none"),
    "uld": ("uld", "v2", "auto"),
    "mined": ("mined", "v2", "auto"),
    "dskd v1": ("dskd", "v1", "none"),
    "dskd v1 cma": ("dskd", "v1", "cma"),
    "dskd v2": ("dskd", "v2", "none"),
    "dskd v2 eta": ("dskd", "v2", "eta"),
}
every_method = pytest.mark.parametrize("name", METHODS)
EXACT = {"rtol": 1e-4, "atol": 1e-6}  # float32 sums in another order


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """(SentencePiece-style teacher's, byte-level student's), of different texts, so that they cut words differently."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [text for example in TEXTS for text in example]
    foreign = ["The elephants danced, and then the zebras danced.", "The olden barbers!", *texts[:3]] * 2
    tiny.train_tokenizers(foreign, str(folder / "teacher"), str(folder / "unused"))
    tiny.train_tokenizers(texts, str(folder / "unused"), str(folder / "student"))
    return read_tokenizer(folder / "teacher"), read_tokenizer(folder / "student")


def random_model(config, rows, seed):
    """With logits that are far apart, so that predictions are firm and differ from place to place."""
    torch.manual_seed(seed)
    model = build_model({**config, "vocab_size": rows})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape)
    return model


class Setting:
    """Models and rows, and what one method makes of them."""

    def __init__(self, tokenizers, name, student=None, teacher=None, padding=(0, 0), **options):
        self.method, self.recipe, self.align = METHODS[name]
        cross = self.align != "none"
        self.tokenizer, self.teacher_tokenizer = tokenizers[1], tokenizers[0 if cross else 1]
        self.student = student or random_model(GPT2, self.tokenizer.size + padding[0], seed=0)
        config = LLAMA if cross else {**GPT2, "n_embd": 24}
        self.teacher = teacher or random_model(config, self.teacher_tokenizer.size + padding[1], seed=1)
        if self.method == "sft":
            self.teacher = self.teacher_tokenizer = None
        torch.manual_seed(2)
        self.o = train.Options(
            method=self.method, recipe=self.recipe, align=self.align, device="cpu", dtype="fp32", projector_lr=1e-3,
            **options,
        )  # fmt: skip
        both = self.student, self.tokenizer, self.teacher, self.teacher_tokenizer
        self.made = train.Method(self.o, *both)
        texts = TEXTS if name != "uld" else [*TEXTS[:-1], ("Who?", "The elephants danced, then the zebras danced.")]
        examples = [Example("here", [output], prompt=prompt) for prompt, output in texts]  # ULD: also a longer student
        both = self.tokenizer, self.teacher_tokenizer
        self.rows, report = tokenise(examples, *both, 128, 64, align=self.made.align)
        assert report.prompts_cut == report.responses_cut == 0
        for row in self.rows if self.method in train.PAIRINGS else ():
            row.pairs = train.PAIRINGS[self.method](row, *both)
        self.pieces = train.Pieces(
            self.student, self.tokenizer, self.teacher, self.teacher_tokenizer, self.rows, method=self.made
        )

    def batch(self, rows=None):
        return self.pieces.collate(rows or self.rows, "cpu")

    def parameters(self):
        named = [("student", self.student), ("projectors", self.made.projectors or torch.nn.Module())]
        return {f"{kind}.{key}": parameter for kind, module in named for key, parameter in module.named_parameters()}

    def update(self, *batches, sampled=None):
        """Terms and gradients of one update."""
        for parameter in self.parameters().values():
            parameter.grad = None
        terms = train.distil(self.o, self.pieces, self.student, list(batches) or [self.batch()], sampled)
        gradients = {name: p.grad.clone() for name, p in self.parameters().items() if p.grad is not None}
        return terms, gradients

    def fit_t2s(self, steps=40):
        """Train the projectors a little, so that some projected teacher states agree with their labels and some not."""
        projectors = [p for p in self.made.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(projectors, lr=0.02)
        for _ in range(steps):
            agreement = self.update()[0]["t2s_agreement"]
            if agreement > 0.3:
                break
            optimizer.step()
        assert 0.1 < agreement < 0.9, "the settings of this test do not exercise the agreement mask"
        return self


# -- what must not matter ----------------------------------------------------------------------------------------------


def padded(side, extra, filler):
    """The same batch, `extra` columns wider."""
    width = side.input_ids.shape[1]
    wider = copy.copy(side)
    wider.input_ids = pad(side.input_ids, (0, extra), value=filler)
    wider.positions, wider.real = (at // width * (width + extra) + at % width for at in (side.positions, side.real))
    return wider


@every_method
def test_padding_order_and_splitting_do_not_matter(tokenizers, name):
    setting = Setting(tokenizers, name)
    if name.startswith("dskd"):
        setting.fit_t2s()
    terms, gradients = setting.update()
    rows = setting.rows
    assert any(key.startswith("student.") for key in gradients)
    assert any(key.startswith("projectors.t2s") for key in gradients) == name.startswith("dskd")
    if name in ("uld", "mined"):  # some tokens have a partner and some have none
        assert 0 < len(setting.batch().student_index) < len(setting.batch().student.labels)
    if name == "dskd v2 eta":  # pairs are dropped for both reasons
        batch = setting.batch()
        assert len(batch.student_index) < len(batch.student.labels)
        assert setting.made.ask_teacher(batch).rows.numel() < len(batch.student_index)

    wide = setting.batch()
    wide.student = padded(wide.student, 7, filler=5)
    if wide.teacher is not None:
        wide.teacher = padded(wide.teacher, 3, filler=9)
    shuffled = [rows[i] for i in (3, 0, 4, 2, 1)]
    ways = {
        "padding": [wide],
        "order": [setting.batch(shuffled)],
        "one by one": [setting.batch([row]) for row in rows],
        "parts": [setting.batch(shuffled[:2]), setting.batch(shuffled[2:])],
    }
    for way, batches in ways.items():
        found, found_gradients = setting.update(*batches)
        assert found == pytest.approx(terms, rel=1e-5, abs=1e-6), way
        assert found_gradients.keys() == gradients.keys(), way
        torch.testing.assert_close(found_gradients, gradients, **EXACT)
    plain = Setting(tokenizers, name, setting.student, setting.teacher, chunk=0)  # instead of the fast losses
    plain.made.projectors = setting.made.projectors
    setting = plain
    found, found_gradients = setting.update(*ways["parts"])
    assert found == pytest.approx(terms, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found_gradients, gradients, **EXACT)


# -- what they are: plainly, from whole tensors of states and logits ---------------------------------------------------


def states_of(model, side):
    """Hidden states, input and label of every response position, example by example and without padding."""
    sequence = torch.tensor([side.prompt + side.response])
    first = len(side.prompt) - 1
    return model(sequence)[0, first:-1], sequence[0, first:-1], sequence[0, first + 1 :]


@pytest.mark.parametrize("how", ["plain", *["transformers"] * (find_spec("transformers") is not None)])
@pytest.mark.parametrize("plain, name", [("kd", "kd"), ("same", "dskd v2"), ("cma", "dskd v1 cma"),
                                         ("eta", "dskd v2 eta")])  # fmt: skip
def test_an_update_is_what_experiments_plain_step_writes_out(tokenizers, plain, name, how):
    """Loss and every gradient, with weights that leave some projected predictions right and some wrong."""
    setting = Setting(tokenizers, name)
    if name != "kd":
        setting.fit_t2s()
    terms, gradients = setting.update()
    for parameter in setting.parameters().values():
        parameter.grad = None
    models = [setting.student, setting.teacher]
    if how == "transformers":
        models = [plain_step.as_transformers(m) for m in models]
        models[1].requires_grad_(False)
    sides = [[row.student for row in setting.rows], [row.teacher for row in setting.rows]]
    sides = [plain_step.pad(side, 0, "cpu") for side in sides]
    pairs = plain_step.pair_positions(setting.rows, "cpu") if plain == "eta" else None
    loss = plain_step.plain_loss(plain, setting.made, models, sides, pairs)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(terms["loss"], rel=1e-5)
    found = {key: parameter.grad for key, parameter in setting.parameters().items()}
    if how == "transformers":
        theirs, names = dict(models[0].named_parameters()), hugging_face_names(setting.student)
        for key, named in names.items():
            gradient = theirs[named].grad
            found[f"student.{key}"] = gradient.mT if TRANSPOSED.search(key) else gradient
    assert gradients.keys() == {key for key, gradient in found.items() if gradient is not None}
    for key, gradient in gradients.items():
        error = (found[key] - gradient).norm() / gradient.norm().clamp(min=1e-3)
        assert error < 1e-3, (key, float(error))


@every_method
def test_the_options_of_the_loss_reach_it(tokenizers, name):
    setting = Setting(tokenizers, name, kd_rate=0.2)
    if name.startswith("dskd"):
        setting.fit_t2s()  # so that some agree: v1 has the divergence in that term alone
    before, _ = setting.update()
    assert before["loss"] == pytest.approx(before["ce"] if name == "sft" else 0.8 * before["ce"] + 0.2 * before["kd"])
    changes = {"temperature": 3.0} if name not in ("sft", "uld") else {}
    changes |= {"divergence": "rkl"} if name == "kd" or name.startswith("dskd") else {}
    for option, value in changes.items():
        setattr(setting.o, option, value)
        terms, _ = setting.update()
        assert terms["kd"] != pytest.approx(before["kd"], rel=1e-5), option
        before = terms


def test_the_logged_shares_by_their_definitions(tokenizers):
    """`accuracy` is of the gold responses, all others are of the sampled ones."""
    setting = Setting(tokenizers, "dskd v2 eta").fit_t2s()
    head, (gold, sampled) = setting.student.head_weight, map(setting.batch, (setting.rows[:2], setting.rows[2:]))
    predicted = predict_tokens(hidden_at(setting.student, gold.student), head)
    gold.student.labels[::3] = predicted[::3]  # a random student is hardly ever right
    said = setting.made.ask_teacher(sampled)
    agree = predict_tokens(setting.made.projectors.t2s(said.hidden), head) == said.label
    terms, _ = setting.update(gold, sampled=[sampled])
    assert terms["accuracy"] == pytest.approx((predicted == gold.student.labels).float().mean().item())
    assert terms["t2s_agreement"] == pytest.approx(agree.float().mean().item()) and agree.any()
    assert terms["align_ratio"] == pytest.approx(sum(sampled.align_ratios) / 3)
    assert terms["student_tokens"] == len(sampled.student.labels)
    assert terms["teacher_tokens"] == len(sampled.teacher.labels)


def test_eta_compares_the_vocabularies_by_bytes(tokenizers):
    """Each byte string's plain token on both sides, or its byte-fallback token; end-of-text means end-of-text."""
    setting = Setting(tokenizers, "dskd v2 eta")

    def by_bytes(tokenizer):
        names = [tokenizer.tokenizer.id_to_token(i) for i in range(tokenizer.size)]
        fallback = {i for i, name in enumerate(names) if name.startswith("<0x")}
        plain = {b: i for i, b in enumerate(tokenizer.bytes) if b and i not in fallback}
        return {tokenizer.bytes[i]: i for i in fallback} | plain

    ids_t, ids_s = map(by_bytes, tokenizers)
    shared = sorted(ids_t.keys() & ids_s.keys())
    head_t = setting.teacher.head_weight[[ids_t[b] for b in shared]].double()
    head_s = setting.student.head_weight[[ids_s[b] for b in shared]].double().detach()
    for layer, source, target in (("t2s", head_t, head_s), ("s2t", head_s, head_t)):
        expected, found = torch.linalg.lstsq(target, source).solution, getattr(setting.made.projectors, layer).weight
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert (tokenizers[0].eos_id, tokenizers[1].eos_id) == (2, 0)
    expected = [0 if i == 2 else ids_s.get(spelt, -1) for i, spelt in enumerate(tokenizers[0].bytes)]
    assert setting.made.student_token.tolist() == expected and -1 in expected


def test_a_predicted_end_is_a_label_as_any_other(tokenizers, monkeypatch):
    """The student's is id 0 here."""
    setting = Setting(tokenizers, "dskd v2 eta")
    ends = [tokenizer.eos_id for tokenizer in tokenizers]
    monkeypatch.setattr(setting.made.objective, "predict_tokens", lambda hidden, _: torch.full((len(hidden),), ends[0]))
    batch = setting.batch()
    said = setting.made.ask_teacher(batch)
    assert ends[1] == 0 and torch.equal(said.rows, batch.student_index) and (said.label == 0).all()


def test_mined_by_its_definition(tokenizers):
    """Dense targets with the official code's sentinels: −1e5 for no probability, 100 for the gold token."""
    teacher_tokenizer, tokenizer = tokenizers
    setting = Setting(tokenizers, "mined")
    terms, _ = setting.update()
    mapped = edit_distance_map(teacher_tokenizer.tokenizer, tokenizer.tokenizer).tolist()
    names = [teacher_tokenizer.tokenizer.id_to_token(i) for i in range(len(mapped))]
    first = {}
    for plain in (True, False):
        for index, student_id in enumerate(mapped):
            if names[index].startswith("<0x") != plain:
                first.setdefault(student_id, index)
    total, ratios = 0, []
    spellings_t, spellings_s = (token_spellings(both.tokenizer) for both in tokenizers)
    for row in setting.rows:
        (h, x, y), (g, x_t, _) = states_of(setting.student, row.student), states_of(setting.teacher, row.teacher)
        spelt = [spellings_t[i] for i in x_t.tolist()], [spellings_s[i] for i in x.tolist()]
        pairs = [(m, n) for m, n in zip(*edit_distance_alignment(*spelt), strict=True) if mapped[x_t[m]] == x[n]]
        first_tokens = spellings_t[row.teacher.response[0]], spellings_s[row.student.response[0]]
        if len(set(first_tokens)) > len({token.removeprefix(b" ") for token in first_tokens}):
            pairs = [(m, n) for m, n in pairs if n > 0]  # only one of them begins with SentencePiece's space
        ratios.append(len(pairs) / len(y))
        target = torch.full((len(y), len(setting.student.head_weight)), -1e5)
        target[torch.arange(len(y)), y] = 100
        for m, n in pairs:
            logits = g[m] @ setting.teacher.head_weight.T
            target[n] = -1e5
            target[n, list(first)] = logits[list(first.values())]
        total += DIVERGENCES["fkl"](h @ setting.student.head_weight.T, target, 2.0).sum().item()
    assert terms["kd"] == pytest.approx(total / terms["student_tokens"], rel=1e-5)
    assert terms["align_ratio"] == pytest.approx(sum(ratios) / len(ratios)) and 0.1 < terms["align_ratio"] < 0.9


# -- on-policy ---------------------------------------------------------------------------------------------------------


def splits(setting, rows):
    return [setting.batch(rows)], [setting.batch(rows[:2]), setting.batch(rows[2:])], [setting.batch([r]) for r in rows]


@pytest.mark.parametrize("name", ["kd", "dskd v2", "dskd v2 eta"])  # what --on-policy goes with
def test_on_policy_is_gold_cross_entropy_and_distillation_on_the_samples(tokenizers, name):
    """loss = (1 − r)·ce(gold) + r·kd(sampled), each a mean over its own tokens, however the update is split."""
    setting = Setting(tokenizers, name, kd_rate=0.3)
    if name.startswith("dskd"):
        setting.fit_t2s()
    setting.o.max_len = 48
    rows, tokens = train.sample_rows(setting.o, setting.pieces, setting.rows, step=0)
    assert sum(len(row.student.response) for row in rows) != sum(len(row.student.response) for row in setting.rows)
    sft = Setting(tokenizers, "sft", setting.student)
    gold, gold_gradients = sft.update(sft.batch(setting.rows))
    _, sampled_ce_gradients = sft.update(sft.batch(rows))
    both, both_gradients = setting.update(setting.batch(rows))  # as if the samples were gold
    expected = {**both, "ce": gold["ce"], "accuracy": gold["accuracy"]}
    expected["loss"] = 0.7 * gold["ce"] + 0.3 * both["kd"]
    expected_gradients = dict(both_gradients)
    for key, gradient in gold_gradients.items():
        expected_gradients[key] = both_gradients[key] + 0.7 * (gradient - sampled_ce_gradients[key])
    for gold, sampled in zip(splits(setting, setting.rows), splits(setting, rows)[::-1], strict=True):
        found, gradients = setting.update(*gold, sampled=sampled)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradients, expected_gradients, **EXACT)


def test_sampling_is_without_dropout_and_leaves_no_trace(tokenizers):
    student = random_model({**GPT2, "embd_pdrop": 0.5, "resid_pdrop": 0.5}, tokenizers[1].size + 9, seed=0)
    with torch.no_grad():
        student.head_weight[tokenizers[1].size :] = 3 * student.head_weight[:9]  # no such tokens, but likely
    setting = Setting(tokenizers, "dskd v2 eta", student)
    setting.o.max_len = 40
    student.train()
    state = torch.get_rng_state()
    rows, _ = train.sample_rows(setting.o, setting.pieces, setting.rows, step=3)
    again, _ = train.sample_rows(setting.o, setting.pieces, setting.rows, step=3)
    assert torch.equal(torch.get_rng_state(), state) and student.training and student.blocks[0].training
    assert all(parameter.grad is None for parameter in student.parameters())
    assert [row.student for row in rows] == [row.student for row in again]
    for o, step in ((setting.o, 4), (replace(setting.o, seed=1), 3)):
        other, _ = train.sample_rows(o, setting.pieces, setting.rows, step)
        assert [row.student for row in rows] != [row.student for row in other]
    student.eval()
    assert [row.student for row in train.sample_rows(setting.o, setting.pieces, setting.rows, step=3)[0]] == [
        row.student for row in rows
    ]
    for row, new in zip(setting.rows, rows, strict=True):
        assert new.student.prompt == row.student.prompt and new.teacher.prompt == row.teacher.prompt
        assert max(new.student.response) < tokenizers[1].size
        for side, eos_id in ((new.student, tokenizers[1].eos_id), (new.teacher, tokenizers[0].eos_id)):
            assert 0 < len(side.response) <= 40 - len(side.prompt)
            assert eos_id not in side.response[:-1]
        ended = new.student.response[-1] == tokenizers[1].eos_id
        assert (new.teacher.response[-1] == tokenizers[0].eos_id) == ended


def test_the_share_of_on_policy_updates():
    for share in (0.0, 0.25, 1.0):
        o = train.Options(on_policy=share)
        drawn = [train.is_on_policy(o, step, 100) for step in range(2000)]
        assert sum(drawn) / 2000 == pytest.approx(share, abs=0.04)
        assert drawn == [train.is_on_policy(o, step, 100) for step in range(2000)]
        later = train.Options(on_policy=share, on_policy_after=3)
        assert [train.is_on_policy(later, step, 100) for step in range(2000)] == [False] * 300 + drawn[300:]
    other = [train.is_on_policy(train.Options(on_policy=0.5, seed=1), step, 100) for step in range(50)]
    assert other != [train.is_on_policy(train.Options(on_policy=0.5, seed=2), step, 100) for step in range(50)]


# -- who moves ---------------------------------------------------------------------------------------------------------


@every_method
def test_what_weight_decay_takes_from(tokenizers, name):
    """With no gradient at all, a step shrinks the student's matrices and all of the projectors that are trained."""
    setting = Setting(tokenizers, name)
    setting.o.weight_decay = 0.1
    optimizer = train.make_optimizer(setting.o, setting.pieces)
    before = {key: parameter.detach().clone() for key, parameter in setting.parameters().items()}
    for parameter in setting.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for key, parameter in setting.parameters().items():
        if key.startswith("projectors."):
            rate = setting.o.projector_lr if parameter.requires_grad else 0.0
        else:
            rate = setting.o.lr if parameter.dim() >= 2 else 0.0
        torch.testing.assert_close(parameter.detach(), before[key] * (1 - 0.1 * rate), rtol=1e-6, atol=0)
        assert torch.equal(parameter, before[key]) == (rate == 0), key
    if "v1" in name:
        assert "projectors.t2s.bias" in before


@every_method
def test_one_step_moves_what_should_move_and_nothing_else(tokenizers, name):
    setting = Setting(tokenizers, name)
    if name.startswith("dskd"):
        setting.fit_t2s()
    setting.o.weight_decay = 0.0  # so that nothing moves without a gradient
    optimizer = train.make_optimizer(setting.o, setting.pieces)
    setting.update()
    before = {key: parameter.detach().clone() for key, parameter in setting.parameters().items()}
    teacher = copy.deepcopy(setting.teacher.state_dict()) if setting.teacher else {}
    optimizer.step()
    moved = {key for key, parameter in setting.parameters().items() if not torch.equal(parameter, before[key])}
    still = before.keys() - moved
    assert still == ({"projectors.s2t.weight"} if "v2" in name else set())
    projectors = {key for key in moved if key.startswith("projectors.")}
    if "v1" in name:
        layers = ("t2s", "s2t", "query") if "cma" in name else ("t2s", "s2t")
        assert projectors == {f"projectors.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    else:
        assert projectors == ({"projectors.t2s.weight"} if "v2" in name else set())
    assert not teacher or all(torch.equal(value, teacher[key]) for key, value in setting.teacher.state_dict().items())
    assert not teacher or all(parameter.grad is None for parameter in setting.teacher.parameters())

    if "v2" in name:  # the next update solves s2t for the student as it is now
        setting.update()
        after = setting.made.projectors.s2t.weight
        assert not torch.equal(after, before["projectors.s2t.weight"])
        again = Setting(tokenizers, name, setting.student, setting.teacher)
        torch.testing.assert_close(after, again.made.projectors.s2t.weight)


def test_the_teacher_is_frozen_in_eval_mode_and_no_part_of_the_distiller(tokenizers):
    teacher = random_model({**GPT2, "n_embd": 24, "attn_pdrop": 0.5}, tokenizers[1].size, seed=1)
    setting = Setting(tokenizers, "dskd v1", teacher=teacher.train())
    assert not setting.teacher.training
    assert not any(parameter.requires_grad for parameter in setting.teacher.parameters())
    names = {name for name, _ in setting.made.named_parameters()}
    assert names == {f"projectors.{layer}.{part}" for layer in ("t2s", "s2t") for part in ("weight", "bias")}
    setting.made.train()
    assert not setting.teacher.training
    assert Setting(tokenizers, "sft").update()[0].keys() == {"ce", "loss", "accuracy", "student_tokens"}
    assert list(Setting(tokenizers, "kd").made.parameters()) == []


# -- vocabularies padded to different numbers of rows ------------------------------------------------------------------


@pytest.mark.parametrize("padding", [(6, 0), (3, 6)])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "sft"])
def test_differently_padded_vocabularies(tokenizers, name, padding):
    setting = Setting(tokenizers, name, padding=padding)
    student_size, teacher_size = setting.tokenizer.size, setting.teacher_tokenizer.size
    with torch.no_grad():  # rows that nothing was trained for may hold anything, even what the teacher likes best
        setting.teacher.head_weight[teacher_size:] = 5 * setting.teacher.head_weight[3]
    batch = setting.batch()
    setting = Setting(tokenizers, name, setting.student, setting.teacher)
    terms, gradients = setting.update()
    assert all(math.isfinite(value) for value in terms.values())
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert setting.student.head_weight.grad.shape[0] == student_size + padding[0]
    states = setting.made.ask_teacher(batch)
    if padding[1]:
        theirs = torch.cat([states_of(setting.teacher, row.teacher)[0] for row in setting.rows])
        best = (theirs @ setting.teacher.head_weight.T).argmax(-1)
        assert (best >= teacher_size).any()
    if name == "dskd v2":
        assert states.label.max() < setting.student.head_weight.shape[0]
        rows = min(student_size + padding[0], teacher_size + padding[1])
        assert torch.equal(states.label, (states.hidden @ setting.teacher.head_weight[:rows].T).argmax(-1))
    if name == "dskd v2 eta":
        assert states.label.max() < student_size


# -- wrong input -------------------------------------------------------------------------------------------------------


def test_auto_alignment(tokenizers):
    other, own = tokenizers
    assert choose_alignment("auto", "dskd", "v2", own, own) == "none"
    assert choose_alignment("auto", "dskd", "v1", own, own) == "none"
    assert choose_alignment("auto", "dskd", "v2", other, own) == "eta"
    assert choose_alignment("auto", "dskd", "v1", other, own) == "cma"
    assert choose_alignment("auto", "kd", "v2", own, own) == "none"
    for method in ("uld", "mined"):
        assert choose_alignment("auto", method, "v2", other, own) == method
        assert choose_alignment("auto", method, "v2", own, own) == method
    assert choose_alignment("eta", "dskd", "v2", own, own) == "eta"


@pytest.mark.parametrize(
    ("name", "where", "term"),
    [
        ("sft", "student", "ce"),
        ("kd", "teacher", "kd"),
        ("uld", "teacher", "kd"),
        ("mined", "teacher", "kd"),
        ("dskd v2", "t2s", "t2s_ce"),
        ("dskd v1", "s2t", "s2t_kd"),
        ("dskd v1 cma", "query", "t2s_ce"),
        ("dskd v2 eta", "t2s", "t2s_ce"),
    ],
)
def test_a_term_that_is_not_a_number_is_named(tokenizers, name, where, term):
    setting = Setting(tokenizers, name)
    if where in ("student", "teacher"):
        module = getattr(setting, where).norm
    else:
        module = getattr(setting.made.projectors, where)
    with torch.no_grad():
        module.weight.view(-1)[0] = math.nan
    setting.made.projectors is None or setattr(setting.made.projectors, "teacher_inverse", None)  # not solved anew
    with pytest.raises(FloatingPointError, match=rf"\b{term} is nan"):
        setting.update()


def test_bf16_autocast_gives_nearly_the_same(tokenizers):
    for name in METHODS:
        setting = Setting(tokenizers, name)
        expected, _ = setting.update()
        setting.o.dtype = "bf16"
        if setting.teacher is not None:
            setting.teacher.bfloat16()
        found, gradients = setting.update()
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        for term in ("loss", "ce", "s2t_kd", "t2s_ce"):
            if term in expected:
                assert found[term] == pytest.approx(expected[term], rel=0.03), (name, term)
                assert found[term] != expected[term]
