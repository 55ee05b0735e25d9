"""An adapter means the same wherever it was trained: in this project's engines and in PEFT."""

from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from tests.support import peft_loop
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_inference, open_training
from tests.support.tiny_models import VOCABULARY, make_model
from tests.support.trajectories import short_steps, walk, warm_rates

from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.core.types import FloatArray
from finetune.engines.registry import ENGINES, choose_engine

# PEFT 0.21 still asks transformers 5 for a property under its old name.
pytestmark = [
    pytest.mark.lora,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TRAINERS = [*ENGINES, "peft"]
BATCH = batch_of(random_rows(3, vocabulary=VOCABULARY, lengths=(12, 20)))
STEPS, RATES = short_steps(10), warm_rates(10, 2e-2)
RANK_2 = {  # the module of each model that gets another rank
    "llama": "layers.1.self_attn.q_proj",
    "phi3": "layers.1.self_attn.qkv_proj",
    "gemma3": "layers.1.self_attn.q_proj",
    "gpt2": "h.1.attn.c_attn",
}
TOLERANCE = 1e-4  # nats, float32; the libraries add in different orders


@pytest.fixture(scope="module", params=RANK_2)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_adapter_answers_alike_in_both_engines_and_in_peft(
    model: Path, tmp_path: Path, trainer: str, use_dora: bool
) -> None:
    lora = LoraConfig(rank=4, alpha=6, rank_pattern={RANK_2[model.name]: 2})
    if trainer == "peft":
        trained = peft_loop.with_peft(peft_loop.load(model), lora, use_dora=use_dora)
        peft_loop.train(trained, STEPS, TrainingConfig(), rates=RATES)
        trained.save_pretrained(tmp_path)
    else:
        engine = choose_engine(ModelConfig(name="any", backend=trainer))
        session = open_training(engine, model, lora=lora, method="dora" if use_dora else "lora")
        walk(session, STEPS, rates=RATES)
        session.save_weights(tmp_path)
    answers = {name: _by_engine(name, model, tmp_path) for name in ENGINES}
    expected = peft_loop.logprobs(PeftModel.from_pretrained(peft_loop.load(model), tmp_path).eval(), BATCH)
    for answer in answers.values():
        np.testing.assert_allclose(answer, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected - peft_loop.logprobs(peft_loop.load(model), BATCH)).max() > 0.05


def _by_engine(name: str, model: Path, adapter: Path) -> FloatArray:
    engine = choose_engine(ModelConfig(name="any", backend=name))
    return open_inference(engine, model, tuned=adapter).token_logprobs(BATCH, adapter="tuned")
