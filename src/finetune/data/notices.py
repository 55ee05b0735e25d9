"""What a person should know about their data, in sentences. Nothing is left out, cut or inferred in silence."""

from collections.abc import Iterator, Mapping

from finetune.config.schema import DataConfig
from finetune.data.report import DataReport
from finetune.data.templates import TOKENIZER_TEMPLATE, Template

_SHOWN = 3
_SINGULAR = {"": "", "are": "is", "have": "has"}


def describe(
    report: DataReport,
    config: DataConfig,
    template: Template,
    unseen_roles: Mapping[str, int],
    *,
    leaks: int = 0,
) -> tuple[str, ...]:
    """The sentences, most general first. `leaks` counts validation rows whose request is also trained on."""
    sentences = [*_files(report), *_rows(report), *_lengths(report, config), *_template(config, template, unseen_roles)]
    if report.validation is not None:
        held_out = report.validation
        sentences += [f"Validation: {line}" for line in (*_files(held_out), *_rows(held_out))]
    if leaks:
        sentences.append(
            f"{_rows_of(leaks, 'have')} a request that is trained on too: the validation loss says less about new ones."
        )
    return tuple(sentences)


def _rows_of(count: int, verb: str = "") -> str:
    """`1 row is`, `2 rows are`."""
    noun = "row" if count == 1 else "rows"
    return f"{count:,} {noun} {verb if count != 1 else _SINGULAR[verb]}".rstrip()


def _files(report: DataReport) -> Iterator[str]:
    for file in report.files:
        extra = "" if file.encoding in {"UTF-8", "binary"} else f", {file.encoding}"
        yield f"{file.path}: {_rows_of(file.rows)}, {file.format}{extra}, {file.shape}."
        if file.unused_columns:
            columns = ", ".join(f"{name} ({count:,} rows)" for name, count in file.unused_columns.items())
            yield f"{file.path}: columns that are not used: {columns}."


def _rows(report: DataReport) -> Iterator[str]:
    rows = report.rows
    if rows.undesirable:
        yield (
            f"{_rows_of(rows.undesirable, 'are')} labelled undesirable and left out; "
            "data.include_undesirable=true trains on them too."
        )
    if rows.duplicates:
        both = f" ({rows.undesirable_duplicates:,} of them undesirable)" if rows.undesirable_duplicates else ""
        noun = "an exact duplicate" if rows.duplicates == 1 else "exact duplicates"
        yield f"{_rows_of(rows.duplicates, 'are')} {noun} of another{both}; one copy of each is kept."
    if report.conflicts:
        occur = "request occurs" if report.conflicts == 1 else "requests occur"
        yield f"{report.conflicts:,} {occur} with both labels."
    if report.problems:
        first = "; ".join(str(problem) for problem in report.problems[:_SHOWN])
        more = f"; and {len(report.problems) - _SHOWN:,} more" if len(report.problems) > _SHOWN else ""
        yield f"{_rows_of(len(report.problems))} dropped because they cannot be used: {first}{more}."
    for reason, count in report.dropped.items():
        if reason != "cannot be used":
            yield f"{_rows_of(count, 'are')} dropped: {reason}."
    if rows.truncated:
        yield f"{_rows_of(rows.truncated, 'are')} longer than {report.max_length:,} tokens and cut."


def _lengths(report: DataReport, config: DataConfig) -> Iterator[str]:
    lengths = report.lengths
    if lengths is None:
        return
    if config.max_length is None:
        source = "the longest row" if report.max_length == lengths.longest else "the model's context"
        yield f"data.max_length is {report.max_length:,} tokens: {source}."
        if lengths.recommended < report.max_length:
            yield (
                f"99 % of the rows have at most {lengths.p99:,} tokens: "
                f"data.max_length={lengths.recommended} would save memory."
            )
    elif lengths.longest * 2 <= config.max_length:
        yield f"data.max_length={config.max_length:,} has no effect: the longest row has {lengths.longest:,} tokens."


def _template(config: DataConfig, template: Template, unseen_roles: Mapping[str, int]) -> Iterator[str]:
    if config.template is None:
        own = template.name == TOKENIZER_TEMPLATE
        yield f"Template: {'the chat template of the tokenizer' if own else template.name} (data.template is not set)."
    elif template.stop_strings:
        yield (
            f"Template {template.name}: {template.turn_end!r} is no special token of this tokenizer; "
            f"an answer ends with it as text, then EOS."
        )
    for role, count in unseen_roles.items():
        yield f"Template {template.name} leaves out the {role} messages of {count:,} rows."
