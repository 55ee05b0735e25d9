"""Files of an export, without an engine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate
from finetune.adapters.peft import write_adapter
from finetune.adapters.store import read_adapter
from finetune.core.errors import ModelError
from finetune.export.card import CardFacts, model_card
from finetune.export.formats import copy_model, stored_type, write_mlx, write_peft
from finetune.export.verify import Comparison, Divergence

UNKNOWN: dict[str, Any] = {"available": (), "model_type": ""}  # the base is not on this machine


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    pairs = {
        f"model.layers.{layer}.mlp.up_proj": LoraUpdate(
            rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(12, 2)).astype(np.float32)
        )
        for layer in range(2)
    }
    config = AdapterConfig(rank=2, alpha=8.0, target_modules=("up_proj",), base_model="somewhere/else")
    write_adapter(tmp_path / "adapter", Adapter(config, pairs))
    return tmp_path / "adapter"


def same_weights(left: Path, right: Path) -> bool:
    a, b = read_adapter(left).updates, read_adapter(right).updates
    return a.keys() == b.keys() and all(np.array_equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


def test_a_peft_export_has_the_same_bytes_and_the_base_that_it_is_given(adapter: Path, tmp_path: Path) -> None:
    write_peft(adapter, tmp_path / "out", base="org/base", **UNKNOWN)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (adapter / weights).read_bytes()
    before = json.loads((adapter / "adapter_config.json").read_text())
    after = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert after == {**before, "base_model_name_or_path": "org/base"}


def test_an_mlx_export_reads_back_as_the_same_adapter(adapter: Path, tmp_path: Path) -> None:
    write_mlx(adapter, tmp_path / "out", base="org/base", layers=2, names={})
    document = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert same_weights(adapter, tmp_path / "out")
    assert document["lora_parameters"]["scale"] == 4.0
    assert (document["num_layers"], document["model"]) == (2, "org/base")


def test_an_mlx_adapter_becomes_a_peft_adapter(adapter: Path, tmp_path: Path) -> None:
    write_mlx(adapter, tmp_path / "mlx", base="org/base", layers=2, names={})
    write_peft(tmp_path / "mlx", tmp_path / "peft", base="org/base", **UNKNOWN)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert same_weights(adapter, tmp_path / "peft")


def test_modules_get_the_names_of_mlx_lm_where_they_differ(adapter: Path, tmp_path: Path) -> None:
    paths = {f"model.layers.{layer}.mlp.up_proj": f"model.h.{layer}.ff.up" for layer in range(2)}
    write_mlx(adapter, tmp_path / "out", base="org/base", layers=2, names=paths)
    assert read_adapter(tmp_path / "out").updates.keys() == set(paths.values())
    keys = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert keys == ["ff.up"]


def test_names_of_mlx_lm_become_those_of_transformers(adapter: Path, tmp_path: Path) -> None:
    paths = {f"model.layers.{layer}.mlp.up_proj": f"model.h.{layer}.mlp.c_fc" for layer in range(2)}
    write_mlx(adapter, tmp_path / "mlx", base="b", layers=2, names=paths)
    available = [f"transformer.h.{layer}.mlp.{name}" for layer in range(2) for name in ("c_fc", "c_proj")]
    write_peft(tmp_path / "mlx", tmp_path / "peft", base="b", available=available, model_type="gpt2")
    found = read_adapter(tmp_path / "peft")
    assert found.updates.keys() == {name for name in available if name.endswith("c_fc")}
    assert (found.config.target_modules, found.config.fan_in_fan_out) == (("c_fc",), True)


def test_names_that_are_not_certain_are_refused_without_the_base(adapter: Path, tmp_path: Path) -> None:
    paths = {f"model.layers.{layer}.mlp.up_proj": f"model.h.{layer}.mlp.c_fc" for layer in range(2)}
    write_mlx(adapter, tmp_path / "mlx", base="b", layers=2, names=paths)
    with pytest.raises(ModelError, match=r"(?s)model\.h\.0\.mlp\.c_fc.*model\.h\.1\.mlp\.c_fc.*--model"):
        write_peft(tmp_path / "mlx", tmp_path / "peft", base="b", **UNKNOWN)


def test_keys_that_peft_would_not_load_are_written_anew(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = {name.replace(".weight", ".default.weight"): array for name, array in load_file(weights).items()}
    before = read_adapter(adapter)
    save_file(tensors, weights)
    write_peft(adapter, tmp_path / "out", base="b", **UNKNOWN)
    assert "default" not in " ".join(load_file(tmp_path / "out" / weights.name))
    assert read_adapter(tmp_path / "out").updates.keys() == before.updates.keys()


def test_a_damaged_adapter_is_not_exported(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cannot be read"):
        write_peft(adapter, tmp_path / "out", base="org/base", **UNKNOWN)
    assert not (tmp_path / "out").exists()


def test_a_whole_model_is_copied_without_what_only_resuming_needs(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"):
        (checkpoint / name).write_text("{}")
    copy_model(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, "float32"), ({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "torch.float16"}, "float16")],
)
def test_the_type_of_stored_weights_is_that_of_the_configuration(
    tmp_path: Path, config: dict[str, str], expected: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_type(tmp_path) == expected


FACTS = CardFacts(
    title="mine",
    format="peft",
    base="org/base",
    method={"method": "LoRA", "rank": 8, "checkpoint": None},
    comparison=Comparison(120, 1.5e-6, 2.0, 1e-4, "float32 rounding only", Divergence(60, 2e-9, 0.31)),
    data={"rows trained": 1234},
    figures={"perplexity": 3.14159},
    template="chatml",
)


def test_the_card_says_what_how_from_what_and_how_good() -> None:
    card = model_card(FACTS)
    assert card.startswith("---\nbase_model: org/base\n")
    for text in (
        "- rank: 8",
        "- rows trained: 1,234",
        "- perplexity: 3.142",
        "`chatml`",
        "1.5e-06",
        "2.0e-09 nats a token",
        "PeftModel",
    ):
        assert text in card
    assert "checkpoint" not in card.split("## How to load it")[0]


def test_the_card_of_a_bare_adapter_has_no_empty_sections() -> None:
    card = model_card(replace(FACTS, data={}, figures={}, template=None, format="mlx"))
    assert "## Data" not in card
    assert "## Figures" not in card
    assert "mlx_lm" in card


def test_the_card_says_where_nothing_was_compared() -> None:
    card = model_card(replace(FACTS, comparison=None))
    assert "## Not checked" in card
    nameless = model_card(replace(FACTS, comparison=None, base=""))
    assert "base_model" not in nameless
    assert "Tuned from" not in nameless
    assert "## Checked" not in card
