"""Adapt the tokenizer files of a trained student to its training, so that it is served as it was trained."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, processors

from model import read_json
from runtime.tokenizer import PLAIN, TextTokenizer, content_of, find_chat, find_template, name_tokens, read_if_there

RULES = set(  # fields of generation_config.json that change even greedy output; Qwen2.5-Instruct has the first one
    "repetition_penalty no_repeat_ngram_size suppress_tokens begin_suppress_tokens bad_words_ids sequence_bias "
    "forced_bos_token_id forced_eos_token_id min_length min_new_tokens num_beams encoder_repetition_penalty "
    "exponential_decay_length_penalty guidance_scale watermarking_config".split()
)


def write_as_trained(tokenizer: TextTokenizer, directory: Path) -> None:
    """Adapt the copied files in `directory` to the training here, so that `transformers` encodes a prompt, or turns,
    to the same ids, also ends responses at end-of-text, and generates the same text."""
    if find_template(tokenizer.tokenizer) != (tokenizer.prefix, []):
        write_template(directory / "tokenizer.json", tokenizer)
    end, model = tokenizer.names([tokenizer.eos_id]), read_if_there(directory / "config.json")
    config = before = read_if_there(directory / "tokenizer_config.json")
    config = {**config, "add_bos_token": bool(tokenizer.prefix), "add_eos_token": False}
    if content_of(config.get("eos_token")) != end:  # with a chat template, or if the files only give an id
        config["eos_token"] = end
    if config.get("tokenizer_class") not in PLAIN:
        # For any other class, transformers 5 rebuilds the tokenizer from the vocabulary and the class's own rules:
        # Llama's then splits a text that begins with a space differently from tokenizer.json.
        bos = name_tokens(directory, tokenizer.tokenizer).get("bos_token")
        names = {"bos_token": bos, "model_input_names": ["input_ids", "attention_mask"]}  # so far given by the class
        config = {**names, **config, "tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.chat is not None and tokenizer.chat.as_trained() != find_chat(directory):
        config.pop("chat_template", None)
        (directory / "chat_template.jinja").write_text(tokenizer.chat.as_trained(), encoding="utf-8")
    if config != before:
        write_json(directory / "tokenizer_config.json", config)

    special = read_if_there(directory / "special_tokens_map.json")
    if content_of(special.get("eos_token", end)) != end:
        write_json(directory / "special_tokens_map.json", {**special, "eos_token": end})

    path = directory / "generation_config.json"
    generation = read_if_there(path)
    named = (generation if path.is_file() else model).get("eos_token_id")
    kept = {field: value for field, value in generation.items() if field not in RULES}
    # without this file, transformers also reads such rules from config.json, where older versions wrote them
    in_model = not path.is_file() and model.keys() & RULES
    if in_model or not {*tokenizer.end_ids} <= {*(named if isinstance(named, list) else [named])}:
        kept["eos_token_id"] = tokenizer.end_ids if len(tokenizer.end_ids) > 1 else tokenizer.eos_id
    if kept != generation:
        write_json(path, kept)


def write_template(path: Path, tokenizer: TextTokenizer) -> None:
    """Give tokenizer.json a post-processor that puts `prefix` before a text and nothing after it."""
    names = {tokenizer.tokenizer.id_to_token(index): index for index in tokenizer.prefix}
    single = [*names, "$A"]
    second = [f"{piece}:1" for piece in (*names, "$B")]
    bare = Tokenizer(models.WordLevel({}, unk_token=""))
    bare.post_processor = processors.TemplateProcessing(single, [*single, *second], list(names.items()))
    template = json.loads(bare.to_str())["post_processor"]
    content = read_json(path)
    before = content["post_processor"]
    parts = before["processors"] if before and before["type"] == "Sequence" else [before]
    offsets = [part for part in parts if part and part["type"] == "ByteLevel"]  # it trims offsets, but adds no tokens
    content["post_processor"] = {"type": "Sequence", "processors": [*offsets, template]} if offsets else template
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
