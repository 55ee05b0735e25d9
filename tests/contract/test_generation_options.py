"""What a request may ask of sampling and of adapters, in a batch with others that do not ask for it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support.decoding import decode
from tests.support.subjects import Subject, finish, make_subject, prompt
from tests.support.tiny_models import VOCABULARY

from finetune.core.errors import ModelError, UsageError
from finetune.core.types import BoolArray, GenerationRequest, Sampling
from finetune.engines.base import Engine, InferenceSession


@pytest.fixture(scope="module")
def subject(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return make_subject(engine, tmp_path_factory.mktemp(f"options-{engine.name}"), "llama")


@pytest.fixture
def session(subject: Subject) -> Iterator[InferenceSession]:
    opened = subject.open()
    yield opened
    opened.close()


def alone(session: InferenceSession, request: GenerationRequest) -> list[int]:
    return decode(session.generator(), request)[0]


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
    subject: Subject, session: InferenceSession
) -> None:
    expected = {name: alone(session, GenerationRequest(prompt(6), 20, adapter=name)) for name in ("low", "high", None)}
    size = session.parameters
    generator = session.generator()
    numbers = {name: generator.add(GenerationRequest(prompt(6), 20, adapter=name)) for name in expected}
    events = [event for _ in range(4) for event in generator.step()]
    session.unload_adapter("high")  # its request goes on
    session.load_adapter("new", subject.adapters["dora"])
    numbers["new"] = generator.add(GenerationRequest(prompt(6), 20, adapter="new"))
    with pytest.raises(UsageError, match="No adapter is called 'high'"):
        generator.add(GenerationRequest(prompt(6), 20, adapter="high"))
    with pytest.raises(UsageError, match="called 'new' already"):
        session.load_adapter("new", subject.adapters["low"])
    events += finish(generator)
    expected["new"] = alone(session, GenerationRequest(prompt(6), 20, adapter="dora"))
    found = {name: [event.token for event in events if event.request == number] for name, number in numbers.items()}
    assert found == expected
    session.unload_adapter("new")
    session.load_adapter("high", subject.adapters["high"])
    assert session.parameters == size


def test_an_adapter_loaded_under_an_old_name_never_meets_the_prefixes_of_the_old_one(
    subject: Subject, session: InferenceSession
) -> None:
    request = GenerationRequest(prompt(20), 8, adapter="low")
    generator = session.generator()
    generator.add(request)
    generator.step()
    session.unload_adapter("low")  # under way: what it reads from here on is kept under no name
    session.load_adapter("low", subject.adapters["high"])
    finish(generator)
    assert alone(session, request) == alone(session, replace(request, adapter="high"))


def test_an_adapter_with_values_that_are_not_numbers_is_refused(
    subject: Subject, session: InferenceSession, tmp_path: Path
) -> None:
    """Its rows would be decoded beside those of others."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in subject.adapters["low"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = np.nan
    save_file(weights, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        session.load_adapter("broken", broken)
    assert alone(session, GenerationRequest(prompt(4), 3, adapter="low"))
