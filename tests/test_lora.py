"""lora.py against peft (where installed), and training with adapters against its promises."""

import copy
import json
import os
import re
import shutil
import sys

import pytest
import torch
from helpers import CONFIGS, GPT2, LLAMA, arguments, random_batch, random_model, same, weights_of
from safetensors.torch import load_file, save_file

import eval as evaluation
import lora
import model
import train
from runtime import hub
from runtime import peft as peft_files
from runtime import run as checkpoint
from runtime.load import find_model
from runtime.peft import adapter_state, load_adapter, peft_path, save_adapter
from runtime.strict import check_model

GPT2_LAYERS = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
LLAMA_LAYERS = {*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))}
every_family = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])


@pytest.fixture(scope="module")
def peft():
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return library


def trained(m, rank=3, alpha=5.0, dropout=0.0, **options):
    """m with adapters as after some training: B is no longer zero."""
    torch.manual_seed(1)
    lora.attach(m, rank, alpha, dropout, **options)
    for layer in lora.adapted_layers(m).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return m


def logits_of(m):
    with torch.no_grad():
        return m.logits(m(random_batch()[0]))


def close(a, b, limit=1e-5):
    return float((a - b).abs().max()) < limit


# ---------------------------------------------------------------------------------------------------------------------
# The layers


@every_family
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_attached_model_starts_as_the_base_and_has_gradient_in_adapters_only(family, targets):
    m = random_model(CONFIGS[family])
    before, names = logits_of(m), {name for name, _ in m.named_parameters()}
    assert lora.attach(m, 4, 8, targets=targets) is m
    assert torch.equal(logits_of(m), before)

    if targets:
        layers = GPT2_LAYERS if family == "gpt2" else LLAMA_LAYERS
    else:
        layers = {"attn.c_attn"} if family == "gpt2" else {"self_attn.q_proj", "self_attn.v_proj"}
    adapters = {f"blocks.{i}.{name}.lora_{X}" for i in range(2) for name in layers for X in "AB"}
    assert {name for name, _ in m.named_parameters()} == names | adapters
    m.logits(m(random_batch()[0])).square().mean().backward()
    assert {name for name, p in m.named_parameters() if p.grad is not None} == adapters
    assert {name for name, p in m.named_parameters() if p.requires_grad} == adapters
    # at B = 0 the gradient reaches B, not yet A
    assert all((p.grad.abs().max() > 0) == name.endswith("_B") for name, p in m.named_parameters() if name in adapters)


def test_a_layer_is_its_formula():
    torch.manual_seed(0)
    m = torch.nn.ModuleDict({"c_fc": torch.nn.Linear(6, 5)})
    plain, x = copy.deepcopy(m.c_fc), torch.randn(7, 6)
    layer = trained(m, rank=2, alpha=3.0, dropout=0.5, targets="all-linear").eval().c_fc
    assert float(layer.lora_A.detach().abs().max()) <= 1 / 6**0.5  # uniform in ±1/√in, as peft starts it
    weight = plain.weight + 3.0 / 2 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, plain.bias))

    layer.train()
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), plain(x) + 1.5 * kept @ layer.lora_A.T @ layer.lora_B.T)  # the base has none


@every_family
def test_merged_logits_equal_adapted_ones(family):
    m = random_model(CONFIGS[family])
    base, weights = logits_of(m), [p for p in m.parameters()]
    values = [p.clone() for p in weights]
    adapted = logits_of(trained(m))
    assert lora.merge(m) is m and not lora.adapted_layers(m)
    assert not any(p.requires_grad for p in m.parameters())  # still frozen
    assert close(logits_of(m), adapted) and not close(adapted, base, 0.1)
    assert all(torch.equal(p, value) for p, value in zip(weights, values, strict=True))  # old tensors are left alone


def test_merging_rounds_once_in_half_precision():
    """W + update is summed in float32 and is then within half a unit of bf16's last place, 2⁻⁹ of its power of two."""
    layer = trained(random_model(LLAMA).bfloat16(), targets=["up_proj"]).blocks[0].mlp.up_proj
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
    with torch.no_grad():
        exact = layer.weight.double() + 5 / 3 * layer.lora_B.double() @ layer.lora_A.double()
    merged = layer.merge().weight
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= 1.001 * 2**-9 * 2 ** exact.abs().log2().ceil()).all()


def test_attached_layers_take_over_the_mode_and_generate_with_the_cache():
    m = random_model({**GPT2, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0})
    trained(m, dropout=0.5)
    assert torch.equal(logits_of(m), logits_of(m))  # eval: no dropout
    prompts = [[1, 2, 3], [4]]
    new = model.generate(m, prompts, 8, None, temperature=0)
    assert new == model.generate(lora.merge(copy.deepcopy(m)), prompts, 8, None, temperature=0)
    m.train()
    assert not torch.equal(logits_of(m), logits_of(m))


@pytest.mark.parametrize(
    "values, message",
    [
        ((0, 8.0), "rank 0"),
        ((-1, 8.0), "rank -1"),
        ((2.0, 8.0), "rank 2.0"),
        ((True, 8.0), "rank True"),
        ((4, 0.0), "alpha 0.0"),
        ((4, float("nan")), "alpha nan"),
        ((4, float("inf")), "alpha inf"),
        ((4, "8"), "alpha '8'"),
        ((4, 8.0, 1.0), "dropout 1.0"),
        ((4, 8.0, -0.1), "dropout -0.1"),
        # c_fc does not end in ".fc"; the head, here an own layer, gets no adapter
        ((4, 8.0, 0.1, ["lm_head", "c_fc", "fc"]), "no linear layer called 'lm_head', 'fc'; give some of "
         "c_attn, c_proj, c_fc, or all-linear"),
        ((4, 8.0, 0.1, "q_proj"), "no linear layer called 'q_proj'; give some of c_attn, c_proj, c_fc"),
        ((4, 8.0, 0.1, []), "give some of c_attn, c_proj, c_fc"),
    ],
)  # fmt: skip
def test_impossible_values_leave_the_model_alone(values, message):
    m = random_model({**GPT2, "tie_word_embeddings": False})
    with pytest.raises(ValueError, match=message):
        lora.attach(m, *values)
    assert not lora.adapted_layers(m) and all(p.requires_grad for p in m.parameters())


@pytest.mark.parametrize("target", ["model.layers.1.q_proj", "layers.1.q_proj"])
def test_layers_of_a_model_of_transformers(target):
    layers = [torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2)}) for _ in range(2)]
    m = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})})
    assert lora.choose_layers(m, target) == ["model.layers.1.q_proj"]


def test_a_rank_above_the_width_and_a_second_adapter():
    m = trained(random_model(GPT2), rank=30)  # wasteful, but peft's files may have it
    adapted = logits_of(m)
    with pytest.raises(ValueError, match="already has adapters"):
        lora.attach(m, 4, 8)
    assert close(logits_of(lora.attach(lora.merge(m), 2, 8)), adapted)
    assert not any(module.training for module in m.modules())  # else its dropout would be active


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral-no-window", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [None, "all-linear", "some"])
def test_peft_reads_our_adapter_and_means_the_same(peft, recwarn, family, targets, tmp_path):
    """Its names, logits, gradients and merged weights."""
    if targets == "some" and family == "gpt2":
        targets = ["transformer.h.1.attn.c_proj", "c_attn"]
    elif targets == "some":
        targets = ["model.layers.1.self_attn.q_proj", "down_proj"]
    m = random_model(CONFIGS[family])
    base = in_transformers(m, tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=targets, task_type="CAUSAL_LM")
    names = peft.get_peft_model_state_dict(peft.get_peft_model(copy.deepcopy(base), config)).keys()
    recwarn.clear()
    save_adapter(trained(m, rank=3, alpha=5.0, targets=targets, dropout=0.1), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).eval()
    assert names == peft.get_peft_model_state_dict(theirs).keys() == adapter_state(m).keys()
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message) or "fan_in" in str(w.message)]

    ids = random_batch()[0]
    logits, their_logits = m.logits(m(ids)), theirs(ids).logits
    assert close(logits, their_logits)
    logits.square().mean().backward()
    their_logits.square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    ours = {peft_path(m, name): p.grad for name, p in m.named_parameters() if p.grad is not None}
    assert len(ours) == len(gradients) == len(adapter_state(m))
    for name, gradient in ours.items():
        theirs_of = gradients[f"base_model.model.{name}.default.weight"]
        torch.testing.assert_close(gradient, theirs_of, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert close(theirs.merge_and_unload()(ids).logits, logits_of(lora.merge(m)))


# ---------------------------------------------------------------------------------------------------------------------
# Files


@every_family
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_saved_adapter_comes_back(family, targets, tmp_path):
    m = trained(random_model(CONFIGS[family]), dropout=0.1, targets=targets)
    save_adapter(m, tmp_path)
    again = load_adapter(random_model(CONFIGS[family]), tmp_path)
    assert torch.equal(logits_of(again), logits_of(m))
    assert set(lora.adapted_layers(again)) == set(lora.adapted_layers(m))
    assert same(adapter_state(again), adapter_state(m))
    settings = [{(x.rank, x.alpha, x.dropout, x.training) for x in lora.adapted_layers(y).values()} for y in (m, again)]
    assert settings[0] == settings[1] == {(3, 5.0, 0.1, False)}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(random_model(CONFIGS[family]), tmp_path / "none")


def in_transformers(m, directory):
    """The base model of m, which is still plain, in transformers."""
    import transformers

    model.save_model(m, directory)
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def their_logits(m):
    with torch.no_grad():
        return m(random_batch()[0]).logits


@every_family
@pytest.mark.parametrize("part", [False, True])
def test_we_load_an_adapter_of_peft(peft, family, part, tmp_path):
    m = random_model(CONFIGS[family])
    base, theirs = logits_of(m), in_transformers(m, tmp_path / "base")
    targets = ["c_attn", "q_proj", "v_proj"] if part else "all-linear"
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.2, target_modules=targets, layers_to_transform=[1] if part else None,
        init_lora_weights="gaussian" if part else True, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(m, tmp_path / "adapter")
    assert close(logits_of(m), their_logits(theirs)) and not close(logits_of(m), base, 1e-2)
    ours = len(lora.adapted_layers(m))
    assert ours == sum("lora_A" in name for name, _ in theirs.named_parameters())
    save_adapter(m, tmp_path / "again")  # the same layers go back
    assert len(lora.adapted_layers(load_adapter(random_model(CONFIGS[family]), tmp_path / "again"))) == ours


def test_an_adapter_alone_is_a_model_where_its_base_is(peft, tiny_task, tmp_path, own_folder, capsys, monkeypatch):
    """For every command: it is merged once, and has the base's tokenizer unless it has one of its own."""
    import transformers

    base, adapter, data = tiny_task / "student", tmp_path / "adapter", tiny_task / "test.jsonl"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(adapter)
    (adapter / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "mine": 1}')
    merged = find_model(str(adapter), "teacher")
    assert f"{adapter} is an adapter; merged with its base {base}, the model is in" in capsys.readouterr().err
    assert close(logits_of(model.load_model(merged)), their_logits(theirs))
    assert not close(their_logits(theirs), logits_of(model.load_model(base)), 1e-2)
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert json.loads((merged / "tokenizer_config.json").read_text())["mine"] == 1
    stamp = (merged / "model.safetensors").stat().st_mtime_ns
    evaluation.main([str(adapter), "--data", str(data), "--limit=1", "--greedy", "--max-len=64", "--device=cpu"])
    assert find_model(str(adapter), "teacher") == merged == next(merged.parent.glob("merged-*"))
    assert (merged / "model.safetensors").stat().st_mtime_ns == stamp
    assert find_model(str(adapter), "student", weights=False) == base

    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    capsys.readouterr()
    assert find_model(str(both), "teacher") == both
    assert f"note: {both} holds a whole model, so the adapter beside it is not used" in capsys.readouterr().err

    config = json.loads((adapter / "adapter_config.json").read_text())
    for base in ("/nowhere/else", None):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(FileNotFoundError, match=f"is an adapter whose base model is missing: model '{base}'"):
            find_model(str(adapter), "teacher")
    # peft merges with that revision
    config |= {"base_model_name_or_path": "owner/model", "revision": "step1"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is an adapter of revision 'step1' of owner/model; download that one"):
        find_model(str(adapter), "teacher")
    with monkeypatch.context() as patch:  # the main one is the one that is looked up
        patch.setattr(peft_files, "model_directory", lambda name, weights: tiny_task / "student")
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "revision": "main"}))
        assert peft_files.base_of(adapter) == "owner/model"
    config |= {"base_model_name_or_path": str(tiny_task / "student")}  # a directory has no revisions
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert find_model(str(adapter), "student", weights=False) == tiny_task / "student"


def test_a_base_that_is_not_supported_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    """QLoRA's adapters name the quantised copy that they were trained on."""
    save_adapter(trained(random_model(LLAMA)), tmp_path / "adapter", "unsloth/llama-bnb-4bit")
    for file, content in {"config.json": {**LLAMA, "quantization_config": {"bits": 4}}, "tokenizer.json": {}}.items():
        (tmp_path / file).write_text(json.dumps(content))
    monkeypatch.setattr(hub, "find_snapshot", lambda repository, kind, files, name: tmp_path)
    with pytest.raises(ValueError, match="adapter of unsloth/llama-bnb-4bit, .* quantised. Write the path of"):
        find_model(str(tmp_path / "adapter"), "teacher")  # and not "no model.safetensors"


def test_two_runs_may_merge_the_same_adapter_at_once(tmp_path, monkeypatch):
    m = random_model(GPT2)
    save_model, folders = peft_files.save_model, [tmp_path / "base", tmp_path / "adapter"]
    save_model(m, folders[0])
    save_adapter(trained(m), folders[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def save_after_another_run(m, path):
        monkeypatch.setattr(peft_files, "save_model", save_model)
        peft_files.merge_into(*folders)
        save_model(m, path)

    monkeypatch.setattr(peft_files, "save_model", save_after_another_run)
    merged = peft_files.merge_into(*folders)
    assert list(merged.parent.iterdir()) == [merged]  # no second copy is left
    assert close(logits_of(model.load_model(merged)), logits_of(m))


def test_an_adapter_and_a_base_that_changed_are_merged_anew(tmp_path, monkeypatch):
    """Even if every file keeps its size, as it does after another training."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base, adapter, m = tmp_path / "base", tmp_path / "adapter", random_model(GPT2)
    adapted = trained(copy.deepcopy(m))
    for changed in ("both", "adapter", "base"):
        with torch.no_grad():
            if changed != "adapter":
                m.norm.bias += 1
                adapted.norm.bias.copy_(m.norm.bias)
                model.save_model(m, base)
            if changed != "base":
                adapted.blocks[0].attn.c_attn.lora_B.neg_()
                save_adapter(adapted, adapter)
        assert close(logits_of(model.load_model(peft_files.merge_into(base, adapter))), logits_of(adapted)), changed


@pytest.mark.parametrize("own", [True, False])
def test_a_merged_model_does_not_mix_two_tokenizers(own, tmp_path, monkeypatch):
    """transformers 5 writes no special_tokens_map.json, and a transformers 4 no chat_template.jinja; the base's would
    decide the end-of-text and the template of the adapter."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    m = random_model(GPT2)
    model.save_model(m, base)
    save_adapter(trained(m), adapter)
    for name in ("special_tokens_map.json", "chat_template.jinja", "tokenizer_config.json", "generation_config.json"):
        (base / name).write_text("{}")
    if own:
        (adapter / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    merged = peft_files.merge_into(base, adapter)
    assert (merged / "generation_config.json").is_file()
    assert (merged / "special_tokens_map.json").is_file() == (merged / "chat_template.jinja").is_file() == (not own)


@pytest.fixture
def saved(tmp_path):
    """saved(config, edit_config, edit_tensors): a directory with an adapter for GPT2, spoilt by the two functions."""

    def make(edit_config=lambda config: None, edit_tensors=lambda tensors: None):
        save_adapter(trained(random_model(GPT2), targets="all-linear"), tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        edit_config(config)
        edit_tensors(tensors)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return make


def assert_refused(path, message, config=GPT2):
    """With the file's name, and the model left as it was."""
    m = random_model({**config, "tie_word_embeddings": False})
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_adapter(m, path)
    assert str(path) in str(caught.value)
    assert not lora.adapted_layers(m) and all(p.requires_grad for p in m.parameters())


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("use_dora", True, "use_dora = True is not supported, only plain LoRA"),
        ("use_rslora", True, "use_rslora = True"),
        ("bias", "all", "bias = 'all'"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("rank_pattern", {"c_fc": 2}, "rank_pattern"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa'"),
        ("something_new", 1, "something_new = 1"),
        ("peft_type", "IA3", "not an adapter of peft_type LORA"),
        ("r", None, "rank None"),
        ("lora_alpha", "8", "alpha '8'"),
        ("lora_dropout", 2, "dropout 2"),
        ("r", 4, r"lora_A.weight' is \[3, 24\], but the model and rank 4 of adapter_config.json need"),
    ],
)
def test_adapters_of_another_kind(saved, field, value, message):
    assert_refused(saved(lambda config: config.update({field: value})), message)


@pytest.mark.parametrize(
    "key, shape, message",
    [
        (FIRST, [3, 25], rf"'{FIRST}' is \[3, 25\], .* need \[3, 24\]"),
        (FIRST.replace("lora_A", "lora_B"), [3, 24], r"lora_B.weight' is \[3, 24\], .* need \[72, 3\]"),
        (FIRST.replace(".0.", ".2."), [3, 24], r"no linear layer for tensor .*h\.2.* \[3, 24\]"),
        (FIRST.replace("lora_A", "lora_magnitude"), [72], "no linear layer for tensor .*lora_magnitude"),
        ("base_model.model.lm_head.weight", [61, 24], "lm_head.weight changes the head or an embedding.*peft"),
        ("base_model.model.lm_head.lora_A.weight", [3, 24], "lm_head.lora_A.weight changes the head"),
        ("base_model.model.transformer.wte.lora_embedding_A", [3, 61], "wte.lora_embedding_A changes the head or"),
        ("base_model.model.model.embed_tokens.weight", [61, 24], "embed_tokens.weight changes the head or"),
        (FIRST, None, r"h\.0\.attn\.c_attn has only lora_B"),
    ],
)
def test_adapters_of_another_model(saved, key, shape, message):
    def edit(tensors):
        tensors.pop(key, None)
        tensors.update({key: torch.ones(shape)} if shape else {})

    assert_refused(saved(edit_tensors=edit), message)


@pytest.mark.parametrize("key, untie", [
    ("lm_head.base_layer.weight", True), ("transformer.wte.lora_embedding_A", True), ("lm_head.weight", False),
    ("transformer.wpe.lora_embedding_A", False),
])  # fmt: skip
def test_an_adapter_of_a_tied_head_is_not_merged_into_both(saved, key, untie):
    path = saved(edit_tensors=lambda tensors: tensors.update({f"base_model.model.{key}": torch.ones(3, 3)}))
    with pytest.raises(ValueError, match=f"{key} changes the head.*: {'its base ties.* then ' * untie}merge it once"):
        load_adapter(random_model(GPT2), path)


@pytest.mark.parametrize("fields, keys, untie", [
    ({"use_rslora": True}, ["lm_head.lora_A.weight"], True),  # the field is refused before the tensors are looked at
    ({"use_dora": True}, ["transformer.wte.base_layer.weight"], True),
    ({}, ["transformer.wpe.lora_embedding_A", "transformer.wte.lora_embedding_A"], True),  # not by the first key alone
    ({"modules_to_save": ["wte"]}, ["transformer.wte.weight"], False),  # peft unties these itself
    ({"use_rslora": True}, [], False),
])  # fmt: skip
def test_whatever_is_refused_a_tied_base_is_untied_before_merging(saved, fields, keys, untie):
    added = {f"base_model.model.{key}": torch.ones(3, 3) for key in keys}
    path = saved(lambda config: config.update(fields), lambda tensors: tensors.update(added))
    with pytest.raises(ValueError, match=f"plain LoRA.*: {'its base ties.* then ' * untie}merge it once"):
        load_adapter(random_model(GPT2), path)
    with pytest.raises(ValueError, match="plain LoRA.*: merge it once"):
        load_adapter(random_model({**GPT2, "tie_word_embeddings": False}), path)
    if untie:
        saved(lambda config: config.update({"ensure_weight_tying": True}), lambda tensors: tensors.update(added))
        with pytest.raises(ValueError, match="ensure_weight_tying = True .* peft cannot merge this one either"):
            load_adapter(random_model(GPT2), path)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("family, targets", [("gpt2", ["c_attn", "wte"]), ("qwen3", ["q_proj", "lm_head"])])
def test_the_commands_of_the_error_merge_an_adapter_of_a_tied_head(peft, family, targets, tmp_path, monkeypatch):
    m, base, adapter = random_model(CONFIGS[family]), tmp_path / "base", tmp_path / "adapter"
    config = peft.LoraConfig(r=2, target_modules=targets, use_rslora=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(in_transformers(m, base), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(adapter)
    with pytest.raises(ValueError, match="use_rslora") as caught:
        load_adapter(m, adapter)
    untie, merge = re.findall(r'python -c "(.*?)"', str(caught.value))
    monkeypatch.setattr(sys, "argv", ["-c", str(base), str(tmp_path / "copy")])
    exec(untie, {})
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "copy")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["-c", str(adapter), str(tmp_path / "merged")])
    exec(merge, {})
    check_model(tmp_path / "merged")
    assert close(logits_of(model.load_model(tmp_path / "merged")), their_logits(theirs), 1e-4)
    assert not close(logits_of(m), their_logits(theirs), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_adapter_may_have_been_trained_in_another_precision(saved, dtype):
    path = saved(edit_tensors=lambda tensors: tensors.update({name: x.to(dtype) for name, x in tensors.items()}))
    m = load_adapter(random_model(GPT2), path)
    assert close(logits_of(m), logits_of(trained(random_model(GPT2), targets="all-linear")), 0.1)


@pytest.mark.parametrize("spoil", [lambda x: x / 0, lambda x: x.to(torch.int8)], ids=["not finite", "quantised"])
def test_values_that_are_no_weights(saved, spoil):
    path = saved(edit_tensors=lambda tensors: tensors.update({FIRST: spoil(tensors[FIRST])}))
    assert_refused(path, f"'{FIRST}' is quantised .*, or has values that are not finite")


def test_an_adapter_of_the_other_architecture_and_an_empty_one(saved):
    assert_refused(saved(edit_tensors=lambda tensors: tensors.clear()), "no tensors")
    assert_refused(saved(), "transformer.h.0.attn.c_attn.lora_A.weight.*adapter of another model", LLAMA)


def test_missing_and_damaged_files(saved):
    path = saved()
    config, tensors = path / "adapter_config.json", path / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-20])
    assert_refused(path, "not a readable safetensors file")
    tensors.unlink()
    assert_refused(path, "adapter_model.safetensors not found")
    config.write_text("{")
    assert_refused(path, "not valid JSON")
    config.unlink()
    assert_refused(path, "adapter_config.json not found")


# ---------------------------------------------------------------------------------------------------------------------
# Training

METHODS = {
    "sft of the llama-style model": {"method": "sft", "student": "teacher"},
    "eta": {"align": "eta"},
    "cma": {"recipe": "v1", "align": "cma"},
}


def command(task, out, method="eta", **changed):
    options = {"lora": 4, "lr": 1e-2, **METHODS[method], **changed}
    options |= {name: task / options[name] for name in ("student", "teacher") if isinstance(options.get(name), str)}
    return arguments(task, out, **options)


@pytest.fixture
def at_save(monkeypatch):
    """A list to which every checkpoint appends the pieces of the run that it saved."""
    seen, save = [], checkpoint.save_checkpoint

    def save_and_tell(o, pieces, *others):
        save(o, pieces, *others)
        seen.append(pieces)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_and_tell)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_only_adapters_and_projectors_move(tiny_task, tmp_path, at_save, method):
    train.main(command(tiny_task, tmp_path / "run", method, max_steps=3))
    source = tiny_task / METHODS[method].get("student", "student")
    pieces, start = at_save[-1], model.load_model(source)
    before, after = dict(start.named_parameters()), dict(pieces.student.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    fresh = lora.attach(copy.deepcopy(start), 4, 8.0)
    for name, layer in lora.adapted_layers(pieces.student).items():
        assert layer.lora_B.abs().max() > 0 and layer.lora_A.shape == fresh.get_submodule(name).lora_A.shape

    trained_names = {name for name, p in pieces.student.named_parameters() if p.requires_grad}
    assert trained_names == {name for name, p in fresh.named_parameters() if p.requires_grad} > set()
    state = load_file(tmp_path / "run" / "resume" / "state.safetensors")
    assert {name.removeprefix("student.") for name in state if name.startswith("student.")} == trained_names
    projectors = [name for name, p in pieces.method.named_parameters() if p.requires_grad]
    assert len([name for name in state if name.endswith("exp_avg")]) == len(trained_names) + len(projectors)
    assert len(projectors) == {"eta": 1, "cma": 6}.get(method, 0)

    # in the merged checkpoint only the matrices with an adapter have changed
    old, new = load_file(source / "model.safetensors"), weights_of(tmp_path / "run")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and changed == {
        peft_path(fresh, name) + ".weight" for name in lora.adapted_layers(fresh)
    }
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (record["lora"], record["lora_alpha"], record["lora_dropout"]) == (4, 8.0, 0.1)
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    targets = ["c_attn"] if METHODS[method].get("student", "student") == "student" else ["q_proj", "v_proj"]
    assert record["lora_targets"] == adapter["target_modules"] == targets


def test_the_checkpoint_is_the_adapted_model(peft, tiny_task, tmp_path, at_save):
    """student/ in transformers and in our loader, and adapter/ on the base in peft, all give the logits trained."""
    import transformers

    out = tmp_path / "run"
    train.main(command(tiny_task, out, max_steps=5))
    expected = logits_of(at_save[-1].student.eval())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "student").eval()
    assert close(their_logits(theirs), expected) and close(logits_of(model.load_model(out / "student")), expected)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_task / "student").eval()
    assert not close(their_logits(base), expected, 1e-2)
    assert close(their_logits(peft.PeftModel.from_pretrained(base, str(out / "adapter"))), expected)
    both = peft.AutoPeftModelForCausalLM.from_pretrained(str(out / "adapter")).eval()  # finds the base by its config
    assert close(their_logits(both), expected)
    assert (out / "samples.txt").read_text().count("### prompt") == 5


@pytest.mark.parametrize("preset", [True, False])
def test_an_adapter_names_its_base_wherever_it_is_read(tiny_task, tmp_path, monkeypatch, preset):
    """By its name on the hub, not by this machine's cache; a directory by its whole path."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **where: str(tiny_task / "student"))
    monkeypatch.chdir(tmp_path)
    student = "gpt2" if preset else os.path.relpath(tiny_task / "student")
    options = {"method": "sft", "teacher": None, "student": student, "lora": 2, "max_steps": 1}
    train.main(arguments(tiny_task, tmp_path / "run", **options))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    expected = hub.MODELS["gpt2"] if preset else str((tiny_task / "student").resolve())
    assert config["base_model_name_or_path"] == expected


def test_a_run_and_its_adapter_are_its_student(tiny_task, tmp_path, capsys):
    """As the student or the teacher of the next run, and in eval.py."""
    first, second = tmp_path / "first", tmp_path / "second"
    train.main(command(tiny_task, first, method="eta"))
    assert find_model(str(first / "adapter"), "teacher") == find_model(str(first), "teacher") == first / "student"
    capsys.readouterr()
    train.main(arguments(tiny_task, second, teacher=first, student=first, lora=2))
    assert f"teacher: {first / 'student'}, trained here: --method dskd" in capsys.readouterr().err
    config = json.loads((second / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first / "student")
    evaluation.main([str(first), "--data", str(tiny_task / "test.jsonl"), "--limit=1", "--greedy", "--device=cpu"])
    assert list(first.glob("eval-*.json"))


@pytest.mark.parametrize(
    "words, targets, layers",
    [
        (["c_proj", "c_attn"], ["c_attn", "c_proj"], {"attn.c_attn", "attn.c_proj", "mlp.c_proj"}),
        (["mlp.c_proj,c_fc"], ["c_fc", "mlp.c_proj"], {"mlp.c_fc", "mlp.c_proj"}),
        (["all-linear"], ["all-linear"], GPT2_LAYERS),
    ],
)
def test_layers_that_the_command_line_names(tiny_task, tmp_path, capsys, words, targets, layers):
    train.main(command(tiny_task, tmp_path / "run") + ["--lora-targets", *words])
    m = load_adapter(model.load_model(tiny_task / "student"), tmp_path / "run" / "adapter")
    assert {name.split(".", 2)[2] for name in lora.adapted_layers(m)} == layers
    assert json.loads((tmp_path / "run" / "args.json").read_text())["lora_targets"] == targets
    assert f"LoRA on {', '.join(targets)}: " in capsys.readouterr().err
