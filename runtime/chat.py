"""Chat templates: what a model's own makes of an example's turns, in jinja2's sandbox, as `transformers` renders it."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import Example

FORMER = "qwen2.5", "llama3.2", "smollm2"  # formats that were written down here, by which older runs name theirs
# HumanEval's prompt as a message: a model that was taught to chat does not go on with a text by itself
COMPLETE = "Complete this Python function:\n\n```python\n{prompt}\n```"
# How prompts begin that are in one of the usual formats already, perhaps behind a begin-of-text
MARKED = re.compile(r"(\s*<\S+?>)?\s*(<[|｜](im_start|start_header_id|user)[|｜]>|<start_of_turn>|\[INST])", re.I)


class Generation(Extension):
    """{% generation %} tells trainers what a model wrote; it renders what it holds."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def raise_exception(message: str):
    raise TemplateError(message)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
ENVIRONMENT.filters["tojson"] = lambda x, ensure_ascii=False, **how: json.dumps(x, ensure_ascii=ensure_ascii, **how)
# a template that asks for the date is told that on which Llama's own falls back, so that prompts stay what they were
ENVIRONMENT.globals |= {"raise_exception": raise_exception, "strftime_now": datetime(2024, 7, 26).strftime}


@dataclass
class ChatTemplate:
    """A template with what it knows beside the turns."""

    source: str
    tokens: dict[str, str]  # {"bos_token": "<s>", ...}, as the model's tokenizer names them
    name: str  # whose it is, for messages
    own: bool = True  # the model's own
    thinking: bool = False  # its `enable_thinking`

    @cached_property
    def template(self) -> Template:
        return ENVIRONMENT.from_string(self.source)

    def render(self, turns: list[dict[str, str]], ask: bool = True) -> str:
        """The turns, and what a model's answer begins with if `ask`. Raises ValueError if they cannot be rendered."""
        known = {"tools": None, "documents": None, "enable_thinking": self.thinking, **self.tokens}
        try:
            return self.template.render(messages=turns, add_generation_prompt=ask, **known)
        except Exception as error:  # it is a program of somebody else's
            raise ValueError(f"{self.name} cannot render these turns: {' '.join(str(error).split())}") from error

    def message(self, example: Example) -> str:
        """What the user says: without the words and marks by which a base model knows its turn."""
        if example.code is not None and example.code.entry_point:
            return COMPLETE.format(prompt=example.prompt.rstrip())
        if example.prompt is not None:
            return example.prompt.removesuffix("\n[BEGIN]\n")  # MBPP's
        return "\n\n".join(part for part in (example.instruction, example.input) if part)

    def prompt_text(self, example: Example) -> str:
        """What the model reads before its answer. Raises ValueError for an example that is in a chat format already."""
        message = self.message(example)
        if MARKED.match(message):
            raise ValueError(f"{example.where}: the prompt is in a chat format already; give the message, or no option")
        try:
            return self.render([*example.history, {"role": "user", "content": message}])
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from error

    def as_trained(self) -> str:
        """The source, with this `enable_thinking` where none is given, as `transformers` gives none by itself."""
        default = f"{{% if enable_thinking is not defined %}}{{% set enable_thinking = {str(self.thinking).lower()} %}}"
        return f"{default}{{% endif %}}\n" * ("enable_thinking" in self.source) + self.source
