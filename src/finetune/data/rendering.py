"""Rows in the template that suits them, which is known for certain only when all of them are read."""

from collections.abc import Callable, Mapping, Sequence

from finetune.data.encoding import Encoder
from finetune.data.load import Means, first_kinds, load
from finetune.data.loaded import LoadedData, RowKinds
from finetune.data.readers import SourceFile
from finetune.data.templates import Template, choose_template
from finetune.data.tokenizer import TextTokenizer


def template_for(name: str | None, tokenizer: TextTokenizer, kinds: RowKinds) -> Template:
    """The named template; without a name the one that suits the rows: plain for text, else as `choose_template`."""
    if name is None and not kinds.conversations:
        return choose_template("plain", tokenizer)
    return choose_template(name, tokenizer, conversations=kinds.dialogues)


def load_in_template(
    sources: Sequence[tuple[SourceFile, float]],
    name: str | None,
    encoder: Callable[[Template], Encoder],
    *,
    tokenizer: TextTokenizer,
    columns: Mapping[str, str],
    means: Means,
    max_error_rate: float | None,
) -> tuple[LoadedData, Template]:
    """Load with the template that the first rows call for, and again where all rows call for another. As `load`."""
    template = template_for(name, tokenizer, first_kinds(sources, columns))
    while True:
        loaded = load(sources, columns=columns, encoder=encoder(template), means=means, max_error_rate=max_error_rate)
        suited = template_for(name, tokenizer, loaded.kinds())
        if suited.name == template.name:
            return loaded, suited
        template = suited
