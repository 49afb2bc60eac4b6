"""The prompt formats of chat models: what a family's own template makes of one message of a user."""

import re
from dataclasses import dataclass

from data import Example

# HumanEval's prompt as a message: a model that was taught to chat does not go on with a text by itself
COMPLETE = "Complete this Python function:\n\n```python\n{prompt}\n```"


@dataclass(frozen=True)
class ChatFormat:
    """A family's template with its default system message."""

    name: str
    text: str  # with {message} in it
    end: str  # the token that ends the answer

    def special_tokens(self) -> list[str]:
        return list(dict.fromkeys(re.findall(r"<\|\w+\|>", self.text)))

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
        if re.match(r"\s*<\|(im_start|begin_of_text|start_header_id)\|>", message):
            raise ValueError(
                f"{example.where}: the prompt is in a chat format already, and would be put into another "
                f"({self.name}); leave out the option, or give the message alone"
            )
        return self.text.format(message=message.strip() if self.name == "llama3.2" else message)  # as its template does


CHATML = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
CHATS = {
    chat.name: chat
    for chat in (
        ChatFormat(
            "qwen2.5",
            CHATML.replace("{system}", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
            "<|im_end|>",
        ),
        ChatFormat(
            "llama3.2",  # its template has a date: always the one that it falls back on, never today's
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{message}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "<|eot_id|>",
        ),
        ChatFormat(
            "smollm2",
            CHATML.replace("{system}", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
            "<|im_end|>",
        ),
    )
}
