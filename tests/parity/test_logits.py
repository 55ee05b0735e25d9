"""Both engines give the distribution of transformers at every position, and the same text: for each architecture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import peft_loop
from tests.support.batches import batch_of, packed_batch, random_rows
from tests.support.decoding import decode
from tests.support.engines import open_inference
from tests.support.tiny_models import CONFIGS, VOCABULARY, WINDOW, WINDOWED, make_model

from finetune.core.types import Batch, GenerationRequest
from finetune.engines.base import Engine

ROWS = random_rows(5, vocabulary=VOCABULARY, lengths=(WINDOW + 1, 3 * WINDOW))
BATCHES: dict[str, Batch] = {
    "padded": batch_of(ROWS, prompt=2, pad=5),
    "packed": packed_batch([ROWS[:3], ROWS[3:]], prompt=2),  # the shorter pack has padding too
}
TOLERANCE = 1e-4  # nats, float32; the libraries add in different orders
NEW_TOKENS = 20


@pytest.fixture(scope="module", params=[*CONFIGS, *(kind for kind in WINDOWED if kind not in CONFIGS)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_distributions_are_those_of_transformers(engine: Engine, model: Path, batch: Batch) -> None:
    session = open_inference(engine, model)
    reference = peft_loop.load(model)
    expected = peft_loop.distributions(reference, batch)
    np.testing.assert_allclose(session.logprobs(batch), expected, rtol=0, atol=TOLERANCE)
    picked = peft_loop.logprobs(reference, batch)
    np.testing.assert_allclose(session.token_logprobs(batch), picked, rtol=0, atol=TOLERANCE)
    assert session.loss(batch).total == pytest.approx(-float(picked.sum()), rel=1e-5)
    assert expected.std() > 0.3  # a model that says nothing would agree with anything


def test_greedy_tokens_are_those_of_transformers(engine: Engine, model: Path) -> None:
    """A prompt and an answer that are both longer than the window."""
    prompt = tuple(int(token) for token in ROWS[0][: WINDOW + 1])
    reference = peft_loop.load(model)
    with torch.inference_mode():
        output = reference.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, eos_token_id=None, do_sample=False
        )
    [tokens] = decode(open_inference(engine, model).generator(), GenerationRequest(prompt, NEW_TOKENS))
    assert tokens == output[0, len(prompt) :].tolist()
