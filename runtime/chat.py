"""Chat templates: render an example's turns with a model's template, as `transformers` does, in jinja2's sandbox."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data import Example

FORMER = "qwen2.5", "llama3.2", "smollm2"  # formats that used to be built in; older runs name theirs so
# HumanEval's prompt as a message: a chat model does not continue a text unless it is asked to
COMPLETE = "Complete this Python function:\n\n```python\n{prompt}\n```"
# How prompts begin that are already in one of the usual chat formats, perhaps after a begin-of-text token
ROLE = r"<[|｜](im_start|start_header_id|system|user)[|｜]>"
MARKED = re.compile(rf"(\s*<\S+?>)?\s*({ROLE}|<start_of_turn>|\[INST])", re.I)


class Generation(Extension):
    """{% generation %} marks what a model wrote, for training code; here only its content is rendered."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def raise_exception(message: str):
    raise TemplateError(message)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
ENVIRONMENT.filters["tojson"] = lambda x, ensure_ascii=False, **how: json.dumps(x, ensure_ascii=ensure_ascii, **how)
# a template that asks for the date gets the default date of Llama's template, so that prompts never change
ENVIRONMENT.globals |= {"raise_exception": raise_exception, "strftime_now": datetime(2024, 7, 26).strftime}


@dataclass
class ChatTemplate:
    """A template, and the variables that it has besides the turns."""

    source: str
    tokens: dict[str, str]  # {"bos_token": "<s>", ...}, as the model's tokenizer names them
    name: str  # whose it is, for messages
    own: bool = True  # the model's own
    thinking: bool = False  # the template's variable `enable_thinking`

    @cached_property
    def template(self) -> Template:
        return ENVIRONMENT.from_string(self.source)

    def render(self, turns: list[dict[str, str]], ask: bool = True) -> str:
        """The turns as text, with `ask` also the start of the answer. Raises ValueError if they cannot be rendered."""
        known = {"tools": None, "documents": None, "enable_thinking": self.thinking, **self.tokens}
        try:
            return self.template.render(messages=turns, add_generation_prompt=ask, **known)
        except Exception as error:  # a template is somebody else's program and may raise anything
            raise ValueError(f"{self.name} cannot render these turns: {' '.join(str(error).split())}") from error

    def message(self, example: Example) -> str:
        """The user's message, without the words and marks that tell a base model that its turn begins."""
        if example.code is not None and example.code.entry_point:
            return COMPLETE.format(prompt=example.prompt.rstrip())
        if example.prompt is not None:
            return example.prompt.removesuffix("\n[BEGIN]\n")  # MBPP's
        return "\n\n".join(part for part in (example.instruction, example.input) if part)

    def prompt_text(self, example: Example) -> str:
        """What the model reads before its answer. Raises ValueError for an example that already has a chat format."""
        message = self.message(example)
        if MARKED.match(message):
            raise ValueError(f"{example.where}: the prompt is in a chat format already; give only the message, "
                             "or use --chat none")  # fmt: skip
        try:
            return self.render([*example.history, {"role": "user", "content": message}])
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from error

    def as_trained(self) -> str:
        """The source, with this `enable_thinking` as the default, because `transformers` does not set it by itself."""
        default = f"{{% if enable_thinking is not defined %}}{{% set enable_thinking = {str(self.thinking).lower()} %}}"
        return f"{default}{{% endif %}}\n" * ("enable_thinking" in self.source) + self.source
