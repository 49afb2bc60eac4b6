"""What a CUDA device computes is what the CPU computes; run with `python -m pytest -m cuda`, which is
faster with `-n 8` of pytest-xdist.

With DEVICE=cpu the same tests run without a card, to try them: `DEVICE=cpu python -m pytest -m cuda`. What is compiled
is slow there; `-k "not compiled"` leaves it out.
"""

import copy
import gc
import os
import warnings
from importlib.util import find_spec
from itertools import islice

import pytest
import torch
from helpers import CONFIGS, arguments, load_run, log_of, random_batch, random_model, same, stopped_by_ctrl_c
from safetensors.torch import load_file
from test_train import EVERY_KIND

import train
from fast import losses as fast_losses
from fast.cuda import graphed
from model import KVCache, generate

DEVICE = os.environ.get("DEVICE", "cuda")
ON_CARD = torch.device(DEVICE).type == "cuda"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for sums in a fixed order
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_CARD and not torch.cuda.is_available(), reason="no CUDA device; DEVICE=cpu tries the tests"),
]
HEAD_64 = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1,
           "head_dim": 64}  # fmt: skip
FAMILIES = CONFIGS | {  # of the width of a head that CUDA's fused kernels are made for
    "gpt2, 64": {**CONFIGS["gpt2"], "n_embd": 128, "n_head": 2},
    "llama, 64": {**CONFIGS["llama"], **HEAD_64},
    "mistral-window, 64": {**CONFIGS["mistral-window"], **HEAD_64},
    "qwen3, 64": {**CONFIGS["qwen3"], **HEAD_64},
}
MORE = ["eager", "plain", *["compiled"] * (find_spec("triton") is not None or not ON_CARD)]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """float32 is float32, not TF32, also where training would ask for that; and nothing compiled is left over."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    torch.compiler.reset()


def run(task, out, *flags, device=DEVICE, **options) -> list[dict]:
    """The log of two updates of train.py in float32, unless the options say otherwise."""
    train.main([*arguments(task, out, **{"dtype": "fp32", **options, "device": device}), *flags])
    return log_of(out)


# ---------------------------------------------------------------------------------------------------------------------
# Models


def logits_and_gradients(m, dtype) -> dict[str, torch.Tensor]:
    """On the model's device; of the real tokens of a padded batch."""
    device = m.embed.weight.device
    ids, mask = random_batch()
    real = mask.flatten().nonzero()[:, 0].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        logits = m.logits(m(ids.to(device), real=real).flatten(0, 1)[real]).float()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * direction.to(device)).sum().backward()
    return {"logits": logits.detach().cpu(), **{name: p.grad.cpu() for name, p in m.named_parameters()}}


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 4e-4), ("bf16", 0.2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients(name, dtype, tolerance):
    expected = logits_and_gradients(random_model(FAMILIES[name]), "fp32")
    found = logits_and_gradients(random_model(FAMILIES[name]).to(DEVICE), dtype)
    assert found.keys() == expected.keys()
    errors = {key: float((found[key] - x).norm() / x.norm().clamp(min=1e-2)) for key, x in expected.items()}
    assert max(errors.values()) < tolerance and errors["logits"] < tolerance / 4, errors


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation(name):
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    m = random_model(FAMILIES[name])
    expected = generate(m, prompts, 25, 0, temperature=0)
    assert generate(m.to(DEVICE), prompts, 25, 0, temperature=0) == expected
    sampled = [generate(m, prompts, 25, None, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_as_graphs(name, autocast, monkeypatch):
    """The tokens are those of kernels launched one by one, in a batch that shrinks and in buffers that grow."""
    monkeypatch.setattr(KVCache, "STEP", 8)
    m, prompts = random_model(FAMILIES[name]).to(DEVICE), [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    for options in ({"temperature": 0}, {"seed": 1}):
        with torch.autocast(m.embed.weight.device.type, torch.bfloat16, enabled=autocast):
            expected = generate(m, prompts, [25, 3, 12], None, **options)
            with graphed(m):
                for _ in range(2):
                    assert generate(m, prompts, [25, 3, 12], None, **options) == expected


@pytest.mark.skipif(not ON_CARD, reason="for a card's memory")
def test_graphs_take_no_more_memory(monkeypatch):
    """What PyTorch reserves stays the same, however many graphs are captured."""
    monkeypatch.setattr(KVCache, "STEP", 8)
    config, used = {**CONFIGS["gpt2"], "vocab_size": 50257}, []
    m = random_model(config).to(DEVICE)
    with graphed(m):
        for _ in range(12):
            generate(m, [[5, 6, 7]] * 32, 30, None, temperature=0)  # four graphs
            used.append(torch.cuda.memory_reserved(DEVICE))
    assert used[-1] == used[2], used


# ---------------------------------------------------------------------------------------------------------------------
# Updates


@pytest.fixture(scope="module")
def on_cpu(tiny_task, tmp_path_factory):
    """Asked for a kind, the log of its run on the CPU."""
    logs = {}

    def ask(kind, options):
        if kind not in logs:
            logs[kind] = run(tiny_task, tmp_path_factory.mktemp("cpu") / "run", device="cpu", **options)
        return logs[kind]

    return ask


UPDATES = [(kind, how) for kind in EVERY_KIND for how in MORE
           if how == "eager" or kind[0] != "seqkd" and not (kind[-1] and kind[2] != "eta")]  # fmt: skip


@pytest.mark.parametrize("kind, how", UPDATES, ids=str)
def test_an_update(tiny_task, tmp_path, on_cpu, kind, how):
    """Of every method, recipe and alignment: the fast and the plain losses, eager and compiled."""
    method, recipe, align, teacher, on_policy = kind
    options = {"method": method, "recipe": recipe, "align": align, "teacher": tiny_task / teacher, "max_len": 60,
               "max_steps": 2, "on_policy": on_policy}  # fmt: skip
    flags = ["--compile"] if how == "compiled" else ["--no-compile"]
    log = run(tiny_task, tmp_path / "run", *flags, **options, chunk=0 if how == "plain" else 512)
    for line, expected in zip(log, on_cpu(kind, options), strict=True):
        assert all(torch.tensor(value).isfinite() for value in line.values())
        names = {name for name in expected if not name.endswith("second") and name != "generation_share"}
        if on_policy:  # each device draws numbers of its own; the gold part of the first update knows nothing of it
            names = {"ce", "accuracy"} if line["step"] == 1 else set()
        for name in names:  # Adam's first step is one of signs: where a gradient is almost 0, each device has its own
            shares = name in ("accuracy", "t2s_agreement")
            error = {"rel": 2e-3 if line["step"] == 1 else 2e-2, "abs": 0.03 if shares else 1e-5}
            assert line[name] == pytest.approx(expected[name], **error), name


def test_an_update_in_bf16(tiny_task, tmp_path, on_cpu):
    kind = EVERY_KIND[-2]
    options = {"recipe": "v2", "align": "eta", "max_len": 60}
    log = run(tiny_task, tmp_path / "run", "--no-compile", **options, dtype="bf16")
    for line, expected in zip(log, on_cpu(kind, options), strict=True):
        for name in ("loss", "ce", "t2s_ce", "t2s_kd", "s2t_kd", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=0.05), name


@pytest.mark.parametrize("name", fast_losses.DIVERGENCES)
@pytest.mark.skipif("compiled" not in MORE, reason="torch.compile needs triton on CUDA")
def test_compiled_losses(name):
    """The fused kernels, whose logits are bf16, at sizes that leave half a chunk."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(*shape, generator=generator) for shape in ((75, 16), (700, 16), (44, 24), (900, 24))]
    tokens = torch.randint(700, (75,), generator=generator).to(DEVICE)
    rows = torch.randperm(75, generator=generator)[:44].to(DEVICE)
    label = (states[2] @ states[3].T).argmax(-1).to(DEVICE)
    label[::3] = 0  # two of three agree
    found = {}
    for fused in (False, True):
        inputs = [x.to(DEVICE).requires_grad_() for x in copy.deepcopy(states)]
        options = {"only_agreeing": name != "uld", "ce_weight": 0.1, "target_ce_weight": 0.2, "kd_weight": 0.3}
        with torch.autocast(DEVICE.partition(":")[0], torch.bfloat16):
            terms = fast_losses.head_terms(
                *inputs, rows, tokens, label, **options, divergence=name, temperature=2.0, chunk=32, fused=fused
            )
        terms.loss.backward()
        found[fused] = [terms.loss.detach(), terms.ce, terms.target_ce, terms.kd, *(x.grad for x in inputs[:3])]
    for ours, eager in zip(found[True], found[False], strict=True):
        assert (ours - eager).float().norm() < 1e-2 * eager.float().norm()


@pytest.mark.parametrize("compiled", ["eager", *MORE[2:]])
@pytest.mark.parametrize("more", [{"recompute": True}, {"lora": 4}, {"cache_teacher": "states"}], ids=str)
def test_options_of_an_update(tiny_task, tmp_path, more, compiled):
    """They leave the loss as it is, or in the third digit where states are rounded to bf16."""
    if "cache_teacher" in more:
        more = {"cache_teacher": tmp_path / "states"}
    flag = "--compile" if compiled == "compiled" else "--no-compile"
    log = run(tiny_task, tmp_path / "more", flag, **more)
    plain = run(tiny_task, tmp_path / "plain", "--no-compile")
    assert log[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-2 if "cache_teacher" in more else 1e-3)
    assert (tmp_path / "more" / "adapter").exists() == ("lora" in more)
    if "lora" not in more:
        assert log[1]["loss"] == pytest.approx(plain[1]["loss"], rel=2e-2 if "cache_teacher" in more else 1e-3)


@pytest.mark.skipif("compiled" not in MORE, reason="torch.compile needs triton on CUDA")
@pytest.mark.parametrize(
    "more",
    [{}, {"recipe": "v1", "align": "cma"}, {"grad_accum": 2}, {"on_policy": 0.5, "max_len": 60}, {"recompute": True},
     {"lora": 4, "grad_accum": 2}],
    ids=str,
)  # fmt: skip
def test_graphs(tiny_task, tmp_path, more):
    """Six updates of other lengths in bf16, which on CUDA run as graphs, beside the same ones launched one by one."""
    options = {"dtype": "bf16", "max_steps": 6, "lr": 1e-5, **more}
    found, expected = (run(tiny_task, tmp_path / how, how, **options) for how in ("--compile", "--no-compile"))
    names = ("ce", "t2s_ce", "s2t_kd", "grad_norm")
    for line, other in zip(found, expected, strict=True):
        for name in names if "on_policy" not in more else names[:1]:
            assert line[name] == pytest.approx(other[name], rel=0.05), (line["step"], name)


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("more", [{}, {"on_policy": 0.5, "max_len": 60}, {"dtype": "bf16", "lora": 4}], ids=str)
def test_resume_is_exact(tiny_task, tmp_path, more):
    """With sums in a fixed order, which on CUDA has to be asked for; with dropout."""
    options = {"student": tiny_task / "dropout", "max_steps": 4, "checkpoint_every": 2, **more}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            run(tiny_task, tmp_path / "whole", "--no-compile", **options)
            with stopped_by_ctrl_c():
                run(tiny_task, tmp_path / "parts", "--no-compile", **options)
            run(tiny_task, tmp_path / "parts", "--no-compile", **options, resume=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same(*(load_file(tmp_path / name / "resume" / "state.safetensors") for name in ("whole", "parts")))


@pytest.mark.skipif("compiled" not in MORE, reason="torch.compile needs triton on CUDA")
@pytest.mark.parametrize("teacher", ["teacher", "twin"])
def test_compiled_once_for_all_lengths(tiny_task, tmp_path, teacher):
    from torch._dynamo.utils import counters

    counters.clear()
    options = {"teacher": tiny_task / teacher, "max_steps": 0, "epochs": 3, "dtype": "bf16"}
    log = run(tiny_task, tmp_path / "run", "--compile", **options)
    counts = {line["step"]: line["compilations"] for line in log}
    per_epoch = len(counts) // 3
    assert counts[per_epoch] == counts[3 * per_epoch] > 0 and not counters["graph_break"]


def memory_in_use() -> int:
    """Bytes of all tensors on the device; on the CPU of those that Python knows of."""
    gc.collect()
    if ON_CARD:
        return torch.cuda.memory_allocated(DEVICE)
    return sum(x.nbytes for x in gc.get_objects() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_memory_does_not_grow(tiny_task, tmp_path, recipe):
    """Over 300 updates."""
    words = arguments(tiny_task, tmp_path / "run", recipe=recipe, device=DEVICE, max_steps=0)
    o, pieces = load_run([*words, "--no-compile"])
    optimizer, used = train.make_optimizer(o, pieces), {}
    for step, (_, _, batches) in enumerate(train.prefetch(pieces.updates(o, 0, 300)), 1):
        terms = train.distil(o, pieces, pieces.student.train(), batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del batches
        if step in (50, 290):  # one batch is made ahead: its size differs by less than this
            used[step] = memory_in_use()
    assert terms["loss"] > 0 and abs(used[290] - used[50]) < 2**16, used


@pytest.mark.skipif(not ON_CARD, reason="for a card, which works while the CPU goes on")
@pytest.mark.parametrize("teacher, expected", [("twin", 1), ("teacher", 2)])
def test_how_often_an_update_waits(tiny_task, tmp_path, teacher, expected):
    """For the terms that are logged, and with ETA for the number of pairs."""
    words = arguments(tiny_task, tmp_path / "run", teacher=tiny_task / teacher, device=DEVICE, dtype="bf16")
    o, pieces = load_run([*words, "--no-compile"])
    batches = [batches for _, _, batches in islice(train.prefetch(pieces.updates(o, 0, 2)), 2)]
    train.distil(o, pieces, pieces.student.train(), batches[0])  # the first update waits more often
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.distil(o, pieces, pieces.student, batches[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing" in str(one.message)]
    assert len(waits) == expected, waits


@pytest.mark.skipif(not ON_CARD, reason="for a card's memory and its large products")
def test_the_real_vocabularies():
    """The divergence under Qwen1.5's head, fused and not: many rows and columns at once."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, 1000, 2048, device=DEVICE)
    head, found = torch.randn(151936, 2048, device=DEVICE) * 0.02, []
    for chunk, fused in ((512, "compiled" in MORE), (333, False)):
        states = hidden.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            terms = fast_losses.head_terms(
                states, head, teacher_hidden, head, kd_weight=1e-3, temperature=2.0, chunk=chunk, fused=fused
            )
        terms.loss.backward()
        found.append((float(terms.loss), states.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-2)
    assert (found[0][1] - found[1][1]).norm() < 2e-2 * found[1][1].norm()
