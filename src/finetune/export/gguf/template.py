"""The chat template as a GGUF file carries it: it has to say by itself what the rest of this package knows."""

import json

from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer
from finetune.export.gguf.tokenizer import TemplateFacts

_SPECIAL_TOKENS = "special_tokens"


def template_facts(template: Template | None, tokenizer: TextTokenizer) -> TemplateFacts:
    """What is written of the template; nothing where prompts are raw text."""
    if template is None:
        return TemplateFacts()
    end = template.turn_end
    turn_end = tokenizer.token_id(end) if end in tokenizer.special_tokens else None
    return TemplateFacts(portable_source(template), turn_end)


def portable_source(template: Template) -> str:
    """The template's text with the variables that only this package gives it written out.

    Those are the list of special tokens, and the header of an answer that some templates leave to the caller.
    """
    source = template.source
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
