"""What a run is measured on: its validation rows and sample prompts, as the loop wants them."""

from collections.abc import Iterable, Iterator

from finetune.core.types import Batch
from finetune.data.batching import evaluation_batches
from finetune.engines.base import Generator
from finetune.generation.requests import AnswerOptions, Prompt, TextRequest, answer_all
from finetune.training.validation import SampleAnswer, Validation
from finetune.workflows.preparation import Preparation


def validation_of(prepared: Preparation) -> Validation | None:
    """None where no row is kept for validation."""
    if not prepared.data.validation:
        return None
    training, data, evaluated = prepared.config.training, prepared.data, prepared.evaluated

    def batches() -> Iterable[Batch]:
        return evaluation_batches(
            evaluated,
            max_rows=training.most_rows,
            max_tokens=training.max_batch_tokens,
            pad_id=prepared.tokenizer.pad_id,
            packing=bool(training.packing),
        )

    def answers(generator: Generator) -> Iterator[SampleAnswer]:
        outputs = answer_all(generator, requests, prepared.tokenizer)
        for sample, output in zip(samples, outputs, strict=True):
            yield SampleAnswer(sample.prompt, sample.expected, output.text)

    limit, room = prepared.source.context_length, prepared.config.output.sample_tokens
    samples = [sample for sample in data.samples if limit is None or len(sample.prompt_ids) + room <= limit]
    stop = data.template.stop_ids(prepared.tokenizer), data.template.stop_strings
    requests = [
        TextRequest(Prompt(sample.prompt, sample.prompt_ids, *stop), AnswerOptions(max_tokens=room))
        for sample in samples
    ]
    return Validation(batches, answers)
