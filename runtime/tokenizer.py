"""A model's tokenizer: the interface that training uses, and how it is read from its files and checked."""

import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from align import token_bytes
from data import Example, Side, cut_prompt
from model import read_json
from runtime.chat import FORMER, ChatTemplate

PLAIN = "PreTrainedTokenizerFast", "TokenizersBackend"  # transformers' classes without rules and names of their own
TURNS = [{"role": "user", "content": "An odd question"}, {"role": "assistant", "content": "An odd reply"}]  # for probes


@dataclass(eq=False)
class TextTokenizer:
    """A tokenizer as training needs it: plain text in, ids out. `read_tokenizer` reads one from a model's directory."""

    directory: Path
    tokenizer: Tokenizer
    end_ids: list[int]  # all ids that end a response when the model writes one; end-of-text is the first
    chat: ChatTemplate | None = None  # None: prompts in the plain template
    prefix: list[int] = field(default_factory=list)  # the ids that begin every prompt (--bos)

    def __post_init__(self):
        self.eos_id = self.end_ids[0]  # end-of-text, which follows every response that the model is trained on
        self.bytes = [spelling or b"" for spelling in token_bytes(self.tokenizer)]  # special tokens spell nothing
        self.bytes[self.eos_id] = None  # even if the vocabulary does not mark end-of-text as special
        self.size = len(self.bytes)  # all ids are smaller

    def prompt_text(self, example: Example) -> str:
        """The example's prompt as the model reads it after `prefix`. Raises ValueError if it begins with `prefix`."""
        text = self.chat.prompt_text(example) if self.chat else example.prompt_text()
        begin = self.names(self.prefix)
        if begin and text.startswith(begin):
            raise ValueError(
                f"{example.where}: the prompt begins with {begin}, which would appear twice, since {self.directory} "
                "adds it to each prompt; remove it from the data, or use --no-bos"
            )
        thought = self.chat and re.search(r"(</?)think>\s*\Z", text)
        if thought and example.outputs[0].lstrip().startswith("<think>"):
            how = "use --chat thinking" if thought[1] == "</" else "remove <think> from the data"
            say_once(f"{self.directory}: responses begin with <think>, but its chat template has already written "
                     f"{thought[0].rstrip()}: {how}")  # fmt: skip
        return text

    def fit_prompts(self, examples: list[Example], limit: int) -> list[str]:
        """The prompts as the model reads them, cut to at most `limit` tokens."""
        return [self.prompt_text(cut_prompt(example, [self], limit)) for example in examples]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: `prefix` and the text, in which the name of a special token stands for that token."""
        self.tokenizer.encode_special_tokens = False
        return self.prefix + self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Ids of a response, in which "</s>" is text, not an end."""
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_examples(self, examples: list[Example]) -> Iterator[Side]:
        """The examples as the model reads them, uncut; encoded on all cores, a thousand at once to save memory."""
        for first in range(0, len(examples), 1000):
            part = examples[first : first + 1000]
            self.tokenizer.encode_special_tokens = False  # as in `encode_prompt`
            prompts = self.tokenizer.encode_batch([self.prompt_text(e) for e in part], add_special_tokens=False)
            self.tokenizer.encode_special_tokens = True  # as in `encode`
            responses = self.tokenizer.encode_batch([e.outputs[0] for e in part], add_special_tokens=False)
            for example, prompt, response in zip(part, prompts, responses, strict=True):
                yield Side(self.prefix + prompt.ids, response.ids + ([self.eos_id] if example.ends else []))

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, without special tokens and without ends, whether these are special or not."""
        return self.tokenizer.decode([i for i in ids if i not in self.end_ids], skip_special_tokens=True)

    def spell(self, ids: list[int]) -> list[bytes | None]:
        """The bytes of each id, as `exact_token_alignment` takes them."""
        return [self.bytes[i] for i in ids]

    def names(self, ids: list[int]) -> str:
        return "".join(self.tokenizer.id_to_token(i) or "" for i in ids)


def read_tokenizer(
    directory: str | Path, chat: str = "none", bos: bool = False, rows: int | None = None
) -> TextTokenizer:
    """The tokenizer of tokenizer.json, with the ends that tokenizer_config.json (or, beside an old one,
    special_tokens_map.json), generation_config.json and config.json name. Raises ValueError, naming the file, for one
    that is wrong.

    chat: as in `read_chat`, or "none" for the plain template. With a chat template, end-of-text is what ends a turn.
    rows: the number of the model's embeddings. A special token beyond them, often padding, is left out, with a note.
    bos: prompts begin with what tokenizer.json's own template puts before a text (<s> for Llama, nothing for GPT-2),
    unless the chat template already does that.
    """
    directory, file = Path(directory), Path(directory) / "tokenizer.json"
    tokenizer = open_tokenizer(file)
    template = None if chat == "none" else read_chat(directory, tokenizer, chat)
    end_ids = find_ends(directory, tokenizer, template)
    if rows is not None:
        written = template.source if template else ""
        tokenizer = leave_out_tokens(file, tokenizer, rows, tokenizer.id_to_token(end_ids[0]), written)
        end_ids = [end for end in end_ids if tokenizer.id_to_token(end) is not None]
    added = tokenizer.get_added_tokens_decoder()  # files may not mark ends as special, but responses may quote them
    tokenizer.add_special_tokens([added[end] for end in end_ids if end in added])
    cut_names(tokenizer)
    try:
        read = TextTokenizer(directory, tokenizer, end_ids, template)
    except ValueError as error:  # from `token_bytes`
        raise ValueError(f"{file}: {error}") from error
    if bos:
        begin, _ = find_template(tokenizer)
        if any(tokenizer.id_to_token(index) is None for index in begin):
            raise ValueError(f"{file}: its post-processor adds ids {begin}, but the vocabulary lacks one of them")
        if read.chat is None or read.encode_prompt(read.chat.render(TURNS[:1]))[: len(begin)] != begin:
            read.prefix = begin
    return read


def open_tokenizer(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        ids = tokenizer.encode("Größe\n\x00 東京 🦊", add_special_tokens=False).ids
        tokenizer.decode(ids)  # some defects show only in use
        find_template(tokenizer)
    except BaseException as error:  # the library raises a bare Exception, and its panics are not even that
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{file}: cannot be read as a tokenizer: {error}") from error
    ids = tokenizer.get_vocab().values()
    largest, distinct = max(ids, default=-1), len(set(ids))
    if not 0 <= largest < 2**24 or distinct < len(ids):  # bounded, because lists over all ids are made
        raise ValueError(f"{file}: {len(ids)} tokens have {distinct} ids up to {largest}: not a valid vocabulary")
    return tokenizer


def leave_out_tokens(file: Path, tokenizer: Tokenizer, rows: int, end: str, written: str) -> Tokenizer:
    """The tokenizer without the special tokens whose ids are `rows` or more. The end is kept, and so are the tokens in
    the source of the chat template, `written`."""
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    beyond = {token: i for token, i in special.items() if i >= rows and token != end and token not in written}
    if not beyond:
        return tokenizer
    named = ", ".join(f"{token} ({i})" for token, i in beyond.items())
    say_once(f"{file}: the model has no embedding for {named}; these are left out, and their names are ordinary text")
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in beyond]
    if isinstance(content["model"]["vocab"], dict):
        content["model"]["vocab"] = {token: i for token, i in content["model"]["vocab"].items() if token not in beyond}
    return Tokenizer.from_str(json.dumps(content))


def cut_names(tokenizer: Tokenizer) -> None:
    """Unigram finds every piece of its vocabulary in a text, even "</s>"; so first cut special tokens' names in two."""
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    cuts = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1]
    if isinstance(tokenizer.model, models.Unigram) and cuts:
        cut = pre_tokenizers.Split(Regex("|".join(cuts)), "merged_with_previous")
        before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, cut])


def find_template(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that tokenizer.json's post-processor puts before and after a text."""
    bare = Tokenizer(models.WordLevel({"text": 0}, unk_token="text"))  # works for any vocabulary
    if tokenizer.post_processor is not None:
        bare.post_processor = tokenizer.post_processor
    encoding = bare.encode("text")
    at = encoding.special_tokens_mask.index(0)
    return encoding.ids[:at], encoding.ids[at + 1 :]


def read_chat(directory: Path, tokenizer: Tokenizer, chat: str) -> ChatTemplate:
    """The chat template for a model's prompts. chat: "own", the model's; "thinking", the same with `enable_thinking`;
    or the path of a template, or of a model directory that has one."""
    own = find_chat(directory)
    source = own if chat in ("own", "thinking") else find_chat(Path(chat))
    if source is None and chat in ("own", "thinking"):
        raise ValueError(f"{directory}: no chat template in chat_template.jinja or tokenizer_config.json; give the "
                         "path of one")  # fmt: skip
    if source is None:
        former = " (which is no longer built in)" * (chat in FORMER)
        raise ValueError(f"{directory}: the chat template {chat!r}{former} is neither own, thinking, none nor the "
                         "path of a template or of a model directory with one; for the model's own use --chat, "
                         "--student-chat or --teacher-chat own")  # fmt: skip
    tokens = {name: token for name, token in name_tokens(directory, tokenizer).items() if isinstance(token, str)}
    name = f"{directory}'s chat template" if source == own else f"the chat template {chat}"
    return ChatTemplate(source, tokens, name, source == own, chat == "thinking")


def name_tokens(directory: Path, tokenizer: Tokenizer) -> dict:
    """{"bos_token": "<s>", ...}: what the files call each special token. Where they leave out begin or end of text, as
    GPT-2's do, `transformers` has a class that knows the tokens; they are those of config.json."""
    config = read_if_there(directory / "tokenizer_config.json")
    special = read_if_there(directory / "special_tokens_map.json")
    named = config | special if is_old(config) else special | config
    if config.get("tokenizer_class") not in PLAIN:
        model = read_if_there(directory / "config.json")
        ids = {name: model.get(f"{name}_id") for name in ("bos_token", "eos_token")}
        vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
        named = {name: vocabulary.get(index) for name, index in ids.items() if type(index) is int} | named
    return {name: content_of(token) for name, token in named.items() if name.endswith("_token")}


def is_old(config: dict) -> bool:
    """Whether this is the tokenizer_config.json of a transformers before 4.34: later changes to the special tokens went
    into special_tokens_map.json alone, which `transformers` therefore puts first."""
    return "added_tokens_decoder" not in config


def find_chat(path: Path) -> str | None:
    """The chat template in a file or in a model directory; None if there is none."""
    file = path if path.is_file() else path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 ({error.reason})") from error
    template = read_if_there(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several, with names
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    return template.get("default") if isinstance(template, dict) else template


def find_ends(directory: Path, tokenizer: Tokenizer, chat: ChatTemplate | None) -> list[int]:
    """Every id that the chat template or one of the files names as an end; end-of-text is the first."""
    ends, vocabulary = [], tokenizer.get_vocab()
    ids = set(vocabulary.values())
    if chat is not None:  # the first special token after an answer
        behind = chat.render(TURNS, ask=False).partition(TURNS[1]["content"])[2]
        tokenizer.encode_special_tokens, added = False, tokenizer.get_added_tokens_decoder()
        encoded = tokenizer.encode(behind, add_special_tokens=False).ids
        ends += [i for i in encoded if i in added and added[i].special][:1]
    files = ["tokenizer_config.json", "generation_config.json", "config.json"]
    for name in ["special_tokens_map.json"] * is_old(read_if_there(directory / files[0])) + files:
        key = "eos_token" if "token" in name else "eos_token_id"
        value = content_of(read_if_there(directory / name).get(key))
        for end in value if isinstance(value, list) else [value]:
            index = vocabulary.get(end) if isinstance(end, str) else end
            if type(index) is int and index in ids:
                ends.append(index)
            elif end is not None and (not ends or type(index) is not int):  # further unknown ids are never generated
                raise ValueError(f"{directory / name}: {key} {end!r} is not in tokenizer.json")
    if not ends:
        raise ValueError(f"{directory}: no end-of-text token: add eos_token to tokenizer_config.json")
    return list(dict.fromkeys(ends))


def check_size(tokenizer: TextTokenizer, rows: int) -> None:
    """Raises ValueError unless the tokenizer can belong to a model with `rows` embeddings."""
    if not tokenizer.size <= rows <= 1.1 * tokenizer.size + 1024:  # real vocabularies are padded by a few hundred rows
        without = f" (the first without one is {tokenizer.names([rows])!r})" if rows < tokenizer.size else ""
        raise ValueError(
            f"{tokenizer.directory}: the tokenizer has ids up to {tokenizer.size - 1}, the model has {rows} embeddings"
            f"; tokenizer.json and model.safetensors do not belong together{without}"
        )


def count_shared(teacher: TextTokenizer, student: TextTokenizer) -> int:
    """How many ids, counted from 0, have the same token in both vocabularies. 0 unless they are of one family: only
    added tokens may follow these ids, and end-of-text must be the same."""
    vocabularies = [tokenizer.tokenizer.get_vocab() for tokenizer in (teacher, student)]
    apart = vocabularies[0].items() ^ vocabularies[1].items()
    shared = min((index for _, index in apart), default=teacher.size)
    for tokenizer, vocabulary in zip((teacher, student), vocabularies, strict=True):
        added = tokenizer.tokenizer.get_added_tokens_decoder()
        if any(index >= shared and index not in added for index in vocabulary.values()):
            return 0
    return shared if teacher.eos_id == student.eos_id < shared else 0


def say_if_forgotten(tokenizer: TextTokenizer, chat_option: str, chat_is_known: bool, bos_is_open: bool) -> None:
    """A note on standard error if prompts are not in the model's own chat template, or lack what its tokenizer puts
    before a text, unless that was decided when the model was trained."""
    chat, directory, notes = tokenizer.chat, tokenizer.directory, []
    end, begin = tokenizer.names([tokenizer.eos_id]), tokenizer.names(find_template(tokenizer.tokenizer)[0])
    if chat and not chat.own:
        marks = re.findall(r"<[^<>\s]{2,40}>|\[/?[A-Z_]+\]", chat.render(TURNS))
        plain = dict.fromkeys(mark for mark in marks if tokenizer.tokenizer.token_to_id(mark) is None)
        unknown = f"; its vocabulary lacks {', '.join(plain)}" * bool(plain)
        notes = [f"prompts are in {chat.name}, not the model's own{unknown}"]
    elif not chat and not chat_is_known and find_chat(directory):
        notes = [f"prompts are not in the model's chat template; use it with {chat_option} own"]
    elif not chat and not chat_is_known and re.search("im_end|eot|end_of_turn|<.end.>", end):
        notes = [f"its end-of-text {end} looks like the end of a turn, but it has no chat template"]
    if not chat and bos_is_open and begin and not tokenizer.prefix:
        notes += [f"prompts do not begin with the {begin} that its tokenizer puts before a text (nor do they in the "
                  "papers' code); add it with --bos"]  # fmt: skip
    for note in notes:
        print(f"note: {directory}: {note}", file=sys.stderr)


def escape_what_cannot_be_printed() -> None:
    """Print characters that the encoding of standard output lacks (cp1252 on Windows) as standard error does, \\u6771,
    instead of failing after long work."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is not, and is UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")


@cache
def say_once(note: str) -> None:
    """Print a note on standard error, but only once."""
    print(f"note: {note}", file=sys.stderr)


def read_if_there(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def content_of(token):
    """The text of a token, which these files give directly or inside an object with more about the token."""
    return token.get("content") if isinstance(token, dict) else token
