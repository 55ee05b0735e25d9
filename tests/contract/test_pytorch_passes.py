"""Which tokens the PyTorch engine reads in which pass, on the CPU. What comes out is every engine's contract."""

from pathlib import Path

import pytest
import torch
from tests.support.decoding import decode, next_events
from tests.support.engines import open_inference
from tests.support.tiny_models import VOCABULARY

from finetune.core.errors import OutOfMemory
from finetune.core.types import GenerationRequest
from finetune.engines.base import Generator
from finetune.engines.torch.cache import Cache
from finetune.engines.torch.engine import TorchEngine
from finetune.engines.torch.generate import TorchRows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU reads all prompts in one pass")


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Tokens that differ from those of other seeds from the first one on."""
    return tuple((seed * 31 + place * place) % (VOCABULARY - 5) + 5 for place in range(length))


@pytest.fixture
def generator(llama: Path) -> Generator:
    """One that has answered before: it knows what a token's keys and values take."""
    found = open_inference(TorchEngine(), llama).generator()
    found.add(GenerationRequest(prompt(5, seed=90), 1))
    while found.busy:
        found.step()
    return found


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> list[int]:
    """Tokens of each pass from now on."""
    tokens, run = list[int](), TorchRows._run

    def counted(self: TorchRows, step: object, before: object) -> object:
        tokens.append(len(step.tokens))  # type: ignore[attr-defined]
        return run(self, step, before)  # type: ignore[arg-type]

    monkeypatch.setattr(TorchRows, "_run", counted)
    return tokens


def test_long_prompts_that_come_together_are_read_one_after_the_other(generator: Generator, passes: list[int]) -> None:
    numbers = [generator.add(GenerationRequest(prompt(length, seed=length), 9)) for length in (120, 100, 110)]
    short, middle = numbers[1:]
    assert [{event.request for event in generator.step()} for _ in range(3)] == [{short}, {short, middle}, set(numbers)]
    assert passes == [100, 110 + 1, 120 + 2]  # rows that decode go on meanwhile


def test_short_prompts_that_come_together_are_read_in_one_pass(generator: Generator, passes: list[int]) -> None:
    numbers = {generator.add(GenerationRequest(prompt(20 + row, seed=row), 9)) for row in range(4)}
    assert {event.request for event in generator.step()} == numbers
    assert passes == [20 + 21 + 22 + 23]


def test_a_short_beginning_that_nobody_has_read_costs_no_pass(generator: Generator, passes: list[int]) -> None:
    head = prompt(10, seed=1)
    for row in range(3):
        generator.add(GenerationRequest((*head, *prompt(12, seed=2 + row)), 9))
    generator.step()
    assert passes == [3 * 22]


def test_a_long_beginning_is_read_once(generator: Generator, passes: list[int]) -> None:
    head = prompt(40, seed=1)
    for row in range(3):
        generator.add(GenerationRequest((*head, *prompt(12, seed=2 + row)), 9))
    generator.step()
    assert passes == [51, 1 + 12 + 12]  # the first prompt up to its last token, then what is left of all


def test_a_prompt_that_comes_in_the_middle_of_a_step_is_read_before_the_rest_of_it(
    generator: Generator, passes: list[int]
) -> None:
    others = {generator.add(GenerationRequest(prompt(9, seed=seed), 9)) for seed in (1, 2)}
    assert {event.request for event in next_events(generator)} == others
    assert not generator.step()  # a part of the next one
    new = generator.add(GenerationRequest(prompt(11, seed=3), 9))
    assert [event.request for event in generator.step()] == [new]
    assert {event.request for event in next_events(generator)} == others  # of the step that was half done
    assert {event.request for event in next_events(generator)} == {*others, new}
    assert passes == [9 + 9, 2, 11, 3]


def test_who_leaves_in_the_middle_of_a_step_has_read_what_the_step_makes_it_read(
    llama: Path, generator: Generator
) -> None:
    """What it has read is kept for a request that goes on from it, and the step goes on for the others."""
    fresh = open_inference(TorchEngine(), llama)
    requests = [GenerationRequest(prompt(9, seed=seed), 9) for seed in (1, 2, 3)]
    expected = decode(fresh.generator(), *requests)
    leaving, *others = [generator.add(request) for request in requests]
    events = [*next_events(generator), *next_events(generator)]
    assert not generator.step()
    generator.cancel(leaving)
    while generator.busy:
        events += generator.step()
    said = {number: [event.token for event in events if event.request == number] for number in (leaving, *others)}
    assert said == {leaving: expected[0][:2], others[0]: expected[1], others[1]: expected[2]}
    longer = GenerationRequest((*requests[0].prompt, *expected[0][:2], 7, 8), 9)
    assert decode(generator, longer) == decode(fresh.generator(), longer)


def test_memory_that_runs_out_for_the_keys_of_a_new_row_is_said(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(self: Cache, like: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    generator.add(GenerationRequest(prompt(9, seed=1), 9))
    next_events(generator)
    monkeypatch.setattr(Cache, "_empty", no_room)
    with pytest.raises(OutOfMemory):
        next_events(generator)


def test_a_step_that_is_given_up_half_done_leaves_the_model_as_it_was(llama: Path) -> None:
    session = open_inference(TorchEngine(), llama)
    request = GenerationRequest(prompt(9, seed=1), 9)
    expected = decode(session.generator(), request)
    given_up = session.generator()
    given_up.add(request)
    next_events(given_up)
    assert not given_up.step()
    del given_up
    assert decode(session.generator(), request) == expected
