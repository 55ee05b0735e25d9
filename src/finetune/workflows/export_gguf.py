"""`ft export --format gguf` and `gguf-lora`: one file for llama.cpp, Ollama and LM Studio, checked in llama.cpp."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.adapters.adapter import Adapter
from finetune.adapters.store import read_adapter
from finetune.core.errors import ModelError, UsageError
from finetune.core.types import Dtype
from finetune.engines.registry import choose_engine
from finetune.export.formats import is_quantised
from finetune.export.gguf.architectures import read_shape, window_notice
from finetune.export.gguf.lora import lora_tensors, write_lora
from finetune.export.gguf.quantize import SCHEMES, Scheme, find_scheme, stored_bytes
from finetune.export.gguf.template import opens_with_special, template_facts
from finetune.export.gguf.tensors import plan_tensors
from finetune.export.gguf.tokenizer import read_vocabulary
from finetune.export.gguf.writer import ModelFile, require_package, write_model
from finetune.export.ollama import modelfile
from finetune.export.verify import Comparison
from finetune.models.info import stored_dtype
from finetune.models.source import read_config
from finetune.workflows.export_files import beside, move_all, require_free, require_space
from finetune.workflows.export_gguf_check import check_adapter, check_model
from finetune.workflows.export_job import Base, Job

OnNotice = Callable[[str], None]
SUFFIX = ".gguf"
_BY_TYPE = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Source:
    """The floating point files that are converted, and the adapter that is added to them on the way."""

    directory: Path
    adapter: Adapter | None = None
    rounded_to: Dtype = "float32"  # by a merge that came before


def check_request(output: Path, format: str, quantize: str | None) -> Scheme | None:
    """Everything about a request that can be wrong before a model is looked at. None: the type of the files.

    Raises UsageError.
    """
    require_package()
    if output.suffix != SUFFIX or output.is_dir():
        raise UsageError(f"--output {output}: --format {format} writes one file. Give it a name that ends in {SUFFIX}.")
    require_free(outputs_of(output, format))
    if quantize is not None and format != "gguf":
        raise UsageError(f"--quantize {quantize} has no effect: an adapter stays float32. Leave it out.")
    return None if quantize is None else find_scheme(quantize)


def outputs_of(output: Path, format: str) -> list[Path]:
    """The files that an export writes."""
    return [output, output.with_suffix(".Modelfile")] if format == "gguf" else [output]


def export_gguf(job: Job, output: Path, scheme: Scheme | None, on_notice: OnNotice) -> Comparison | None:
    """Write a whole model and its Modelfile. Raises ModelError where the file does not answer like the model."""
    base = _required(job)
    with beside(output, "merged") as merged, beside(output, "export") as temporary:
        content = _content(base, _source(job, base, merged), output.stem, scheme)
        _say(content, on_notice)
        require_space(output, _size(content))
        temporary.mkdir(parents=True)
        files = [(temporary / path.name, path) for path in outputs_of(output, "gguf")]
        write_model(files[0][0], content)
        files[1][0].write_text(_modelfile(output.name, base, content, on_notice), encoding="utf-8")
        comparison = check_model(job, base, files[0][0], content, on_notice)
        move_all(files)
    return comparison


def export_lora(job: Job, output: Path, on_notice: OnNotice) -> Comparison | None:
    """Write an adapter alone. Raises ModelError where base and adapter together do not answer like the tuned model."""
    base = _required(job)
    shape, adapter = read_shape(base.source.path), read_adapter(job.original)
    tensors, _alpha = lora_tensors(adapter, shape)
    with beside(output, "base") as scratch, beside(output, "export") as temporary:
        plan_tensors(base.source.path, shape, adapter)  # refuses an adapter that is not this base's
        require_space(output, sum(4 * int(np.prod(tensor.shape)) for tensor in tensors))
        temporary.mkdir(parents=True)
        file = temporary / output.name
        write_lora(file, adapter, shape, name=output.stem)
        content = None if is_quantised(base.source.config) else _content(base, Source(base.source.path), "base", None)
        comparison = check_adapter(job, base, file, (scratch, content), on_notice)
        move_all([(file, output)])
    return comparison


def _required(job: Job) -> Base:
    if job.base is None:
        raise UsageError("GGUF needs the base model on this machine. Give it with --model.")
    return job.base


def _source(job: Job, base: Base, scratch: Path) -> Source:
    """What is converted. A base that was trained on in few bits is merged by its engine: only that knows its values."""
    if job.subject.adapter is None:
        return Source(job.original)
    quantised = is_quantised(base.source.config)
    if not quantised and job.subject.model.quantization is None:
        return Source(base.source.path, read_adapter(job.original))
    choose_engine(job.subject.model).merge(
        base.source.path,
        model_config=job.subject.model,
        adapter=job.original,
        destination=scratch,
        dequantize=quantised,
    )
    return Source(scratch, rounded_to=stored_dtype(scratch))


def _content(base: Base, source: Source, name: str, scheme: Scheme | None) -> ModelFile:
    if is_quantised(read_config(source.directory)):
        raise ModelError(
            f"{source.directory} holds quantised weights, which GGUF has other forms for. Export the model from before "
            "its quantisation."
        )
    shape = read_shape(source.directory)
    plan = plan_tensors(source.directory, shape, source.adapter)
    opens = opens_with_special(base.template)
    return ModelFile(
        name=name,
        shape=shape,
        plan=plan,
        scheme=scheme or SCHEMES[_BY_TYPE[stored_dtype(source.directory)]],
        tokenizer=base.tokenizer,
        vocabulary=read_vocabulary(base.source.path, base.tokenizer, plan.vocabulary, opens_special=opens),
        template=template_facts(base.template, base.tokenizer),
        rounded_to=source.rounded_to,
    )


def _say(content: ModelFile, on_notice: OnNotice) -> None:
    notices = (*content.plan.notices, *content.vocabulary.notices, window_notice(content.shape), _narrow(content))
    for notice in notices:
        if notice is not None:
            on_notice(notice)


def _narrow(content: ModelFile) -> str | None:
    """What to say of rows that the blocks of a K-quant do not divide."""
    kinds = [kind for kind, tensor in zip(content.types(), content.plan.tensors, strict=True) if len(tensor.shape) > 1]
    others = [kind for kind in kinds if not kind.endswith("_K")]
    if not content.scheme.needs_llamacpp or not others:
        return None
    return (
        f"{len(others)} of {len(kinds)} matrices have rows that are no whole number of blocks of 256 and are written "
        f"as {', '.join(sorted(set(others)))}, as llama.cpp does."
    )


def _size(content: ModelFile) -> int:
    sizes = zip(content.types(), content.plan.tensors, strict=True)
    return sum(stored_bytes(kind, tensor.shape) for kind, tensor in sizes)


def _modelfile(gguf: str, base: Base, content: ModelFile, on_notice: OnNotice) -> str:
    settings = base.tokenizer.settings
    text, family = modelfile(
        gguf,
        base.template,
        bos=settings.bos_token or "",
        eos=settings.eos_token or "",
        context=content.shape.context,
    )
    if family is None:
        on_notice(
            "The chat template has no known form for Ollama: the Modelfile leaves it out, and Ollama reads the one in "
            "the GGUF file where it can. Compare an answer before you rely on it."
        )
    return text
