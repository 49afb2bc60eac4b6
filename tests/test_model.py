"""model.py against transformers (where installed), and against its own plain definitions."""

import copy
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, GPT2, LLAMA, LLAMA3, perturb, random_batch, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
from model import Packing, build_model, generate, load_model, sample, save_model
from runtime.strict import check_config, check_model

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [44, 2, 60], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]]
every_family = pytest.mark.parametrize("name", CONFIGS)


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
        expected = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(ours.logits(hidden)[real], expected[real], atol=1e-4, rtol=0)

    for logits in (ours.logits(ours(ids)), theirs(ids).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = [m.weight.grad for m in (ours.embed, theirs.get_input_embeddings())]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)

    certain = generate(ours, PROMPTS[:1], 4, None, temperature=0)[0][3]  # an end that one sequence is sure to reach
    for eos_id in (0, certain):
        new = generate(ours, PROMPTS, 12, eos_id, temperature=0)
        for prompt, tokens in zip(PROMPTS, new, strict=True):
            expected = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=12,
                do_sample=False, eos_token_id=eos_id, pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
            assert tokens == expected


def test_activations_are_those_of_transformers(transformers):
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 99)
    for name, activation in model.ACTIVATIONS.items():
        torch.testing.assert_close(activation(x), ACT2FN[name](x), atol=1e-6, rtol=0)


def test_a_field_that_is_left_out_is_what_it_is_in_transformers(transformers):
    """As a config.json may leave it out; but for those that follow from other fields."""
    for family, fields in model.FIELDS.items():
        asked = {"use_sliding_window": True} if "use_sliding_window" in fields else {}  # else there is no window
        follow = {"n_inner", "head_dim", "layer_types", *model._ROPE} - ({"head_dim"} if family == "qwen3" else set())
        follow |= {"num_key_value_heads"} if family == "llama" else set()
        theirs, ours = transformers.AutoConfig.for_model(family, **asked), {**fields, **asked}
        ours = {field: x for field, x in ours.items() if field not in follow and x is not model.REQUIRED}
        assert {field: getattr(theirs, field) for field in ours} == ours


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


def test_a_mistral_that_names_its_layers_slides_where_it_says_so(transformers, tmp_path):
    """Ministral's config.json; transformers 5 makes another class of it."""
    pytest.importorskip("transformers", minversion="5")
    layers = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ours = random_model({**CONFIGS["mistral-window"], **layers})
    save_model(ours, tmp_path)
    check_model(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids, _ = random_batch()
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=0)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("fields", [
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}},  # as in Qwen2.5
    {"rope_parameters": {**YARN, "rope_theta": 700.0, "factor": None, "original_max_position_embeddings": 10}},
    {"rope_scaling": {**YARN, "beta_fast": 3, "beta_slow": 0.5, "truncate": False, "attn_factor": 0.9}},
    {"rope_scaling": {**YARN, "beta_fast": 3, "truncate": None}},
    {"rope_scaling": {**YARN, "attention_factor": 0.7}, "original_max_position_embeddings": 20},
    {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": None}, "rope_theta": 1e6},
    {"rope_scaling": {**YARN, "mscale": 0.7, "beta_fast": 1, "original_max_position_embeddings": 4}},
    {"rope_scaling": {**YARN, "factor": 0.5}},
    {"rope_scaling": YARN, "rope_theta": 2.0},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},  # our sequences end where it begins
    {"rope_scaling": {"rope_type": "linear", "factor": 3, "original_max_position_embeddings": 5, "beta_fast": 1}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4}},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 12}, "original_max_position_embeddings": 12},
    {"rope_scaling": {**LLAMA3, "type": "llama3", "mscale": 1}, "rope_parameters": {**LLAMA3, "rope_theta": 500.0},
     "rope_theta": 500},
    {"rope_scaling": {"type": "default", "factor": 8.0}, "rope_theta": 5000.0},
], ids=str)  # fmt: skip
def test_rotary_scaling_is_that_of_transformers(transformers, fields):
    config = {**LLAMA, "head_dim": 32, **fields}
    assert check_config(copy.deepcopy(config)).rotary
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**config))
    positions = torch.arange(40)[None]
    for ours, expected in zip(build_model(config).rotary(positions), theirs(torch.ones(1), positions), strict=True):
        torch.testing.assert_close(ours[:, :, 0], expected[..., :16], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_a_tied_model_whose_file_has_the_head_alone(name, tmp_path):
    """What safetensors.torch.save_model leaves of a tied pair in transformers: the first name."""
    save_model(random_model(CONFIGS[name]), tmp_path)
    expected, tensors = load_model(tmp_path), load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    check_model(tmp_path)
    for body in (True, False):
        again = load_model(tmp_path, body=body)
        assert torch.equal(again.embed.weight, expected.embed.weight) and again.head_weight is again.embed.weight
    assert torch.equal(load_model(tmp_path)(torch.tensor([[1, 2]])), expected(torch.tensor([[1, 2]])))


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


# ------------------------------------------------------------------------------------------ without transformers


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


def test_position_limit():
    m = random_model(GPT2)  # 40 positions
    outputs = generate(m, [[1] * 38, [2] * 40, [3] * 5, [4], [5], [6]], 10, None, temperature=0)
    assert [len(new) for new in outputs] == [2, 0, 10, 10, 10, 10]
    assert outputs[2] == generate(m, [[3] * 5], 10, None, temperature=0)[0]
    with pytest.raises(ValueError, match="41 tokens is longer than the model's 40 positions"):
        m(torch.ones(1, 41, dtype=torch.long))


def test_a_budget_for_each_prompt():
    m = random_model(GPT2)
    whole = generate(m, PROMPTS, 12, None, temperature=0)
    budgets = [max(12 - 6 * i, 0) for i in range(len(PROMPTS))]  # 12, 6, 0, ...
    expected = [new[:budget] for new, budget in zip(whole, budgets, strict=True)]
    assert generate(m, PROMPTS, budgets, None, temperature=0) == expected


def test_rows_beyond_the_vocabulary_are_never_drawn():
    m = random_model(GPT2)
    with torch.no_grad():  # all states point at the last rows
        m.norm.bias.fill_(1.0)
        m.head_weight[50:] = 3.0
    assert max(max(new) for new in generate(m, PROMPTS, 10, None, seed=1)) >= 50
    assert max(max(new) for new in generate(m, PROMPTS, 10, None, seed=1, vocabulary=50)) < 50


def test_there_is_nothing_to_draw_from_logits_that_are_not_finite():
    for wrong, temperature in itertools.product((float("nan"), float("inf")), (1.0, 0.0)):
        drawn = sample(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, wrong]]), temperature).tolist()
        assert drawn[0] >= 0 and drawn[1] == -1
        m = random_model(GPT2)
        m.embed.weight.data[7] = wrong
        with pytest.raises(FloatingPointError, match="not finite"):
            generate(m, [[1, 2], [3]], 3, None, temperature)


def test_generate_restores_the_mode_and_refuses_nonsense():
    m = random_model(GPT2).train()
    generate(m, [[1, 2]], 3, None)
    assert m.training and m.blocks[0].training
    assert generate(m, [], 3, None) == [] and generate(m, [[1]], 0, None) == [[]]
    for arguments, message in (
        ({"prompts": [[1], []]}, "prompt 1 has 0 tokens"),
        ({"prompts": [[1], [1] * 41]}, "prompt 1 has 41 tokens; it needs 1 to 40"),
        ({"prompts": [[61]]}, "prompt 0 has 1 tokens; .* below the vocabulary's 61"),
        ({"prompts": [[-1]]}, "below the vocabulary"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": [1, 2]}, "one per prompt"),
        ({"prompts": [[1], [2]], "max_new_tokens": [1, -1]}, "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(m, **{"prompts": [[1]], "max_new_tokens": 2, "eos_id": None, **arguments})


def test_seeded_sampling():
    m = random_model(LLAMA)
    first = generate(m, PROMPTS, 15, None, temperature=2.0, seed=3)
    assert first == generate(m, PROMPTS, 15, None, temperature=2.0, seed=3)
    assert first != generate(m, PROMPTS, 15, None, temperature=2.0, seed=4)
    usual = generate(m, PROMPTS, 15, None, temperature=1.0, top_k=0, top_p=1.0, seed=3)
    assert usual == generate(m, PROMPTS, 15, None, seed=3)  # what is on-policy is sampled so
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


def test_sampling_adds_up_in_float32():
    """In bfloat16 most of so many tokens would add nothing to the cumulative mass."""
    drawn = sample(torch.zeros(20_000, 1000, dtype=torch.bfloat16), generator=torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 1000


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
    assert not torch.equal(block.attn(x, None, None, None), block.attn(x, None, None, None))


def flash_attention(q, k, v, starts, key_starts, longest, longest_keys, dropout, causal, debug):
    """PyTorch's, which is for CUDA alone, of each sequence by itself; q, k, v (N, heads, head_dim)"""
    assert torch.equal(starts, key_starts) and starts.dtype == torch.int32 and causal and not dropout
    assert max(starts.diff()) <= longest == longest_keys
    parts = []
    for part in zip(*(x.split(starts.diff().tolist()) for x in (q, k, v)), strict=True):
        of_one = (x.transpose(0, 1)[None] for x in part)
        parts.append(torch.nn.functional.scaled_dot_product_attention(*of_one, is_causal=True, enable_gqa=True)[0])
    return torch.cat([part.transpose(0, 1) for part in parts]), None


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [[6, 1, 9], [4]])
def test_nothing_is_computed_for_padding(name, lengths, monkeypatch):
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
    with monkeypatch.context() as on_cuda:
        on_cuda.setattr(Packing, "has_flash_kernel", staticmethod(lambda q: True))
        on_cuda.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
        torch.testing.assert_close(m(ids, real=real).flatten(0, 1)[real], packed.flatten(0, 1)[real])
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 5
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_takes_no_memory(name):
    """Of a long sequence beside short ones hardly more is kept for the backward pass than of the long one alone."""

    def kept(lengths: list[int]) -> int:
        storages, T = {}, max(lengths)
        real = torch.cat([torch.arange(length) + row * T for row, length in enumerate(lengths)])

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = m(torch.zeros((len(lengths), T), dtype=torch.long), real=real)
        assert hidden.requires_grad
        return sum(storages.values())

    m = random_model(CONFIGS[name]).train()
    T = m.limit
    assert kept([T, 1, 1, 1]) < 1.2 * kept([T])


@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "qwen3"])
def test_autocast(name):
    m = random_model(CONFIGS[name])
    ids, _ = random_batch()
    with torch.no_grad():
        exact = m.logits(m(ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # generation inside the region must not leave gradient-free copies of the weights behind for the training step
        assert all(len(new) == 6 for new in generate(m, PROMPTS, 6, None, temperature=0))
        logits = m.logits(m(ids))
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
    ids, _ = random_batch()
    m.recompute = recompute
    compiled = torch.compile(m, backend="eager", fullgraph=True)  # fails on any break of the graph
    torch.testing.assert_close(compiled(ids), m(ids))


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
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # without it transformers 4 does not read the file
        assert file.metadata() == {"format": "pt"}


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
    save_model(random_model({**LLAMA, "dtype": "bfloat16"}), tmp_path)  # transformers 5 spells it so
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "float32" and "torch_dtype" not in config


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
