"""What was written as GGUF, run in llama.cpp and compared with the tuned model; without llama.cpp, read back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.config.schema import ModelConfig
from finetune.core.errors import ModelError
from finetune.core.machine import free_memory
from finetune.core.types import Batch, Dtype, FloatArray
from finetune.data.batching import evaluation_batches
from finetune.data.rows import Message
from finetune.engines.registry import choose_engine
from finetune.export import llamacpp
from finetune.export.gguf.check import allowed, compare_running, largest_error, positions
from finetune.export.gguf.writer import ModelFile, write_model
from finetune.export.probes import TEXTS
from finetune.export.verify import LARGEST_SHARE, Comparison, thinned
from finetune.models.info import stored_dtype
from finetune.models.weights import read_weights
from finetune.workflows.export_job import Base, Job, probes
from finetune.workflows.opening import open_session, whole_model

OnNotice = Callable[[str], None]
_MOST_POSITIONS = 32
# Of a tensor that was read back, relative to its norm: half a step of its type.
_LARGEST_ERRORS = {"F32": 1e-6, "F16": 1e-3, "BF16": 5e-3}
_QUANTISED_ERROR = 0.5  # of two bits; a tensor that was mixed up has 1.4
_MISSING = "llama.cpp is not installed (`pip install 'finetune[llamacpp]'`)"


@dataclass(frozen=True, slots=True)
class _Truth:
    """What the tuned model and its base say at a few positions [positions, V], and the type they computed in."""

    tuned: FloatArray
    base: FloatArray
    batches: Sequence[Batch]
    computed_in: Dtype


def check_model(job: Job, base: Base, file: Path, content: ModelFile, on_notice: OnNotice) -> Comparison | None:
    """Compare a file with the tuned model. None where llama.cpp is not installed, and the file was only read back."""
    if not llamacpp.is_installed():
        _check_tensors(file, content, on_notice)
        return None
    truth = _truth(job, base)
    with llamacpp.serve(file) as server:
        comparison = _compared(server, truth, content)
        _compare_texts(server, base, on_notice)
    _judge(comparison, on_notice)
    return comparison


def check_adapter(
    job: Job, base: Base, file: Path, reference: tuple[Path, ModelFile | None], on_notice: OnNotice
) -> Comparison | None:
    """Let llama.cpp add an adapter to its base, and compare with the tuned model.

    `reference` is where the base is written for that, and what is written; None for a quantised one.
    """
    scratch, content = reference
    if not llamacpp.is_installed() or content is None:
        why = "its base is quantised" if llamacpp.is_installed() else _MISSING
        on_notice(f"The adapter was not run, as {why}.")
        return None
    scratch.mkdir(parents=True)
    write_model(scratch / "base.gguf", content)
    with llamacpp.serve(scratch / "base.gguf", lora=file) as server:
        comparison = _compared(server, _truth(job, base), content)
    _judge(comparison, on_notice)
    return comparison


def _compared(server: llamacpp.LlamaCpp, truth: _Truth, content: ModelFile) -> Comparison:
    gelu = "silu" not in content.shape.architecture.activations
    tolerance, reason = allowed(content.scheme, (truth.computed_in, content.rounded_to), gelu=gelu)
    places = list(positions(truth.batches))
    return compare_running(server, places, original=truth.tuned, base=truth.base, tolerance=tolerance, reason=reason)


def _truth(job: Job, base: Base) -> _Truth:
    rows = probes(job.subject, base, lambda _message: None)
    batches = list(evaluation_batches(rows, max_rows=1, max_tokens=None, pad_id=base.tokenizer.pad_id))
    few = [thinned(batch, max(1, _MOST_POSITIONS // len(batches))) for batch in batches]
    model = base.source.path if job.subject.adapter is not None else job.original
    config = _exact(job.subject.model, model)
    computed_in = choose_engine(config).compute_dtype(config, stored_dtype(model))
    if job.subject.adapter is not None:
        tuned, untuned = _scores(config, model, few, {"tuned": job.original})
    else:
        (tuned,) = _scores(whole_model(config), model, few, {})
        untuned = tuned if job.subject.tuned_model is None else _scores(config, base.source.path, few, {})[0]
    return _Truth(tuned, untuned, few, computed_in)


def _scores(config: ModelConfig, model: Path, batches: Sequence[Batch], adapters: dict[str, Path]) -> list[FloatArray]:
    """Log-probabilities with each adapter, and of the model alone."""
    with open_session(config, model, adapters) as session:
        return [
            np.concatenate([session.logprobs(batch, adapter=name) for batch in batches]) for name in (*adapters, None)
        ]


def _exact(config: ModelConfig, model: Path) -> ModelConfig:
    """The model in float32 where that fits into memory: rounded products would hide what the file itself changed."""
    size = 4 * sum(tensor.elements for tensor in read_weights(model))
    if config.quantization is not None or 2 * size > free_memory():
        return config
    return config.model_copy(update={"dtype": "float32"})


def _compare_texts(server: llamacpp.LlamaCpp, base: Base, on_notice: OnNotice) -> None:
    """Say where llama.cpp makes other tokens of a text, or another prompt of a conversation."""
    texts = list(TEXTS)
    if base.template is not None:
        prompt = base.template.render_prompt([Message("user", TEXTS[0])])
        texts.append(prompt)
        bos = base.tokenizer.settings.bos_token or ""
        theirs = server.render([{"role": "user", "content": TEXTS[0]}])
        if theirs.removeprefix(bos) != prompt.removeprefix(bos):
            on_notice("llama.cpp renders a conversation in another way than this template: compare `/apply-template`.")
    ours = [[int(token) for token in base.tokenizer.encode(text)[0]] for text in texts]
    other = [text for text, ids in zip(texts, ours, strict=True) if server.tokenize(text) != ids]
    if other:
        on_notice(f"llama.cpp makes other tokens of {len(other)} of {len(texts)} texts, e.g. of {other[0][:60]!r}.")


def _check_tensors(file: Path, content: ModelFile, on_notice: OnNotice) -> None:
    error, bound = largest_error(file, content), _LARGEST_ERRORS.get(content.scheme.base, _QUANTISED_ERROR)
    if error > bound:
        raise ModelError(
            f"The file does not hold the model's weights: read back, a tensor is {error:.1e} away from what it should "
            f"be, and {bound:.0e} is allowed. Nothing was left there."
        )
    on_notice(
        f"The file was read back: no tensor is more than {error:.1e} of its size away from the model's. "
        f"It was not run, as {_MISSING}."
    )


def _judge(comparison: Comparison, on_notice: OnNotice) -> None:
    limit, found = comparison.tolerance, comparison.largest_difference
    if limit is not None and found > limit:
        raise ModelError(
            f"llama.cpp does not answer like the original: log-probabilities differ by up to {found:.2g} nats on "
            f"{comparison.tokens:,} tokens, and {limit:.0e} is allowed ({comparison.reason}). Nothing was left there."
        )
    divergence = comparison.divergence
    if limit is None and divergence.base and divergence.share > LARGEST_SHARE:
        on_notice(
            f"The quantisation moves predictions by {divergence.share:.0%} of what tuning changed. "
            "Choose more bits where answers suffer: --quantize q8_0."
        )
