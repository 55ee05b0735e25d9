"""Models and adapters against transformers and PEFT: log-probabilities, merging, full tuning, for each architecture."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_adapters, load_model
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.support.batches import batch_of, random_rows
from tests.support.engines import BASE, open_inference, open_training
from tests.support.tiny_models import CONFIGS, VOCABULARY, make_model
from transformers import AutoModelForCausalLM

from finetune.adapters.mlx_lm import write_mlx_lm
from finetune.adapters.store import read_adapter
from finetune.config.schema import LoraConfig
from finetune.core.types import Batch, FloatArray
from finetune.engines.base import Engine

# PEFT 0.21 still asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ROWS = random_rows(3, vocabulary=VOCABULARY, lengths=(16, 20))
BATCH = batch_of(ROWS)
TOLERANCE = 1e-4  # nats, float32; two libraries add in different orders


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / request.param, request.param)


def reference(model: Any, batch: Batch) -> FloatArray:
    """log p(target) by PyTorch, 0 where nothing is trained on."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor(batch.inputs, dtype=torch.long)).logits
    log_p = torch.log_softmax(logits.float(), -1)
    picked = log_p.gather(-1, torch.tensor(batch.targets, dtype=torch.long)[..., None])[..., 0].numpy()
    return np.where(batch.loss_mask, picked, 0.0).astype(np.float32)


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_log_probabilities_are_those_of_transformers(engine: Engine, model: Path) -> None:
    expected = reference(load(model), BATCH)
    np.testing.assert_allclose(open_inference(engine, model).token_logprobs(BATCH), expected, atol=TOLERANCE)
    assert expected.std() > 0.5  # a model that says nothing would agree with anything


@pytest.mark.lora
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_adapter_means_the_same_in_peft_and_merged(
    engine: Engine, model: Path, tmp_path: Path, use_rslora: bool
) -> None:
    session = open_training(engine, model, lora=LoraConfig(rank=4, alpha=6, use_rslora=use_rslora))
    for _ in range(3):
        session.step([BATCH], learning_rate=2e-2).result()
    session.save_weights(tmp_path / "adapter")
    inference = open_inference(engine, model, tuned=tmp_path / "adapter")
    tuned, base = inference.token_logprobs(BATCH, adapter="tuned"), inference.token_logprobs(BATCH)
    assert np.abs(tuned - base).max() > 0.05
    in_peft = PeftModel.from_pretrained(load(model), tmp_path / "adapter")
    np.testing.assert_allclose(reference(in_peft, BATCH), tuned, atol=TOLERANCE)
    report = engine.merge(model, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "merged")
    assert report.modules == len(session.weights()) // 2
    assert report.largest_change > 0
    np.testing.assert_allclose(reference(load(tmp_path / "merged"), BATCH), tuned, atol=TOLERANCE)
    np.testing.assert_allclose(open_inference(engine, tmp_path / "merged").token_logprobs(BATCH), tuned, atol=TOLERANCE)


def test_a_fully_tuned_model_loads_in_transformers(engine: Engine, model: Path, tmp_path: Path) -> None:
    session = open_training(engine, model, method="full")
    before = session.loss(BATCH).mean
    for _ in range(2):
        session.step([BATCH], learning_rate=1e-3).result()
    session.save_weights(tmp_path)
    assert session.loss(BATCH).mean < before
    expected = -float(reference(load(tmp_path), BATCH).sum())
    assert session.loss(BATCH).total == pytest.approx(expected, rel=1e-5)


@pytest.mark.lora
def test_peft_reads_ranks_and_targets_of_single_modules(engine: Engine, tmp_path: Path) -> None:
    path = make_model(tmp_path / "base", "gpt2")
    targets = ("h.1.attn.c_attn", "h.0.mlp.c_proj", "c_fc")
    lora = LoraConfig(rank=4, alpha=6, target_modules=targets, rank_pattern={"h.1.mlp.c_fc": 2})
    session = open_training(engine, path, lora=lora)
    for _ in range(3):
        session.step([BATCH], learning_rate=2e-2).result()
    session.save_weights(tmp_path / "adapter")
    expected = open_inference(engine, path, tuned=tmp_path / "adapter").token_logprobs(BATCH, adapter="tuned")
    in_peft = PeftModel.from_pretrained(load(path), tmp_path / "adapter")
    np.testing.assert_allclose(reference(in_peft, BATCH), expected, atol=TOLERANCE)


@pytest.mark.lora
def test_an_adapter_that_peft_wrote_loads_here(engine: Engine, tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    config = PeftConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"up_proj": 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    in_peft = get_peft_model(load(path), config)
    in_peft.save_pretrained(tmp_path / "adapter")
    session = open_inference(engine, path, theirs=tmp_path / "adapter")
    expected = reference(in_peft, BATCH)
    np.testing.assert_allclose(session.token_logprobs(BATCH, adapter="theirs"), expected, atol=TOLERANCE)
    assert np.abs(session.token_logprobs(BATCH) - expected).max() > 0.05


@pytest.mark.lora
def test_an_adapter_in_mlx_lms_layout_means_the_same_there_and_here(engine: Engine, tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    session = open_training(engine, path, lora=LoraConfig(rank=4, alpha=6))
    for _ in range(3):
        session.step([BATCH], learning_rate=2e-2).result()
    session.save_weights(tmp_path / "peft")
    write_mlx_lm(tmp_path / "mlx", read_adapter(tmp_path / "peft"), layers=2)
    inference = open_inference(engine, path, peft=tmp_path / "peft", mlx=tmp_path / "mlx")
    expected = inference.token_logprobs(BATCH, adapter="peft")
    np.testing.assert_array_equal(inference.token_logprobs(BATCH, adapter="mlx"), expected)
    model, _ = load_model(path)
    logits = np.array(load_adapters(model, str(tmp_path / "mlx"))(mx.array(BATCH.inputs)))
    log_p = torch.log_softmax(torch.tensor(logits), -1).gather(-1, torch.tensor(BATCH.targets).long()[..., None])
    np.testing.assert_allclose(np.where(BATCH.loss_mask, log_p[..., 0].numpy(), 0), expected, atol=TOLERANCE)


@pytest.mark.lora
def test_merging_into_bfloat16_rounds_once(engine: Engine, tmp_path: Path) -> None:
    """The merged file is the float32 sum rounded, not a sum of rounded parts."""
    path = make_model(tmp_path / "base", dtype=torch.bfloat16)
    session = open_training(engine, path, lora=LoraConfig(rank=4, target_modules=("up_proj",)))
    session.step([BATCH], learning_rate=1e-2).result()
    session.save_weights(tmp_path / "adapter")
    engine.merge(path, model_config=BASE, adapter=tmp_path / "adapter", destination=tmp_path / "merged")
    base, merged = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "merged"))
    name = "model.layers.0.mlp.up_proj"
    a, b = (torch.tensor(session.weights()[f"base_model.model.{name}.lora_{which}.weight"]) for which in "AB")
    expected = (base[f"{name}.weight"].float() + 2.0 * (b @ a)).to(torch.bfloat16)
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    differing = (merged[f"{name}.weight"] != expected).float().mean().item()
    assert differing < 0.01  # ties that fall the other way in a different order of additions
    assert torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
