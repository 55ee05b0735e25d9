"""From what a person writes to what the model reads, in the way that training did it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune.core.errors import ModelError
from finetune.data.rows import Message
from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer
from finetune.generation.requests import Prompt


@dataclass(frozen=True, slots=True)
class Prompter:
    """Makes prompts for one tokenizer: through a template, or, without one, from raw text."""

    tokenizer: TextTokenizer
    template: Template | None

    def prompt(self, text: str, *, system: str | None = None) -> Prompt:
        """One request: a user message where there is a template, else the text as it is."""
        if self.template is None:
            return self.raw(text if system is None else f"{system}\n\n{text}")
        head = () if system is None else (Message("system", system),)
        return self.messages([*head, Message("user", text)])

    def messages(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> Prompt:
        """A conversation, ready for the model's turn."""
        if self.template is None:
            raise ModelError("A conversation needs a template, and the model has none. Give one, for example chatml.")
        text = self.template.render_prompt(messages, tools)
        stop_tokens, stop_strings = self.template.stop_ids(self.tokenizer), self.template.stop_strings
        return Prompt(text, prompt_ids(text, self.tokenizer), stop_tokens, stop_strings)

    def raw(self, text: str) -> Prompt:
        """The text alone; the answer ends where the model says so (EOS)."""
        eos = self.tokenizer.eos_id
        return Prompt(text, prompt_ids(text, self.tokenizer), frozenset() if eos is None else frozenset({eos}))


def prompt_ids(text: str, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Token ids with exactly one BOS where the model wants one.

    An empty text becomes the token that begins (or else ends) a text: a model cannot continue nothing.
    """
    ids = tokenizer.prompt_ids(text)
    if ids:
        return ids
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if start is None:
        raise ModelError("The prompt is empty, and the tokenizer has no token that begins a text. Give a prompt.")
    return (start,)
