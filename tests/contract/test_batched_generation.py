"""One batch of many lengths and adapters: each request gets what it gets alone, whoever joins, leaves or is cancelled.

Sums of a batch and of a row alone are rounded in another order: log-probabilities of float32 agree within 1e-4.
"""

import pkgutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.decoding import decode
from tests.support.subjects import Subject, finish, make_subject, prompt
from tests.support.tiny_models import CONFIGS, WINDOW, WINDOWED

from finetune.config.schema import ModelConfig
from finetune.core.errors import OutOfMemory
from finetune.core.types import GenerationRequest, Sampling
from finetune.engines.base import Engine, InferenceSession

KINDS = [*CONFIGS, *(kind for kind in WINDOWED if kind not in CONFIGS)]
every_kind = pytest.mark.parametrize("kind", KINDS, scope="module")
# One of each way to keep positions and windows.
some_kinds = pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2-windowed", "gpt2"], scope="module")
TOLERANCE = 1e-4


# Longer than WINDOW and than the part of a prompt that is read at once, and as short as one token.
REQUESTS = (
    GenerationRequest(prompt(5), 12, adapter="low"),
    GenerationRequest(prompt(1), 20),
    GenerationRequest(prompt(3 * WINDOW + 1), 7, adapter="high"),
    GenerationRequest(prompt(40), 15, adapter="dora"),
    GenerationRequest(prompt(WINDOW), 3, Sampling(repetition_penalty=1.5), adapter="low"),
    GenerationRequest(prompt(6), 10, Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=3), adapter="high"),
)


@pytest.fixture(scope="module")
def subject(engine: Engine, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject(engine, tmp_path_factory.mktemp(f"{kind}-{engine.name}"), kind)


@pytest.fixture(autouse=True)
def prompts_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 16)


def alone(session: InferenceSession, request: GenerationRequest) -> list[int]:
    return decode(session.generator(), request)[0]


@every_kind
def test_a_batch_of_lengths_and_adapters_gives_what_each_request_gives_alone(subject: Subject) -> None:
    together, single = subject.open(), subject.open()
    generator = together.generator()
    numbers = [generator.add(request) for request in REQUESTS]
    events = finish(generator)
    for number, request in zip(numbers, REQUESTS, strict=True):
        lone = single.generator()
        lone.add(request)
        expected = finish(lone)
        found = [event for event in events if event.request == number]
        assert [event.token for event in found] == [event.token for event in expected]
        np.testing.assert_allclose(
            [event.logprob for event in found], [event.logprob for event in expected], atol=TOLERANCE
        )


@some_kinds
def test_requests_join_while_others_decode_and_are_cancelled(subject: Subject) -> None:
    session = subject.open()
    expected = [alone(session, request) for request in REQUESTS]
    generator, events, numbers = subject.open().generator(), [], []
    for position, request in enumerate(REQUESTS):
        numbers.append(generator.add(request))
        events += [*generator.step(), *generator.step()]
        if position == 3:
            generator.cancel(numbers[1])
    events += finish(generator)
    found = [[event.token for event in events if event.request == number] for number in numbers]
    assert found[1] == expected[1][: len(found[1])]
    assert [tokens for row, tokens in enumerate(found) if row != 1] == [*expected[:1], *expected[2:]]


@pytest.mark.parametrize("kind", ["llama", "gemma2-windowed"], scope="module")
@pytest.mark.parametrize("seed", range(2))
def test_whoever_comes_and_goes_at_any_moment_of_a_step(subject: Subject, seed: int) -> None:
    """A step may be computed in parts, between which requests come, are cancelled and begin as others have begun."""
    random, single = np.random.default_rng(seed), subject.open()
    requests = [replace(request, prompt=prompt(len(request.prompt), seed)) for request in REQUESTS]
    requests += [replace(request, prompt=(*request.prompt, *prompt(4, seed))) for request in requests]
    generator, numbers, cancelled = subject.open().generator(), dict[int, GenerationRequest](), set[int]()
    events, waiting = [], [requests[place] for place in random.permutation(len(requests))]
    while waiting or generator.busy:
        if waiting and random.random() < 0.2:
            request = waiting.pop()
            numbers[generator.add(request)] = request
        if numbers and random.random() < 0.02:
            cancelled.add(number := int(random.choice(list(numbers))))
            generator.cancel(number)
        events += generator.step()
    for number, request in numbers.items():
        found, expected = [event.token for event in events if event.request == number], alone(single, request)
        assert found == (expected[: len(found)] if number in cancelled else expected), request


@some_kinds
def test_a_cached_prefix_changes_no_token(subject: Subject) -> None:
    """The next turn begins with what was read and said, another answer with a part of it."""
    session, fresh = subject.open(), subject.open()
    head = prompt(2 * WINDOW + 3, seed=1)
    for adapter in ("dora", None):
        first = GenerationRequest(head, 9, adapter=adapter)
        said = alone(session, first)
        for turn in (first, replace(first, prompt=(*head, *said, 7, 8, 9)), replace(first, prompt=(*head[:-4], 5, 6))):
            assert alone(session, turn) == decode(fresh.generator(), turn)[0], (adapter, turn)
        fresh = subject.open()


@some_kinds
def test_prompts_that_are_read_together_give_what_each_gives_alone(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 512)
    adapters = ("low", None, "dora", "high", "low")
    requests = [
        GenerationRequest(prompt(2 * WINDOW + row, seed=row), 8, adapter=adapter)
        for row, adapter in enumerate(adapters)
    ]
    together, single = subject.open(), subject.open()
    for _ in range(2):  # the second time with new prompts, and a generator that knows its model
        assert decode(together.generator(), *requests) == [alone(single, request) for request in requests]
        requests = [replace(request, prompt=request.prompt[::-1]) for request in requests]


@pytest.mark.parametrize("kind", ["llama"], scope="module")
def test_adapters_share_a_quantised_base(subject: Subject) -> None:
    """What a quantised base unpacks serves all rows, and each keeps its own adapter."""
    config = ModelConfig(name="base", dtype="float32", quantization="8bit")

    def opened() -> InferenceSession:
        return subject.engine.open_inference(subject.model, model_config=config, adapters=subject.adapters)

    session = opened()
    together = decode(opened().generator(), *REQUESTS)
    assert together == [alone(session, request) for request in REQUESTS]
    assert together != decode(subject.open().generator(), *REQUESTS)


PLACES = {
    "mlx": ("finetune.engines.mlx.generate.MLXRows._ends", "finetune.engines.mlx.generate.RowSampler.choose"),
    "pytorch": ("finetune.engines.torch.generate.TorchRows._run", "finetune.engines.torch.generate.choose"),
}


@pytest.mark.parametrize("kind", ["llama"], scope="module")
@pytest.mark.parametrize("place", [0, 1], ids=["reading", "choosing"])
@pytest.mark.parametrize("calls", [0, 4], ids=lambda calls: f"after-{calls}")
def test_where_memory_runs_out_in_a_step_the_next_generator_decodes_as_ever(
    subject: Subject, calls: int, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = subject.open()
    expected = [alone(subject.open(), request) for request in REQUESTS]
    failing, left = session.generator(), iter(range(calls))
    for request in REQUESTS:
        failing.add(request)

    with monkeypatch.context() as patch:
        name = PLACES[subject.engine.name][place]
        computed = pkgutil.resolve_name(name)

        def fails(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise MemoryError("no room for the next token")
            return computed(*arguments, **options)

        patch.setattr(name, fails)
        with pytest.raises(OutOfMemory, match="no room for the next token"):
            finish(failing)
    assert not failing.busy
    for number in range(len(REQUESTS)):
        failing.cancel(number)  # there is nothing left to cancel, and that is no error
    generator = session.generator()
    numbers = [generator.add(request) for request in REQUESTS]
    events = finish(generator)
    assert [[event.token for event in events if event.request == number] for number in numbers] == expected
