"""`ft export`: write a tuned model for other programs, load it again, and compare before it counts as done."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import ModelConfig
from finetune.core.errors import FinetuneError, ModelError, UsageError
from finetune.core.files import temporary_beside
from finetune.core.paths import CHAT_TEMPLATE
from finetune.core.types import Batch, FloatArray
from finetune.data.batching import evaluation_batches
from finetune.data.rows import EncodedRow
from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer
from finetune.engines.registry import choose_engine
from finetune.export.card import CardFacts, model_card
from finetune.export.formats import ExportFormat, copy_model, stored_type, write_mlx, write_peft
from finetune.export.probes import PROBE_ROWS, probe_rows
from finetune.export.verify import Comparison, compare, logprobs
from finetune.models.source import ModelSource
from finetune.workflows.card import card_facts
from finetune.workflows.opening import find_template, open_session, resolve_base, whole_model
from finetune.workflows.rows import rows_of_run
from finetune.workflows.subjects import Subject, find_subject, is_run

OnNotice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written, and how closely it answers like the original. `size` is in bytes."""

    output: Path
    format: ExportFormat
    base: str
    original: Path
    comparison: Comparison
    files: tuple[str, ...]
    size: int


@dataclass(frozen=True, slots=True)
class _Job:
    """One export: what is written, and what it is compared with."""

    format: ExportFormat
    subject: Subject
    original: Path  # an adapter, or a whole model
    base: ModelSource
    tokenizer: TextTokenizer
    template: Template | None


def export(
    what: Path | str,
    *,
    format: ExportFormat,
    output: Path | str,
    model: str | None = None,
    checkpoint: str | None = None,
    on_notice: OnNotice = lambda _message: None,
) -> ExportResult:
    """Write the result of a run, or an adapter directory, to `output`, which must be new or empty.

    The export is loaded again and its log-probabilities are compared with the original's. Where they differ by
    more than rounding explains, ModelError is raised and nothing is left behind.
    """
    job, output = _job(Path(what), format, model, checkpoint), Path(output)
    _check_output(output)
    rows = _probes(job, on_notice)
    temporary = temporary_beside(output.resolve())
    try:
        temporary.mkdir(parents=True)
        _write(job, temporary)
        comparison = _compare(job, temporary, rows)
        _check(comparison)
        facts = _facts(job, output.resolve().name, comparison)
        (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")
        temporary.rename(output.resolve())
    except OSError as error:
        raise FinetuneError(
            f"{output} cannot be written: {error.strerror or error}. Nothing was left there."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = sorted(path for path in output.rglob("*") if path.is_file())
    names = tuple(path.relative_to(output).as_posix() for path in files)
    size = sum(path.stat().st_size for path in files)
    return ExportResult(output, format, job.subject.model.name, job.original, comparison, names, size)


def _job(what: Path, format: ExportFormat, model: str | None, checkpoint: str | None) -> _Job:
    if is_run(what):
        subject = find_subject(what, model=model, checkpoint=checkpoint)
    else:
        subject = find_subject(model=model, adapter=what, checkpoint=checkpoint)
    original = subject.adapter or subject.tuned_model
    if original is None:
        raise UsageError(f"{what} holds nothing that was tuned. Give a run or an adapter.")
    if subject.adapter is None and format != "merged":
        raise UsageError(f"--format {format}: this run tuned every weight and has no adapter. Use --format merged.")
    base = resolve_base(subject)
    tokenizer = TextTokenizer.open(base.path)
    template = find_template(subject, tokenizer, None, lambda _message: None)
    return _Job(format, subject, original, base, tokenizer, template)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output {output} exists and is not an empty directory. Choose a new one.")


def _probes(job: _Job, on_notice: OnNotice) -> list[EncodedRow]:
    """The run's own validation rows where they can be had, else built-in texts."""
    validation: Sequence[EncodedRow] = ()
    if job.subject.run is not None:
        try:
            validation = rows_of_run(job.subject.run, job.tokenizer, job.base, samples=0).rows[:PROBE_ROWS]
        except FinetuneError as error:
            on_notice(f"Compared on built-in texts, as the run's rows cannot be had: {error}")
    return probe_rows(validation, job.tokenizer)


def _write(job: _Job, destination: Path) -> None:
    """Fill `destination`, but for the card."""
    base = _portable_name(job.base)
    if job.subject.adapter is None:
        copy_model(job.original, destination)
    elif job.format == "peft":
        write_peft(job.original, destination, base=base)
    elif job.format == "mlx":
        paths = choose_engine(job.subject.model).module_paths(job.base.path)
        write_mlx(job.original, destination, base=base, model_config=job.base.config, paths=paths)
    else:
        engine = choose_engine(job.subject.model)
        engine.merge(job.base.path, model_config=job.subject.model, adapter=job.original, destination=destination)
    if job.template is not None and job.template.source != job.tokenizer.chat_template:
        (destination / CHAT_TEMPLATE).write_text(job.template.source, encoding="utf-8")


def _portable_name(base: ModelSource) -> str:
    """What another program finds the base by: the hub's name, or the directory's full path."""
    is_hub_name = not Path(base.name).expanduser().is_dir() and "/" in base.name
    return base.name if is_hub_name else str(base.path.resolve())


def _compare(job: _Job, exported: Path, rows: Sequence[EncodedRow]) -> Comparison:
    """Score the rows with the base, the original, and what was written."""
    batches = list(evaluation_batches(rows, max_rows=1, max_tokens=None, pad_id=job.tokenizer.pad_id))
    config, whole = job.subject.model, whole_model(job.subject.model)
    if job.format != "merged":
        both = {"original": job.original, "exported": exported}
        scores = _score(config, job.base.path, batches, both)
        return compare(base=scores[None], original=scores["original"], exported=scores["exported"], stored_as="float32")
    merged = _score(whole, exported, batches)[None]
    if job.subject.adapter is None:
        base = _score(config, job.base.path, batches)[None]
        original = _score(whole, job.original, batches)[None]
        return compare(base=base, original=original, exported=merged, stored_as="float32")
    scores = _score(config, job.base.path, batches, {"original": job.original})
    stored_as = stored_type(exported)
    return compare(base=scores[None], original=scores["original"], exported=merged, stored_as=stored_as)


def _score(
    config: ModelConfig, model: Path, batches: Sequence[Batch], adapters: Mapping[str, Path] | None = None
) -> dict[str | None, FloatArray]:
    """Log-probabilities of the batches by a model alone (None) and with each adapter."""
    with open_session(config, model, adapters) as session:
        return {name: logprobs(session, batches, adapter=name) for name in (None, *(adapters or {}))}


def _facts(job: _Job, title: str, comparison: Comparison) -> CardFacts:
    return card_facts(job.subject, format=job.format, title=title, base=_portable_name(job.base), comparison=comparison)


def _check(comparison: Comparison) -> None:
    if not comparison.holds:
        raise ModelError(
            f"The export does not answer like the original: log-probabilities differ by up to "
            f"{comparison.largest_difference:.2g} nats on {comparison.tokens:,} tokens, and "
            f"{comparison.tolerance:.0e} is allowed ({comparison.reason}). Nothing was left there."
        )
