"""Who is under way together, and whose prompt is read."""

from finetune.core.types import GenerationRequest
from finetune.engines.scheduling import Limits, Share, fits, next_share


def request(prompt: int, answer: int) -> GenerationRequest:
    return GenerationRequest(tuple(range(1, prompt + 1)), answer)


def test_rows_are_admitted_up_to_their_number_and_their_memory() -> None:
    active = [request(10, 10)] * 3
    assert fits(request(10, 10), active, Limits(rows=4))
    assert not fits(request(10, 10), active, Limits(rows=3))
    assert fits(request(10, 40), active, Limits(cache_tokens=200))
    assert not fits(request(10, 41), active, Limits(cache_tokens=200))  # 4 rows of 51


def test_a_request_alone_is_always_admitted() -> None:
    assert fits(request(500, 500), [], Limits(cache_tokens=10))


def test_a_step_reads_half_of_the_oldest_prompt_and_then_the_shortest() -> None:
    remaining = [1000, 300, 20]
    assert next_share(remaining, 512, first=True) == Share(0, 256)
    assert next_share(remaining, 256, first=False) == Share(2, 20)
    assert next_share(remaining[:2], 236, first=False) == Share(1, 236)


def test_a_prompt_alone_is_read_with_the_whole_step() -> None:
    assert next_share([1000], 512, first=True) == Share(0, 512)
    assert next_share([3], 512, first=True) == Share(0, 3)
