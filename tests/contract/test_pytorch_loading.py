"""What the PyTorch engine does with files, types and memory, beyond what every engine promises."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.batches import batch_of, random_rows
from tests.support.engines import BASE, open_inference, open_training
from tests.support.quantised import quantise
from tests.support.tiny_models import VOCABULARY, make_model

from finetune.config.schema import LoraConfig, ModelConfig
from finetune.core.errors import ModelError, TrainingError
from finetune.engines.mlx.engine import MLXEngine
from finetune.engines.torch import compat, reading
from finetune.engines.torch.device import explained_memory, pick_dtype
from finetune.engines.torch.documents import flatten
from finetune.engines.torch.engine import TorchEngine
from finetune.engines.torch.loading import load_base
from finetune.models.weights import read_weights

ENGINE = TorchEngine()
BATCH = batch_of(random_rows(4, vocabulary=VOCABULARY), prompt=2)


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(change(tensors), model / "model.safetensors", metadata={"format": "pt"})


def test_files_that_mlx_quantised_are_refused_with_the_ways_out(llama: Path, tmp_path: Path) -> None:
    model = quantise(llama, tmp_path / "quantised")
    with pytest.raises(ModelError, match=r"model\.backend=mlx, or the original model"):
        open_training(ENGINE, model)


def test_files_that_another_method_quantised_are_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "copy")
    path = tmp_path / "copy/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="quantised by gptq"):
        open_training(ENGINE, tmp_path / "copy")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gpt2_files_without_the_bodys_prefix_are_read_and_written_as_they_are(tmp_path: Path, method: str) -> None:
    whole = make_model(tmp_path / "whole", "gpt2")
    short = Path(shutil.copytree(whole, tmp_path / "short"))
    buffer = {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}  # older files hold the causal mask too
    rewrite(short, lambda tensors: buffer | {name.removeprefix("transformer."): t for name, t in tensors.items()})
    assert open_inference(ENGINE, short).loss(BATCH) == open_inference(ENGINE, whole).loss(BATCH)
    session = open_training(ENGINE, short, method=method)
    session.step([BATCH], learning_rate=1e-2).result()
    session.save_weights(tmp_path / "tuned")
    written = tmp_path / "tuned"
    if method == "lora":
        written = tmp_path / "merged"
        ENGINE.merge(short, model_config=BASE, adapter=tmp_path / "tuned", destination=written)
    assert load_file(written / "model.safetensors").keys() == load_file(short / "model.safetensors").keys() - buffer
    assert open_inference(ENGINE, written).loss(BATCH).total == pytest.approx(session.loss(BATCH).total, rel=1e-5)


def test_a_copy_of_the_tied_head_is_left_aside(tied_llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tied_llama, tmp_path / "copy"))
    rewrite(copy, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert open_inference(ENGINE, copy).loss(BATCH) == open_inference(ENGINE, tied_llama).loss(BATCH)


def test_integers_in_the_place_of_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(llama, tmp_path / "copy"))
    rewrite(copy, lambda tensors: tensors | {"model.norm.weight": torch.ones(32, dtype=torch.int32)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight is of type I32"):
        open_inference(ENGINE, copy)


def test_a_file_that_shrinks_while_it_is_read_is_named(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(llama / file.name, file)
    last = max(read_weights(tmp_path), key=lambda tensor: tensor.start)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="ends within"):
        reading.read_tensor(last)


def test_weights_are_read_one_at_a_time_and_only_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors of a file in memory beside the model would be a second copy in the making."""
    read: list[str] = []
    alive: list[int] = []

    def counted(info: object) -> torch.Tensor:
        tensor = original(info)
        read.append(info.name)
        alive.append(sum(parameter.device.type != "meta" and parameter.ndim > 1 for parameter in model.parameters()))
        return tensor

    original, model = reading.read_tensor, None
    build = compat.build_model

    def built(*args: object) -> torch.nn.Module:
        nonlocal model
        model = build(*args)
        return model

    monkeypatch.setattr("finetune.engines.torch.loading.read_tensor", counted)
    monkeypatch.setattr(compat, "build_model", built)
    load_base(llama, BASE)
    assert len(read) == len(set(read)) == 21
    assert alive[0] == 0  # no matrix has memory before the first is read
    assert max(b - a for a, b in pairwise(alive)) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_both_engines_draw_the_same_new_weights(tmp_path: Path, kind: str) -> None:
    model = make_model(tmp_path, kind)
    config = ModelConfig(name="base", init="random", dtype="float32")
    losses = [
        open_training(engine, model, method="full", model_config=config, seed=3).loss(BATCH).total
        for engine in (MLXEngine(), ENGINE)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("fast", [True, False], ids=["fast in bfloat16", "slow in bfloat16"])
def test_auto_takes_bfloat16_for_16_bit_files_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    monkeypatch.setattr(compat, "fast_in_bfloat16", lambda device: fast)
    cpu = torch.device("cpu")
    for stored in (torch.bfloat16, torch.float16):
        assert pick_dtype("auto", stored, cpu) == (torch.bfloat16 if fast else torch.float32)
    assert pick_dtype("auto", torch.float32, cpu) == torch.float32
    assert pick_dtype("bfloat16", torch.float32, cpu) == torch.bfloat16


def test_types_that_the_cpu_lacks_are_said_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "fast_in_bfloat16", lambda device: False)
    [problem] = ENGINE.hardware_problems(ModelConfig(name="x", device="cpu", dtype="bfloat16"))
    assert "no bfloat16 arithmetic" in problem
    assert "float32" in problem


def test_memory_that_cannot_be_had_is_explained() -> None:
    with pytest.raises(TrainingError, match=r"Memory ran out: .*Lower training\.batch_size"), explained_memory():
        torch.empty(1 << 50)
    with pytest.raises(RuntimeError, match="shapes"), explained_memory():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_nothing_is_differentiated_below_the_lowest_adapter(llama: Path) -> None:
    lora = LoraConfig(rank=4, target_modules=("model.layers.1.mlp.down_proj",))
    session = open_training(ENGINE, llama, lora=lora)
    differentiated = {}
    for path, module in session._base.model.named_modules():
        if path.endswith("_proj"):
            module.register_forward_hook(
                lambda module, inputs, output, path=path: differentiated.update({path: output.requires_grad})
            )
    session.step([BATCH], learning_rate=1e-2).result()
    assert len(differentiated) == 14
    assert {path for path, found in differentiated.items() if found} == {"model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_threads_and_bfloat16_repeat_bit_for_bit(tied_llama: Path, method: str) -> None:
    """Long enough rows for PyTorch to share its work; embeddings get gradients from two places in full tuning."""
    rows = random_rows(12, vocabulary=VOCABULARY, lengths=(100, 120))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weights = []
        for _ in range(2):
            session = open_training(
                ENGINE, tied_llama, method=method, model_config=ModelConfig(name="x", dtype="bfloat16")
            )
            session.step([batch_of(rows)], learning_rate=1e-3).result()
            weights.append(session.weights())
    finally:
        torch.set_num_threads(threads)
    for name, value in weights[0].items():
        np.testing.assert_array_equal(weights[1][name], value)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointed_layers_are_computed_twice_and_kept_once(llama: Path, method: str) -> None:
    """What the backward pass keeps of a step shrinks to the inputs of the layers."""
    kept = {}
    for checkpointing in (False, True):
        session = open_training(ENGINE, llama, method=method, gradient_checkpointing=checkpointing)
        sizes: list[int] = []

        def remember(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            session._base.split.body(flatten(BATCH, torch.device("cpu")))
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.3 * kept[False]
