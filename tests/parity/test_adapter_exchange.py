"""Adapters between this project, PEFT and mlx-lm: each reads what the others trained, and answers the same.

LoRA and DoRA, both engines, both directions; the references are PEFT on transformers' model and mlx-lm's own.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file
from tests.support.batches import batch_of, random_rows
from tests.support.engines import open_inference, open_training
from tests.support.in_process import ft_here as ft
from tests.support.tiny_models import VOCABULARY, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.config.schema import LoraConfig
from finetune.engines.base import Engine
from finetune.export.formats import write_mlx

pytestmark = [pytest.mark.lora, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")]

METHODS = pytest.mark.parametrize("method", ["lora", "dora"])
BATCH = batch_of(random_rows(3, vocabulary=VOCABULARY, lengths=(12, 12)), prompt=2)
# float32 in three libraries, each with its own order of additions, through two layers
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


def picked(logits: torch.Tensor) -> np.ndarray:
    """log p of the trained targets."""
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(BATCH.targets).long()[..., None])[..., 0]
    return np.asarray(logprobs.detach().numpy()[BATCH.loss_mask])


def in_peft(peft_model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return picked(peft_model.eval()(torch.tensor(BATCH.inputs).long()).logits)


def in_mlx_lm(model: Path, adapter: Path) -> np.ndarray:
    loaded, _ = load_model(model)
    logits = load_adapters(loaded, str(adapter))(mx.array(BATCH.inputs)).astype(mx.float32)
    return picked(torch.tensor(np.array(logits)))


def in_engine(engine: Engine, model: Path, adapter: Path) -> np.ndarray:
    session = open_inference(engine, model, tuned=adapter)
    found = session.token_logprobs(BATCH, adapter="tuned")[BATCH.loss_mask]
    assert np.abs(session.token_logprobs(BATCH)[BATCH.loss_mask] - found).max() > 0.05  # it does something
    return np.asarray(found)


@METHODS
def test_peft_and_mlx_lm_read_what_an_engine_trained(engine: Engine, model: Path, tmp_path: Path, method: str) -> None:
    """Two ranks, so that mlx-lm's copy is filled up, and two scales, so that B is folded."""
    lora = LoraConfig(rank=4, alpha=6, rank_pattern={"up_proj": 2})
    session = open_training(engine, model, lora=lora, method=method)
    for _ in range(4):
        session.step([BATCH], learning_rate=2e-2).result()
    adapter = tmp_path / "adapter"
    session.save_weights(adapter)
    expected = in_engine(engine, model, adapter)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    np.testing.assert_allclose(in_peft(theirs), expected, rtol=0, atol=TOLERANCE)
    write_mlx(adapter, tmp_path / "mlx", base=str(model), layers=2, names={})
    np.testing.assert_allclose(in_mlx_lm(model, tmp_path / "mlx"), expected, rtol=0, atol=TOLERANCE)


@METHODS
@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "rslora"])
def test_an_engine_reads_what_peft_trained(
    engine: Engine, model: Path, tmp_path: Path, method: str, use_rslora: bool
) -> None:
    torch.manual_seed(0)
    config = PeftConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        use_dora=method == "dora",
        use_rslora=use_rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    optimizer = torch.optim.AdamW([weight for weight in theirs.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):
        (-theirs(torch.tensor(BATCH.inputs).long()).logits.log_softmax(-1)[..., 5].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "adapter")
    found = in_engine(engine, model, tmp_path / "adapter")
    np.testing.assert_allclose(found, in_peft(theirs), rtol=0, atol=TOLERANCE)


@METHODS
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_engine_reads_what_mlx_lm_wrote(engine: Engine, tmp_path: Path, method: str, kind: str) -> None:
    """mlx-lm's own layers with random weights, saved as mlx-lm saves them; GPT-2 has other names there."""
    path = make_model(tmp_path / "base", kind)
    if kind == "gpt2":
        write_as_on_the_hub(path)
    adapter = tmp_path / "adapter"
    write_with_mlx_lm(path, adapter, method)
    found = in_engine(engine, path, adapter)
    np.testing.assert_allclose(found, in_mlx_lm(path, adapter), rtol=0, atol=TOLERANCE)


def write_as_on_the_hub(path: Path) -> None:
    """mlx-lm reads GPT-2 without transformers' prefix."""
    from safetensors.numpy import save_file

    tensors = load_file(path / "model.safetensors")
    short = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    save_file(short, path / "model.safetensors", metadata={"format": "pt"})


def write_with_mlx_lm(path: Path, adapter: Path, method: str) -> None:
    parameters: dict[str, Any] = {"rank": 4, "scale": 1.5, "dropout": 0.0}
    loaded, _ = load_model(path)
    loaded.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(loaded, 2, parameters, use_dora=method == "dora")
    weights = {}
    for name, array in tree_flatten(loaded.trainable_parameters()):
        is_magnitude = name.endswith(".m")
        change = mx.random.normal(array.shape) * (0.1 * array if is_magnitude else 0.1)
        weights[name] = array + change if is_magnitude else change
    adapter.mkdir()
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    document = {"fine_tune_type": method, "num_layers": 2, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(document))


def test_peft_adds_scale_b_a_of_a_real_mlx_lm_adapter(shared: Path, tmp_path: Path) -> None:
    """The attention of Qwen2.5 0.5B as it is; its MLP and vocabulary, which the adapter leaves alone, made small."""
    real = shared / "adapters/mlx_qwen2.5-0.5b"
    assert ft("export", real, "--format", "peft", "--output", tmp_path / "peft").code == 0
    document = json.loads((shared / "configs/models/qwen2_0_5b.config.json").read_text())
    (tmp_path / "base").mkdir()
    small = {**document, "intermediate_size": 16, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "base/config.json").write_text(json.dumps(small))
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "base"), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items() if "layers.2" in name}
    merged = PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload().state_dict()
    theirs = load_file(real / "adapters.safetensors")
    for layer in range(20, 24):
        for module in (f"model.layers.{layer}.self_attn.{name}_proj" for name in "qv"):
            a, b = (torch.tensor(theirs[f"{module}.lora_{matrix}"]) for matrix in "ab")
            expected = before[f"{module}.weight"] + 10.0 * (a @ b).T
            torch.testing.assert_close(merged[f"{module}.weight"], expected, rtol=0, atol=1e-6)
            assert not torch.equal(merged[f"{module}.weight"], before[f"{module}.weight"])
