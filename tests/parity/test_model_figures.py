"""What is counted from file headers is what an engine counts once it has loaded the model."""

from pathlib import Path

import pytest

from finetune.adapters.lora import seeded_init
from finetune.config.schema import LoraConfig, ModelConfig, TrainingConfig
from finetune.engines.registry import choose_engine
from finetune.models.info import describe_model
from finetune.models.source import resolve_model


@pytest.mark.parametrize("rank", [1, 16])
def test_headers_give_the_engines_parameter_counts(shared: Path, rank: int) -> None:
    path = shared / "models" / "stories260K"
    model = ModelConfig(name=str(path))
    info = describe_model(resolve_model(str(path)))

    session = choose_engine(model).open_training(
        path, model_config=model, training=TrainingConfig(), lora=LoraConfig(rank=rank), init=seeded_init(0)
    )
    counted = session.parameters
    session.close()

    assert counted.trainable == info.lora_parameters(rank)
    assert counted.total == info.parameters + info.lora_parameters(rank)
