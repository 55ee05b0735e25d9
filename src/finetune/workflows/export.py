"""`ft export`: write a tuned model for other programs, load it again, and compare before it counts as done."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.adapters.naming import mlx_lm_names, require_alike
from finetune.adapters.store import read_adapter
from finetune.config.schema import ModelConfig
from finetune.core.errors import ModelError, UsageError
from finetune.core.paths import CHAT_TEMPLATE
from finetune.core.types import Batch
from finetune.data.batching import evaluation_batches
from finetune.engines.registry import choose_engine, load_packer
from finetune.export.card import model_card
from finetune.export.formats import (
    GGUF_FORMATS,
    ExportFormat,
    copy_model,
    is_quantised,
    stored_type,
    write_mlx,
    write_peft,
)
from finetune.export.verify import LARGEST_SHARE, Comparison, Scores, compare, scores
from finetune.models.source import read_config
from finetune.workflows.card import card_facts
from finetune.workflows.export_files import beside
from finetune.workflows.export_gguf import check_request, export_gguf, export_lora, outputs_of
from finetune.workflows.export_job import Base, ExportRequest, Job, find_job, probes
from finetune.workflows.opening import open_session, whole_model

OnNotice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was written, and how closely it answers like the original. `size` is in bytes."""

    output: Path
    format: ExportFormat
    base: str
    original: Path
    comparison: Comparison | None  # None where the base is not on this machine
    files: tuple[str, ...]
    size: int


def export(
    what: Path | str,
    *,
    format: ExportFormat,
    output: Path | str,
    model: str | None = None,
    checkpoint: str | None = None,
    scale: float | None = None,
    dequantize: bool = False,
    quantize: str | None = None,
    backend: str | None = None,
    on_notice: OnNotice = lambda _message: None,
) -> ExportResult:
    """Write the result of a run, or an adapter (a directory or a file of it), to `output`, which must be new or empty.

    The export is loaded again and its predictions are compared with the original's. Where they differ by more than
    rounding explains, or merging into quantised weights loses the tuning, ModelError is raised and nothing is left
    behind. Adapters whose base is not on this machine are converted without a comparison, and that is said.
    `scale` is for files of mlx-lm that do not say theirs; `dequantize` merges a quantised base into a float model.
    For GGUF `output` is a file, and `what` may be a model. `quantize` is one of its types, such as q8_0 or q4_k_m, or
    4bit or 8bit for a whole model in MLX's packed form.
    """
    output = Path(output)
    request = ExportRequest(Path(what), format, model, checkpoint, scale, dequantize, quantize, backend)
    if format in GGUF_FORMATS:
        return _one_file(request, output, on_notice)
    _check_output(output)
    with beside(output, "original") as scratch, beside(output, "export") as temporary:
        job = find_job(request, scratch, on_notice)
        temporary.mkdir(parents=True)
        if job.bits is None:
            _write(job, temporary, on_notice)
        else:
            _pack(job, job.bits, temporary)
        if job.is_whole and job.base is not None:
            _write_tokenizer(job.base, temporary)
        comparison = None if job.base is None else _compared(job, job.base, temporary, on_notice)
        facts = card_facts(
            job.subject, format=format, title=output.resolve().name, base=job.base_name, comparison=comparison
        )
        facts = replace(facts, packed=job.bits is not None)
        (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")
        temporary.rename(output.resolve())
    files = sorted(path for path in output.rglob("*") if path.is_file())
    names = tuple(path.relative_to(output).as_posix() for path in files)
    size = sum(path.stat().st_size for path in files)
    original = job.original if scale is None else request.what
    return ExportResult(output, format, job.base_name, original, comparison, names, size)


def _one_file(request: ExportRequest, output: Path, on_notice: OnNotice) -> ExportResult:
    """The exports as GGUF."""
    scheme = check_request(output, request.format, request.quantize)
    with beside(output, "original") as scratch:
        job = find_job(request, scratch, on_notice)
        if request.format == "gguf":
            comparison = export_gguf(job, output, scheme, on_notice)
        else:
            comparison = export_lora(job, output, on_notice)
    files = outputs_of(output, request.format)
    names, size = tuple(file.name for file in files), sum(file.stat().st_size for file in files)
    return ExportResult(output, request.format, job.base_name, request.what, comparison, names, size)


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"--output {output} exists and is not an empty directory. Choose a new one.")


def _write(job: Job, destination: Path, on_notice: OnNotice) -> None:
    """Fill `destination`, but for the card."""
    if job.subject.adapter is None:
        copy_model(job.original, destination)
    elif job.format == "peft":
        available = () if job.base is None else choose_engine(job.subject.model).module_paths(job.base.source.path)
        kind = "" if job.base is None else job.base.source.model_type
        write_peft(job.original, destination, base=job.base_name, available=available, model_type=kind)
    elif job.format == "mlx":
        names, layers = _mlx_names(job), None if job.base is None else _layers(job.base)
        for notice in write_mlx(job.original, destination, base=job.base_name, layers=layers, names=names):
            on_notice(notice)
    elif job.base is not None:
        _merge(job, job.base, destination, dequantize=job.dequantize)
    _write_template(job, destination)


def _merge(job: Job, base: Base, destination: Path, *, dequantize: bool) -> None:
    choose_engine(job.subject.model).merge(
        base.source.path,
        model_config=job.subject.model,
        adapter=job.original,
        destination=destination,
        dequantize=dequantize,
    )


def _pack(job: Job, bits: int, destination: Path) -> None:
    """Fill `destination` with the whole model in MLX's packed form; the merged one lies beside it meanwhile."""
    whole = job.original
    with beside(destination, "merged") as scratch:
        if job.subject.adapter is not None and job.base is not None:
            _merge(job, job.base, scratch, dequantize=is_quantised(job.base.source.config))
            whole = scratch
        load_packer()(whole, bits=bits, destination=destination)
    _write_template(job, destination)


def _mlx_names(job: Job) -> Mapping[str, str]:
    """The adapter's modules by the names that mlx-lm gives them."""
    modules = read_adapter(job.original).updates
    if job.base is None:
        require_alike(modules, "Give the base with --model.")
        return {}
    engine = choose_engine(job.subject.model)
    paths = engine.module_paths(job.base.source.path) if engine.name == "mlx" else None
    return mlx_lm_names(modules, model_type=job.base.source.model_type, paths=paths)


def _layers(base: Base) -> int:
    config = base.source.config
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(layers, int):
        raise ModelError("The base's config.json names no number of layers (num_hidden_layers), which mlx-lm needs.")
    return layers


def _write_template(job: Job, destination: Path) -> None:
    """The template of the prompts, where the base's tokenizer has another one or is not here."""
    beside = job.original / CHAT_TEMPLATE
    if job.base is not None:
        template = job.base.template
        if template is not None and template.source != job.base.tokenizer.chat_template:
            (destination / CHAT_TEMPLATE).write_text(template.source, encoding="utf-8")
    elif beside.is_file():
        shutil.copyfile(beside, destination / CHAT_TEMPLATE)


def _write_tokenizer(base: Base, destination: Path) -> None:
    """The tokenizer that was trained with, where the base has tokenizer.model alone, which others convert otherwise."""
    if (destination / "tokenizer.model").is_file() and not (destination / "tokenizer.json").exists():
        (destination / "tokenizer.json").write_text(base.tokenizer.to_json(), encoding="utf-8")


def _compared(job: Job, base: Base, exported: Path, on_notice: OnNotice) -> Comparison:
    """Score the probe rows with the base, the original, and what was written. Raises ModelError where it differs."""
    rows = probes(job.subject, base, on_notice)
    batches = list(evaluation_batches(rows, max_rows=1, max_tokens=None, pad_id=base.tokenizer.pad_id))
    config, whole = job.subject.model, whole_model(job.subject.model)
    adapters = {} if job.subject.adapter is None else {"original": job.original}
    if not job.is_whole:
        found = _score(config, base.source.path, batches, {**adapters, "exported": exported})
        stored_as, requantised = "float32", False
    else:
        found = _score(config, base.source.path, batches, adapters)
        if not adapters:
            found["original"] = _score(whole, job.original, batches, {})[None]
        found["exported"] = _score(_readable(whole, job), exported, batches, {})[None]
        stored_as = "float32" if not adapters else stored_type(exported)
        requantised = is_quantised(read_config(exported))
    comparison = compare(
        base=found[None],
        original=found["original"],
        exported=found["exported"],
        stored_as=stored_as,
        requantised=requantised,
    )
    _check(comparison, _MORE_BITS if job.bits is not None else _FLOAT)
    return comparison


def _readable(config: ModelConfig, job: Job) -> ModelConfig:
    """How to load what was written: only MLX reads its packed form."""
    return config if job.bits is None else config.model_copy(update={"backend": "mlx", "device": "auto"})


def _score(
    config: ModelConfig, model: Path, batches: Sequence[Batch], adapters: Mapping[str, Path]
) -> dict[str | None, Scores]:
    """Scores of a model alone (None) and with each adapter."""
    with open_session(config, model, adapters) as session:
        return {name: scores(session, batches, adapter=name) for name in (None, *adapters)}


_FLOAT = "Merge into a float model with --dequantize, or keep base and adapter apart (--format peft or mlx)."
_MORE_BITS = "Take 8bit, or write a float model with --format merged."


def _check(comparison: Comparison, cure: str) -> None:
    """Raises ModelError where the export does not answer like the original; `cure` is for what few bits lose."""
    if comparison.holds:
        return
    if comparison.tolerance is None:
        divergence = comparison.divergence
        raise ModelError(
            f"The tuning does not survive this merge: quantised again, the merged model is {divergence.exported:.2g} "
            f"nats a token away from the tuned one (KL divergence), and the untuned base {divergence.base:.2g}. "
            f"At most {LARGEST_SHARE:.0%} of that is allowed. Nothing was left there. {cure}"
        )
    raise ModelError(
        f"The export does not answer like the original: log-probabilities differ by up to "
        f"{comparison.largest_difference:.2g} nats on {comparison.tokens:,} tokens, and "
        f"{comparison.tolerance:.0e} is allowed ({comparison.reason}). Nothing was left there."
    )
