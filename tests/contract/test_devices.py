"""Where an engine computes, and how fast."""

from pathlib import Path

import pytest
from tests.support.batches import batch_of, random_rows
from tests.support.tiny_models import VOCABULARY

from finetune.config.schema import ModelConfig
from finetune.core.errors import UsageError
from finetune.engines.base import Engine

BATCH = batch_of(random_rows(2, vocabulary=VOCABULARY))
GPUS = ("cuda", "metal")


def missing(engine: Engine) -> list[str]:
    return [name for name in GPUS if engine.hardware_problems(ModelConfig(name="x", device=name))]


def test_a_gpu_that_is_missing_is_named_before_loading_and_refused_on_loading(engine: Engine, llama: Path) -> None:
    absent = missing(engine)
    assert absent  # no machine has both
    for name in absent:
        config = ModelConfig(name="x", device=name)
        assert engine.hardware_problems(config)[0].startswith(f"model.device={name}: ")
        with pytest.raises(UsageError, match=r"Use model\.device=cpu, or leave it out\."):
            engine.open_inference(llama, model_config=config, adapters={})


def test_the_cpu_is_always_there_and_computes_what_the_default_does(engine: Engine, llama: Path) -> None:
    on_cpu = ModelConfig(name="x", device="cpu", dtype="float32")
    assert not engine.hardware_problems(on_cpu)
    losses = [
        engine.open_inference(llama, model_config=config, adapters={}).loss(BATCH).mean
        for config in (on_cpu, on_cpu.model_copy(update={"device": "auto"}))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # a GPU adds in another order


def test_the_rate_of_products_is_that_of_a_machine_of_this_century(engine: Engine) -> None:
    assert 1e8 < engine.matmul_rate("float32") < 1e16
