"""What `ft export` is asked for: what was tuned, and its base where that is on this machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.adapters.peft import write_adapter
from finetune.adapters.store import is_adapter, named_base, read_adapter
from finetune.config.schema import ModelConfig
from finetune.core.errors import FinetuneError, ModelError, UsageError
from finetune.data.rows import EncodedRow
from finetune.data.templates import Template
from finetune.data.tokenizer import TextTokenizer
from finetune.export.formats import GGUF_FORMATS, ExportFormat, is_quantised
from finetune.export.probes import PROBE_ROWS, probe_rows
from finetune.models.source import ModelSource, find_directory
from finetune.workflows.opening import find_template, resolve_base
from finetune.workflows.rows import rows_of_run
from finetune.workflows.subjects import Subject, find_subject, is_run

OnNotice = Callable[[str], None]
_ADAPTERS: frozenset[ExportFormat] = frozenset({"peft", "mlx", "gguf-lora"})  # formats of an adapter alone
_MLX_BITS = {"4bit": 4, "8bit": 8}
_CONVERTED: frozenset[ExportFormat] = frozenset({"peft", "mlx"})  # formats that need no base


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """As a person gave it."""

    what: Path
    format: ExportFormat
    model: str | None = None
    checkpoint: str | None = None
    scale: float | None = None
    dequantize: bool = False
    quantize: str | None = None
    backend: str | None = None


@dataclass(frozen=True, slots=True)
class Base:
    """The base of an export, on this machine."""

    source: ModelSource
    tokenizer: TextTokenizer
    template: Template | None


@dataclass(frozen=True, slots=True)
class Job:
    """One export: what is written, and what it is compared with. Without a base, adapters are only converted."""

    format: ExportFormat
    subject: Subject
    original: Path  # an adapter, or a whole model
    base: Base | None
    dequantize: bool = False
    bits: int | None = None  # of MLX's files, into which the whole model is packed

    @property
    def is_whole(self) -> bool:
        """Whether a directory with a whole model is written, and not an adapter."""
        return self.format == "merged" or self.bits is not None

    @property
    def base_name(self) -> str:
        """What another program finds the base by: the hub's name, or the directory's full path."""
        if self.base is None:
            return self.subject.model.name
        source = self.base.source
        is_hub_name = not Path(source.name).expanduser().is_dir() and "/" in source.name
        return source.name if is_hub_name else str(source.path.resolve())


def find_job(request: ExportRequest, scratch: Path, on_notice: OnNotice) -> Job:
    """Find what is to be exported. With a `scale` the adapter is written to `scratch` first, as PEFT has it.

    Raises UsageError for what does not go together, ModelError for what is not there.
    """
    subject = _subject(request)
    original = subject.adapter or subject.tuned_model or _as_it_is(subject, request)
    if subject.adapter is None:
        _check_whole(request)
    else:
        original = _understood(subject.adapter, request.scale, scratch, on_notice)
    base = _base(subject, request, on_notice)
    _check_dequantize(request, base)
    if subject.adapter is not None:
        subject = replace(subject, adapter=original)
    return Job(request.format, subject, original, base, request.dequantize, _bits(request))


def _is_converted(request: ExportRequest) -> bool:
    """Whether an adapter is only written in another form, which takes no base."""
    return request.format in _CONVERTED and _bits(request) is None


def _bits(request: ExportRequest) -> int | None:
    """How many bits MLX's files shall have. Raises UsageError for another number, or another format."""
    wanted = request.quantize
    if wanted is None or request.format in GGUF_FORMATS:
        return None
    if request.format != "mlx":
        raise UsageError(f"--quantize {wanted} has no effect on --format {request.format}: use it with gguf or mlx.")
    if wanted not in _MLX_BITS:
        raise UsageError(f"--quantize {wanted}: MLX's files have {' or '.join(_MLX_BITS)} here.")
    return _MLX_BITS[wanted]


def _subject(request: ExportRequest) -> Subject:
    what, model, checkpoint = request.what, request.model, request.checkpoint
    if is_run(what):
        return find_subject(what, model=model, checkpoint=checkpoint, backend=request.backend)
    if request.format == "gguf" and not is_adapter(what) and model is None:
        return find_subject(model=str(what), checkpoint=checkpoint, backend=request.backend)
    nameless = model is None and checkpoint is None and is_adapter(what) and not named_base(what)
    if nameless and _is_converted(request):  # it can be converted without a base
        return Subject(ModelConfig(name=""), adapter=what)
    return find_subject(model=model, adapter=what, checkpoint=checkpoint, backend=request.backend)


def _as_it_is(subject: Subject, request: ExportRequest) -> Path:
    """A model that was not tuned here, for the formats that convert whole models."""
    if request.format != "gguf":
        raise UsageError(f"{request.what} holds nothing that was tuned. Give a run or an adapter.")
    return resolve_base(subject).path


def _check_whole(request: ExportRequest) -> None:
    if request.format in _ADAPTERS and _bits(request) is None:
        raise UsageError(
            f"--format {request.format}: this run tuned every weight and has no adapter. Use --format merged or gguf."
        )
    if request.scale is not None:
        raise UsageError(f"--scale {request.scale:g}: a whole model has no adapter to scale. Leave it out.")


def _understood(adapter: Path, scale: float | None, scratch: Path, on_notice: OnNotice) -> Path:
    """The adapter's place; with a scale that its files do not say, that of a copy that does."""
    read = read_adapter(adapter, scale=scale)
    for notice in read.notices:
        on_notice(notice)
    if scale is None:
        return adapter
    write_adapter(scratch, read)
    return scratch


def _base(subject: Subject, request: ExportRequest, on_notice: OnNotice) -> Base | None:
    if request.model is None and _is_converted(request) and not _is_here(subject.model.name):
        name = subject.model.name
        where = f"The base {name} is not on this machine" if name else "The adapter's files name no base"
        on_notice(f"{where}: the adapter is converted, and its predictions are not compared with the original's.")
        return None
    source = resolve_base(subject)
    tokenizer = TextTokenizer.open(source.path)
    return Base(source, tokenizer, find_template(subject, tokenizer, None, lambda _message: None))


def _is_here(name: str) -> bool:
    if not name:
        return False
    try:
        find_directory(name)
    except ModelError:
        return False
    return True


def _check_dequantize(request: ExportRequest, base: Base | None) -> None:
    if request.dequantize and request.format != "merged":
        why = "it starts from floating point values in any case"
        if request.format in _ADAPTERS and _bits(request) is None:
            why = f"--format {request.format} merges nothing"
        raise UsageError(f"--dequantize has no effect: {why}. Leave it out.")
    if request.dequantize and base is not None and not is_quantised(base.source.config):
        raise UsageError(f"--dequantize has no effect: {base.source.name} is not quantised. Leave it out.")


def probes(subject: Subject, base: Base, on_notice: OnNotice) -> list[EncodedRow]:
    """The run's own validation rows where they can be had, else built-in texts."""
    validation: Sequence[EncodedRow] = ()
    if subject.run is not None:
        try:
            validation = rows_of_run(subject.run, base.tokenizer, base.source, samples=0).rows[:PROBE_ROWS]
        except FinetuneError as error:
            on_notice(f"Compared on built-in texts, as the run's rows cannot be had: {error}")
    return probe_rows(validation, base.tokenizer)
