"""Which rows MLX reads and decodes in one pass, and what happens where they cannot share one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.decoding import decode, next_events
from tests.support.engines import BASE, open_inference
from tests.support.subjects import prompt
from tests.support.tiny_models import CONFIGS, VOCABULARY, WINDOWED, make_model
from transformers import AutoModelForCausalLM, MambaConfig

from finetune.config.schema import ModelConfig
from finetune.core.types import GenerationRequest, Sampling
from finetune.engines.mlx.generate import make_generator
from finetune.engines.mlx.loading import load_base
from finetune.engines.mlx.resident import ResidentAdapters
from finetune.engines.mlx.sharing import rows_can_share
from finetune.engines.registry import choose_engine

REQUESTS = (
    GenerationRequest(prompt(9), 8),
    GenerationRequest(prompt(1), 5),
    GenerationRequest(prompt(9), 8, Sampling(temperature=1.0, seed=3)),
)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers keep a state, and no keys or values."""
    directory = tmp_path_factory.mktemp("models") / "mamba"
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_rows_of_another_kind_of_cache_are_decoded_one_by_one(mamba: Path) -> None:
    assert not rows_can_share(load_base(mamba, BASE))
    session = open_inference(choose_engine(ModelConfig(name="any", backend="mlx")), mamba)
    together = decode(session.generator(), *REQUESTS)
    assert together == [decode(session.generator(), request)[0] for request in REQUESTS]


@pytest.mark.parametrize("kind", sorted({*CONFIGS, *WINDOWED}))
def test_rows_of_every_proven_architecture_share_a_pass(kind: str, tmp_path: Path) -> None:
    assert rows_can_share(load_base(make_model(tmp_path, kind), BASE))


class RecordingModel(ResidentAdapters):
    """Remembers the shape of every pass."""

    def __init__(self, model: Path) -> None:
        base = load_base(model, BASE)
        self.shapes: list[tuple[int, ...]] = []
        super().__init__(replace(base, split=replace(base.split, body=self._recorded(base.split.body))), {})

    def _recorded(self, body: Any) -> Any:
        def recorded(inputs: Any, cache: Any = None) -> Any:
            self.shapes.append(tuple(inputs.shape))
            return body(inputs, cache=cache)

        return recorded


def shapes_of(model: RecordingModel, *requests: GenerationRequest) -> list[tuple[int, ...]]:
    generator = make_generator(model)
    decode(generator, GenerationRequest(prompt(3), 1))  # the size of a token is known from here on
    model.shapes.clear()
    decode(generator, *requests)
    return model.shapes


def test_short_prompts_are_read_in_one_pass_which_gives_their_first_tokens(llama: Path) -> None:
    requests = [GenerationRequest(prompt(length, seed=length), 3) for length in (20, 21, 19)]
    assert shapes_of(RecordingModel(llama), *requests) == [(3, 21), (3, 1), (3, 1)]


def test_prompts_of_very_different_lengths_are_read_apart(llama: Path) -> None:
    requests = [GenerationRequest(prompt(length, seed=length), 2) for length in (5, 61)]
    assert shapes_of(RecordingModel(llama), *requests) == [(1, 5), (1, 61), (2, 1)]


def test_prompts_behind_different_beginnings_that_are_known_are_read_in_one_pass(llama: Path) -> None:
    model, one, other = RecordingModel(llama), prompt(30, seed=1), prompt(17, seed=2)
    generator = make_generator(model)
    decode(generator, GenerationRequest(one, 1))
    decode(generator, GenerationRequest(other, 1))
    prompts = [(*one[:-1], *prompt(7, seed=3)), (*one[:-1], *prompt(8, seed=4)), (*other, *prompt(8, seed=5))]
    requests = [GenerationRequest(tokens, 6) for tokens in (*prompts, prompt(8, seed=6))]
    model.shapes.clear()
    found = decode(generator, *requests)
    assert model.shapes[0] == (4, 8)
    alone = ResidentAdapters(load_base(llama, BASE), {})
    assert found == [decode(make_generator(alone), request)[0] for request in requests]


def test_a_long_prompt_is_read_a_part_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 16)
    assert shapes_of(RecordingModel(llama), GenerationRequest(prompt(43), 1)) == [(1, 16), (1, 16), (1, 11)]


def test_the_first_token_of_a_new_row_comes_before_the_next_ones_of_the_others(llama: Path) -> None:
    model = RecordingModel(llama)
    generator = make_generator(model)
    others = [generator.add(GenerationRequest(prompt(9, seed=seed), 9)) for seed in (1, 2)]
    while next_events(generator):
        if len(model.shapes) > 3:
            break
    model.shapes.clear()
    new = generator.add(GenerationRequest(prompt(11, seed=3), 9))
    assert [event.request for event in next_events(generator)] == [new]
    assert model.shapes == [(1, 11)]
    assert {event.request for event in next_events(generator)} == {*others, new}


def test_a_prompt_that_comes_in_the_middle_of_a_step_is_read_before_the_rest_of_it(llama: Path) -> None:
    requests = [GenerationRequest(prompt(length, seed=length), 9) for length in (9, 10, 11)]
    model = ResidentAdapters(load_base(llama, BASE), {})
    expected = [decode(make_generator(model), request)[0] for request in requests]
    generator = make_generator(model)
    numbers = [generator.add(request) for request in requests[:2]]
    events = [*next_events(generator), *next_events(generator)]
    assert generator.step() == []  # the layers up to the middle
    numbers.append(generator.add(requests[2]))
    events += (first := next_events(generator))
    assert [event.request for event in first] == numbers[2:]
    while generator.busy:
        events += generator.step()
    assert [[event.token for event in events if event.request == number] for number in numbers] == expected


def test_prompts_that_keep_coming_do_not_stop_those_that_decode(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 16)
    generator = make_generator(ResidentAdapters(load_base(llama, BASE), {}))
    decoding = generator.add(GenerationRequest(prompt(3), 20))
    next_events(generator)
    waits = 0
    for seed in range(8):
        generator.add(GenerationRequest(prompt(11, seed=seed), 1))
        tokens = [event.request for event in next_events(generator)]
        waits = 0 if decoding in tokens else waits + 1
        assert waits <= 2  # prompts of 11 tokens, of which 16 may hold the others up
