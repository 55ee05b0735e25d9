"""The registry of templates, and one of them rendered on an example."""

from dataclasses import dataclass

from finetune.core.errors import FinetuneError, UsageError
from finetune.data.rows import Message
from finetune.data.templates import TOKENIZER_TEMPLATE, Template, choose_template, named_template, registered_templates
from finetune.data.tokenizer import TextTokenizer, TokenizerSettings
from finetune.models.source import resolve_model

EXAMPLE = (
    Message("user", "What is the capital of Norway?"),
    Message("assistant", "Oslo."),
    Message("user", "And of Iceland?"),
    Message("assistant", "Reykjavík."),
)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What templates print of a tokenizer."""

    settings: TokenizerSettings
    special_tokens: frozenset[str]


# Stands in where no model is given: the tokens that the package's templates know.
USUAL_TOKENS = _Tokens(
    TokenizerSettings(bos_token="<s>", eos_token="</s>"),
    frozenset({"<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"}),
)


@dataclass(frozen=True, slots=True)
class ShownTemplate:
    """A template with its source, an example, a prompt, and what ends an answer."""

    name: str
    source: str
    rendered: str
    prompt: str
    turn_end: str


def list_templates() -> dict[str, str]:
    """Names with where each comes from."""
    return {name: path or "package" for name, path in registered_templates().items()}


def show_template(name: str, *, model: str | None) -> ShownTemplate:
    """A registered template, a .jinja file, or with a model `tokenizer`: the model's own."""
    template = _open(name, model)
    try:
        rendered = template.render(EXAMPLE)
    except FinetuneError:  # a template for single requests
        rendered = template.render(EXAMPLE[:2])
    return ShownTemplate(name, template.source, rendered, template.render_prompt(EXAMPLE[:1]), template.turn_end)


def _open(name: str, model: str | None) -> Template:
    if model is not None:
        return choose_template(name, TextTokenizer.open(resolve_model(model, weights=False).path))
    if name == TOKENIZER_TEMPLATE:
        raise UsageError("`tokenizer` is the template of a model. Say which: --model MODEL.")
    return named_template(name, USUAL_TOKENS)
