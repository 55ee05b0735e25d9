"""`ft dataset check`: what is suspicious about rows that are well formed."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import DataFile
from finetune.data import doctoring
from finetune.data.doctoring import Finding, Found
from finetune.data.load import load, means_for, open_files
from finetune.data.rendering import template_for
from finetune.data.rows import Example
from finetune.data.samples import LoadedExamples
from finetune.data.tokenizer import TextTokenizer
from finetune.models.source import resolve_model

ANY_RATE = 1.0  # rows that cannot be used are counted, whatever their share


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked for. `advice` says what it means and what to do about it."""

    name: str
    advice: str
    count: int
    findings: tuple[Finding, ...]  # the first ones, where only so many were asked for


@dataclass(frozen=True, slots=True)
class DataCheck:
    """Everything that was looked for, and the rows that no check saw because they cannot be used."""

    rows: int
    unusable: tuple[str, ...]
    checks: tuple[Check, ...]


def check_data(
    path: str,
    *,
    validation: str | None = None,
    model: str | None = None,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    most: int | None = None,
) -> DataCheck:
    """Look at the rows of a file or directory; with a model also at what its template and tokenizer make of them.

    Of each kind the first `most` findings are listed (None: all), and all are counted.

    Raises DataError, UsageError and ModelError for what cannot be read at all.
    """
    examples = _examples(path, columns or {})
    loaded = examples.loaded
    checks = [_check(name, advice, find(examples, most)) for name, advice, find in _ALWAYS]
    if validation is not None:
        held_out = _examples(validation, columns or {})
        checks.append(_check("in validation too", _LEAKS, doctoring.leaks(examples, held_out, most)))
    if model is not None:
        checks += _with_model(examples, model, template, most)
    return DataCheck(loaded.rows, tuple(str(problem) for problem in loaded.problems), tuple(checks))


def _examples(path: str, columns: Mapping[str, str]) -> LoadedExamples:
    means = means_for([path])
    sources = open_files([DataFile(path=path)])
    loaded = load(sources, columns=columns, encoder=None, means=means, max_error_rate=ANY_RATE)
    return LoadedExamples(loaded, columns)


def _with_model(examples: LoadedExamples, model: str, template: str | None, most: int | None) -> list[Check]:
    tokenizer = TextTokenizer.open(Path(resolve_model(model, weights=False).path))
    chosen = template_for(template, tokenizer, examples.loaded.kinds())
    return [
        _check("changed by the template", _MANGLED, doctoring.mangled(examples, chosen, most)),
        _check("changed by the tokenizer", _LOSSY, doctoring.lossy(examples, tokenizer, most)),
    ]


def _check(name: str, advice: str, found: Found) -> Check:
    return Check(name, advice, found.count, found.findings)


_LEAKS = (
    "These validation rows ask what is trained on, exactly or almost: the validation loss says less about new "
    "requests. Take them out of one of the two files."
)
_MANGLED = (
    "The template shows these messages otherwise than they are, or not at all: look with `ft dataset inspect`, and "
    "choose another data.template if the model should learn them as they are."
)
_LOSSY = "The model cannot read or write these characters as they are: another spelling, or another model, keeps them."
_ALWAYS: tuple[tuple[str, str, Callable[[Iterable[Example], int | None], Found]], ...] = (
    ("same request, both labels", "Decide for one label.", doctoring.both_labels),
    (
        "same request, different answers",
        "The model learns their mixture. That is right where several answers are good, and wrong where one is meant.",
        doctoring.different_answers,
    ),
    ("exact copies", "Training keeps one of each.", doctoring.exact_copies),
    (
        "near copies",
        "They count like different rows: the model sees this content more often than others. Keep one of each group.",
        doctoring.near_copies,
    ),
)
