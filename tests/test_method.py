"""distill.py on tiny random models: what must be 0, what must not matter (padding, order, parts), what must move."""

import copy
import itertools
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, pad

import train
from align import exact_token_alignment
from baselines.mined import edit_distance_alignment, edit_distance_map, token_spellings
from data import Example, collate, tokenise
from experiments import tiny
from losses import DIVERGENCES, predict_tokens
from model import build_model
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
    """Models, rows and a distiller of one method."""

    def __init__(self, tokenizers, name, student=None, teacher=None, projectors=None, padding=(0, 0),
                 teacher_tokenizer=None, divergence="fkl", **options):  # fmt: skip
        self.method, self.recipe, self.align = METHODS[name]
        cross = self.align != "none"
        self.tokenizer = tokenizers[1]
        self.teacher_tokenizer = teacher_tokenizer or tokenizers[0 if cross else 1]
        self.student = student or random_model(GPT2, self.tokenizer.size + padding[0], seed=0)
        config = LLAMA if cross else {**GPT2, "n_embd": 24}
        self.teacher = teacher or random_model(config, self.teacher_tokenizer.size + padding[1], seed=1)
        if self.method == "sft":
            self.teacher = self.teacher_tokenizer = None
        torch.manual_seed(2)
        self.o = train.Options(
            method=self.method, recipe=self.recipe, align=self.align, device="cpu", dtype="fp32", projector_lr=1e-3,
            divergence=divergence, projectors=projectors, **options,
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


# -- what must be zero -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(tokenizers, divergence):
    student = random_model(GPT2, tokenizers[1].size, seed=0)
    for name in ("kd", "dskd v2", *(["uld", "mined"] if divergence == "fkl" else [])):
        teacher_tokenizer = {"teacher_tokenizer": tokenizers[1]}
        setting = Setting(
            tokenizers, name, student, copy.deepcopy(student), divergence=divergence, **teacher_tokenizer
        )
        terms, gradients = setting.update()
        assert terms["ce"] > 1
        if name in ("kd", "uld", "mined"):
            assert abs(terms["kd"]) < 1e-6 + 1e-5 * (name == "uld")  # a sum of roundings that have no sign
            if name == "uld":  # the slope of |p − q| at 0 is whatever rounding says
                continue
        else:  # equal heads: both projections are the identity
            assert abs(terms["t2s_kd"]) < 1e-6 and abs(terms["s2t_kd"]) < 1e-6
            assert terms["t2s_agreement"] == 1
        sft = Setting(tokenizers, "sft", student)
        expected = {key: value / 2 for key, value in sft.update()[1].items()}  # kd_rate 0.5
        found = {key: value for key, value in gradients.items() if key.startswith("student.")}
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_a_narrower_copy_keeps_its_logits_in_the_teacher(tokenizers):
    """A student head inside the span of the teacher's: its states project without loss of any logit."""
    setting = Setting(tokenizers, "dskd v2")
    with torch.no_grad():
        setting.teacher.head_weight[:, :16] = setting.student.head_weight
    setting = Setting(tokenizers, "dskd v2", setting.student, setting.teacher)
    hidden = torch.randn(9, 16)
    projected = setting.made.projectors.s2t(hidden) @ setting.teacher.head_weight.T
    torch.testing.assert_close(projected, hidden @ setting.student.head_weight.T, rtol=1e-4, atol=1e-4)


def test_kd_rate_weighs_the_two(tokenizers):
    for rate in (0.0, 0.3, 1.0):
        terms, _ = Setting(tokenizers, "dskd v2", kd_rate=rate).update()
        assert terms["loss"] == pytest.approx((1 - rate) * terms["ce"] + rate * terms["kd"], rel=1e-6)
        assert terms["kd"] == pytest.approx(terms["t2s_ce"] + terms["t2s_kd"] + terms["s2t_kd"], rel=1e-6)


# -- identical tokenizers: ETA is plain DSKD ---------------------------------------------------------------------------


def projectors_of(setting, folder):
    file = folder / "projectors.safetensors"
    tensors = {name: value.detach().clone() for name, value in setting.made.projectors.named_parameters()}
    save_file(tensors, file)
    return str(file)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_eta_with_one_tokenizer_is_dskd_without_alignment(tokenizers, divergence, tmp_path):
    plain = Setting(tokenizers, "dskd v2", divergence=divergence).fit_t2s()
    file = projectors_of(plain, tmp_path)  # the overlap leaves end-of-text out of the least squares: start equally
    plain = Setting(tokenizers, "dskd v2", plain.student, plain.teacher, file, divergence=divergence)
    terms, gradients = plain.update()
    aligned = Setting(tokenizers, "dskd v2 eta", plain.student, plain.teacher, file,
                      teacher_tokenizer=tokenizers[1], divergence=divergence)  # fmt: skip
    aligned_terms, aligned_gradients = aligned.update()
    assert aligned_terms.pop("align_ratio") == 1
    assert 0 < terms["t2s_agreement"] < 1
    assert aligned_terms == pytest.approx(terms, rel=1e-5)
    torch.testing.assert_close(aligned_gradients, gradients, **EXACT)


def test_mined_with_one_tokenizer_is_kd(tokenizers):
    kd = Setting(tokenizers, "kd")
    terms, gradients = kd.update()
    mined = Setting(tokenizers, "mined", kd.student, kd.teacher, teacher_tokenizer=tokenizers[1])
    found, found_gradients = mined.update()
    assert found.pop("align_ratio") == 1
    assert found == pytest.approx(terms, rel=1e-5)
    torch.testing.assert_close(found_gradients, gradients, **EXACT)


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


# -- what they are: the definitions, from the models' states -----------------------------------------------------------


def states_of(model, side):
    """Hidden states, input and label of every response position, example by example and without padding."""
    sequence = torch.tensor([side.prompt + side.response])
    first = len(side.prompt) - 1
    return model(sequence)[0, first:-1], sequence[0, first:-1], sequence[0, first + 1 :]


def test_cma_by_its_definition(tokenizers):
    """Example by example, so that no attention can cross; the standard deviations are over the whole batch."""
    setting = Setting(tokenizers, "dskd v1 cma", divergence="rkl").fit_t2s()
    terms, gradients = setting.update()
    E_s, E_t = setting.student.embed.weight.detach(), setting.teacher.embed.weight
    W_s, W_t = setting.student.head_weight, setting.teacher.head_weight
    projectors = setting.made.projectors
    assert E_t is not W_t
    ours = [states_of(setting.student, row.student) for row in setting.rows]
    theirs = [states_of(setting.teacher, row.teacher) for row in setting.rows]
    tokens = sum(len(labels) for _, _, labels in ours)

    def deviation(tensors):  # of all numbers together, unbiased
        values = torch.cat([tensor.flatten() for tensor in tensors]).double()
        return ((values - values.mean()).square().sum() / (len(values) - 1)).sqrt().item()

    key_std = deviation([E_t[ids] for _, x, y in theirs for ids in (x, y)])
    label_std = deviation([E_t[y] for _, _, y in theirs])
    hidden_std = deviation([hidden for hidden, _, _ in theirs])
    assert len({round(value, 3) for value in (key_std, label_std, hidden_std)}) == 3
    t2s_ce = t2s_kd = s2t_kd = ce = 0
    for (h, x, y), (g, x_t, y_t) in zip(ours, theirs, strict=True):
        query = projectors.query(torch.cat([E_s[x], E_s[y]], -1))
        key = torch.cat([E_t[x_t], E_t[y_t]], -1) / key_std
        scores = query @ key.T / math.sqrt(2 * 24)
        value = projectors.t2s(g / hidden_std + E_t[y_t] / label_std)
        logits_ts = scores.softmax(1) @ value @ W_s.detach().T
        logits_st = scores.softmax(0).T @ projectors.s2t(h) @ W_t.T
        agrees = logits_ts.argmax(-1) == y
        ce += cross_entropy(h @ W_s.T, y, reduction="sum")
        t2s_ce += cross_entropy(logits_ts, y, reduction="sum")
        t2s_kd += DIVERGENCES["rkl"](h @ W_s.T, logits_ts.detach(), 2.0)[agrees].sum()
        s2t_kd += DIVERGENCES["fkl"](logits_st, g @ W_t.T, 2.0).sum()
    expected = {"ce": ce, "t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd}
    assert expected["t2s_kd"] > 0
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value.item() / tokens, rel=1e-5), name
    named = setting.parameters()
    total = 0.5 * sum(expected.values()) / tokens
    found = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
    torch.testing.assert_close(gradients, found, **EXACT)


def test_eta_by_its_definition(tokenizers):
    teacher_tokenizer, tokenizer = tokenizers
    setting = Setting(tokenizers, "dskd v2 eta", divergence="rkl")
    W_s, W_t = setting.student.head_weight, setting.teacher.head_weight
    bytes_t, bytes_s = teacher_tokenizer.bytes, tokenizer.bytes
    assert tokenizer.eos_id == 0 and teacher_tokenizer.eos_id == 2 and bytes_t[2] is None

    # the shared vocabulary: each byte string's plain token on both sides
    def by_bytes(tokenizer):
        names = [tokenizer.tokenizer.id_to_token(i) for i in range(tokenizer.size)]
        fallback = {i for i, name in enumerate(names) if name.startswith("<0x")}
        plain = {b: i for i, b in enumerate(tokenizer.bytes) if b and i not in fallback}
        return {tokenizer.bytes[i]: i for i in fallback} | plain

    ids_t, ids_s = by_bytes(teacher_tokenizer), by_bytes(tokenizer)
    shared = sorted(ids_t.keys() & ids_s.keys())
    head_t, head_s = W_t[[ids_t[b] for b in shared]].double(), W_s[[ids_s[b] for b in shared]].double().detach()
    t2s = torch.linalg.lstsq(head_s, head_t).solution.float()
    s2t = torch.linalg.lstsq(head_t, head_s).solution.float()
    torch.testing.assert_close(setting.made.projectors.t2s.weight, t2s, rtol=1e-4, atol=1e-5)
    terms, _ = setting.fit_t2s().update()
    t2s = setting.made.projectors.t2s.weight.detach()

    t2s_ce, t2s_kd, s2t_kd, ratios, dropped = [], [], [], [], 0
    for row in setting.rows:
        (h, _, y), (g, _, y_t) = states_of(setting.student, row.student), states_of(setting.teacher, row.teacher)
        spelt = [bytes_t[i] for i in y_t.tolist()], [bytes_s[i] for i in y.tolist()]
        pairs = list(zip(*exact_token_alignment(*spelt), strict=True))
        ratios.append(len(pairs) / len(y))
        for m, n in pairs:
            prediction = int((g[m] @ W_t.T).argmax())
            label = 0 if prediction == 2 else ids_s.get(bytes_t[prediction])
            if label is None:
                dropped += 1
                continue
            z, z_ts = h[n : n + 1] @ W_s.T, g[m : m + 1] @ t2s.T @ W_s.T
            z_st, z_t = h[n : n + 1] @ s2t.T @ W_t.T, g[m : m + 1] @ W_t.T
            t2s_ce.append(cross_entropy(z_ts, torch.tensor([label])).item())
            if int(z_ts.argmax()) == label:
                t2s_kd.append(DIVERGENCES["rkl"](z, z_ts, 2.0).item())
            s2t_kd.append(DIVERGENCES["rkl"](z_st, z_t, 2.0).item())
    assert 0 < len(t2s_kd) < len(t2s_ce) and dropped > 0 and min(ratios) < 1
    expected = {"t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd, "align_ratio": ratios}
    for name, values in expected.items():
        assert terms[name] == pytest.approx(sum(values) / len(values), rel=1e-4), name
    assert terms["t2s_agreement"] == pytest.approx(len(t2s_kd) / len(t2s_ce))


def test_uld_by_its_definition(tokenizers):
    setting = Setting(tokenizers, "uld")
    terms, _ = setting.update()
    total = tokens = 0
    longer = set()
    for row in setting.rows:
        (h, _, y), (g, _, y_t) = states_of(setting.student, row.student), states_of(setting.teacher, row.teacher)
        tokens += len(y)
        longer.add(len(y) > len(y_t))
        for state, teacher_state in zip(h, g, strict=False):  # until the shorter ends
            p = sorted((state @ setting.student.head_weight.T).softmax(-1).tolist(), reverse=True)
            q = sorted((teacher_state @ setting.teacher.head_weight.T).softmax(-1).tolist(), reverse=True)
            total += sum(abs(a - b) for a, b in itertools.zip_longest(p, q, fillvalue=0.0))
    assert longer == {True, False}
    assert terms["kd"] == pytest.approx(total / tokens, rel=1e-5)
    assert terms["loss"] == pytest.approx((terms["ce"] + terms["kd"]) / 2, rel=1e-6)


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


def test_v2_labels_are_the_teachers_and_v1s_the_gold_tokens(tokenizers):
    setting = Setting(tokenizers, "dskd v2")
    batch = setting.batch()
    label = setting.made.ask_teacher(batch).label
    hidden = torch.cat([states_of(setting.teacher, row.teacher)[0] for row in setting.rows])
    assert torch.equal(label, (hidden @ setting.teacher.head_weight.T).argmax(-1))
    assert (label != batch.student.labels).any()
    setting = Setting(tokenizers, "dskd v1")
    assert torch.equal(setting.made.ask_teacher(batch).label, batch.student.labels)
    logits = setting.made.projectors.t2s(hidden) @ setting.student.head_weight.T
    expected = cross_entropy(logits, batch.student.labels).item()
    assert setting.update()[0]["t2s_ce"] == pytest.approx(expected, rel=1e-5)


def test_predictions_by_parts():
    hidden, head = torch.randn(7, 4), torch.randn(9, 4)
    for chunk in (1, 3, 7, 100):
        assert torch.equal(predict_tokens(hidden, head, chunk), (hidden @ head.T).argmax(-1))
    assert predict_tokens(hidden[:0], head).shape == (0,)


# -- on-policy ---------------------------------------------------------------------------------------------------------

SAMPLED = [name for name in METHODS if name.split()[0] in ("kd", "dskd")]  # what --on-policy goes with
every_distillation = pytest.mark.parametrize("name", SAMPLED)


def splits(setting, rows):
    return [setting.batch(rows)], [setting.batch(rows[:2]), setting.batch(rows[2:])], [setting.batch([r]) for r in rows]


@every_distillation
def test_on_policy_with_the_gold_responses_is_off_policy(tokenizers, name, monkeypatch):
    """A student that says the gold responses: the same terms, the same gradients."""
    setting = Setting(tokenizers, name)
    if name.startswith("dskd"):
        setting.fit_t2s()
    terms, gradients = setting.update()
    monkeypatch.setattr(train, "generate", lambda *arguments, **_: [row.student.response for row in setting.rows])
    setting.o.max_len = 128
    rows, tokens = train.sample_rows(setting.o, setting.pieces, setting.rows, step=0)
    assert tokens == terms["student_tokens"]
    for new, row in zip(rows, setting.rows, strict=True):
        assert new is not row and (new.student, new.teacher) == (row.student, row.teacher)
    for gold, sampled in zip(splits(setting, setting.rows), splits(setting, rows)[::-1], strict=True):
        found, found_gradients = setting.update(*gold, sampled=sampled)
        assert found == pytest.approx(terms, rel=1e-5, abs=1e-6)
        assert found_gradients.keys() == gradients.keys()
        torch.testing.assert_close(found_gradients, gradients, **EXACT)


@every_distillation
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
    other, _ = train.sample_rows(setting.o, setting.pieces, setting.rows, step=4)
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


@every_distillation
def test_a_sampled_end_of_text_is_trained_on(tokenizers, name, monkeypatch):
    """The gradient of the head's end-of-text row sees whether the sampled response has an end."""
    setting = Setting(tokenizers, name)
    setting.o.max_len = 128
    eos_id = setting.tokenizer.eos_id
    response = setting.tokenizer.encode("The red fox")

    def sampled(ids):
        monkeypatch.setattr(train, "generate", lambda *arguments, **_: [ids] * len(setting.rows))
        return setting.batch(train.sample_rows(setting.o, setting.pieces, setting.rows, step=0)[0])

    ended, cut, empty = sampled([*response, eos_id]), sampled(response), sampled([eos_id])
    for batch, number in ((ended, 1), (cut, 0), (empty, 1)):
        assert (batch.student.labels == eos_id).sum() == number * len(setting.rows)
        assert (batch.teacher.labels == setting.teacher_tokenizer.eos_id).sum() == number * len(setting.rows)
        terms, _ = setting.update(sampled=[batch])
        assert terms["student_tokens"] == len(batch.student.labels) and math.isfinite(terms["kd"])
    assert empty.student.labels.tolist() == [eos_id] * len(setting.rows)


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


@pytest.mark.parametrize("padding", [(0, 6), (6, 0), (3, 6)])
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
    if name == "kd":
        rows = student_size + min(padding)
        hidden = torch.cat([states_of(setting.student, row.student)[0] for row in setting.rows])
        values = DIVERGENCES["fkl"](
            hidden @ setting.student.head_weight[:rows].T, states.hidden @ setting.teacher.head_weight[:rows].T, 2.0
        )
        assert terms["kd"] == pytest.approx(values.mean().item(), rel=1e-5)


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
    ("arguments", "same", "words"),
    [
        (("none", "dskd", "v2"), False, ["--align none", "equal vocabularies", "--align eta", "teacher", "student"]),
        (("auto", "kd", "v2"), False, ["--method kd", "equal vocabularies", "--method dskd"]),
        (("none", "uld", "v2"), True, ["--method uld", "position by position", "--align none"]),
        (("eta", "mined", "v2"), False, ["--method mined", "by edit distance", "--align eta"]),
        (("eta", "kd", "v2"), True, ["--method kd", "--align eta", "position by position"]),
        (("cma", "dskd", "v2"), False, ["--align cma", "--recipe v1"]),
        (("eta", "dskd", "v1"), False, ["--align eta", "--recipe v2"]),
    ],
)
def test_impossible_alignments_say_why(tokenizers, arguments, same, words):
    with pytest.raises(ValueError) as error:
        choose_alignment(*arguments, tokenizers[1 if same else 0], tokenizers[1])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"t2s.weight": (16, 25)}, ["t2s.weight [16, 25]", "expected t2s.weight [16, 24]"]),
        ({"t2s.weight": (24, 16)}, ["t2s.weight [24, 16]", "expected t2s.weight [16, 24]"]),
        ({"t2s.weight": (16, 24), "s2t.weights": (24, 16)}, ["s2t.weights [24, 16]", "s2t.weight [24, 16]"]),
        ({"same.t2s.weight": (16, 24)}, ["same.t2s.weight"]),
        ({"s2t.weight": (24, 16), "s2t.bias": (16,)}, ["s2t.bias [16]", "s2t.bias [24]"]),
    ],
)
def test_projectors_that_do_not_fit_are_named(tokenizers, tmp_path, tensors, words):
    file = tmp_path / "wrong.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(ValueError) as error:
        Setting(tokenizers, "dskd v2", projectors=str(file))
    for word in ["wrong.safetensors", "does not fit", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["dskd v1", "dskd v2", "dskd v1 cma", "dskd v2 eta"])
@pytest.mark.parametrize("given", ["t2s", "s2t"])
@pytest.mark.parametrize("bias", [True, False])
def test_projectors_from_a_file_take_the_place_of_the_recipes(tokenizers, tmp_path, name, given, bias):
    """Only those that it has; the others start as the recipe says. They are trained from there, v2's s2t too."""
    tensors = {f"{given}.weight": torch.randn((16, 24) if given == "t2s" else (24, 16))}
    if bias:
        tensors[f"{given}.bias"] = torch.randn(16 if given == "t2s" else 24)
    save_file(tensors, tmp_path / "p.safetensors")
    setting = Setting(tokenizers, name, projectors=str(tmp_path / "p.safetensors"))
    _, gradients = setting.update()
    projectors = dict(setting.made.projectors.named_parameters())
    for key, value in tensors.items():
        assert torch.equal(projectors[key], value), key
        assert gradients[f"projectors.{key}"].abs().max() > 0, key
    other = "s2t" if given == "t2s" else "t2s"
    assert (f"{given}.bias" in projectors) == bias
    assert (f"{other}.bias" in projectors) == ("v1" in name)
    if "v2" in name:
        recipe = dict(Setting(tokenizers, name, setting.student, setting.teacher).made.named_parameters())
        torch.testing.assert_close(projectors[f"{other}.weight"], recipe[f"projectors.{other}.weight"])


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


def test_a_batch_moves_with_all_its_tensors(tokenizers):
    setting = Setting(tokenizers, "dskd v2 eta")
    batch = collate(setting.rows, 0).to("meta")
    tensors = [batch.teacher_index, batch.student_index]
    tensors += [x for side in (batch.student, batch.teacher) for x in vars(side).values() if torch.is_tensor(x)]
    assert len(tensors) == 10 and all(tensor.device.type == "meta" for tensor in tensors)
