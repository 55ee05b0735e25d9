"""A base that is quantised on loading (`model.quantization`), on every engine; QLoRA is LoRA on it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.support.batches import batch_of, random_rows
from tests.support.engines import BASE, open_training, require_exact_resume
from tests.support.tiny_adapters import adapt
from tests.support.tiny_models import VOCABULARY, make_model
from tests.support.trajectories import drift, short_steps, walk, warm_rates

from finetune.config.schema import LoraConfig, ModelConfig
from finetune.core.errors import FinetuneError, ModelError
from finetune.core.types import FloatArray
from finetune.engines.base import Engine, InferenceSession, TrainSession

pytestmark = pytest.mark.lora
BATCH = batch_of(random_rows(6, vocabulary=VOCABULARY), prompt=2)
CONFIGS = {bits: BASE.model_copy(update={"quantization": bits}) for bits in ("4bit", "8bit")}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return CONFIGS[request.param]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


def test_predictions_stay_near_those_of_the_float_base(engine: Engine, model: Path) -> None:
    """4 bits move a weight by 9 % of its row's spread, 8 bits by 0.5 %, and logits here are a few units wide."""
    exact = _opened(engine, model, BASE).token_logprobs(BATCH)
    distance = {
        bits: float(np.abs(_opened(engine, model, config).token_logprobs(BATCH) - exact).mean())
        for bits, config in CONFIGS.items()
    }
    assert 0 < distance["8bit"] < 0.03
    assert distance["8bit"] * 5 < distance["4bit"] < 0.5


def _opened(engine: Engine, model: Path, config: ModelConfig, **adapters: Path) -> InferenceSession:
    return engine.open_inference(model, model_config=config, adapters=adapters)


def test_embeddings_norms_and_head_stay_as_they_are(
    engine: Engine, llama: Path, tmp_path: Path, config: ModelConfig
) -> None:
    """With zeros in the layers, which every format holds exactly, only what is not quantised is left to answer."""
    hollow = shutil.copytree(llama, tmp_path / "hollow")
    tensors = load_file(llama / "model.safetensors")
    tensors = {name: array * (".layers." not in name or array.ndim == 1) for name, array in tensors.items()}
    save_file(tensors, hollow / "model.safetensors", metadata={"format": "pt"})
    found = _opened(engine, hollow, config).token_logprobs(BATCH)
    np.testing.assert_array_equal(found, _opened(engine, hollow, BASE).token_logprobs(BATCH))


def test_a_quantised_matrix_counts_as_what_it_stands_for(engine: Engine, llama: Path, config: ModelConfig) -> None:
    assert _opened(engine, llama, config).parameters == _opened(engine, llama, BASE).parameters


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_new_adapter_changes_nothing(engine: Engine, model: Path, config: ModelConfig, method: str) -> None:
    expected = _opened(engine, model, config).loss(BATCH).total
    session = open_training(engine, model, model_config=config, method=method)
    assert session.loss(BATCH).total == pytest.approx(expected, rel=1e-6)  # m / n of DoRA is 1


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_training_walks_near_the_curve_of_the_float_base(engine: Engine, llama: Path, method: str) -> None:
    curves = {
        bits: walk(
            open_training(engine, llama, model_config=config, method=method),
            short_steps(12),
            rates=warm_rates(12, 1e-2),
        )
        for bits, config in {"none": BASE, **CONFIGS}.items()
    }
    assert drift(curves["8bit"], curves["none"]).max() < 0.01
    assert drift(curves["4bit"], curves["none"]).max() < 0.1
    assert curves["4bit"][-1] < 0.95 * curves["4bit"][0]


def test_a_module_without_adapter_passes_the_gradient_on(engine: Engine, llama: Path, config: ModelConfig) -> None:
    """Only the first layer is adapted: its gradient comes through the second's packed weights.

    The loss falls by lr |g|^2 in a step of gradient descent; 5 % is the curvature of so small a step.
    """
    lora = LoraConfig(rank=4, target_modules=("model.layers.0.mlp.up_proj",))
    session = open_training(
        engine, llama, lora=lora, model_config=config, optimizer="sgd", beta1=0.0, max_grad_norm=None
    )
    session.step([BATCH], learning_rate=0.1).result()
    before, rate = session.loss(BATCH).mean, 0.02
    norm = session.step([BATCH], learning_rate=rate).result().grad_norm
    fallen = before - session.loss(BATCH).mean
    assert fallen == pytest.approx(rate * norm**2, rel=0.05)


def test_loading_again_and_resuming_give_the_same_bits(
    engine: Engine, llama: Path, tmp_path: Path, config: ModelConfig
) -> None:
    def opened() -> TrainSession:
        return open_training(engine, llama, model_config=config, lora=LoraConfig(rank=4, dropout=0.1))

    require_exact_resume(opened, BATCH, tmp_path)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merging_adds_the_adapter_to_the_values_it_was_trained_on(
    engine: Engine, model: Path, tmp_path: Path, config: ModelConfig, method: str
) -> None:
    adapter = adapt(engine, model, tmp_path / "adapter", method=method)
    engine.merge(model, model_config=config, adapter=adapter, destination=tmp_path / "merged")
    expected = _opened(engine, model, config, tuned=adapter).token_logprobs(BATCH, adapter="tuned")
    merged = _opened(engine, tmp_path / "merged", BASE).token_logprobs(BATCH)
    # float32 products in another order; an adapter added to the original weights is 0.01 (8 bits) away and more
    np.testing.assert_allclose(merged, expected, atol=2e-4)


def test_every_weight_of_a_quantised_base_cannot_be_trained(engine: Engine, llama: Path, config: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"is quantised.*lora"):
        open_training(engine, llama, model_config=config, method="full")


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("torch")
    monkeypatch.setattr("finetune.engines.torch.quantize.find_spec", lambda name: None)
    return


@pytest.mark.usefixtures("no_bitsandbytes")
def test_a_missing_library_is_named_before_anything_is_loaded(engine: Engine, tmp_path: Path) -> None:
    if engine.name != "pytorch":
        pytest.skip("MLX quantises by itself")
    with pytest.raises(FinetuneError, match=r"bitsandbytes, which is not installed.*finetune\[torch\]"):
        open_training(engine, tmp_path / "nothing", model_config=CONFIGS["4bit"])
    assert engine.hardware_problems(CONFIGS["4bit"])
    assert not engine.hardware_problems(CONFIGS["8bit"])


@pytest.mark.parametrize("shape", [(48, 32), (7, 9), (130, 192)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nf4_is_the_nearest_of_sixteen_values_in_blocks_of_64(shape: tuple[int, int], dtype: str) -> None:
    """Blocks cross the ends of rows; their scales are within 2 % after their own quantisation to 8 bits."""
    torch = pytest.importorskip("torch")
    from finetune.engines.torch.nf4 import Nf4Matrix

    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = Nf4Matrix.pack(torch.from_numpy(values)).dense(getattr(torch, dtype)).float().numpy()
    expected, scales = _nf4(values)
    assert (np.abs(found - expected) <= 0.02 * scales).all()


def _nf4(values: np.ndarray) -> tuple[FloatArray, FloatArray]:
    """The nearest NF4 values (appendix E of Dettmers et al. 2023), and each one's scale."""
    levels = np.array(
        [
            *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
            *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
        ]
    )
    flat = np.pad(values.ravel(), (0, -values.size % 64)).reshape(-1, 64)
    scales = np.abs(flat).max(axis=1, keepdims=True)
    nearest = levels[np.abs((flat / scales)[..., None] - levels).argmin(axis=-1)] * scales
    count = values.size
    return nearest.ravel()[:count].reshape(values.shape), np.repeat(scales, 64)[:count].reshape(values.shape)
