"""Nothing meets on two devices, and nothing waits for the device without need: training on a CUDA device that is only
pretended (pretended.py)."""

import contextlib
import functools
import json
import shutil
from unittest.mock import MagicMock, patch

import pytest
import torch
from helpers import CONFIGS, arguments, load_run, log_of, random_model, stopped_by_ctrl_c
from pretended import pretended_cuda
from test_train import EVERY_KIND

import fast.cuda
import train
from fast.losses import predict_tokens
from model import KVCache, generate, read_json

# All methods wait for the terms and for the gradient's norm.
MORE_WAITS = {"eta": 1, "cma": 1}  # for the aligned tokens; for CMA's moments


@pytest.fixture(scope="module")
def short_task(tiny_task, tmp_path_factory):
    """The tiny task with four examples, and a student with dropout and 48 positions."""
    root = tmp_path_factory.mktemp("short") / "task"
    shutil.copytree(tiny_task, root)
    for name in ("train.jsonl", "valid.jsonl"):
        (root / name).write_text("".join((root / name).read_text().splitlines(keepends=True)[:4]))
    config = read_json(root / "dropout" / "config.json")
    (root / "dropout" / "config.json").write_text(json.dumps({**config, "n_positions": 48}))
    return root


def words(task, out, device, **options) -> list[str]:
    common = {"dtype": "fp32", "max_len": 40, "max_prompt_len": 36, "checkpoint_every": 1}
    return [*arguments(task, out, **{**common, **options, "device": device}), "--no-compile"]


def update(arguments: list[str]) -> dict[str, float]:
    """The terms of one update of train.py and the gradient's norm."""
    o, pieces = load_run(arguments)
    optimizer = train.make_optimizer(o, pieces)
    indices, rows, batches = next(pieces.updates(o, 0, 1))
    sampled = train.sample_batches(o, pieces, rows, 0, train.Meter())[1] if o.on_policy else None
    terms = train.distil(o, pieces, pieces.student.train(), batches, sampled)
    terms["grad_norm"] = train.parallel.clip_gradients([p for g in optimizer.param_groups for p in g["params"]], o.clip)
    optimizer.step()
    return terms


ONCE = [kind for kind in EVERY_KIND if kind[:1] + kind[3:4] not in {("uld", "twin"), ("mined", "twin")}]
KINDS = [(kind, 512) for kind in ONCE if not kind[-1]] + [(ONCE[-1], 512)]  # one of them on-policy
KINDS += [(kind, 0) for kind in EVERY_KIND if kind[2] in ("eta", "cma") and not kind[-1]]


@pytest.mark.parametrize("kind, chunk", KINDS, ids=str)
def test_every_method(short_task, tmp_path, kind, chunk):
    """The same terms as on the CPU, and no more waits than are needed: with sampling, one for each token."""
    method, recipe, align, teacher, on_policy = kind
    options = {"method": method, "recipe": recipe, "align": align, "teacher": short_task / teacher, "chunk": chunk,
               "on_policy": on_policy}  # fmt: skip
    expected = update(words(short_task, tmp_path / "cpu", "cpu", **options))
    with pretended_cuda() as card:
        assert update(words(short_task, tmp_path / "cuda", "cuda", **options)) == pytest.approx(expected, rel=1e-3)
    if method != "seqkd":  # there, the teacher's answers are in it
        sampling = 40 if on_policy else 0  # a token each
        assert sum(card.waits.values()) <= 2 + MORE_WAITS.get(align, 0) + sampling


def test_predictions_are_tokens():
    """Not the rows that pad the head on a card, even where all logits are negative."""
    hidden, head = torch.rand(50, 16), -torch.rand(700, 16)
    with pretended_cuda():
        found = predict_tokens(hidden.to("cuda"), head.to("cuda"), chunk=32).tolist()
    assert found == (hidden @ head.T).argmax(-1).tolist()


def test_a_whole_run(short_task, tmp_path):
    """With everything that reads or writes files, and interrupted."""
    options = {"student": short_task / "dropout", "from_scratch": True, "valid": short_task / "valid.jsonl",
               "cache_teacher": tmp_path / "states"}  # fmt: skip
    with pretended_cuda():
        with stopped_by_ctrl_c():
            train.main(words(short_task, tmp_path / "run", "cuda", **options))
        train.main([*words(short_task, tmp_path / "run", "cuda", **options), "--resume"])
    assert log_of(tmp_path / "run")[-1].keys() == {"step", "valid_ce"}


@pytest.mark.parametrize("name", ["gpt2", "qwen3-window"])
def test_generation_replays_each_token(name, monkeypatch):
    """The tokens are the CPU's; what is captured is captured once for all steps on the same buffers."""
    monkeypatch.setattr(KVCache, "STEP", 8)
    prompts, m, seen = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]], random_model(CONFIGS[name]), []
    budgets = [25, 3, 12]  # so that sequences leave the batch
    expected = generate(m, prompts, budgets, None, temperature=0)

    def capture(run, device):
        seen.append(0)

        def replay():
            seen[-1] += 1
            return run()

        return replay

    with pretended_cuda(), patch("fast.cuda.capture", capture):
        m.to("cuda")
        with fast.cuda.graphed(m):
            assert generate(m, prompts, budgets, None, temperature=0) == expected
            first = list(seen)
            assert generate(m, prompts, budgets, None, temperature=0) == expected
        assert generate(m, prompts, budgets, None, temperature=0) == expected
    assert seen == 2 * first and sum(first) == 24 - len(first)  # all but the first step on the buffers
    assert len(first) == 5  # of 3 sequences with 16 places, 2 with 16 and 24, 1 with 24 and 32


def test_graphs_share_memory(monkeypatch):
    """A pool of its own would stay reserved after each graph is gone."""
    pools = []

    class Graph:
        def capture_begin(self, pool=None, capture_error_mode="global"):
            pools.append(pool)

        def pool(self):
            return (0, 7)

        def capture_end(self):
            pass

        replay = capture_end

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(fast.cuda, "shared", functools.cache(fast.cuda.shared.__wrapped__))
    for _ in range(3):
        assert fast.cuda.capture(lambda: 5, torch.device("cpu"))() == 5
    assert pools == [None, (0, 7), (0, 7), (0, 7)]


@pytest.mark.parametrize("capability, dtype", [((7, 5), "fp32"), ((8, 6), "bf16"), ((12, 0), "bf16")])
def test_bf16_is_the_default_where_a_card_has_it(short_task, tmp_path, capability, dtype):
    with pretended_cuda(), patch.multiple(torch.cuda, get_device_capability=lambda index: capability,
                                          get_arch_list=lambda: ["sm_75", "sm_80", "sm_120"]):  # fmt: skip
        given = train.parse(arguments(short_task, tmp_path / "run", device="cuda"))
        assert train.check_options(train.Options(**given)).dtype == dtype


def test_a_missing_compiler_is_named(short_task, tmp_path, monkeypatch):
    def no_compiler(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("Failed to find C compiler")

    monkeypatch.setattr(train, "distil", no_compiler)
    with pytest.raises(SystemExit, match="error: torch.compile failed: Failed to find C compiler(.|\n)*--no-compile"):
        train.main(words(short_task, tmp_path / "run", "cpu"))


def test_what_a_card_refuses():
    with pretended_cuda() as card:
        x = torch.arange(6.0).view(2, 3).to("cuda").requires_grad_()
        assert x.device == torch.device("cuda:0") and x.is_cuda and (x * 2).sum().item() == 30
        assert (2 * x.cpu()).tolist() == [[0, 2, 4], [6, 8, 10]] and not x.cpu().is_cuda
        other, index = torch.ones(2, 3), torch.tensor([0])
        for wrong in (lambda: x + other, lambda: other + x, lambda: torch.cat([x, other]), lambda: x[index],
                      lambda: other.add_(x), lambda: torch.zeros(2, 3, device=x.device) @ other.mT):  # fmt: skip
            with pytest.raises(RuntimeError, match="cuda:0 and"):
                wrong()
        for wrong in (x.detach().numpy, lambda: x.detach().cpu().numpy() * 0 + x.detach().__array__()):
            with pytest.raises(TypeError, match="can't convert cuda:0"):
                wrong()
        before = sum(card.waits.values())
        assert len(x[x > 2]) == 3 and bool((x > 2).any())
        assert sum(card.waits.values()) == before + 2


@pytest.mark.parametrize("name", ["label", "hidden"])
def test_a_tensor_that_was_left_on_the_cpu_is_found_in_an_update(short_task, tmp_path, monkeypatch, name):
    ask = train.Method.ask_teacher

    def ask_and_forget(self, batch):
        answer = ask(self, batch)
        setattr(answer, name, getattr(answer, name).cpu())
        return answer

    monkeypatch.setattr(train.Method, "ask_teacher", ask_and_forget)
    with pretended_cuda(), pytest.raises(RuntimeError, match="cuda:0 and"):
        update(words(short_task, tmp_path / "run", "cuda"))
