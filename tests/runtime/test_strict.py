"""runtime/strict.py: what can be wrong with a config and a checkpoint, and that what is right is let through."""

import json

import pytest
import torch
from helpers import GPT2, LLAMA, LLAMA3, QWEN, random_batch, save_random, write
from safetensors.torch import save_file

from model import FIELDS, load_model
from runtime.strict import check_config, check_model


def test_names_of_older_checkpoints(tmp_path):
    """GPT-2 on the hub: no prefix, causal-mask constants, sometimes the tied head again. LLaMA: rotary frequencies."""
    (ids, _), rotary = random_batch(), "layers.0.self_attn.rotary_emb.inv_freq"
    for config, prefix, embedding, constants in (
        (GPT2, "transformer.", "wte.weight", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
        ({**LLAMA, "tie_word_embeddings": True}, "model.", "embed_tokens.weight", [rotary]),
    ):
        path = tmp_path / prefix
        saved, tensors = save_random(path, config)
        expected = load_model(path)(ids)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        tensors |= {name: torch.ones(3) for name in constants} | {"lm_head.weight": expected.new_zeros(61, 24)}
        with pytest.raises(ValueError, match="lm_head.weight differs from the embedding"):
            write(path, saved, tensors)
            check_model(path)
        tensors["lm_head.weight"] = tensors[embedding].clone()
        write(path, saved, tensors)
        assert torch.equal(load_model(path)(ids), expected)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json not found; expected a Hugging Face directory"):
        check_model(tmp_path / "absent")
    save_random(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="index.json not found; expected a Hugging Face directory"):
        check_model(tmp_path)


def test_damaged_files(tmp_path):
    save_random(tmp_path)
    good = (tmp_path / "model.safetensors").read_bytes()
    for bad in (good[:-100], good[:50], b"", b"\xff" * 200, b"PK\x03\x04 a zip file, as torch.save writes"):
        (tmp_path / "model.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
            check_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2",')
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        check_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        check_model(tmp_path)


def test_wrong_tensors(tmp_path):
    config, tensors = save_random(tmp_path)
    key = "transformer.h.0.mlp.c_fc.weight"  # [in, out] in the file: 24, 96
    for name, tensor, message in (
        (key, torch.zeros(24, 95), rf"{key}: shape \[24, 95\] in the file, but \[24, 96\] according to config.json"),
        (key, tensors[key].T.contiguous(), r"shape \[96, 24\] in the file, but \[24, 96\]"),
        ("transformer.ln_f.bias", torch.zeros(25), r"ln_f.bias: shape \[25\] in the file, but \[24\] according"),
        ("transformer.ln_f.bias", torch.zeros(24, dtype=torch.int8), "ln_f.bias: I8 weights"),
        ("transformer.ln_f.bias", torch.zeros(24, dtype=torch.float8_e4m3fn), "F8_E4M3 weights .a quantised"),
        ("transformer.h.2.ln_1.bias", torch.zeros(24), "tensor 'transformer.h.2.ln_1.bias' is not known"),
        ("score.weight", torch.zeros(2, 24), "tensor 'score.weight' is not known for model_type gpt2"),
        (key, None, rf"lacks 1 tensors: {key}"),
    ):
        changed = {**tensors, name: tensor}
        write(tmp_path, config, {n: t for n, t in changed.items() if t is not None})
        with pytest.raises(ValueError, match=message):
            check_model(tmp_path)
    write(tmp_path, {**config, "tie_word_embeddings": False}, tensors)
    with pytest.raises(ValueError, match="lacks 1 tensors: lm_head.weight"):
        check_model(tmp_path)


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
    with pytest.raises(ValueError, match="tensor 'wte.weight' appears twice"):
        check_model(tmp_path)
    for escape in ("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "a\\b", ""):
        index.write_text(json.dumps({"weight_map": {**weight_map, "transformer.wte.weight": escape}}))
        with pytest.raises(ValueError, match="is not a plain file name"):
            check_model(tmp_path)
    index.write_text(json.dumps({"weight_map": {**weight_map, "transformer.wte.weight": "model-3.safetensors"}}))
    with pytest.raises(ValueError, match="model-3.safetensors: not a readable safetensors file .no such file"):
        check_model(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({**GPT2, "model_type": "bert"}, "model_type 'bert' is not supported, only gpt2, .* examples/ has"),
        ({"n_embd": 4}, "model_type None is not supported"),
        ({k: v for k, v in GPT2.items() if k != "n_head"}, "n_head must be an integer from 1 to .*is 'missing'"),
        ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "hidden_size must be an integer from 1"),
        ({**GPT2, "n_layer": 0}, "n_layer must be an integer from 1 to 1024, but is 0"),
        ({**GPT2, "n_layer": True}, "n_layer must be an integer from 1 to 1024, but is True"),
        ({**GPT2, "n_inner": 0}, "n_inner must be an integer from 1"),
        ({**GPT2, "n_head": 5}, "n_embd 24 is not divisible by 5 heads"),
        ({**LLAMA, "hidden_size": 50}, "hidden_size 50 is not divisible by 6 heads"),  # transformers does not load it
        ({**LLAMA, "model_type": "qwen2", "hidden_size": 4}, "hidden_size 4 is not divisible by 6 heads"),
        ({**LLAMA, "num_key_value_heads": 4}, "6 attention heads cannot share 4 key-value heads"),
        ({**LLAMA, "head_dim": 5}, "head_dim 5 is odd"),
        ({**GPT2, "hidden_size": 32}, "hidden_size = 32 is not supported, only 24"),  # n_embd's other name
        ({**GPT2, "max_position_embeddings": 50}, "max_position_embeddings = 50 is not supported, only 40"),
        *[({**LLAMA, name: value}, f"{name} = .* is not supported, only") for name, value in (
            ("use_mrope", True), ("pruned_heads", {"0": [1]}), ("compression_config", {"format": "x"}),
            ("transformers_weights", "x.safetensors"), ("is_encoder_decoder", True))],
        ({**LLAMA, "quantization_config": {"bits": 4}}, "'bits': 4. is not supported.* not quantised"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        ({**GPT2, "reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights = False is not supported, only True"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention = True"),
        ({**GPT2, "activation_function": "tanh"}, "activation 'tanh' is not supported"),
        ({**LLAMA, "hidden_act": "mish"}, "activation 'mish' is not supported"),
        ({**LLAMA, "is_causal": False}, "is_causal = False is not supported"),
        ({**LLAMA, "rope_interleaved": True}, "rope_interleaved = True"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial or per-layer rotary embedding"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "partial or per-layer rotary"),
        ({**LLAMA, "rope_scaling": {"type": "longrope"}}, "rotary scaling 'longrope' is not supported, only default"),
        ({**LLAMA, "rope_scaling": {"rope_type": ["yarn"]}}, "rotary scaling .'yarn'. is not supported"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, "contradict each other"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number from 0.001 to .* is 0"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "factor must be a number from .*, but is 'missing'"),
        ({**LLAMA, "rope_scaling": {**LLAMA3, "factor": "8"}}, "factor must be a number from .*, but is '8'"),
        ({**LLAMA, "rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor below its high_freq_factor"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "truncate": 1}}, "truncate must be true or false"),
        ({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1}, "'yarn' needs a rope_theta above"),
        ({**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta 10000.*contradict"),
        ({**LLAMA, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 1e6}}, "contradict"),
        ({**LLAMA, "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "factor": 5.0}}, "contradict"),
        ({**LLAMA, "rope_scaling": LLAMA3, "original_max_position_embeddings": 17}, "contradict"),
        ({**QWEN, "model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types must name"),
        ({**QWEN, "model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]}, "layer_types must"),
        ({**QWEN, "model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
        ({**LLAMA, "model_type": "mistral", "layer_types": ["sliding_attention"]}, "layer_types must name"),
    ],
)
def test_configs_not_understood(config, message):
    with pytest.raises(ValueError, match=message):
        check_config(config)


def test_configs_of_the_hub_are_understood():
    """The fields of well-known checkpoints' config.json; their sizes cut down."""
    old_gpt2 = {"n_ctx": 1024, "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None,
                "task_specific_params": {"text-generation": {"max_length": 50}}, "n_special": 0, "output_past": True,
                "predict_special_tokens": True, "architectures": ["GPT2LMHeadModel"], "_num_labels": 1}  # fmt: skip
    check_config({**GPT2, **old_gpt2, "n_embd": 15})  # an odd width of its heads: there is nothing to rotate
    check_config({**LLAMA, "pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16", "use_cache": True})
    smollm2 = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}, "rope_theta": 1e5}
    assert check_config({**LLAMA, **smollm2, "tie_word_embeddings": True}).tied
    llama32 = {"rope_theta": 5e5, "eos_token_id": [1, 2], "rope_scaling": {**LLAMA3, "factor": 32.0}, "mlp_bias": False}
    check_config({**LLAMA, **llama32, "head_dim": 64})
    qwen = {"use_mrope": False, "attention_dropout": 0.0, "rope_theta": 1e6}
    assert check_config({**QWEN, **qwen, "model_type": "qwen2"}).windows == [None, None]


MARKS = {"auto_map": {"AutoModel": "modeling.X"}, "author": "A. Author", "_model_name_or_path": "x/y", "num_beams": 1,
         "unsloth_version": "2025.9.7", "unsloth_fixed": True, "bad_words_ids": None, "new_in_2027": [1]}  # fmt: skip


@pytest.mark.parametrize("family", FIELDS)
def test_marks_of_other_software_are_one_note(family, capsys):
    """Fields that no computation of the family reads, also those of another family: they change nothing."""
    config = {**(GPT2 if family == "gpt2" else LLAMA), "model_type": family}
    foreign = {"gpt2": {"sliding_window": 8, "mlp_bias": True}, "llama": {"sliding_window": 8, "layer_types": ["x"]},
               "mistral": {"attention_bias": True, "mlp_bias": True}, "qwen2": {"attention_bias": True},
               "qwen3": {"n_embd": 4}}[family]  # fmt: skip
    plain = check_config(config)
    harmless = {"use_cache": None, "quantization_config": None, "is_causal": None, "torch_dtype": "float16"}
    assert not capsys.readouterr().err
    marked = check_config({**config, **harmless, **MARKS, **foreign}, f"{family}.json")
    note = capsys.readouterr().err
    assert note.startswith(f"note: {family}.json: fields that do not affect a {family} model are ignored: ")
    assert note.count("\n") == 1
    assert all(field in note for field in [*MARKS, *foreign]) and not any(field in note for field in harmless)
    check_config({**config, **MARKS, **foreign}, f"{family}.json")
    assert not capsys.readouterr().err  # once
    assert str(plain) == str(marked)


def test_null_is_the_default():
    assert check_config({**GPT2, "tie_word_embeddings": None, "activation_function": None}).tied
    llama = {**LLAMA, "tie_word_embeddings": None, "hidden_act": None, "attention_bias": None, "rms_norm_eps": None}
    assert str(check_config(llama)) == str(check_config(LLAMA)) and not check_config(llama).tied
    assert check_config({**LLAMA, "model_type": "mistral", "sliding_window": None}).windows == [None, None]
    windows = {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}
    assert check_config({**QWEN, **windows, "model_type": "qwen2"}).windows == [None, None]
    assert check_config({**LLAMA, "model_type": "mistral", "num_key_value_heads": None}).kv_heads == 6
