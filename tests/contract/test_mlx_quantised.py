"""Quantised bases on the MLX engine: files as mlx-lm writes them, and floats quantised on loading."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.convert import convert
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.utils import load_model
from tests.support.batches import batch_of, random_rows
from tests.support.engines import BASE, open_training
from tests.support.quantised import quantise
from tests.support.tiny_models import VOCABULARY

from finetune.adapters.adapter import peft_names
from finetune.config.schema import ModelConfig
from finetune.core.errors import ModelError
from finetune.core.types import Batch
from finetune.engines.base import Engine
from finetune.engines.mlx import quantize
from finetune.engines.mlx.dora import row_norms
from finetune.engines.mlx.engine import MLXEngine
from finetune.engines.mlx.loading import load_base
from finetune.engines.mlx.lora import LoRALinear, LoraSlot, LoraWeights
from finetune.engines.mlx.quantize import Packed, packed

BATCH = batch_of(random_rows(4, vocabulary=VOCABULARY), prompt=2)
FOUR_BITS = ModelConfig(name="base", dtype="float32", quantization="4bit")
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def mlx() -> Engine:
    return MLXEngine()


@pytest.fixture(scope="module")
def mixed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files whose layers have different bits and groups, some none, as mlx-lm's recipes leave them."""

    def choose(path: str, module: Any) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[1] % 32 or "q_proj" in path:
            return False
        return {"bits": 6 if "v_proj" in path else 3, "group_size": 32, "mode": "affine"}

    model = tmp_path_factory.mktemp("models") / "mixed"
    convert(str(llama), mlx_path=str(model), quantize=True, q_bits=4, q_group_size=32, quant_predicate=choose)
    return model


def mlx_lm_logprobs(model: Path, batch: Batch) -> np.ndarray:
    """What mlx-lm's own model makes of the directory."""
    loaded, _ = load_model(model)
    logits = loaded(mx.array(batch.inputs)).astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    picked = np.take_along_axis(logprobs, batch.targets[..., None].astype(np.int64), axis=-1)[..., 0]
    return np.where(batch.loss_mask, picked, 0.0)


def trained(
    engine: Engine, model: Path, adapter: Path, *, model_config: ModelConfig = BASE, method: str = "lora"
) -> None:
    """Write an adapter that a few large steps have moved far from nothing."""
    session = open_training(engine, model, model_config=model_config, method=method)
    for _ in range(3):
        session.step([BATCH], learning_rate=1e-2).result()
    session.save_weights(adapter)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_files_of_any_bits_give_mlx_lms_own_logits(mlx: Engine, llama: Path, tmp_path: Path, bits: int) -> None:
    model = quantise(llama, tmp_path / "quantised", bits=bits)
    session = mlx.open_inference(model, model_config=BASE, adapters={})
    # float32 on both sides: the order of additions differs
    np.testing.assert_allclose(session.token_logprobs(BATCH), mlx_lm_logprobs(model, BATCH), atol=2e-5)


def test_files_of_mixed_bits_give_mlx_lms_own_logits_and_train(mlx: Engine, mixed: Path, tmp_path: Path) -> None:
    session = mlx.open_inference(mixed, model_config=BASE, adapters={})
    np.testing.assert_allclose(session.token_logprobs(BATCH), mlx_lm_logprobs(mixed, BATCH), atol=2e-5)
    trained(mlx, mixed, tmp_path)
    tuned = mlx.open_inference(mixed, model_config=BASE, adapters={"tuned": tmp_path})
    assert tuned.loss(BATCH, adapter="tuned").mean < session.loss(BATCH).mean


def test_loading_quantises_linear_modules_of_the_layers_and_nothing_else(llama: Path) -> None:
    modules = dict(load_base(llama, FOUR_BITS).model.named_modules())
    quantized = {path.split(".", 3)[-1] for path, module in modules.items() if isinstance(module, nn.QuantizedLinear)}
    projections = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert quantized == projections | {"mlp.gate_proj", "mlp.up_proj"}  # rows of down_proj have 48 values
    assert {modules[path].group_size for path in modules if path.endswith("q_proj")} == {32}
    assert type(modules["model.embed_tokens"]) is nn.Embedding
    assert type(modules["lm_head"]) is nn.Linear


def test_modules_that_cannot_be_quantised_are_named(mlx: Engine, llama: Path, wide: Path) -> None:
    said = open_training(mlx, llama, model_config=FOUR_BITS).notices
    assert said == ("model.quantization=4bit: 2 modules (down_proj) stay float: no group size divides their rows.",)
    assert not open_training(mlx, wide, model_config=FOUR_BITS).notices


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_products_unpack_a_block_of_rows_at_a_time(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_UNPACKED", 1)  # so that a block has the fewest rows, 64
    weight, x, cotangent = (
        mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate([(150, 128), (2, 5, 128), (2, 5, 150)])
    )
    packed = quantize.Packed(*mx.quantize(weight, 64, bits), 64, bits)
    dense = packed.dense(mx.float32)
    found = mx.vjp(packed.product, [x], [cotangent])
    np.testing.assert_allclose(found[0][0], x @ dense.T, atol=4e-5)  # sums of 128 products, up to 40
    np.testing.assert_allclose(found[1][0], cotangent @ dense, atol=4e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantising_on_loading_gives_the_values_of_mlx_lms_conversion(
    mlx: Engine, llama: Path, tmp_path: Path, bits: int
) -> None:
    def choose(path: str, module: Any) -> bool:
        return isinstance(module, nn.Linear) and path != "lm_head" and module.weight.shape[1] % 32 == 0

    convert(
        str(llama), mlx_path=str(tmp_path / "m"), quantize=True, q_bits=bits, q_group_size=32, quant_predicate=choose
    )
    config = ModelConfig(name="base", dtype="float32", quantization=f"{bits}bit")
    on_loading = mlx.open_inference(llama, model_config=config, adapters={})
    converted = mlx.open_inference(tmp_path / "m", model_config=BASE, adapters={})
    np.testing.assert_array_equal(on_loading.token_logprobs(BATCH), converted.token_logprobs(BATCH))


def test_quantising_on_loading_never_holds_the_float_model(wide: Path) -> None:
    """The peak is the packed model and a few matrices of one layer."""
    floats = (wide / "model.safetensors").stat().st_size
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    base = load_base(wide, FOUR_BITS)
    assert mx.get_peak_memory() - before < 0.45 * floats
    assert base.dtype == mx.float32


def test_a_step_never_keeps_the_dense_matrices(mlx: Engine, wide: Path) -> None:
    """A step on the packed base needs less memory than one on the float base by most of the weights."""

    def peak(config: ModelConfig) -> int:
        gc.collect()  # models of other tests
        mx.clear_cache()
        session = open_training(mlx, wide, model_config=config)
        session.step([BATCH], learning_rate=1e-3).result()
        found = session.peak_memory_bytes()
        session.close()
        return found

    floats = (wide / "model.safetensors").stat().st_size
    assert peak(FOUR_BITS) < peak(BASE) - 0.7 * floats


@pytest.mark.parametrize("rows", [1, 3, 4, 50])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_products_by_packed_weights_and_their_gradients_are_those_of_the_values(rows: int, bits: int) -> None:
    matrix = Packed(*mx.quantize(mx.random.normal((48, 64), key=mx.random.key(0)), 32, bits), 32, bits)
    x = mx.random.normal((2, rows, 64), key=mx.random.key(1))

    def squared(product: Callable[[Any], Any]) -> Any:
        return mx.value_and_grad(lambda x: mx.square(product(x)).sum())(x)

    found, expected = squared(matrix.product), squared(lambda x: x @ matrix.dense(mx.float32).T)
    for ours, dense in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-3)  # sums of 64 products of size 10


def test_the_gradients_are_those_of_the_dequantised_model(mlx: Engine, llama: Path, tmp_path: Path) -> None:
    model = quantise(llama, tmp_path / "quantised")
    start = open_training(mlx, model, seed=3)
    start.save_weights(tmp_path / "nothing")  # B is zero: merging only dequantises
    mlx.merge(model, model_config=BASE, adapter=tmp_path / "nothing", destination=tmp_path / "floats", dequantize=True)
    dense = open_training(mlx, tmp_path / "floats", seed=3, optimizer="sgd")
    session = open_training(mlx, model, seed=3, optimizer="sgd")
    for _ in range(2):  # after the first step A has a gradient too
        dense.step([BATCH], learning_rate=1.0).result()
        session.step([BATCH], learning_rate=1.0).result()
    expected = dense.weights()
    for name, weight in session.weights().items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_full_tuning_of_a_quantised_base_is_refused(mlx: Engine, llama: Path, mixed: Path) -> None:
    with pytest.raises(ModelError, match="is quantised"):
        open_training(mlx, mixed, method="full")
    with pytest.raises(ModelError, match="is quantised"):
        open_training(mlx, llama, model_config=FOUR_BITS, method="full")


def test_files_that_are_quantised_already_take_their_own_bits_only(mlx: Engine, llama: Path, tmp_path: Path) -> None:
    model = quantise(llama, tmp_path / "quantised", bits=8)
    with pytest.raises(ModelError, match=r"model\.quantization=4bit: .* quantised already, to 8 bits\. Leave"):
        mlx.open_inference(model, model_config=FOUR_BITS, adapters={})
    same = FOUR_BITS.model_copy(update={"quantization": "8bit"})
    asked = mlx.open_inference(model, model_config=same, adapters={}).loss(BATCH)
    assert asked == mlx.open_inference(model, model_config=BASE, adapters={}).loss(BATCH)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_merge_keeps_the_bits_of_each_layer_and_mlx_lm_computes_as_we_do(
    mlx: Engine, mixed: Path, tmp_path: Path, method: str
) -> None:
    trained(mlx, mixed, tmp_path / "adapter", method=method)
    mlx.merge(mixed, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "merged")
    before, after = (dict(load_model(path)[0].named_modules()) for path in (mixed, tmp_path / "merged"))
    settings = {path: getattr(module, "bits", None) for path, module in before.items()}
    assert {path: getattr(module, "bits", None) for path, module in after.items()} == settings
    merged = mlx.open_inference(tmp_path / "merged", model_config=BASE, adapters={})
    np.testing.assert_allclose(merged.token_logprobs(BATCH), mlx_lm_logprobs(tmp_path / "merged", BATCH), atol=2e-5)
    assert merged.loss(BATCH).mean < mlx.open_inference(mixed, model_config=BASE, adapters={}).loss(BATCH).mean


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_dequantised_merge_answers_like_base_and_adapter(
    mlx: Engine, mixed: Path, tmp_path: Path, method: str
) -> None:
    trained(mlx, mixed, tmp_path / "adapter", method=method)
    report = mlx.merge(
        mixed, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "floats", dequantize=True
    )
    assert report.modules == 14
    assert (
        not {"quantization", "quantization_config"} & json.loads((tmp_path / "floats/config.json").read_text()).keys()
    )
    apart = mlx.open_inference(mixed, model_config=BASE, adapters={"tuned": tmp_path / "adapter"})
    merged = mlx.open_inference(tmp_path / "floats", model_config=BASE, adapters={})
    expected = apart.token_logprobs(BATCH, adapter="tuned")
    np.testing.assert_allclose(merged.token_logprobs(BATCH), expected, atol=2e-5)
    np.testing.assert_allclose(mlx_lm_logprobs(tmp_path / "floats", BATCH), expected, atol=2e-5)


def test_a_merge_finds_scales_that_lie_in_another_file(mlx: Engine, llama: Path, tmp_path: Path) -> None:
    model = quantise(llama, tmp_path / "quantised")
    trained(mlx, model, tmp_path / "adapter")
    mlx.merge(model, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "whole")
    tensors: Any = mx.load(str(model / "model.safetensors"))
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    first, second = parts.values()
    for name, array in tensors.items():
        (first if name.endswith(".weight") else second)[name] = array
    (model / "model.safetensors").unlink()
    for file, members in parts.items():
        mx.save_safetensors(str(model / file), members)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    mlx.merge(model, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "parts")
    whole, sharded = (
        mlx.open_inference(tmp_path / name, model_config=BASE, adapters={}).token_logprobs(BATCH)
        for name in ("whole", "parts")
    )
    np.testing.assert_array_equal(whole, sharded)
    np.testing.assert_allclose(mlx_lm_logprobs(tmp_path / "parts", BATCH), whole, atol=2e-5)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_dora_layer_computes_what_mlx_lms_does(llama: Path, bits: int | None) -> None:
    config = BASE if bits is None else ModelConfig(name="base", dtype="float32", quantization=f"{bits}bit")
    layer = dict(load_base(llama, config).model.named_modules())[UP]
    rng = np.random.default_rng(0)
    a, b = mx.array(rng.normal(size=(4, 32)), mx.float32), mx.array(rng.normal(size=(48, 4)), mx.float32)
    magnitude, x = mx.array(rng.normal(size=48), mx.float32), mx.array(rng.normal(size=(2, 7, 32)), mx.float32)
    theirs = DoRALinear.from_base(layer, r=4, scale=0.5)
    theirs.lora_a, theirs.lora_b, theirs.m = a.T, b.T, magnitude
    slot = LoraSlot({UP: LoraWeights(a, b, 0.5, magnitude, row_norms({UP: layer}).updated(UP, a, b, 0.5))})
    found, expected = LoRALinear(layer, UP, slot)(x), theirs(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # norms in float32 by another formula


@pytest.mark.parametrize("bits", [None, 4])
def test_row_norms_are_those_of_the_merged_matrix(llama: Path, bits: int | None) -> None:
    config = BASE if bits is None else FOUR_BITS
    layer = dict(load_base(llama, config).model.named_modules())[UP]
    weight = packed(layer).dense(mx.float32) if bits else layer.weight
    rng = np.random.default_rng(0)
    a, b = mx.array(rng.normal(size=(4, 32)), mx.float32), mx.array(rng.normal(size=(48, 4)), mx.float32)
    norms = row_norms({UP: layer})
    np.testing.assert_allclose(norms.initial(UP), mx.linalg.norm(weight, axis=1), rtol=1e-6)
    np.testing.assert_allclose(norms.updated(UP, a, b, 0.3), mx.linalg.norm(weight + 0.3 * (b @ a), axis=1), rtol=1e-5)


def test_magnitudes_start_as_row_norms_of_the_quantised_values(mlx: Engine, llama: Path) -> None:
    magnitude = open_training(mlx, llama, model_config=FOUR_BITS, method="dora").weights()[peft_names(UP).magnitude]
    weight = packed(dict(load_base(llama, FOUR_BITS).model.named_modules())[UP]).dense(mx.float32)
    np.testing.assert_allclose(magnitude, mx.linalg.norm(weight, axis=1), rtol=1e-6)
