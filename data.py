"""From text to batches: examples, the prompt template, tokenisation for both models, aligned indices, batches.

A label at position i is token i+1: the last prompt token predicts the first response token, and the last response token
predicts end-of-text. The shift happens once, here in `collate`; everything after it works on response positions only.

Both models see the same text. What is too long is cut once, on the text, until it fits both tokenisers: a long context
(`input`) before a long instruction, never the template's answer marker. A response that was cut has no end-of-text.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models

from align import exact_token_alignment, token_bytes

# The Alpaca template, in the form that the Dolly-based KD papers use (MiniLLM, arXiv 2306.08543)
PREAMBLE = "Below is an instruction that describes a task"
PROMPT = PREAMBLE + (
    ". Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = PREAMBLE + (
    ", paired with an input that provides further context. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# The prompt of MBPP's paper, without its three worked examples (Austin et al., arXiv 2108.07732)
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
    "{tests}\n[BEGIN]\n"
)

# Chat formats: what a family's own template makes of one message of a user, with its default system message, and the
# token that ends the answer. Llama's has a date: always the one that its template falls back on, never today's.
_CHATML = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
CHATS = {
    "qwen2.5": (
        _CHATML.replace("{system}", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        "<|im_end|>",
    ),
    "llama3.2": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{message}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "smollm2": (
        _CHATML.replace("{system}", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        "<|im_end|>",
    ),
}
# HumanEval's prompt as a message: a model that was taught to chat does not go on with a text by itself
COMPLETE = "Complete this Python function:\n\n```python\n{prompt}\n```"

# ---------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass
class CodeTask:
    """What a programming exercise is checked with."""

    tests: str  # Python, to be run after the program
    entry_point: str = ""  # HumanEval: the function that the prompt begins and the response ends; MBPP: ""


@dataclass
class Example:
    """One line of a data set. Either `prompt` is given as is, or it is made of `instruction` and `input`."""

    where: str  # "file, line 7", for messages
    outputs: list[str]  # responses; training takes the first, evaluation compares with all
    prompt: str | None = None
    instruction: str = ""
    input: str = ""
    ends: bool = True  # False: the response stops where a length limit cut it, so that no end-of-text follows
    code: CodeTask | None = None  # the outputs are programs

    def prompt_text(self, chat: str = "none") -> str:
        """What a model reads before the response: the plain template, or the chat format of that name."""
        if chat != "none":
            return self._chat_text(chat)
        if self.prompt is not None:
            return self.prompt
        if self.input:
            return PROMPT_WITH_INPUT.format(instruction=self.instruction, input=self.input)
        return PROMPT.format(instruction=self.instruction)

    def _chat_text(self, chat: str) -> str:
        message = self.message()
        if re.match(r"\s*<\|(im_start|begin_of_text|start_header_id)\|>", message):
            raise ValueError(
                f"{self.where}: the prompt is in a chat format already, and would be put into another ({chat}); leave "
                "out the option, or give the message alone"
            )
        return CHATS[chat][0].format(message=message.strip() if chat == "llama3.2" else message)  # as its template does

    def message(self) -> str:
        """What the user says in a chat format: without the words and marks by which a base model knows its turn."""
        if self.code is not None and self.code.entry_point:
            return COMPLETE.format(prompt=self.prompt.rstrip())
        if self.prompt is not None:
            return self.prompt.removesuffix("\n[BEGIN]\n")  # MBPP's
        return "\n\n".join(part for part in (self.instruction, self.input) if part)


def read_jsonl(path: str | Path, first: int = 0, last: int | None = None) -> list[Example]:
    """The examples on lines [first, last) of a UTF-8 JSONL file; blank lines are skipped.

    A line is {"prompt", "output"} or {"instruction", "input" (optional), "output"}; `output` is a string or a list of
    reference strings; "end_of_text": false says that it is cut off. Without an `output` it may be a line as these sets
    publish it: GSM8K {"question", "answer"}, HumanEval {"task_id", "prompt", "entry_point", "canonical_solution",
    "test"}, or MBPP {"text", "code", "test_list", "test_setup_code" (optional)}. Other keys are left alone. Raises
    ValueError naming file, line and key of what is wrong.
    """
    examples = []
    try:
        # split on "\n" alone: str.splitlines also cuts at U+2028 and U+0085, which may stand inside a JSON string
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    empty = []
    for number, line in enumerate(lines[first:last], start=first + 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
        example = _example(record, where)
        if not all(example.outputs):
            empty.append(number)
        examples.append(example)
    if empty:
        raise ValueError(
            f"{path}: the output is empty on line{'s' * (len(empty) > 1)} {', '.join(map(str, empty[:10]))}"
            f"{' and others' if len(empty) > 10 else ''}; drop these lines, there is no response to learn from"
        )
    if not examples:
        raise ValueError(f"{path}: no examples")
    return examples


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object's keys and values; of a key that comes twice json would take the last value without a word."""
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"the key {twice!r} comes twice")
    return record


def _example(record: dict, where: str) -> Example:
    """A line's example; the keys that only one of the formats has tell which it is."""

    def text(key: str, required: bool = True) -> str:
        value = record.get(key, None if required else "")
        if not isinstance(value, str):
            found = "is missing" if key not in record else f"must be a string, found {type(value).__name__}"
            raise ValueError(f"{where}: {key!r} {found}")
        return _encodable(value, key, where)

    if "output" not in record:
        if "question" in record:
            return Example(where, [text("answer")], instruction=text("question"))
        if "entry_point" in record or "canonical_solution" in record:
            name = text("entry_point")
            if not name.isidentifier() or f"def {name}(" not in text("prompt"):
                raise ValueError(f"{where}: 'prompt' does not define the 'entry_point' {name!r}")
            code = CodeTask(f"{text('test')}\ncheck({name})\n", name)
            return Example(where, [text("canonical_solution")], prompt=text("prompt"), code=code)
        if "test_list" in record:
            return _mbpp_example(record, where, text)
    outputs = record.get("output")
    if isinstance(outputs, str):
        outputs = [outputs]
    if not isinstance(outputs, list) or not outputs or not all(isinstance(output, str) for output in outputs):
        found = "is missing" if "output" not in record else "must be a string or a list of strings"
        raise ValueError(f"{where}: 'output' {found}")
    outputs = [_encodable(output, "output", where) for output in outputs]
    ends = record.get("end_of_text", True)
    if not isinstance(ends, bool):
        raise ValueError(f"{where}: 'end_of_text' must be true or false, found {type(ends).__name__}")
    if "prompt" in record:
        example = Example(where, outputs, prompt=text("prompt"), ends=ends)
        if not example.prompt:
            raise ValueError(f"{where}: 'prompt' is empty, so that nothing could predict the first response token")
        return example
    if "instruction" not in record:
        raise ValueError(f"{where}: neither 'prompt' nor 'instruction'")
    return Example(where, outputs, instruction=text("instruction"), input=text("input", required=False), ends=ends)


def _mbpp_example(record: dict, where: str, text: Callable) -> Example:
    tests = record["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"{where}: 'test_list' must be a list of strings, with at least one")
    tests = "\n".join(_encodable(test, "test_list", where) for test in tests)
    prompt = MBPP_PROMPT.format(text=text("text"), tests=tests)
    setup = text("test_setup_code", required=False)  # it uses the program's classes, so it follows the program
    return Example(where, [text("code")], prompt=prompt, code=CodeTask(f"{setup}\n{tests}\n"))


def _encodable(text: str, key: str, where: str) -> str:
    """The text itself. JSON can spell half of a surrogate pair (a lone \\ud83d), which is no character of any text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {key!r} has half a surrogate pair at character {error.start}") from error
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Tokenisation


class TextTokenizer:
    """A tokenizer as training needs it: plain text in, ids out, its ends, and how its prompts begin.

    eos_id: end-of-text, which follows every response that the model is trained on.
    end_ids: all that end a response when the model writes one, end-of-text first: a model may have several.
    prefix: the ids that begin every prompt, none by default.
    """

    def __init__(self, directory: str | Path, chat: str = "none", bos: bool = False):
        """Reads tokenizer.json, and the ends from tokenizer_config.json, generation_config.json and config.json.

        chat: a key of CHATS, or "none" for the plain template. In a chat format, what ends a turn is end-of-text.
        bos: prompts begin with what tokenizer.json's own template puts before a text (<s> in Llama's, nothing in
        GPT-2's), unless the chat format begins so by itself.
        """
        self.directory, self.chat = Path(directory), chat
        self.prefix: list[int] = []
        self.end_ids: list[int] = []
        if chat not in ("none", *CHATS):
            raise ValueError(f"{directory}: no chat format is called {chat!r}, only none, {', '.join(CHATS)}")
        file = self.directory / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.decode(self.encode("Größe\n\x00 東京 🦊"))  # some defects show only when it is used
            self.template = self._template()
        except BaseException as error:  # the library raises bare Exception, and what it panics with is not even that
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ValueError(f"{file}: cannot be read as a tokenizer: {error}") from error
        ids = self.vocabulary().values()
        self.size = max(ids, default=-1) + 1
        distinct = len(set(ids))
        if not 0 < self.size <= 2**24 or distinct < len(ids):  # all ids are listed, up to the last
            raise ValueError(f"{file}: {len(ids)} tokens with {distinct} ids up to {self.size - 1}: not a vocabulary")
        self.end_ids = self._ends()
        self.eos_id = self.end_ids[0]
        if bos:
            self._begin_prompts(self.template[0])
        try:
            self.bytes = [spelling or b"" for spelling in token_bytes(self.tokenizer)]  # special tokens spell nothing
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        self.bytes[self.eos_id] = None  # also where the vocabulary does not mark end-of-text as special

    def _template(self) -> tuple[list[int], list[int]]:
        """The ids that tokenizer.json's post-processor puts before and behind a text."""
        bare = Tokenizer(models.WordLevel({"text": 0}, unk_token="text"))  # shows them, whatever the vocabulary is
        if self.tokenizer.post_processor is not None:
            bare.post_processor = self.tokenizer.post_processor
        encoding = bare.encode("text")
        at = encoding.special_tokens_mask.index(0)
        return encoding.ids[:at], encoding.ids[at + 1 :]

    def _begin_prompts(self, ids: list[int]) -> None:
        if any(self.tokenizer.id_to_token(index) is None for index in ids):
            file = self.directory / "tokenizer.json"
            raise ValueError(f"{file}: its post-processor adds ids {ids}, but the vocabulary lacks one of them")
        if self.chat != "none" and self.encode_prompt(CHATS[self.chat][0])[: len(ids)] == ids:
            return
        self.prefix = ids

    def _ends(self) -> list[int]:
        """Every id that one of the files calls an end, end-of-text first."""
        ends = [] if self.chat == "none" else [self._end_of_turn()]
        for file, key in [
            ("tokenizer_config.json", "eos_token"),
            ("generation_config.json", "eos_token_id"),
            ("config.json", "eos_token_id"),
        ]:
            path = self.directory / file
            value = _content(_read_object(path).get(key))
            for end in value if isinstance(value, list) else [value]:
                index = self.vocabulary().get(end) if isinstance(end, str) else end
                if end is None:
                    continue
                if type(index) is int and 0 <= index < self.size and self.tokenizer.id_to_token(index) is not None:
                    ends.append(index)
                elif not ends or type(index) is not int:  # another id that it does not have is never generated
                    raise ValueError(f"{path}: {key} {end!r} is not in tokenizer.json")
        if not ends:
            raise ValueError(f"{self.directory}: no end-of-text token: give eos_token in tokenizer_config.json")
        return list(dict.fromkeys(ends))

    def _end_of_turn(self) -> int:
        text, end = CHATS[self.chat]
        for token in dict.fromkeys(re.findall(r"<\|\w+\|>", text)):
            if len(self.encode_prompt(token)) != 1:
                raise ValueError(
                    f"{self.directory}: the chat format {self.chat} needs the special token {token}, which this "
                    "tokenizer does not have; choose another format, or none"
                )
        return self.tokenizer.token_to_id(end)

    def write_as_trained(self, directory: Path) -> None:
        """Make the files of a copy in `directory` say what a model was trained with here, so that `transformers` makes
        the same ids of a prompt, and ends responses at end-of-text too."""
        if self.template != (self.prefix, []):
            path = directory / "tokenizer.json"
            content = json.loads(path.read_text(encoding="utf-8"))
            content["post_processor"] = self._post_processor(content["post_processor"])
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
        token = self.tokenizer.id_to_token(self.eos_id)
        model = _read_object(directory / "config.json")

        config = before = _read_object(directory / "tokenizer_config.json")
        config = {**config, "add_bos_token": bool(self.prefix), "add_eos_token": False}
        if _content(config.get("eos_token")) != token:  # in a chat format, or where only an id is given
            config["eos_token"] = token
        if config.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            # From any other class transformers 5 makes the tokenizer anew, of the vocabulary and the class's own rules:
            # Llama's then cuts a text that begins with a space in another way than tokenizer.json.
            bos = model.get("bos_token_id")
            bos = self.tokenizer.id_to_token(bos) if type(bos) is int and 0 <= bos < self.size else None
            names = {"bos_token": bos, "model_input_names": ["input_ids", "attention_mask"]}  # the class's to know
            config = {**names, **config, "tokenizer_class": "PreTrainedTokenizerFast"}
        if config != before:
            _write_object(directory / "tokenizer_config.json", config)

        special = _read_object(directory / "special_tokens_map.json")
        if _content(special.get("eos_token", token)) != token:
            _write_object(directory / "special_tokens_map.json", {**special, "eos_token": token})

        path = directory / "generation_config.json"
        generation = _read_object(path)
        named = (generation if path.is_file() else model).get("eos_token_id")
        if self.eos_id not in (named if isinstance(named, list) else [named]):
            ends = self.end_ids if len(self.end_ids) > 1 else self.eos_id
            _write_object(path, {**generation, "eos_token_id": ends})

    def _post_processor(self, before: dict | None) -> dict:
        """tokenizer.json's post-processor with `prefix` before a text and nothing behind it."""
        names = {self.tokenizer.id_to_token(index): index for index in self.prefix}

        def piece(sequence: str, type_id: int) -> list[dict]:
            start = [{"SpecialToken": {"id": name, "type_id": type_id}} for name in names]
            return [*start, {"Sequence": {"id": sequence, "type_id": type_id}}]

        template = {
            "type": "TemplateProcessing", "single": piece("A", 0), "pair": piece("A", 0) + piece("B", 1),
            "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in names.items()},
        }  # fmt: skip
        parts = before["processors"] if before and before["type"] == "Sequence" else [before]
        offsets = [part for part in parts if part and part["type"] == "ByteLevel"]  # it trims offsets, and adds nothing
        return {"type": "Sequence", "processors": [*offsets, template]} if offsets else template

    def say_if_forgotten(self, chat_option: str, bos_is_open: bool) -> None:
        """A note on standard error where a tokenizer that ends turns is used without the chat format that has them, or
        one that begins texts without what they begin with, if that was not decided."""
        end = self.tokenizer.id_to_token(self.eos_id)
        if self.chat == "none" and end in {end for _, end in CHATS.values()}:
            print(f"note: {self.directory} ends turns ({end}), but no {chat_option} is given", file=sys.stderr)
        if bos_is_open and self.chat == "none" and self.template[0] and not self.prefix:
            begin = "".join(self.tokenizer.id_to_token(index) or "" for index in self.template[0])
            print(
                f"note: {self.directory}: prompts are read without the {begin} that its tokenizer puts before a text "
                "(as in the papers' code); --bos adds it",
                file=sys.stderr,
            )

    def prompt_text(self, example: Example) -> str:
        """The example's prompt as this tokenizer's model reads it, after `prefix`. Raises ValueError if the prefix
        would come twice."""
        text = example.prompt_text(self.chat)
        begin = "".join(map(self.tokenizer.id_to_token, self.prefix))
        if begin and text.startswith(begin):
            raise ValueError(
                f"{example.where}: the prompt begins with {begin}, which would come twice, since {self.directory} adds "
                "it to each prompt; take it out of the data, or use --no-bos"
            )
        return text

    def encode(self, text: str) -> list[int]:
        """Ids of a response, where "</s>" is text, not an end."""
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: `prefix` and the text, where a special token's name is that token, as in chat formats."""
        self.tokenizer.encode_special_tokens = False
        return self.prefix + self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str], prompts: bool) -> list[list[int]]:
        """`encode_prompt` or `encode` of each text, on all cores."""
        self.tokenizer.encode_special_tokens = not prompts
        start = self.prefix if prompts else []
        return [start + encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids without special tokens, and without ends, special or not."""
        return self.tokenizer.decode([i for i in ids if i not in self.end_ids], skip_special_tokens=True)

    def spelt(self, ids: list[int]) -> list[bytes | None]:
        """The bytes of each id, as `exact_token_alignment` takes them: None is end-of-text alone, the other special
        tokens spell nothing."""
        return list(map(self.bytes.__getitem__, ids))

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab(with_added_tokens=True)

    def check_model(self, rows: int) -> None:
        """Raises ValueError unless this tokenizer can belong to a model with `rows` embeddings."""
        if self.size > rows:
            raise ValueError(
                f"{self.directory}: the tokenizer has ids up to {self.size - 1}, the model only {rows} embeddings; "
                "tokenizer.json and model.safetensors do not belong together"
            )
        if rows > 1.1 * self.size + 1024:  # real vocabularies are padded by a few hundred rows
            raise ValueError(
                f"{self.directory}: the model has {rows} embeddings, the tokenizer only {self.size} ids; "
                "tokenizer.json and model.safetensors do not belong together"
            )


def _read_object(path: Path) -> dict:
    """A JSON file's object, an empty one if there is no such file. Raises ValueError naming a file that is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _write_object(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _content(token):
    """The text of a token, which these files give as such, or in an object that says more about the token."""
    return token.get("content") if isinstance(token, dict) else token


@dataclass
class Side:
    """One example as one model reads it: prompt and response ids; end-of-text is part of an uncut response."""

    prompt: list[int]
    response: list[int]


@dataclass
class Row:
    """One example, tokenised: for the student, and for the teacher with the aligned pairs if there is one."""

    student: Side
    teacher: Side | None = None
    pairs: tuple[np.ndarray, np.ndarray] | None = None  # aligned (teacher, student) indices into the two responses
    states: np.ndarray | None = None  # (M, D) int16, the bits of bfloat16: the teacher's hidden states, from cache.py
    predictions: np.ndarray | None = None  # (M,) the teacher's arg-max tokens, from there too


@dataclass
class CutReport:
    """How much of the text did not fit."""

    examples: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    prompt_characters: int = 0
    response_characters: int = 0

    def __str__(self) -> str:
        if not self.prompts_cut and not self.responses_cut:
            return f"{self.examples} examples, none cut"
        return (
            f"{self.examples} examples; cut to fit: {self.prompts_cut} prompts ({self.prompt_characters} characters), "
            f"{self.responses_cut} responses ({self.response_characters} characters)"
        )


def longest_prefix(length: int, fits: Callable[[int], bool]) -> int:
    """The largest n in [0, length] that fits, -1 if not even 0 does; bisection, since longer texts have more tokens.

    (A merge may make a longer text one token shorter: then n fits and n + 1 does not, but a larger one might.)
    """
    if fits(length):
        return length
    low, high = -1, length - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def cut_prompt(example: Example, tokenizers: list[TextTokenizer], limit: int) -> str:
    """The prompt as the first tokenizer's model reads it, cut so that it has at most `limit` tokens in each."""
    return tokenizers[0].prompt_text(cut_example(example, tokenizers, limit))


def cut_example(example: Example, tokenizers: list[TextTokenizer], limit: int) -> Example:
    """The example, cut so that its prompt has at most `limit` tokens for each tokenizer, in the format of each: what is
    left is the same text for all. Raises ValueError if it cannot be."""

    def fits(example: Example) -> bool:
        return all(len(tokenizer.encode_prompt(tokenizer.prompt_text(example))) <= limit for tokenizer in tokenizers)

    if fits(example):
        return example
    if example.prompt is not None:  # taken as is: the answer marker stands at the end, so the beginning goes
        text = example.prompt
        length = longest_prefix(len(text), lambda n: fits(replace(example, prompt=text[len(text) - n :])))
        found, shorter = length > 0, replace(example, prompt=text[len(text) - max(length, 0) :])
    else:
        length = longest_prefix(len(example.input), lambda n: fits(replace(example, input=example.input[:n])))
        shorter = replace(example, input=example.input[: max(length, 0)])
        if length < 0:  # no room for a context: the instruction alone, as much of it as fits
            length = longest_prefix(
                len(example.instruction), lambda n: fits(replace(shorter, instruction=example.instruction[:n]))
            )
            shorter = replace(shorter, instruction=example.instruction[: max(length, 0)])
        found = length >= 0
    if not found:
        raise ValueError(f"{example.where}: the prompt does not fit into --max-prompt-len {limit}")
    return shorter


def tokenise(
    examples: list[Example],
    student: TextTokenizer,
    teacher: TextTokenizer | None = None,
    max_len: int = 512,
    max_prompt_len: int = 256,
    align: str | None = None,
) -> tuple[list[Row], CutReport]:
    """Rows of at most `max_len` tokens (prompt, response and end-of-text together) for each model.

    align: "eta" also aligns the tokens of each response; "none" demands that both models have the same. Raises
    ValueError naming an example that cannot fit, or that differs.
    """
    tokenizers = [student] if teacher is None else [student, teacher]
    rows, report = [], CutReport(examples=len(examples))
    limit = min(max_prompt_len, max_len - 1)
    for example, (prompts, responses) in zip(examples, whole_texts(examples, tokenizers), strict=True):
        if any(len(ids) > limit for ids in prompts):
            shorter = cut_example(example, tokenizers, limit)
            lengths = [len(student.prompt_text(either)) for either in (example, shorter)]
            report.prompts_cut += 1
            report.prompt_characters += max(0, lengths[0] - lengths[1])
            prompts = [tokenizer.encode_prompt(tokenizer.prompt_text(shorter)) for tokenizer in tokenizers]
        if not all(prompts):
            raise ValueError(f"{example.where}: the prompt has no tokens, so that nothing could predict the response")

        text = example.outputs[0]

        def fits(text: str, end_of_text: int, prompts=prompts) -> bool:
            sides = zip(tokenizers, prompts, strict=True)
            return all(len(ids) + len(tokenizer.encode(text)) + end_of_text <= max_len for tokenizer, ids in sides)

        whole = all(len(p) + len(r) + example.ends <= max_len for p, r in zip(prompts, responses, strict=True))
        if not whole:
            length = longest_prefix(len(text), lambda n, text=text, fits=fits: fits(text[:n], end_of_text=0))
            if length < 1:
                raise ValueError(f"{example.where}: no room for a response within --max-len {max_len}")
            report.responses_cut += 1
            report.response_characters += len(text) - length
            responses = [tokenizer.encode(text[:length]) for tokenizer in tokenizers]
        sides = [
            Side(ids, response + [tokenizer.eos_id] * (whole and example.ends))
            for tokenizer, ids, response in zip(tokenizers, prompts, responses, strict=True)
        ]
        if not all(side.response for side in sides):
            raise ValueError(f"{example.where}: the response has no tokens")
        row = Row(*sides)
        if teacher is not None and align == "none" and row.teacher.response != row.student.response:
            raise ValueError(
                f"{example.where}: the tokenizers have the same vocabulary but cut this response differently; "
                "use --align eta (recipe v2) or cma (recipe v1)"
            )
        if align == "eta":
            row.pairs = exact_token_alignment(teacher.spelt(row.teacher.response), student.spelt(row.student.response))
        rows.append(row)
    return rows, report


def whole_texts(examples: list[Example], tokenizers: list[TextTokenizer]) -> Iterator[tuple[tuple, tuple]]:
    """The ids of each example's prompt and response, one of each per tokenizer, before anything is cut."""
    for first in range(0, len(examples), 1000):
        part = examples[first : first + 1000]
        texts = [example.outputs[0] for example in part]
        prompts = [t.encode_all([t.prompt_text(example) for example in part], prompts=True) for t in tokenizers]
        responses = [tokenizer.encode_all(texts, prompts=False) for tokenizer in tokenizers]
        yield from zip(zip(*prompts, strict=True), zip(*responses, strict=True), strict=True)


def sampled_row(
    row: Row, response: list[int], student: TextTokenizer, teacher: TextTokenizer, max_len: int, align: str
) -> Row:
    """The row with a response that the student sampled in the place of the gold one (v2, eq. 18).

    response: the new ids, with the end unless the length cut it. The student keeps these ids, whether or not it
    would cut their text into them itself. With `align` "none" the teacher reads the same ids, otherwise their text:

    - bytes that are no UTF-8 become U+FFFD in it, as for any reader; such tokens have no exact counterpart, those
      around them do. Where the length cut a character in two, the teacher's text ends before it;
    - end-of-text stands on both sides or on neither, an empty response is end-of-text alone; where the student ended
      with another of its ends, end-of-text takes its place, as it follows every gold response;
    - what does not fit into the teacher's `max_len` is cut off both.

    Returns `row` itself where one side has no token left (nothing but special tokens before the cut, or no room).
    """

    if response and response[-1] in student.end_ids:
        response = [*response[:-1], student.eos_id]

    def for_teacher(length: int) -> list[int]:
        """The teacher's tokens of the first `length` of the student's."""
        if align == "none":
            return response[:length]
        if length == len(response) and response[-1] == student.eos_id:
            return teacher.encode(student.decode(response[:-1])) + [teacher.eos_id]
        return teacher.encode(student.decode(response[:length]).rstrip("\ufffd"))

    room = max_len - len(row.teacher.prompt)
    length = longest_prefix(len(response), lambda n: len(for_teacher(n)) <= room) if response else 0
    if length < 1 or not for_teacher(length):
        return row
    sampled = Row(Side(row.student.prompt, response[:length]), Side(row.teacher.prompt, for_teacher(length)))
    if align == "eta":
        sampled.pairs = exact_token_alignment(
            teacher.spelt(sampled.teacher.response), student.spelt(sampled.student.response)
        )
    return sampled


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def _to(instance, device):
    """A copy of a dataclass with its tensors, and its dataclasses' tensors, on `device`; CUDA copies them while the
    processor goes on, which takes pinned memory."""
    pin = torch.device(device).type == "cuda"
    moved = {}
    for entry in fields(instance):
        value = getattr(instance, entry.name)
        if isinstance(value, torch.Tensor):
            value = value.pin_memory().to(device, non_blocking=True) if pin else value.to(device)
        moved[entry.name] = value.to(device) if isinstance(value, ModelBatch) else value
    return replace(instance, **moved)


@dataclass
class ModelBatch:
    """What one model reads, and its R response positions, flattened. No attention mask: padding is on the right, where
    causality hides it from every position that is used."""

    input_ids: torch.Tensor  # (B, T), padded to the longest example
    real: torch.Tensor  # (N,) of the tokens that are no padding, in the flattened (B·T)
    positions: torch.Tensor  # (R,) of the response positions in the flattened (B·T)
    labels: torch.Tensor  # (R,) the token each of them predicts
    lengths: list[int]  # (B,) how many of the R belong to each example

    to = _to

    @property
    def inputs(self) -> torch.Tensor:
        """(R,) the token read at each response position"""
        return self.input_ids.flatten()[self.positions]


@dataclass
class Batch:
    """B examples: N student and M teacher response positions, and which of them are aligned."""

    student: ModelBatch
    teacher: ModelBatch | None = None
    teacher_index: torch.Tensor | None = None  # (A,) into the M teacher positions
    student_index: torch.Tensor | None = None  # (A,) into the N student positions
    align_ratios: list[float] = field(default_factory=list)  # aligned pairs over student tokens, per example
    teacher_hidden: torch.Tensor | None = None  # (M, D) bfloat16, where the rows have states
    teacher_predictions: torch.Tensor | None = None  # (M,)

    to = _to


def collate_side(sides: list[Side], pad_id: int) -> ModelBatch:
    """Pad on the right and shift once: position i reads token i and predicts token i+1."""
    sequences = [side.prompt + side.response for side in sides]
    width = max(len(sequence) for sequence in sequences) - 1  # nothing follows the last token
    input_ids = torch.full((len(sides), width), pad_id)
    real, positions, labels = [], [], []
    for row, (side, sequence) in enumerate(zip(sides, sequences, strict=True)):
        input_ids[row, : len(sequence) - 1] = torch.tensor(sequence[:-1])
        real += range(row * width, row * width + len(sequence) - 1)
        first = row * width + len(side.prompt) - 1  # the last prompt token predicts the first response token
        positions += range(first, first + len(side.response))
        labels += side.response
    lengths = [len(side.response) for side in sides]
    return ModelBatch(input_ids, *map(torch.tensor, (real, positions, labels)), lengths)


def collate(rows: list[Row], student_pad: int, teacher_pad: int = 0) -> Batch:
    """One batch of rows. The padding ids are read by no response position, any valid id will do."""
    batch = Batch(collate_side([row.student for row in rows], student_pad))
    if rows[0].teacher is not None:
        batch.teacher = collate_side([row.teacher for row in rows], teacher_pad)
    if rows[0].pairs is not None:
        teacher_index, student_index = [], []
        teacher_offset = student_offset = 0
        for row in rows:
            teacher_index.append(row.pairs[0] + teacher_offset)
            student_index.append(row.pairs[1] + student_offset)
            teacher_offset += len(row.teacher.response)
            student_offset += len(row.student.response)
            batch.align_ratios.append(len(row.pairs[1]) / len(row.student.response))
        batch.teacher_index = torch.from_numpy(np.concatenate(teacher_index))
        batch.student_index = torch.from_numpy(np.concatenate(student_index))
    if rows[0].states is not None:
        batch.teacher_hidden = torch.from_numpy(np.concatenate([row.states for row in rows])).view(torch.bfloat16)
    if rows[0].predictions is not None:
        batch.teacher_predictions = torch.from_numpy(np.concatenate([row.predictions for row in rows])).long()
    return batch


def without_responses(batch: Batch) -> Batch:
    """A batch of one padding token per model and no response position, for a process that has no example left."""

    def empty(side: ModelBatch | None) -> ModelBatch | None:
        none = {"positions": side.positions[:0], "labels": side.labels[:0], "lengths": [0]} if side else {}
        return side and replace(side, input_ids=side.input_ids[:1, :1], real=side.real[:1], **none)

    rest = batch.teacher_index, batch.student_index, [], batch.teacher_hidden, batch.teacher_predictions
    return Batch(empty(batch.student), empty(batch.teacher), *[None if x is None else x[:0] for x in rest])


def update_order(
    examples: int, per_update: int, seed: int, start: int = 0, lengths: list[int] | None = None
) -> Iterator[list[int]]:
    """Endless lists of example indices, one per update from the `start`-th on; each epoch is shuffled anew.

    A function of (seed, epoch) alone, so that a run can be taken up at any update. One update of an epoch, the last, is
    smaller where the examples do not divide evenly. With `lengths` the examples of an update are of similar length:
    windows of 50 shuffled updates are sorted and cut anew, and the updates of the epoch shuffled.
    """
    updates = -(-examples // per_update)
    while True:
        epoch, first = divmod(start, updates)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(examples, generator=generator).tolist()
        places = range(updates)
        if lengths is not None:
            windows = [order[i : i + 50 * per_update] for i in range(0, examples, 50 * per_update)]
            order = [index for window in windows for index in sorted(window, key=lengths.__getitem__)]
            places = torch.randperm(updates, generator=generator).tolist()
        for place in places[first:]:
            yield order[place * per_update : (place + 1) * per_update]
        start = (epoch + 1) * updates


def total_length(row: Row) -> int:
    """Tokens that both models read of it."""
    return sum(len(side.prompt) + len(side.response) - 1 for side in (row.student, row.teacher) if side)


def split_update(rows: list[Row], batch_size: int, tokens: int = 0) -> list[list[Row]]:
    """The rows of one update as forward passes: `batch_size` at a time as they come or, with a budget of `tokens`, the
    longest first and as many as fit: rows × longest ≤ tokens for each model, padding counted. A row always fits."""
    if not tokens:
        return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    parts: list[list[Row]] = []
    longest = 0
    for row in sorted(rows, key=total_length, reverse=True):
        width = max(len(side.prompt) + len(side.response) - 1 for side in (row.student, row.teacher) if side)
        longest = max(longest, width)
        if not parts or longest * (len(parts[-1]) + 1) > tokens:
            parts.append([])
            longest = width
        parts[-1].append(row)
    return parts


def padding_share(batches: list[list[Row]]) -> float:
    """Share of padding among all positions of the batches, of both models."""
    real = padded = 0
    for rows in batches:
        for sides in ([row.student for row in rows], [row.teacher for row in rows if row.teacher]):
            lengths = [len(side.prompt) + len(side.response) - 1 for side in sides]
            real += sum(lengths)
            padded += len(lengths) * max(lengths, default=0)
    return 1 - real / padded


def ahead(items: Iterator) -> Iterator:
    """The same items, each made by a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item
