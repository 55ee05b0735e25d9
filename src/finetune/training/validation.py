"""What a run is measured on: the loss over all validation rows, and the model's own answers to a few prompts."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from finetune.core.types import Batch, LossSum
from finetune.engines.base import Generator, TrainSession
from finetune.training.signals import StopRequest


@dataclass(frozen=True, slots=True)
class SampleAnswer:
    """A validation prompt, the answer that the data expects, and the model's own."""

    prompt: str
    expected: str
    output: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """One complete evaluation."""

    loss: LossSum
    answers: tuple[SampleAnswer, ...]


@dataclass(frozen=True, slots=True)
class Validation:
    """The validation rows as batches, made anew for each evaluation, and the prompts to answer."""

    batches: Callable[[], Iterable[Batch]]
    answers: Callable[[Generator], Iterator[SampleAnswer]]

    def measure(self, session: TrainSession, stop: StopRequest) -> Measurement | None:
        """Loss and answers with the weights as they are; None where a stop was requested before the end.

        Half an evaluation is worth nothing: the checkpoint says that it is still due, and resuming does it.
        """
        total = LossSum(0.0, 0, 0)
        for batch in self.batches():
            if stop.requested:
                return None
            total += session.loss(batch)
        answers = []
        for answer in self.answers(session.generator()):
            answers.append(answer)
            if stop.requested:
                return None
        return None if stop.requested else Measurement(total, tuple(answers))
