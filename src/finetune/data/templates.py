"""Chat templates: how a conversation becomes the text that a model reads, in training and in use alike.

A template is the tokenizer's own, one of the package's (`templates/*.jinja`), one that a person put into
`~/.config/finetune/templates` or the directory `FT_TEMPLATES`, a `.jinja` file, or Jinja text itself.
"""

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import jinja2

from finetune.core.errors import DataError, UsageError
from finetune.data.probe import TemplateShape, probe_template
from finetune.data.rows import Message
from finetune.data.sandbox import GENERATION_CLOSE, GENERATION_OPEN, REFUSED, compile_template
from finetune.data.tokenizer import TextTokenizer, TokenizerSettings

TOKENIZER_TEMPLATE = "tokenizer"


class TemplateError(DataError):
    """A template cannot render a conversation. The message names the template."""


class TemplateRefusedError(DataError):
    """A template would run long, fill the memory, or reach out of its sandbox: nothing more is done with it."""


class SpecialTokens(Protocol):
    """The part of a tokenizer that templates print: BOS and EOS, and which texts are tokens of their own."""

    @property
    def settings(self) -> TokenizerSettings:
        """The texts of BOS, EOS and the others."""
        ...

    @property
    def special_tokens(self) -> frozenset[str]:
        """All texts that are one special token each."""
        ...


class Template:
    """A template bound to the special tokens of one tokenizer."""

    def __init__(self, name: str, source: str, tokenizer: SpecialTokens) -> None:
        self.name = name
        self.source = source
        self.sha256 = hashlib.sha256(source.encode("utf-8")).hexdigest()
        self.special_tokens = tokenizer.special_tokens
        self._tokenizer = tokenizer
        settings = tokenizer.settings
        self.eos_token = settings.eos_token
        self._variables = {
            "bos_token": settings.bos_token or "",
            "eos_token": settings.eos_token or "",
            "pad_token": settings.pad_token or "",
            "unk_token": settings.unk_token or "",
            "special_tokens": sorted(tokenizer.special_tokens),
            "documents": None,
        }
        try:
            self._render = compile_template(source)
        except REFUSED as error:
            raise self._refusal(error) from error
        except jinja2.TemplateError as error:
            raise TemplateError(f"The template `{name}` is not valid Jinja: {_reason(error)}.") from error

    def __repr__(self) -> str:
        return f"Template({self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:  # a compiled template does not travel to another process
        return Template, (self.name, self.source, self._tokenizer)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, generation_prompt: bool = False
    ) -> str:
        """The conversation as text. `generation_prompt` adds the header of the answer that comes next."""
        rendered = self.render_turns([as_turn(message) for message in messages], tools, generation_prompt)
        return rendered.replace(GENERATION_OPEN, "").replace(GENERATION_CLOSE, "")

    def render_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        fields: Mapping[str, str] | None = None,
    ) -> str:
        """The text to generate an answer from: what training showed the model in front of one.

        `fields` are the instruction and input of an Alpaca row; without them its message is the instruction.
        """
        turns = conversation_turns(messages, fields or {})
        rendered = self.render_turns(turns, tools, True) + self.shape.missing_header
        return rendered.replace(GENERATION_OPEN, "").replace(GENERATION_CLOSE, "")

    def render_turns(
        self, turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], generation_prompt: bool
    ) -> str:
        """Render plain dictionaries; generation marks stay in the text. Raises TemplateError."""
        variables = self._variables | {
            "messages": list(turns),
            "tools": list(tools) or None,
            "add_generation_prompt": generation_prompt,
        }
        try:
            return self._render(variables)
        except REFUSED as error:
            raise self._refusal(error) from error
        except Exception as error:
            # The template is someone's program: whatever it trips over is a fault of the template for this row.
            raise TemplateError(f"the template `{self.name}` cannot render this: {_reason(error)}") from error

    def _refusal(self, error: Exception) -> TemplateRefusedError:
        whose = f"The model's own template (`{self.name}`)" if self.name == TOKENIZER_TEMPLATE else f"`{self.name}`"
        return TemplateRefusedError(
            f"{whose} is refused as harmful: {_reason(error)}. A template is a program of its authors. "
            "Choose another with data.template, for example chatml."
        )

    @cached_property
    def shape(self) -> TemplateShape:
        """What stands around an answer in this template, found by rendering small conversations."""
        return probe_template(self.render, self.special_tokens, self.eos_token)

    @property
    def turn_end(self) -> str:
        """The text that ends an answer: a special token, or plain text where the template has no special one."""
        return self.shape.turn_end or self.eos_token or ""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Plain text that ends an answer, where that is no token of its own."""
        return (self.turn_end,) if self.turn_end and self.turn_end not in self.special_tokens else ()

    def stop_ids(self, tokenizer: TextTokenizer) -> frozenset[int]:
        """The tokens that end an answer: EOS, and the template's own end of turn."""
        found = (tokenizer.token_id(text) for text in self.shape.closers if text in tokenizer.special_tokens)
        return frozenset(token for token in (*found, tokenizer.eos_id) if token is not None)


def as_turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it; keys without a value are left out."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [dict(call) for call in message.tool_calls]
    if message.name:
        turn["name"] = message.name
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def conversation_turns(messages: Sequence[Message], fields: Mapping[str, str]) -> list[dict[str, Any]]:
    """All messages as turns; the last user turn carries the row's instruction and input."""
    turns = [as_turn(message) for message in messages]
    users = [turn for turn in turns if turn["role"] == "user"]
    if users and fields:
        users[-1] |= {key: value for key, value in fields.items() if key in {"instruction", "input"}}
    return turns


def choose_template(name: str | None, tokenizer: TextTokenizer, *, conversations: bool = True) -> Template:
    """The template of that name, file or text; None is the tokenizer's own, else chatml (alpaca for single requests).

    Raises UsageError for a name that is not known, with the nearest ones.
    """
    if name is None and tokenizer.chat_template is None:
        name = "chatml" if conversations else "alpaca"
    if name is None or name == TOKENIZER_TEMPLATE:
        if tokenizer.chat_template is None:
            raise UsageError("data.template=tokenizer: this tokenizer has no chat template. Choose one by name.")
        return Template(TOKENIZER_TEMPLATE, tokenizer.chat_template, tokenizer)
    return named_template(name, tokenizer)


def named_template(name: str, tokenizer: SpecialTokens) -> Template:
    """A registered template, a template file, or Jinja text itself. Raises UsageError."""
    if "{{" in name or "{%" in name:
        return Template("custom", name, tokenizer)
    if name.endswith((".jinja", ".jinja2", ".j2")):
        return Template(name, _read_template(Path(name).expanduser()), tokenizer)
    return Template(name, template_source(name), tokenizer)


def template_source(name: str) -> str:
    """The Jinja text of a registered template. Raises UsageError for an unknown name."""
    known = registered_templates()
    if name not in known:
        near = difflib.get_close_matches(name, [*known, TOKENIZER_TEMPLATE], n=3, cutoff=0.5)
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(
            f"data.template={name}: there is no template of that name.{meant} Known: {', '.join(sorted(known))}; "
            f"or a .jinja file; or put {name}.jinja into {person_directory()}."
        )
    origin = known[name]
    return _read_template(Path(origin)) if origin else _package_directory().joinpath(f"{name}.jinja").read_text("utf-8")


def registered_templates() -> dict[str, str]:
    """Names with the file each comes from; "" for the package's own. A person's file hides one of the same name."""
    names = (entry.name for entry in _package_directory().iterdir())
    found = dict.fromkeys(sorted(name.removesuffix(".jinja") for name in names if name.endswith(".jinja")), "")
    for directory in (person_directory(), os.environ.get("FT_TEMPLATES")):
        if directory and Path(directory).is_dir():
            found |= {file.stem: str(file) for file in sorted(Path(directory).glob("*.jinja"))}
    return found


def person_directory() -> Path:
    """Where a person keeps templates of their own."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "finetune" / "templates"


def _package_directory() -> Any:
    return resources.files("finetune.data").joinpath("templates")


def _read_template(path: Path) -> str:
    if path.exists() and not (path.is_file() or path.is_dir()):  # its end may never come
        raise UsageError(f"data.template={path}: this is no file but a device or a pipe. Give the path of a file.")
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"data.template={path}: the template file cannot be read ({reason}).") from error


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    line = f" (line {error.lineno} of the template)" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return text.removesuffix(".") + line
