"""`ft dataset check`: what is suspicious about rows that are well formed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import DataFile
from finetune.data import doctoring
from finetune.data.doctoring import Finding
from finetune.data.load import load_examples
from finetune.data.prepare import template_for
from finetune.data.rows import Example
from finetune.data.tokenizer import TextTokenizer
from finetune.models.source import resolve_model

ANY_RATE = 1.0  # rows that cannot be used are counted, whatever their share


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked for. `advice` says what it means and what to do about it."""

    name: str
    advice: str
    findings: tuple[Finding, ...]


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
) -> DataCheck:
    """Look at the rows of a file or directory; with a model also at what its template and tokenizer make of them.

    Raises DataError, UsageError and ModelError for what cannot be read at all.
    """
    loaded = load_examples([DataFile(path=path)], columns=columns or {}, max_error_rate=ANY_RATE)
    checks = [_check(name, advice, find(loaded.examples)) for name, advice, find in _ALWAYS]
    if validation is not None:
        held_out = load_examples([DataFile(path=validation)], columns=columns or {}, max_error_rate=ANY_RATE)
        checks.append(_check("in validation too", _LEAKS, doctoring.leaks(loaded.examples, held_out.examples)))
    if model is not None:
        checks += _with_model(loaded.examples, model, template)
    return DataCheck(loaded.rows, tuple(str(problem) for problem in loaded.problems), tuple(checks))


def _with_model(examples: Sequence[Example], model: str, template: str | None) -> list[Check]:
    tokenizer = TextTokenizer.open(Path(resolve_model(model, weights=False).path))
    chosen = template_for(template, tokenizer, examples)
    return [
        _check("changed by the template", _MANGLED, doctoring.mangled(examples, chosen)),
        _check("changed by the tokenizer", _LOSSY, doctoring.lossy(examples, tokenizer)),
    ]


def _check(name: str, advice: str, findings: Sequence[Finding]) -> Check:
    return Check(name, advice, tuple(findings))


_LEAKS = (
    "These validation rows ask what is trained on, exactly or almost: the validation loss says less about new "
    "requests. Take them out of one of the two files."
)
_MANGLED = (
    "The template shows these messages otherwise than they are, or not at all: look with `ft dataset inspect`, and "
    "choose another data.template if the model should learn them as they are."
)
_LOSSY = "The model cannot read or write these characters as they are: another spelling, or another model, keeps them."
_ALWAYS: tuple[tuple[str, str, Callable[[Sequence[Example]], list[Finding]]], ...] = (
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
