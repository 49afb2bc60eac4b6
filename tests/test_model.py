"""model.py against transformers (where installed), against stored numbers, and against its own plain definitions."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from model import build_model, generate, load_model, sample, save_model

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
    "llama-linear-scaling": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral-window": {**LLAMA, "model_type": "mistral", "sliding_window": 5},
    "mistral-no-window": {**LLAMA, "model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "qwen2": {**QWEN, "model_type": "qwen2"},
    "qwen2-window": {**QWEN, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4},
    "qwen3": {**QWEN, "model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True},
    "qwen3-window": {**QWEN, "model_type": "qwen3", "head_dim": 4, "attention_bias": True, "use_sliding_window": True,
                     "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [44, 2, 60], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]]
every_family = pytest.mark.parametrize("name", CONFIGS)


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


def save_random(path, config=GPT2):
    """A valid directory to spoil; returns its config and tensors."""
    save_model(random_model(config), path)
    return json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")


def write(path, config, tensors):
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------- against transformers


@pytest.fixture(scope="module")
def transformers():
    library = pytest.importorskip("transformers")
    library.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


@every_family
def test_saved_model_is_the_same_model_in_transformers(transformers, name, tmp_path):
    ours = random_model(CONFIGS[name])
    save_model(ours, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(theirs).__name__ == model.ARCHITECTURES[CONFIGS[name]["model_type"]]
    theirs.eval()

    ids, mask = random_batch()
    with torch.no_grad():
        output = theirs(ids, output_hidden_states=True)
        hidden = ours(ids)
        torch.testing.assert_close(hidden, output.hidden_states[-1], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.logits(hidden), output.logits, atol=1e-4, rtol=0)
        real = mask.bool()
        padded, expected = ours.logits(ours(ids, mask)), theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(padded[real], expected[real], atol=1e-4, rtol=0)

    certain = generate(ours, PROMPTS[:1], 4, None, temperature=0)[0][3]  # an end that one sequence is sure to reach
    for eos_id in (0, certain):
        new = generate(ours, PROMPTS, 25, eos_id, temperature=0)
        for prompt, tokens in zip(PROMPTS, new, strict=True):
            expected = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=25,
                do_sample=False, eos_token_id=eos_id, pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
            assert tokens == expected


@every_family
def test_transformers_checkpoint_loads(transformers, name, tmp_path):
    config = transformers.AutoConfig.for_model(**copy.deepcopy(CONFIGS[name]))  # it writes into rope_parameters
    theirs = perturb(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    # tiny shards exercise the index
    theirs.save_pretrained(tmp_path, max_shard_size="6KB" if name in ("gpt2", "qwen2") else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (name in ("gpt2", "qwen2"))
    ours = load_model(tmp_path)
    assert not ours.training and ours.config["model_type"] == CONFIGS[name]["model_type"]
    ids, _ = random_batch()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)
    assert torch.equal(ours.embed.weight, theirs.get_input_embeddings().weight)
    assert torch.equal(ours.head_weight, theirs.get_output_embeddings().weight)


def test_gradients_equal_transformers(transformers, tmp_path):
    for name in ("gpt2", "qwen3-window"):
        dropout = {"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0} if name == "gpt2" else {}
        ours = random_model({**CONFIGS[name], **dropout})
        save_model(ours, tmp_path / name)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).train()
        ids, _ = random_batch()
        theirs(ids, labels=ids).loss.backward()
        ours.train()
        logits = ours.logits(ours(ids))[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        expected = theirs.get_input_embeddings().weight.grad
        torch.testing.assert_close(ours.embed.weight.grad, expected, atol=1e-4, rtol=1e-3)


def test_bfloat16_is_as_close_as_transformers(transformers, tmp_path):
    """In bfloat16 our error against float32 is no worse than transformers'; positions far out test the rotary table."""
    exact = random_model({**LLAMA, "max_position_embeddings": 512, "rope_theta": 100.0})
    save_model(exact, tmp_path)
    ids = torch.randint(0, 61, (2, 500), generator=torch.Generator().manual_seed(0))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = exact.logits(exact(ids))
        their_error = (theirs(ids).logits.float() - expected).abs().mean()
        for ours in (load_model(tmp_path, dtype=torch.bfloat16), load_model(tmp_path).to(torch.bfloat16)):
            assert ours.rotary.inverse_frequencies.dtype == torch.float32
            hidden = ours(ids)
            assert hidden.dtype == torch.bfloat16
            assert (ours.logits(hidden).float() - expected).abs().mean() < 1.1 * their_error


def test_sampling_filters_agree_with_transformers(transformers):
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 3
    for top_k, top_p in ((5, 1.0), (0, 0.7), (6, 0.8)):
        kept = logits
        if top_k:
            kept = transformers.TopKLogitsWarper(top_k)(None, kept)
        if top_p < 1:
            kept = transformers.TopPLogitsWarper(top_p)(None, kept)
        drawn = torch.zeros_like(logits, dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        for _ in range(300):
            drawn.scatter_(1, sample(logits, 1.0, top_k, top_p, generator)[:, None], True)
        assert not (drawn & (kept == -torch.inf)).any()
        likely = kept.softmax(-1) > 0.05
        assert (drawn | ~likely).all()


# ------------------------------------------------------------------------------------------ without transformers


def wave_model(config):
    """Weights by a formula, so that stored numbers pin the computation down without a checkpoint."""
    m = build_model(config).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(m.named_parameters())):
            wave = torch.sin(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + i)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(0.3 * wave.view(parameter.shape) + float(is_norm))
    return m


# log-probabilities of token 0 after each of [1, 2, 3, 4, 5, 6], computed by transformers from wave_model's weights
STORED = {
    "gpt2": [-5.15935, -4.73706, -3.81793, -5.03685, -4.85808, -3.79742],
    "llama3-scaling": [-4.69369, -4.1407, -3.59047, -7.53439, -4.64829, -3.2502],
    "qwen2-window": [-5.30143, -4.0535, -3.85328, -6.62882, -4.09869, -3.57591],
    "qwen3": [-4.35146, -4.60137, -3.09606, -5.7518, -6.31102, -3.09833],
}


@pytest.mark.parametrize("name", ["gpt2", "llama3-scaling", "qwen2-window", "qwen3"])
def test_stored_numbers(name):
    m = wave_model(CONFIGS[name])
    with torch.no_grad():
        logits = m.logits(m(torch.tensor([[1, 2, 3, 4, 5, 6]])))
    torch.testing.assert_close(logits.log_softmax(-1)[0, :, 0], torch.tensor(STORED[name]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("step", [3, 64])
@every_family
def test_cached_decoding_equals_the_full_forward_pass(name, step, monkeypatch):
    """Greedy tokens are the arg-max of uncached forward passes, alone and in a batch that shrinks as sequences end."""
    monkeypatch.setattr(model.KVCache, "STEP", step)  # the cache grows many times, or never
    m = random_model(CONFIGS[name])
    alone = [generate(m, [prompt], 20, None, temperature=0)[0] for prompt in PROMPTS]
    for prompt, new in zip(PROMPTS, alone, strict=True):
        assert len(new) == 20
        with torch.no_grad():
            predictions = m.logits(m(torch.tensor([prompt + new]))).argmax(-1)[0]
        assert new == predictions[len(prompt) - 1 : -1].tolist()
    eos_id = alone[0][4]
    cut = [new[: new.index(eos_id) + 1] if eos_id in new else new for new in alone]
    assert len(cut[0]) <= 5
    assert generate(m, PROMPTS, 20, eos_id, temperature=0) == cut
    assert generate(m, PROMPTS[::-1], 20, eos_id, temperature=0) == cut[::-1]


@every_family
def test_padding_never_reaches_real_tokens(name):
    m = random_model(CONFIGS[name])
    ids, mask = random_batch()
    with torch.no_grad():
        hidden = m(ids, mask)
        for row, length in enumerate(mask.sum(1).tolist()):
            torch.testing.assert_close(hidden[row, :length], m(ids[row : row + 1, :length])[0], atol=1e-5, rtol=0)


def test_sliding_window_sees_exactly_its_tokens():
    config = {**CONFIGS["mistral-window"], "num_hidden_layers": 1}
    m = random_model(config)
    ids, _ = random_batch()
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 61
    with torch.no_grad():
        moved = (m(ids) - m(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [True] * 5 + [False] * 9  # window 5: the token itself and the four before it


def test_position_limit():
    m = random_model(GPT2)  # 40 positions
    outputs = generate(m, [[1] * 38, [2] * 40, [3] * 5, [4], [5], [6]], 10, None, temperature=0)
    assert [len(new) for new in outputs] == [2, 0, 10, 10, 10, 10]
    assert outputs[2] == generate(m, [[3] * 5], 10, None, temperature=0)[0]
    with pytest.raises(ValueError, match="prompt 1 has 41 tokens, the model 40 positions"):
        generate(m, [[1], [1] * 41], 1, None)
    with pytest.raises(ValueError, match="41 tokens is longer than the model's 40 positions"):
        m(torch.ones(1, 41, dtype=torch.long))


def test_a_budget_for_each_prompt():
    m = random_model(GPT2)
    whole = generate(m, PROMPTS, 12, None, temperature=0)
    budgets = [max(12 - 6 * i, 0) for i in range(len(PROMPTS))]  # 12, 6, 0, ...
    expected = [new[:budget] for new, budget in zip(whole, budgets, strict=True)]
    assert generate(m, PROMPTS, budgets, None, temperature=0) == expected
    with pytest.raises(ValueError, match="2 max_new_tokens for 1 prompts"):
        generate(m, [[1]], [1, 2], None)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(m, [[1], [2]], [1, -1], None)


def test_rows_beyond_the_vocabulary_are_never_drawn():
    m = random_model(GPT2)
    with torch.no_grad():  # all states point at the last rows
        m.norm.bias.fill_(1.0)
        m.head_weight[50:] = 3.0
    assert max(max(new) for new in generate(m, PROMPTS, 10, None, seed=1)) >= 50
    assert max(max(new) for new in generate(m, PROMPTS, 10, None, seed=1, vocabulary=50)) < 50


def test_there_is_nothing_to_draw_from_logits_that_are_not_finite():
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="not finite"):
            sample(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, wrong]]))


def test_generate_restores_the_mode_and_refuses_nonsense():
    m = random_model(GPT2).train()
    generate(m, [[1, 2]], 3, None)
    assert m.training and m.blocks[0].training
    assert generate(m, [], 3, None) == [] and generate(m, [[1]], 0, None) == [[]]
    for arguments, message in (
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[61]]}, "prompt 0 has a token id outside the vocabulary of 61"),
        ({"prompts": [[-1]]}, "outside the vocabulary"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(m, **{"prompts": [[1]], "max_new_tokens": 2, "eos_id": None, **arguments})


def test_seeded_sampling():
    m = random_model(LLAMA)
    first = generate(m, PROMPTS, 15, None, temperature=2.0, seed=3)
    assert first == generate(m, PROMPTS, 15, None, temperature=2.0, seed=3)
    assert first != generate(m, PROMPTS, 15, None, temperature=2.0, seed=4)
    state = torch.get_rng_state()
    generate(m, PROMPTS, 5, None, seed=3)
    assert torch.equal(state, torch.get_rng_state())  # a seed leaves the global generator alone
    torch.manual_seed(7)
    unseeded = generate(m, PROMPTS, 15, None, temperature=2.0)
    torch.manual_seed(7)
    assert unseeded == generate(m, PROMPTS, 15, None, temperature=2.0)
    greedy = generate(m, PROMPTS, 15, None, temperature=0)
    assert greedy == generate(m, PROMPTS, 15, None, temperature=3.0, top_k=1, seed=0)
    assert greedy == generate(m, PROMPTS, 15, None, temperature=3.0, top_p=1e-6, seed=0)


@pytest.mark.parametrize(
    "options, expected",
    [  # of the probabilities 0.15, 0.5, 0.05, 0.3
        ({}, [0.15, 0.5, 0.05, 0.3]),
        ({"temperature": 0.5}, [x * x / 0.365 for x in (0.15, 0.5, 0.05, 0.3)]),  # p² / Σ p²
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 0.625, 0, 0.375]),
        ({"top_k": 9}, [0.15, 0.5, 0.05, 0.3]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.79}, [0, 0.625, 0, 0.375]),
        ({"top_p": 0.81}, [3 / 19, 10 / 19, 0, 6 / 19]),
        ({"top_k": 3, "top_p": 0.51}, [0, 1, 0, 0]),  # top_k first: then the likeliest has 0.5 / 0.95 = 0.526
    ],
)
def test_sampling_distribution(options, expected):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(40000, 4) + 1.0
    # the tolerance below is more than 4 standard deviations of a frequency
    drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)
    frequencies = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(frequencies, torch.tensor(expected, dtype=torch.float32), atol=0.012, rtol=0)
    assert (frequencies[torch.tensor(expected) == 0] == 0).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24, 1.0])  # 1.0: not drawn, but a product may be rounded up to it
def test_the_ends_of_the_uniform_draw_find_tokens_with_mass(uniform, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform))
    logits = torch.tensor([[-5.0, 2.0, 1.0, -5.0], [3.0, -9.0, -9.0, 2.9], [-9.0, -9.0, 1.0, -9.0]])
    expected = [1, 0, 2] if uniform == 0 else [2, 3, 2]
    assert sample(logits, top_k=2)[:2].tolist() == expected[:2]
    assert sample(logits, top_p=0.9).tolist() == expected


def test_dropout_is_active_in_training_only():
    ids, _ = random_batch()
    for config, active in (
        (GPT2, True),  # 0.1 by default
        ({**GPT2, "embd_pdrop": 0.5, "attn_pdrop": 0, "resid_pdrop": 0}, True),
        ({**GPT2, "embd_pdrop": 0, "attn_pdrop": 0.5, "resid_pdrop": 0}, True),
        ({**GPT2, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0.5}, True),
        ({**GPT2, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}, False),
        ({**LLAMA, "attention_dropout": 0.5}, True),
        (LLAMA, False),
    ):
        m = random_model(config)
        with torch.no_grad():
            assert torch.equal(m(ids), m(ids))
            m.train()
            assert torch.equal(m(ids), m(ids)) != active
    block, x = random_model({**GPT2, "attn_pdrop": 0, "resid_pdrop": 0.5}).train().blocks[0], torch.ones(1, 1, 24)
    assert not torch.equal(block.mlp(x), block.mlp(x))
    assert not torch.equal(block.attn(x, 0, None, None, None), block.attn(x, 0, None, None, None))
    # an unbiased estimate: the mean over many draws of a dropped embedding is the embedding
    torch.manual_seed(0)
    m = random_model({**GPT2, "embd_pdrop": 0.5}).train()
    mean = torch.stack([m.dropout(m.embed.weight) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, m.embed.weight, atol=0.15, rtol=0)

# -- dropout on a CPU --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_mask_keeps_one_minus_p(p):
    torch.manual_seed(0)
    keep = model.keep_mask(torch.empty(3, 5, 40_001), p)
    assert keep.dtype == torch.bool and keep.shape == (3, 5, 40_001)
    n = keep.numel()
    for part in (keep, *keep.flatten()[: n // 4 * 4].view(-1, 4).T):  # also each of the four lanes of a random word
        assert part.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / part.numel()) ** 0.5)
    pairs = keep.flatten()[: n // 2 * 2].view(-1, 2).float()
    assert torch.corrcoef(pairs.T)[0, 1].abs() < 5 / len(pairs) ** 0.5  # neighbours know nothing of each other
    torch.manual_seed(0)
    assert torch.equal(keep, model.keep_mask(torch.empty(3, 5, 40_001), p))  # torch's generator, so runs can be resumed


def test_dropout_keeps_the_mean_and_scales_the_gradient():
    x = torch.ones(1000, 10, requires_grad=True)
    layer = model.Dropout(0.25)
    y = layer(x)
    y.sum().backward()
    assert y.detach().unique().tolist() == pytest.approx([0, 4 / 3])
    torch.testing.assert_close(x.grad, y.detach())
    assert layer.eval()(x) is x
    assert model.Dropout(0.0)(x) is x and not model.Dropout(1.0)(x).any()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize(("lengths", "rows"), [([7, 7], 128), ([8, 3], 4), ([2, 11, 1], 4), ([1], 3)])
def test_attention_with_dropout_by_blocks_equals_the_whole_matrix(lengths, rows, dtype, tolerance, monkeypatch):
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(sum(lengths), 3, 4, dtype=dtype).requires_grad_() for _ in range(4))
    kept = []

    def recorded(x, p, keep_mask=model.keep_mask):
        kept.append(keep_mask(x, p))
        return kept[-1]

    monkeypatch.setattr(model, "keep_mask", recorded)
    y = model.DropoutAttention.apply(q, k, v, lengths, 0.3, rows)
    gradients = torch.autograd.grad(y, (q, k, v), g)
    keep, seen = torch.zeros(3, sum(lengths), sum(lengths), dtype=dtype), torch.zeros(sum(lengths), sum(lengths))
    blocks, first = iter(kept), 0
    for length in lengths:
        for start in range(0, length, rows):
            part = next(blocks)
            at = first + start
            keep[:, at : at + part.shape[1], first : first + part.shape[2]] = part
        seen[first : first + length, first : first + length] = 1
        first += length
    causal = seen.tril().bool()
    assert next(blocks, None) is None
    assert sum(lengths) < 5 or not keep.bool()[causal.expand_as(keep)].all()
    scores = (torch.einsum("nhd,mhd->hnm", q, k) / 2).masked_fill(~causal, -torch.inf)
    expected = torch.einsum("hnm,mhd->nhd", scores.softmax(-1) * keep / 0.7, v)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for ours, plain in zip(gradients, torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=4 * tolerance)


def test_training_with_attention_dropout_goes_by_blocks(monkeypatch):
    """What a model calls is that function, with its dropout, and never in eval mode; also under autocast."""
    calls = []
    apply = model.DropoutAttention.apply
    monkeypatch.setattr(model.DropoutAttention, "apply", lambda *a: calls.append(a[3:]) or apply(*a))
    dropout = {"attn_pdrop": 1e-5, "resid_pdrop": 0, "embd_pdrop": 0}  # rounds to 1/65536: hardly anything is dropped
    m = random_model({**GPT2, **dropout})
    ids = torch.randint(m.config["vocab_size"], (2, 9))
    expected = m(ids)
    assert calls == []
    m.train()
    torch.testing.assert_close(m(ids), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = m(ids)
    hidden.sum().backward()  # outside of autocast, as in training
    torch.testing.assert_close(hidden.float(), expected, rtol=0.1, atol=0.1)
    assert calls == [([9, 9], 1e-5)] * 2 * m.config["n_layer"]
    del calls[:]
    real = torch.tensor([*range(9), *range(9, 13)])
    packed, padded = (hidden.flatten(0, 1)[real] for hidden in (m(ids, real=real), expected))
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)
    assert calls == [([9, 4], 1e-5)] * m.config["n_layer"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [[6, 1, 9], [9, 9], [4], [2, 2, 5]])
def test_nothing_is_computed_for_padding(name, lengths):
    """States and gradients without the padding are those with it, and the padding has no token that is looked at."""
    m = random_model(CONFIGS[name]).double()
    T, vocabulary = max(lengths), m.config["vocab_size"]
    ids, real = torch.full((len(lengths), T), 10**9), []
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(vocabulary, (length,))
        real += range(row * T, row * T + length)
    real, weights = torch.tensor(real), torch.randn(sum(lengths), len(m.norm.weight), dtype=torch.float64)
    rows = []
    for layer in m.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda layer, x, y: rows.append(x[0].numel() // layer.in_features))
    packed = m(ids, real=real)
    assert set(rows) == {sum(lengths)} and packed.shape[:2] == ids.shape
    padding = torch.ones(ids.numel(), dtype=torch.bool)
    padding[real] = False
    assert not packed.flatten(0, 1)[padding].any()
    padded = m(ids.where(ids < vocabulary, 0))
    gradients = []
    for hidden in (packed, padded):
        (hidden.flatten(0, 1)[real] * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None})
        m.zero_grad()
    torch.testing.assert_close(packed.flatten(0, 1)[real], padded.flatten(0, 1)[real])
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 5
    torch.testing.assert_close(gradients[0], gradients[1])



@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "qwen3"])
def test_autocast(name):
    m = random_model(CONFIGS[name])
    ids, mask = random_batch()
    with torch.no_grad():
        exact = m.logits(m(ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # generation inside the region must not leave gradient-free copies of the weights behind for the training step
        assert all(len(new) == 6 for new in generate(m, PROMPTS, 6, None, temperature=0))
        logits = m.logits(m(ids, mask))
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).abs().mean() < 0.03 * exact.abs().mean()
    logits.float().logsumexp(-1).sum().backward()
    for parameter_name, parameter in m.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        if not parameter_name.endswith("k_proj.bias"):  # adds the same to all scores of a query, up to rotation
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "qwen3"])
def test_recomputed_blocks_keep_nothing_and_change_no_bit(name, autocast):
    """Dropout of the second run of a block is that of the first."""
    dropout = "attn_pdrop" if name == "gpt2" else "attention_dropout"
    m = random_model({**CONFIGS[name], dropout: 0.3}).train()
    ids, mask = random_batch()
    real, kept, found, runs = mask.flatten().nonzero()[:, 0], [], [], []
    m.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))

    def pack(tensor):
        kept[-1] += tensor.nbytes
        return tensor

    for m.recompute in (False, True):
        kept.append(0)
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = m(ids, real=real)
        hidden.square().sum().backward()
        found.append([hidden.detach(), *(p.grad for p in m.parameters() if p.grad is not None)])
        m.zero_grad()
    assert len(found[0]) == len(found[1]) > 10 and all(map(torch.equal, *found))
    assert kept[1] < 0.25 * kept[0] and len(runs) == 1 + 2
    with torch.no_grad():
        assert m(ids).shape[:2] == ids.shape and len(runs) == 4  # nothing to recompute for


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen2-window"])
def test_one_graph_for_compile(name, recompute):
    torch.compiler.reset()
    m = random_model(CONFIGS[name])
    ids, mask = random_batch()
    m.recompute = recompute
    compiled = torch.compile(m, backend="eager", fullgraph=True)  # fails on any break of the graph
    torch.testing.assert_close(compiled(ids, mask), m(ids, mask))


def test_attention_mask_must_be_right_padding():
    m = random_model(GPT2)
    ids = torch.ones(2, 4, dtype=torch.long)
    m(ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    m(ids, torch.tensor([[True, True, True, False]] * 2))
    for rows in ([[1, 1, 1, 1], [0, 0, 1, 1]], [[1, 0, 1, 1], [1, 1, 1, 1]]):
        with pytest.raises(ValueError, match="pad on the right"):
            m(ids, torch.tensor(rows))
    with pytest.raises(ValueError, match=r"attention_mask \(2, 3\), input_ids \(2, 4\)"):
        m(ids, torch.ones(2, 3))


def test_initialisation():
    torch.manual_seed(0)
    config = {**GPT2, "n_embd": 192, "n_layer": 8, "vocab_size": 500, "initializer_range": 0.05}
    for name, parameter in build_model(config).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            std = 0.05 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.05
            assert abs(parameter.std() / std - 1) < 0.05 and abs(parameter.mean()) < 0.05 * std, name
    config = {**LLAMA, "initializer_range": 0.5, "rope_scaling": {**LLAMA3}}
    m = build_model(config)
    config["rope_scaling"].clear()
    assert m.config["rope_scaling"] == LLAMA3  # the model keeps its own copy
    m = build_model({**LLAMA, "initializer_range": 0.5})
    assert abs(m.head_weight.std() / 0.5 - 1) < 0.1 and m.training
    assert m.rotary.inverse_frequencies.tolist() == [1.0, pytest.approx(0.01)]  # real numbers, not meta


# ----------------------------------------------------------------------------------------------------- checkpoints


@every_family
def test_round_trip_is_exact(name, tmp_path):
    m = random_model(CONFIGS[name])
    save_model(m, tmp_path)
    again = load_model(str(tmp_path))
    with open(tmp_path / "model.safetensors", "r+b") as file:  # a loaded model is independent of its file
        good = file.read()
        file.seek(len(good) // 2)
        file.write(bytes(len(good) // 2))
    expected = dict(m.named_parameters())
    assert expected.keys() == dict(again.named_parameters()).keys()
    for parameter_name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected[parameter_name])
    assert {field: again.config[field] for field in CONFIGS[name]} == CONFIGS[name]
    (tmp_path / "model.safetensors").write_bytes(good)
    tied = (again.head_weight is again.embed.weight) == (m.head_weight is m.embed.weight)
    assert tied and ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (m.lm_head is not None)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_dtypes(tmp_path):
    m = random_model(LLAMA)
    save_model(m.half(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float16"
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.float16
    again = load_model(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.embed.weight, m.embed.weight.float())
    assert {p.dtype for p in load_model(tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}
    save_model(again, tmp_path)  # from here on it is a float32 checkpoint and says so
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_names_of_older_checkpoints(tmp_path):
    """GPT-2 on the hub: no prefix, causal-mask constants, sometimes the tied head again. LLaMA: rotary frequencies."""
    ids, _ = random_batch()
    for config, prefix, constants in (
        (GPT2, "transformer.", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ({**LLAMA, "tie_word_embeddings": True}, "model.", ["layers.0.self_attn.rotary_emb.inv_freq"]),
    ):
        path = tmp_path / prefix
        saved, tensors = save_random(path, config)
        expected = load_model(path)(ids)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        tensors |= {name: torch.ones(3) for name in constants} | {"lm_head.weight": expected.new_zeros(61, 24)}
        with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
            write(path, saved, tensors)
            load_model(path)
        tensors["lm_head.weight"] = load_model_embedding(tensors)
        write(path, saved, tensors)
        assert torch.equal(load_model(path)(ids), expected)


def load_model_embedding(tensors):
    return tensors["wte.weight" if "wte.weight" in tensors else "embed_tokens.weight"].clone()


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json not found; expected a Hugging Face directory"):
        load_model(tmp_path / "absent")
    save_random(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="expected model.safetensors, or model.safetensors.index.json"):
        load_model(tmp_path)


def test_damaged_files(tmp_path):
    save_random(tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()
    for bad in (good[:-100], good[:50], b"", b"\xff" * 200, b"PK\x03\x04 a zip file, as torch.save writes"):
        (tmp_path / "model.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2",')
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_model(tmp_path)


def test_wrong_tensors(tmp_path):
    config, tensors = save_random(tmp_path)
    key = "transformer.h.0.mlp.c_fc.weight"  # [in, out] in the file: 24, 96
    for name, tensor, message in (
        (key, torch.zeros(24, 95), rf"{key}: shape \[24, 95\] in the file, \[24, 96\] by config.json"),
        (key, tensors[key].T.contiguous(), r"shape \[96, 24\] in the file, \[24, 96\]"),
        ("transformer.ln_f.bias", torch.zeros(25), r"ln_f.bias: shape \[25\] in the file, \[24\] by"),
        ("transformer.ln_f.bias", torch.zeros(24, dtype=torch.int8), "ln_f.bias: torch.int8 weights"),
        ("transformer.h.2.ln_1.bias", torch.zeros(24), "tensor 'transformer.h.2.ln_1.bias' is not known"),
        ("score.weight", torch.zeros(2, 24), "tensor 'score.weight' is not known for model_type gpt2"),
        (key, None, rf"lacks 1 tensors: {key}"),
    ):
        changed = {**tensors, name: tensor}
        write(tmp_path, config, {n: t for n, t in changed.items() if t is not None})
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    write(tmp_path, {**config, "tie_word_embeddings": False}, tensors)
    with pytest.raises(ValueError, match="lacks 1 tensors: lm_head.weight"):
        load_model(tmp_path)


def test_shards(tmp_path):
    config, tensors = save_random(tmp_path)
    expected = load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    again = load_model(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), again.parameters(), strict=True))

    twice = tensors["transformer.wte.weight"]
    save_file({"wte.weight": twice, "transformer.wte.weight": twice.clone()}, tmp_path / "twice.safetensors")
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "twice.safetensors"}}))
    with pytest.raises(ValueError, match="tensor 'wte.weight' came twice"):
        load_model(tmp_path)
    for escape in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b", ""):
        index.write_text(json.dumps({"weight_map": {**weight_map, "transformer.wte.weight": escape}}))
        with pytest.raises(ValueError, match="is not a plain file name"):
            load_model(tmp_path)
    for broken in ({}, {"weight_map": []}, {"weight_map": {"transformer.wte.weight": 1}}):
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="expected a weight_map"):
            load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {**weight_map, "transformer.wte.weight": "model-3.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="model-3.safetensors not found, but .*index.json lists"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({**GPT2, "model_type": "bert"}, "model_type 'bert' is not supported, only gpt2, llama"),
        ({"n_embd": 4}, "model_type None is not supported"),
        ({k: v for k, v in GPT2.items() if k != "n_head"}, "n_head must be an integer from 1 to .*is 'missing'"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size must be an integer from 1"),
        ({**GPT2, "n_layer": 0}, "n_layer must be an integer from 1 to 1024, it is 0"),
        ({**GPT2, "n_head": 5}, "n_embd 24 does not divide into 5 heads"),
        ({**LLAMA, "num_key_value_heads": 4}, "6 attention heads cannot share 4 key-value heads"),
        ({**LLAMA, "head_dim": 5}, "head_dim 5 is odd"),
        ({**GPT2, "flash": 1}, "field 'flash' .= 1. is not known"),
        ({**GPT2, "hidden_size": 24}, "field 'hidden_size'"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "field 'quantization_config'"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        ({**GPT2, "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights = False is not supported, only True"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention = True"),
        ({**GPT2, "activation_function": "tanh"}, "activation 'tanh' is not supported"),
        ({**LLAMA, "hidden_act": "mish"}, "activation 'mish' is not supported"),
        ({**LLAMA, "sliding_window": 8}, "sliding_window = 8 is not supported"),
        ({**LLAMA, "rope_interleaved": True}, "rope_interleaved = True"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({**LLAMA, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "got .'factor', 'type'."),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number from 0.001 to .* is 0"),
        ({**LLAMA, "rope_scaling": {**LLAMA3, "factor": "8"}}, "factor must be a number from .*, it is '8'"),
        ({**LLAMA, "rope_scaling": {**LLAMA3, "low_freq_factor": 9.0}}, "low_freq_factor below its high_freq_factor"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "'linear' needs the fields .'factor'., got .."),
        ({**LLAMA, "rope_scaling": {**LLAMA3, "beta_fast": 32}}, "'llama3' needs the fields .*beta_fast"),
        ({**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta.*contradict"),
        ({**LLAMA, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e6}}, "contradict"),
        ({**QWEN, "model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types must name"),
        ({**QWEN, "model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, "layer_types must"),
        ({**QWEN, "model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
        ({**LLAMA, "model_type": "mistral", "attention_bias": True}, "attention_bias = True"),
    ],
)
def test_configs_not_understood(config, message):
    with pytest.raises(ValueError, match=message):
        build_model(config)


def test_configs_of_the_hub_are_understood():
    """The fields of well-known checkpoints' config.json; their sizes cut down."""
    old_gpt2 = {"n_ctx": 1024, "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None,
                "task_specific_params": {"text-generation": {"max_length": 50}}, "n_special": 0, "output_past": True,
                "predict_special_tokens": True, "architectures": ["GPT2LMHeadModel"], "_num_labels": 1}  # fmt: skip
    build_model({**GPT2, **old_gpt2})
    build_model({**LLAMA, "pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16", "use_cache": True})
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}, "rope_theta": 1e5}
    assert build_model({**LLAMA, **smollm2, "tie_word_embeddings": True}).lm_head is None
    llama32 = {"rope_theta": 5e5, "eos_token_id": [1, 2], "rope_scaling": {**LLAMA3, "factor": 32.0}, "mlp_bias": False}
    build_model({**LLAMA, **llama32, "head_dim": 64})
    qwen = {"use_mrope": False, "attention_dropout": 0.0, "rope_theta": 1e6}
    assert build_model({**QWEN, **qwen, "model_type": "qwen2"}).windows == [None, None]


def test_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch):
    old, new = random_model(GPT2, 1), random_model(GPT2, 2)
    save_model(old, tmp_path)

    def crash(tensors, file, metadata):
        Path(file).write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_model(new, tmp_path)
    assert torch.equal(load_model(tmp_path).embed.weight, old.embed.weight)
    monkeypatch.undo()
    save_model(new, tmp_path)
    assert torch.equal(load_model(tmp_path).embed.weight, new.embed.weight)


def test_only_plain_models_are_saved(tmp_path):
    m = random_model(GPT2)
    m.blocks[0].attn.c_attn.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="blocks.0.attn.c_attn.adapter.*merge adapters before saving"):
        save_model(m, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_works_copied_alone(tmp_path):
    (tmp_path / "model.py").write_text(Path(model.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.'); import doctest, model; "
               "failed, run = doctest.testmod(model); sys.exit(failed or not run)"]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
