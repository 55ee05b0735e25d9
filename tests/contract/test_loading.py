"""Models that do not fit together are refused with everything that is wrong, and nothing is left behind."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support.batches import batch_of, random_rows
from tests.support.engines import BASE, open_inference, open_training

from finetune.config.schema import DataConfig, LoraConfig, ModelConfig, RunConfig, TrainingConfig
from finetune.core.errors import ConfigError, ModelError, UsageError
from finetune.engines.base import Engine, Feature
from finetune.engines.features import FEATURES
from finetune.engines.registry import needed_features, require


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama, tmp_path / "copy")
    return tmp_path / "copy"


def change_config(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_all_mismatches_of_the_weights_are_reported_at_once(engine: Engine, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((5, 32), np.float32)
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((5, 5), np.float32)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        open_inference(engine, copy)
    message = str(caught.value)
    assert "3 tensors" in message
    assert "model.norm.weight (32,) is missing" in message
    assert "model.layers.0.mlp.up_proj.weight has shape (5, 32), and config.json needs (48, 32)" in message
    assert "model.layers.9.mlp.up_proj.weight (5, 5) does not belong to the model" in message


def test_damaged_and_missing_files_are_named(engine: Engine, copy: Path) -> None:
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
        open_inference(engine, copy)
    weights.unlink()
    with pytest.raises(ModelError, match="holds no model"):
        open_inference(engine, copy)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"its index .* names are missing: model-1\.safetensors"):
        open_inference(engine, copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="has no readable weight_map"):
        open_inference(engine, copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json.* cannot be read"):
        open_inference(engine, copy)


def test_an_unknown_architecture_is_refused(engine: Engine, copy: Path) -> None:
    change_config(copy, model_type="nosuch")
    with pytest.raises(ModelError, match="model_type 'nosuch' is not an architecture"):
        open_inference(engine, copy)


@pytest.mark.parametrize(
    "values",
    [{"num_attention_heads": 0}, {"hidden_size": "many"}, {"hidden_size": -8}],
    ids=["no head", "a word", "negative"],
)
def test_a_configuration_that_is_no_model_is_refused(engine: Engine, copy: Path, values: dict[str, object]) -> None:
    change_config(copy, **values)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_inference(engine, copy)


def test_sharded_weights_load_and_merge_file_by_file(engine: Engine, llama: Path, copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, copy / file)
        weight_map.update(dict.fromkeys(names, file))
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    session = open_training(engine, copy)
    session.save_weights(tmp_path / "adapter")
    report = engine.merge(copy, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "merged")
    assert (report.modules, report.largest_change) == (14, 0.0)
    assert {file.name for file in copy.iterdir()} == {file.name for file in (tmp_path / "merged").iterdir()}
    assert open_inference(engine, tmp_path / "merged").parameters == open_inference(engine, llama).parameters


def test_an_adapter_of_another_model_is_refused_with_every_mismatch(
    engine: Engine, llama: Path, copy: Path, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=4, target_modules=("up_proj", "q_proj"))
    open_training(engine, llama, lora=lora).save_weights(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    stem = "base_model.model.model.layers"
    weights[f"{stem}.7.mlp.up_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
    weights[f"{stem}.7.mlp.up_proj.lora_B.weight"] = np.zeros((48, 4), np.float32)
    weights[f"{stem}.0.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 9), np.float32)
    save_file(weights, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(ModelError) as caught:
        open_inference(engine, llama, tuned=tmp_path / "adapter")
    assert "model.layers.7.mlp.up_proj: the model has no linear module of this name" in str(caught.value)
    assert "model.layers.0.self_attn.q_proj: adapter 9 -> 32, model 32 -> 32" in str(caught.value)
    with pytest.raises(ModelError):
        engine.merge(llama, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_does_not_overwrite(engine: Engine, llama: Path, tmp_path: Path) -> None:
    open_training(engine, llama).save_weights(tmp_path / "adapter")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        engine.merge(llama, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "taken")
    assert (tmp_path / "taken/file").read_text() == "mine"


def test_options_that_the_engine_lacks_are_refused_before_loading(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FEATURES, engine.name, engine.features - {Feature.QUANTIZATION})
    config = RunConfig(
        model=ModelConfig(name="x", quantization="4bit"),
        data=DataConfig(train_file="x"),
        training=TrainingConfig(gradient_checkpointing=True),
    )
    needed = needed_features(config)
    assert needed == {Feature.LORA, Feature.QUANTIZATION, Feature.GRADIENT_CHECKPOINTING}
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        require(engine.name, needed)
    require(engine.name, needed - {Feature.QUANTIZATION})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_same_loss(engine: Engine, llama: Path, dtype: str) -> None:
    batch = batch_of(random_rows(4, vocabulary=260))
    half = engine.open_inference(llama, model_config=ModelConfig(name="x", dtype=dtype), adapters={})
    assert half.loss(batch).mean == pytest.approx(open_inference(engine, llama).loss(batch).mean, rel=0.02)
