"""A `Modelfile` for Ollama: where the model is, how prompts are rendered, and what ends an answer.

Ollama's templates are Go's, not Jinja. A template is recognised by what it renders, and written in Go where it is one
of the well-known ones; of any other only `FROM` and the parameters are written.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.data.rows import Message
from finetune.data.templates import Template, TemplateError

# The context that a running model gets, unless it has less: Ollama reserves memory for all of it.
MOST_CONTEXT = 8192

_USER = (Message("user", "qzask"),)
_TURNS = (*_USER, Message("assistant", "qzanswer"), Message("user", "qzagain"))
_SYSTEM = (Message("system", "qzrules"),)
_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", re.DOTALL)
_BOS, _EOS, _END = "{bos}", "{eos}", "{end}"


@dataclass(frozen=True, slots=True)
class Family:
    """A well-known template: what stands around a text, with `%s` for it.

    Where `system` is None, the system text is put into the first request as `joined` says. `opening` comes before a
    request that opens the conversation, `between` before each later one. {bos}, {eos} and {end} (of a turn) are the
    model's own tokens.
    """

    name: str
    user: str
    assistant: str
    header: str
    system: str | None = None
    joined: str = ""
    opening: str = ""
    between: str = ""
    stops: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation, without the BOS in front of it."""
        text = rules = ""
        for number, message in enumerate(messages):
            if message.role == "system":
                block, rules = (self.system or "", "") if self.system is not None else ("", self.joined)
                text += block.replace("%s", message.content)
                rules = rules.replace("%s", message.content)
            elif message.role == "user":
                text += self.opening if number == 0 else self.between if number > 1 else ""
                text += self.user.replace("%s", rules + message.content)
                rules = ""
            else:
                text += self.assistant.replace("%s", message.content)
        return text + self.header

    def in_go(self) -> str:
        """The same as a template of Go. With a system text, message 0 is that, and the first request is message 1."""
        content, joined = "{{ .Content }}", self.joined.replace("%s", "{{ $.System }}")
        rules = f"{{{{ if and $.System (eq $i 1) }}}}{joined}{{{{ end }}}}" if joined else ""
        opening = f"{{{{ if eq $i 0 }}}}{self.opening}{{{{ end }}}}" if self.opening else ""
        between = f"{{{{ if gt $i 1 }}}}{self.between}{{{{ end }}}}" if self.between else ""
        turns = {
            "system": (self.system or "").replace("%s", content),
            "user": opening + between + self.user.replace("%s", rules + content),
            "assistant": self.assistant.replace("%s", content),
        }
        cases = "".join(f'{{{{ if eq .Role "{role}" }}}}{text}{{{{ end }}}}' for role, text in turns.items() if text)
        return f"{{{{ range $i, $_ := .Messages }}}}{cases}{{{{ end }}}}{self.header}"

    def with_tokens(self, bos: str, eos: str, end: str) -> "Family":
        """The family with a model's own tokens in it."""

        def filled(text: str) -> str:
            return text.replace(_BOS, bos).replace(_EOS, eos).replace(_END, end or eos)

        return replace(
            self,
            user=filled(self.user),
            assistant=filled(self.assistant),
            header=filled(self.header),
            system=None if self.system is None else filled(self.system),
            between=filled(self.between),
        )


def _wrapped(name: str, around: str, *, assistant: str = "assistant", header: str, **rest: str | None) -> Family:
    """A family that wraps every turn alike, but for the name of the role."""
    of = {role: around.replace("{role}", role) for role in ("system", "user", assistant)}
    return Family(name, of["user"], of[assistant], header, **{"system": of["system"], **rest})  # type: ignore[arg-type]


_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
FAMILIES = (
    _wrapped("ChatML", "<|im_start|>{role}\n%s{end}\n", header="<|im_start|>assistant\n"),
    _wrapped(
        "Llama 3",
        "<|start_header_id|>{role}<|end_header_id|>\n\n%s{end}",
        header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    Family(
        "Llama 2",
        "[INST] %s [/INST]",
        " %s {eos}",
        "",
        joined="<<SYS>>\n%s\n<</SYS>>\n\n",
        between="{bos}",
        stops=("[INST]",),
    ),
    Family("Mistral", "[INST] %s [/INST]", " %s{eos}", "", joined="%s\n\n", stops=("[INST]",)),
    Family("Mistral v3", "[INST] %s[/INST]", " %s{eos}", "", joined="%s\n\n", stops=("[INST]",)),
    _wrapped(
        "Gemma",
        "<start_of_turn>{role}\n%s<end_of_turn>\n",
        assistant="model",
        header="<start_of_turn>model\n",
        system=None,
        joined="%s\n\n",
    ),
    _wrapped("Phi-3", "<|{role}|>\n%s<|end|>\n", header="<|assistant|>\n"),
    Family(
        "Alpaca",
        "### Instruction:\n%s\n\n",
        "### Response:\n%s{eos}\n\n",
        "### Response:\n",
        system="%s\n\n",
        opening=_PREAMBLE,
        stops=("### Instruction:",),
    ),
    Family("plain", "%s", "%s{eos}", "", system="%s"),
)


def recognised(template: Template, *, bos: str, eos: str) -> tuple[Family, str] | None:
    """The family that renders like a template, and the system text that it puts where none is given ("": none)."""
    alone, turns = (_rendered(template, messages, bos) for messages in (_USER, _TURNS))
    ruled = _rendered(template, (*_SYSTEM, *_USER), bos)
    for family in (family.with_tokens(bos, eos, template.turn_end) for family in FAMILIES):
        default = _default_system(alone, family)
        rules = (Message("system", default),) if default else ()
        accepts = ruled is None or ruled == family.render((*_SYSTEM, *_USER))
        if accepts and (alone, turns) == (family.render((*rules, *_USER)), family.render((*rules, *_TURNS))):
            return family, default
    return None


def _default_system(alone: str | None, family: Family) -> str:
    found = _DEFAULT_SYSTEM.match(alone or "") if family.name == "ChatML" else None
    return "" if found is None else found[1]


def _rendered(template: Template, messages: Sequence[Message], bos: str) -> str | None:
    """A prompt without BOS; None where the template refuses such a conversation."""
    try:
        text = template.render_prompt(list(messages))
    except TemplateError:
        return None
    return text.removeprefix(bos) if bos else text


def modelfile(gguf: str, template: Template | None, *, bos: str, eos: str, context: int) -> tuple[str, str | None]:
    """The file's text for a GGUF file beside it, and the name of the template's family; None where it has no Go form.

    Without a template (`None`) prompts are raw text, and so is the Go form.
    """
    known = (
        (FAMILIES[-1].with_tokens(bos, eos, eos), "") if template is None else recognised(template, bos=bos, eos=eos)
    )
    lines = [f"FROM ./{gguf}"]
    stops = {eos} if template is None else {template.turn_end, eos}
    if known is not None:
        family, default = known
        lines.append(f'TEMPLATE """{family.in_go()}"""')
        stops.update(family.stops)
        if default:
            lines.append(f'SYSTEM """{default}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in sorted(filter(None, stops))]
    lines.append(f"PARAMETER num_ctx {min(context, MOST_CONTEXT)}")
    return "\n".join(lines) + "\n", None if known is None else known[0].name


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def next_steps(file: str, *, is_adapter: bool) -> list[str]:
    """How to run what was written, one line a program."""
    stem = file.removesuffix(".gguf")
    if is_adapter:
        return [f"llama.cpp: llama-cli -m BASE.gguf --lora {file}"]
    return [
        f"llama.cpp: llama-cli -m {file}",
        f"Ollama:    ollama create {stem.rpartition('/')[2].lower()} -f {stem}.Modelfile",
        f"LM Studio: lms import {file}",
    ]
