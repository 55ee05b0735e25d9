"""What other programs write in PEFT's layout: adapter names inside keys, shapes of the magnitude, other methods."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.unit.adapters.samples import MODULES, dora_adapter, plain_adapter, same_updates

from finetune.adapters.peft import write_adapter
from finetune.adapters.store import adapter_files, is_adapter, named_base, read_adapter
from finetune.core.errors import ModelError


def rewrite_tensors(directory: Path, rename: object) -> None:
    """Write the tensors again under the names (and shapes) that `rename` gives them."""
    file = directory / "adapter_model.safetensors"
    save_file(dict(rename(name, array) for name, array in load_file(file).items()), file)  # type: ignore[operator]


@pytest.mark.parametrize(
    "magnitude", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"]
)
@pytest.mark.parametrize("shape", [(-1,), (1, -1), (-1, 1)])
def test_a_magnitude_is_read_in_every_form_that_peft_gives_it(
    tmp_path: Path, magnitude: str, shape: tuple[int, ...]
) -> None:
    written = dora_adapter()
    write_adapter(tmp_path, written)

    def rename(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        if not name.endswith("lora_magnitude_vector"):
            return name, array
        return name.replace("lora_magnitude_vector", magnitude), array.reshape(shape)

    rewrite_tensors(tmp_path, rename)
    if magnitude.endswith("default.weight"):  # then PEFT names the adapter in every key
        rewrite_tensors(tmp_path, lambda name, array: (with_name(name, "default"), array))
    same_updates(read_adapter(tmp_path), written)


def with_name(key: str, name: str) -> str:
    for matrix in ("lora_A", "lora_B"):
        key = key.replace(f".{matrix}.weight", f".{matrix}.{name}.weight")
    return key


def test_a_key_may_name_the_adapter_but_not_several(tmp_path: Path) -> None:
    written = plain_adapter()
    write_adapter(tmp_path, written)
    rewrite_tensors(tmp_path, lambda name, array: (with_name(name, "default"), array))
    same_updates(read_adapter(tmp_path), written)
    rewrite_tensors(tmp_path, lambda name, array: (name.replace("lora_B.default", "lora_B.other"), array))
    with pytest.raises(ModelError, match=r"several adapters \('default', 'other'\)"):
        read_adapter(tmp_path)


def test_what_is_beside_the_adapter_is_refused_with_its_name_and_everything_at_once(tmp_path: Path) -> None:
    write_adapter(tmp_path, plain_adapter())
    file = tmp_path / "adapter_model.safetensors"
    start = "base_model.model.model."
    extra = (
        f"{start}embed_tokens.lora_embedding_A",
        f"{start}layers.0.mlp.up_proj.bias",
        "base_model.model.lm_head.modules_to_save.weight",
        f"{start}layers.0.mlp.up_proj.hada_w1_a",
    )
    save_file({**load_file(file), **{name: np.ones(3, np.float32) for name in extra}}, file)
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path)
    for why in ("an embedding was adapted", "a bias was trained", "a whole module was trained", "hada_w1_a: not LoRA"):
        assert why in str(caught.value)


@pytest.mark.parametrize("kind", ["LOHA", "IA3", "ADALORA", None])
def test_another_method_is_refused_by_name(tmp_path: Path, kind: str | None) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(ModelError, match=f"peft_type = {kind!r}, and only LORA"):
        read_adapter(tmp_path)


def test_the_options_that_are_refused_are_refused_at_once(tmp_path: Path) -> None:
    write_adapter(tmp_path, plain_adapter())
    path = tmp_path / "adapter_config.json"
    wrong = {"modules_to_save": ["lm_head"], "bias": "all", "lora_bias": True, "layer_replication": [[0, 1]], "r": "x"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path)
    assert all(f"\n  {key} = " in str(caught.value) for key in wrong)


def test_an_adapter_may_be_named_by_its_weights(tmp_path: Path) -> None:
    written = plain_adapter()
    write_adapter(tmp_path, written)
    weights = tmp_path / "adapter_model.safetensors"
    same_updates(read_adapter(weights), written)
    assert is_adapter(weights)
    assert not is_adapter(tmp_path / "adapter_config.json")
    assert adapter_files(weights) == adapter_files(tmp_path) == (weights, tmp_path / "adapter_config.json")
    assert named_base(tmp_path) == named_base(weights) == "base"
    with pytest.raises(ModelError, match="holds no adapter"):
        read_adapter(tmp_path / "adapter_config.json")
    with pytest.raises(ModelError, match="PEFT's files say their scale"):
        read_adapter(tmp_path, scale=3.0)


def test_other_names_keep_ranks_and_scales(tmp_path: Path) -> None:
    adapter = plain_adapter(ranks=(4, 2), alpha_pattern={MODULES[0]: 5.0}, target_modules=MODULES)
    names = {MODULES[0]: "other.h.0.attn.q", MODULES[1]: "other.h.1.mlp.up"}
    renamed = adapter.renamed(names)
    for old, new in names.items():
        assert renamed.scale(new) == adapter.scale(old)
        assert renamed.config.rank_of(new) == adapter.config.rank_of(old)
    assert renamed.config.target_modules == tuple(names.values())
    assert adapter.renamed({}) is adapter
