"""The chat template as a GGUF file carries it: it has to say by itself what the rest of this package knows."""

import json
import re

from finetune.data.sandbox import strftime_now
from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer
from finetune.export.gguf.tokenizer import TemplateFacts

_SPECIAL_TOKENS, _DAY = "special_tokens", "date_string"
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def template_facts(template: Template | None, tokenizer: TextTokenizer) -> TemplateFacts:
    """What is written of the template; nothing where prompts are raw text."""
    if template is None:
        return TemplateFacts()
    end = template.turn_end
    turn_end = tokenizer.token_id(end) if end in tokenizer.special_tokens else None
    return TemplateFacts(portable_source(template), turn_end)


def portable_source(template: Template) -> str:
    """The template's text with what only this package gives it written out.

    That is the list of special tokens, the header of an answer that some templates leave to the caller, and the date
    that training showed: a template that asks for the day would show another one every day.
    """
    source = _DATE.sub(lambda call: json.dumps(strftime_now(call[2])), template.source)
    if _DAY in source:  # llama.cpp gives this variable the day's date
        source = f"{{%- set {_DAY} = {json.dumps(strftime_now('%d %b %Y'))} -%}}\n{source}"
    if _SPECIAL_TOKENS in source:
        named = [token for token in sorted(template.special_tokens) if token in source]
        source = f"{{%- set {_SPECIAL_TOKENS} = {json.dumps(named, ensure_ascii=False)} -%}}\n{source}"
    missing = template.shape.missing_header
    if missing:
        header = json.dumps(missing, ensure_ascii=False)
        source += f"{{%- if add_generation_prompt -%}}{{{{- {header} -}}}}{{%- endif -%}}"
    return source


def opens_with_special(template: Template | None) -> bool:
    """Whether every prompt begins with a special token."""
    if template is None:
        return False
    from finetune.data.rows import Message

    prompt = template.render_prompt([Message("user", "a")])
    return prompt.startswith(tuple(template.special_tokens))
