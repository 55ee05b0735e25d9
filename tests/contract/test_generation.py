"""Decoding: greedy text of a real model, sampling that depends on nothing but the request, log-probabilities."""

from pathlib import Path

import numpy as np
import pytest
from tests.support.batches import batch_of, random_rows
from tests.support.decoding import decode, next_events
from tests.support.engines import open_inference, open_training
from tests.support.tiny_models import VOCABULARY
from transformers import AutoTokenizer

from finetune.config.schema import LoraConfig
from finetune.core.errors import UsageError
from finetune.core.types import Batch, GenerationRequest, Sampling
from finetune.engines.base import Engine

PROMPT = tuple(range(10, 20))


def test_greedy_text_of_stories260k_is_the_published_one(engine: Engine, shared: Path) -> None:
    model = shared / "models/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(model)
    [tokens] = decode(open_inference(engine, model).generator(), GenerationRequest((tokenizer.bos_token_id,), 256))
    text = " ".join(tokenizer.decode(tokens).split())
    published = " ".join((model / "stories260K.md").read_text().split())
    assert text in published
    assert text.startswith("Once upon a time")
    assert text.endswith("We can help you.")


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.02, repetition_penalty=1.2, seed=5),
    ],
    ids=["plain", "all filters"],
)
def test_sampled_tokens_do_not_depend_on_other_requests(engine: Engine, llama: Path, sampling: Sampling) -> None:
    session = open_inference(engine, llama)
    request = GenerationRequest(PROMPT, 12, sampling)
    other = GenerationRequest(PROMPT[:3], 30, Sampling(temperature=1.0, seed=9))
    [alone] = decode(session.generator(), request)
    _, together = decode(session.generator(), other, request)
    assert together == alone
    [changed] = decode(session.generator(), GenerationRequest(PROMPT, 12, Sampling(temperature=1.0, seed=6)))
    assert changed != alone


def test_every_token_is_drawn_anew(engine: Engine, llama: Path) -> None:
    """At an enormous temperature all tokens are equally likely: one draw repeated would give one token."""
    generator = open_inference(engine, llama).generator()
    [tokens] = decode(generator, GenerationRequest(PROMPT, 20, Sampling(temperature=1e6)))
    assert len(set(tokens)) > 10


def test_requests_of_different_adapters_run_together(engine: Engine, llama: Path, tmp_path: Path) -> None:
    batch = batch_of(random_rows(4, vocabulary=VOCABULARY))
    for name, seed in (("one", 1), ("two", 2)):
        trained = open_training(engine, llama, lora=LoraConfig(rank=4, dropout=0.3), seed=seed)
        for _ in range(5):
            trained.step([batch], learning_rate=5e-2)
        trained.save_weights(tmp_path / name)
    session = open_inference(engine, llama, one=tmp_path / "one", two=tmp_path / "two")
    requests = [GenerationRequest(PROMPT, 8, adapter=adapter) for adapter in (None, "one", "two")]
    together = decode(session.generator(), *requests)
    assert together == [decode(session.generator(), request)[0] for request in requests]
    assert len({tuple(tokens) for tokens in together}) == 3


def test_a_training_session_decodes_with_its_present_weights(engine: Engine, llama: Path) -> None:
    row = random_rows(1, vocabulary=VOCABULARY, lengths=(16, 16))[0]
    session = open_training(engine, llama)
    request = GenerationRequest(tuple(int(token) for token in row[:4]), 12)
    before = decode(session.generator(), request)
    for _ in range(60):
        session.step([batch_of([row])], learning_rate=2e-2)
    [learnt] = decode(session.generator(), request)
    assert before != [learnt]
    assert learnt == row[4:16].tolist()


def test_log_probabilities_of_tokens_are_those_of_scoring(engine: Engine, llama: Path) -> None:
    session = open_inference(engine, llama)
    generator = session.generator()
    generator.add(GenerationRequest(PROMPT, 6))
    events = []
    while generator.busy:
        events += generator.step()
    row = np.array([*PROMPT, *(event.token for event in events)], np.int32)
    batch: Batch = batch_of([row], prompt=len(PROMPT) - 1)
    expected = session.token_logprobs(batch)[batch.loss_mask]
    np.testing.assert_allclose([event.logprob for event in events], expected, atol=1e-4)
    assert [event.finish_reason for event in events] == [None] * 5 + ["length"]


def test_a_long_prompt_is_read_in_parts_with_the_same_result(
    engine: Engine, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_inference(engine, llama)
    request = GenerationRequest(tuple(range(5, 60)), 6)
    whole = decode(session.generator(), request)
    monkeypatch.setattr("finetune.engines.decoding.PREFILL_TOKENS", 16)
    assert decode(session.generator(), request) == whole


def test_stop_tokens_end_a_request_and_are_not_returned(engine: Engine, llama: Path) -> None:
    session = open_inference(engine, llama)
    [tokens] = decode(session.generator(), GenerationRequest(PROMPT, 8))
    generator = session.generator()
    generator.add(GenerationRequest(PROMPT, 8, stop_tokens=frozenset({tokens[3]})))
    events = []
    while generator.busy:
        events += generator.step()
    first = tokens.index(tokens[3])
    assert [event.token for event in events] == [*tokens[:first], None]
    assert events[-1].finish_reason == "stop"


def test_a_cancelled_request_is_never_mentioned_again(engine: Engine, llama: Path) -> None:
    generator = open_inference(engine, llama).generator()
    kept, dropped = generator.add(GenerationRequest(PROMPT, 4)), generator.add(GenerationRequest(PROMPT, 4))
    next_events(generator)
    generator.cancel(dropped)
    seen = []
    while generator.busy:
        seen += [event.request for event in generator.step()]
    assert seen == [kept] * 3


def test_requests_that_make_no_sense_are_refused(engine: Engine, llama: Path) -> None:
    generator = open_inference(engine, llama).generator()
    with pytest.raises(UsageError, match="no tokens"):
        generator.add(GenerationRequest((), 4))
    with pytest.raises(UsageError, match=f"token {VOCABULARY}, and the model knows 0 to {VOCABULARY - 1}"):
        generator.add(GenerationRequest((5, VOCABULARY), 4))
    with pytest.raises(UsageError, match="max_tokens = 0"):
        generator.add(GenerationRequest(PROMPT, 0))
    with pytest.raises(UsageError, match="No adapter is called 'x'"):
        generator.add(GenerationRequest(PROMPT, 4, adapter="x"))
