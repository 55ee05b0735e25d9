"""Training that starts from an adapter of either kind: its weights, its scale, its loss."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_inference, open_training
from tests.support.tiny_adapters import adapt
from tests.support.tiny_model import write_tiny_adapter
from tests.support.tiny_models import VOCABULARY

from finetune.adapters.adapter import peft_names
from finetune.adapters.mlx_lm import write_mlx_lm
from finetune.adapters.store import read_adapter
from finetune.config.schema import LoraConfig
from finetune.core.errors import ConfigError, ModelError
from finetune.engines.base import Engine

BATCH = batch_of(random_rows(4, vocabulary=VOCABULARY), prompt=1)


@pytest.mark.parametrize("kind", ["peft", "mlx"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_goes_on_from_the_weights_and_the_loss_of_the_adapter(
    engine: Engine, llama: Path, tmp_path: Path, method: str, kind: str
) -> None:
    path = adapt(engine, llama, tmp_path / "peft", method=method, rank_pattern={"up_proj": 8})
    start = read_adapter(path)
    if kind == "mlx":
        path = tmp_path / "mlx"
        write_mlx_lm(path, start, layers=2)
    lora = LoraConfig(rank=4, rank_pattern={"up_proj": 8}, init_from=str(path))
    session = open_training(engine, llama, lora=lora, method=method)
    weights = session.weights()
    for module, update in start.updates.items():
        for name, array in zip(peft_names(module), update, strict=True):
            if array is not None:
                np.testing.assert_array_equal(weights[name], array)
    expected = open_inference(engine, llama, start=path).loss(BATCH, adapter="start").mean
    # the same products in the same order; only the loss's own sums differ
    assert session.loss(BATCH).mean == pytest.approx(expected, rel=1e-5)
    assert session.step([BATCH], learning_rate=1e-3).result().loss == pytest.approx(expected, rel=1e-5)
    assert session.loss(BATCH).mean < expected


def test_what_was_trained_on_keeps_the_scale_of_its_start(engine: Engine, llama: Path, tmp_path: Path) -> None:
    path = adapt(engine, llama, tmp_path / "start", use_rslora=True, alpha=3.0)
    lora = LoraConfig(rank=4, alpha=3.0, use_rslora=True, init_from=str(path))
    session = open_training(engine, llama, lora=lora)
    session.save_weights(tmp_path / "start")
    assert replace(read_adapter(path).config, base_model="") == replace(
        read_adapter(tmp_path / "start").config, base_model=""
    )


def test_targets_and_ranks_that_are_not_the_adapters_are_refused(engine: Engine, llama: Path, tmp_path: Path) -> None:
    path = adapt(engine, llama, tmp_path / "start", target_modules=("q_proj",))
    with pytest.raises(ConfigError, match=r"14 modules .* and the adapter .* has 2 \(q_proj\)"):
        open_training(engine, llama, lora=LoraConfig(rank=4, init_from=str(path)))


def test_an_adapter_of_another_model_is_refused_with_every_mismatch(
    engine: Engine, llama: Path, tmp_path: Path
) -> None:
    path = write_tiny_adapter(tmp_path / "start", layers=3)
    with pytest.raises(ModelError) as caught:
        open_training(engine, llama, lora=LoraConfig(rank=4, init_from=str(path)))
    for layer in (0, 1):
        assert f"model.layers.{layer}.self_attn.k_proj: adapter 32 -> 32, model 32 -> 16" in str(caught.value)
    assert "model.layers.2.mlp.up_proj: the model has no linear module of this name" in str(caught.value)
