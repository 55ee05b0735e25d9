"""The rows that a finished run was measured on, made again exactly, or those of another file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.config.schema import DataConfig
from finetune.core.errors import DataError
from finetune.data.prepare import prepare_data, prepare_evaluation
from finetune.data.rows import EncodedRow
from finetune.data.samples import Sample
from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer
from finetune.models.source import ModelSource
from finetune.workflows.subjects import Run

OnNotice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows to score and prompts to answer, and what they come from."""

    data: str
    rows: Sequence[EncodedRow]
    samples: tuple[Sample, ...]
    template: Template
    undesirable: Sequence[EncodedRow] = ()  # labelled so, and not among `rows`

    def first(self, limit: int | None) -> "HeldOut":
        """Only the first rows and prompts of each kind; None: all."""
        if limit is None:
            return self
        return replace(self, rows=self.rows[:limit], samples=self.samples[:limit], undesirable=self.undesirable[:limit])


def rows_of_run(
    run: Run, tokenizer: TextTokenizer, source: ModelSource, *, samples: int, template: str | None = None
) -> HeldOut:
    """The run's validation rows: the same split of the same files.

    Raises DataError where the run kept none, and where the files or what becomes of them has changed since; with
    another `template` only the files must be the same.
    """
    config = run.config.data if template is None else run.config.data.model_copy(update={"template": template})
    prepared = prepare_data(
        config,
        tokenizer=tokenizer,
        context_length=source.context_length,
        seed=run.config.training.seed,
        samples=samples,
    )
    _check_fingerprints(run, prepared.fingerprints, only_files=template is not None)
    if not prepared.validation:
        raise DataError(f"The run {run.paths.root} kept no rows for validation. Give a file with --data.")
    data = f"the validation rows of {run.paths.root}"
    return HeldOut(data, prepared.validation, prepared.samples, prepared.template)


def rows_of_file(
    path: Path,
    tokenizer: TextTokenizer,
    source: ModelSource,
    *,
    config: DataConfig | None,
    samples: int,
    template: str | None,
    on_notice: OnNotice,
) -> HeldOut:
    """All rows of a file, rendered and cut as `config`, that of a run, says; without one by the defaults."""
    config = config or DataConfig(train_file=str(path))
    if template is not None:
        config = config.model_copy(update={"template": template})
    prepared = prepare_evaluation(
        str(path),
        config,
        tokenizer=tokenizer,
        context_length=source.context_length,
        samples=samples,
        on_notice=on_notice,
    )
    undesirable: Sequence[EncodedRow] = ()
    if prepared.report.rows.undesirable:
        undesirable = _undesirable(path, tokenizer, source, config=config, others=prepared.rows)
    return HeldOut(str(path), prepared.rows, prepared.samples, prepared.template, undesirable)


def _undesirable(
    path: Path, tokenizer: TextTokenizer, source: ModelSource, *, config: DataConfig, others: Sequence[EncodedRow]
) -> list[EncodedRow]:
    """The rows that only `include_undesirable` brings in."""
    everything = prepare_evaluation(
        str(path),
        config.model_copy(update={"include_undesirable": True}),
        tokenizer=tokenizer,
        context_length=source.context_length,
        samples=0,
    )
    known = {row.origin for row in others}
    return [row for row in everything.rows if row.origin not in known]


def _check_fingerprints(run: Run, found: Mapping[str, Any], *, only_files: bool) -> None:
    """Refuse rows that are not those of the run: files that changed, or another tokenizer or template."""
    expected = run.info["data"]
    changed = [] if _hashes(expected) == _hashes(found) else ["a data file"]
    if not only_files:
        changed += [f"the {key}" for key in ("template", "tokenizer") if expected[key] != found[key]]
        if not changed and expected["sha256"] != found["sha256"]:
            changed.append("what becomes of the rows")
    if changed:
        raise DataError(
            f"The validation rows of {run.paths.root} cannot be made again, because {' and '.join(changed)} changed "
            "since the run. Give the rows to evaluate on with --data."
        )


def _hashes(fingerprints: Mapping[str, Any]) -> list[str]:
    return [file["sha256"] for file in fingerprints["files"]]
