"""One batch of many lengths and adapters: each request gets what it gets alone, whoever joins, leaves or is cancelled.

Sums of a batch and of a row alone are rounded in another order: log-probabilities of float32 agree within 1e-4.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.decoding import decode
from tests.support.engines import open_inference
from tests.support.tiny_adapters import adapt
from tests.support.tiny_models import CONFIGS, VOCABULARY, WINDOW, WINDOWED, make_model

from finetune.core.errors import UsageError
from finetune.core.types import BoolArray, GenerationRequest, Sampling, TokenEvent
from finetune.engines.base import Engine, Generator, InferenceSession

KINDS = [*CONFIGS, *(kind for kind in WINDOWED if kind not in CONFIGS)]
TOLERANCE = 1e-4


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist())


# Longer than WINDOW and than the part of a prompt that is read at once, and as short as one token.
REQUESTS = (
    GenerationRequest(prompt(5), 12, adapter="low"),
    GenerationRequest(prompt(1), 20),
    GenerationRequest(prompt(3 * WINDOW + 1), 7, adapter="high"),
    GenerationRequest(prompt(40), 15, adapter="dora"),
    GenerationRequest(prompt(WINDOW), 3, Sampling(repetition_penalty=1.5), adapter="low"),
    GenerationRequest(prompt(6), 10, Sampling(temperature=0.8, top_p=0.9, top_k=50, seed=3), adapter="high"),
)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass
class Subject:
    """A model and three adapters of different kinds."""

    engine: Engine
    model: Path
    adapters: dict[str, Path]

    def open(self) -> InferenceSession:
        return open_inference(self.engine, self.model, **self.adapters)


def make_subject(engine: Engine, directory: Path, kind: str) -> Subject:
    model = make_model(directory / "model", kind)
    adapters = {
        "low": adapt(
            engine, model, directory / "low", rank=4, target_modules=["c_proj" if kind == "gpt2" else "o_proj"]
        ),
        "high": adapt(engine, model, directory / "high", rank=8),
        "dora": adapt(engine, model, directory / "dora", method="dora"),
    }
    return Subject(engine, model, adapters)


@pytest.fixture(scope="module")
def subject(engine: Engine, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject(engine, tmp_path_factory.mktemp(f"{kind}-{engine.name}"), kind)


@pytest.fixture(scope="module")
def llama_subject(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject(engine, tmp_path_factory.mktemp(f"one-{engine.name}"), "llama")


@pytest.fixture
def session(llama_subject: Subject) -> Iterator[InferenceSession]:
    opened = llama_subject.open()
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def prompts_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 16)


def finish(generator: Generator) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while generator.busy:
        events += generator.step()
    return events


def alone(session: InferenceSession, request: GenerationRequest) -> list[int]:
    return decode(session.generator(), request)[0]


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


def test_a_cached_prefix_changes_no_token(subject: Subject) -> None:
    """The next turn begins with what was read and said, another answer with a part of it."""
    session, fresh = subject.open(), subject.open()
    head = prompt(2 * WINDOW + 3, seed=1)
    for adapter in (None, "low", "dora", "low"):
        first = GenerationRequest(head, 9, adapter=adapter)
        said = alone(session, first)
        for turn in (first, replace(first, prompt=(*head, *said, 7, 8, 9)), replace(first, prompt=(*head[:-4], 5, 6))):
            assert alone(session, turn) == decode(fresh.generator(), turn)[0], (adapter, turn)
        fresh = subject.open()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_presence_and_frequency_penalties_count_the_answer_alone(session: InferenceSession, temperature: float) -> None:
    request = GenerationRequest(prompt(6), 30, Sampling(temperature=temperature, seed=1))
    plain = alone(session, request)
    assert len(set(plain)) < len(plain)
    for penalty in ({"presence_penalty": 1000.0}, {"frequency_penalty": 1000.0}):
        never_again = replace(request.sampling, **penalty)
        beside = replace(request, sampling=replace(request.sampling, repetition_penalty=1.3))
        said, _, other = decode(session.generator(), replace(request, sampling=never_again), beside, request)
        assert len(set(said)) == 30
        assert other == plain


def test_a_bias_adds_to_a_tokens_logit(session: InferenceSession) -> None:
    request = GenerationRequest(prompt(6), 4)
    biased = replace(request, sampling=Sampling(logit_bias=((9, 1000.0), (10, -1000.0))))
    tokens, plain = decode(session.generator(), biased, request)
    assert tokens == [9] * 4
    assert plain == alone(session, request)
    with pytest.raises(UsageError, match=f"logit_bias has token {VOCABULARY}"):
        session.generator().add(replace(request, sampling=Sampling(logit_bias=((VOCABULARY, 1.0),))))


def test_the_most_probable_tokens_come_with_their_log_probabilities(session: InferenceSession) -> None:
    generator = session.generator()
    number = generator.add(GenerationRequest(prompt(6), 5, top_logprobs=3))
    few = generator.add(GenerationRequest(prompt(4), 5, top_logprobs=1))
    none = generator.add(GenerationRequest(prompt(4), 5))
    events = finish(generator)
    for event in events:
        assert len(event.top) == {number: 3, few: 1, none: 0}[event.request]
        if event.top:
            assert event.top[0] == (event.token, pytest.approx(event.logprob, abs=1e-6))
            assert list(event.top) == sorted(event.top, key=lambda pair: -pair[1])


class Alternating:
    """Allows even tokens, then odd ones, in turn."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> BoolArray:
        return np.arange(VOCABULARY - 20) % 2 == len(self.seen) % 2

    def advance(self, token: int) -> None:
        self.seen.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_decides_which_tokens_may_come(session: InferenceSession, temperature: float) -> None:
    constraint = Alternating()
    sampling = Sampling(temperature=temperature, seed=2)
    free = GenerationRequest(prompt(7), 12, sampling, adapter="low")
    bound = GenerationRequest(prompt(6), 10, sampling, constraint=constraint)
    unbound, tokens = decode(session.generator(), free, bound)
    assert [token % 2 for token in tokens] == [0, 1] * 5
    assert max(tokens) < VOCABULARY - 20
    assert tokens == constraint.seen
    assert unbound == alone(session, free)


def test_adapters_come_and_go_while_requests_of_others_are_under_way(
    llama_subject: Subject, session: InferenceSession
) -> None:
    expected = {name: alone(session, GenerationRequest(prompt(6), 20, adapter=name)) for name in ("low", "high", None)}
    size = session.parameters
    generator = session.generator()
    numbers = {name: generator.add(GenerationRequest(prompt(6), 20, adapter=name)) for name in expected}
    events = [event for _ in range(4) for event in generator.step()]
    session.unload_adapter("high")  # its request goes on
    session.load_adapter("new", llama_subject.adapters["dora"])
    numbers["new"] = generator.add(GenerationRequest(prompt(6), 20, adapter="new"))
    with pytest.raises(UsageError, match="No adapter is called 'high'"):
        generator.add(GenerationRequest(prompt(6), 20, adapter="high"))
    with pytest.raises(UsageError, match="called 'new' already"):
        session.load_adapter("new", llama_subject.adapters["low"])
    events += finish(generator)
    expected["new"] = alone(session, GenerationRequest(prompt(6), 20, adapter="dora"))
    found = {name: [event.token for event in events if event.request == number] for name, number in numbers.items()}
    assert found == expected
    session.unload_adapter("new")
    session.load_adapter("high", llama_subject.adapters["high"])
    assert session.parameters == size


def test_an_adapter_loaded_under_an_old_name_never_meets_the_prefixes_of_the_old_one(
    llama_subject: Subject, session: InferenceSession
) -> None:
    request = GenerationRequest(prompt(20), 8, adapter="low")
    generator = session.generator()
    generator.add(request)
    generator.step()
    session.unload_adapter("low")  # under way: what it reads from here on is kept under no name
    session.load_adapter("low", llama_subject.adapters["high"])
    finish(generator)
    assert alone(session, request) == alone(session, replace(request, adapter="high"))


def test_an_adapter_with_values_that_are_not_numbers_is_refused(
    llama_subject: Subject, session: InferenceSession, tmp_path: Path
) -> None:
    """Its rows would be decoded beside those of others."""
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama_subject.adapters["low"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = np.nan
    save_file(weights, broken / "adapter_model.safetensors")
    from finetune.core.errors import ModelError

    with pytest.raises(ModelError, match="not finite"):
        session.load_adapter("broken", broken)
    assert alone(session, GenerationRequest(prompt(4), 3, adapter="low"))
