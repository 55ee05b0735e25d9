"""Files of an export, without an engine."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate
from finetune.adapters.peft import write_adapter
from finetune.adapters.store import read_adapter
from finetune.core.errors import ModelError
from finetune.export.card import CardFacts, model_card
from finetune.export.formats import copy_model, stored_type, write_mlx, write_peft
from finetune.export.verify import Comparison


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
    write_peft(adapter, tmp_path / "out", base="org/base")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (adapter / weights).read_bytes()
    before = json.loads((adapter / "adapter_config.json").read_text())
    after = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert after == {**before, "base_model_name_or_path": "org/base"}


def test_an_mlx_export_reads_back_as_the_same_adapter(adapter: Path, tmp_path: Path) -> None:
    write_mlx(adapter, tmp_path / "out", base="org/base", model_config={"num_hidden_layers": 2}, paths={})
    document = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert same_weights(adapter, tmp_path / "out")
    assert document["lora_parameters"]["scale"] == 4.0
    assert (document["num_layers"], document["model"]) == (2, "org/base")


def test_an_mlx_adapter_becomes_a_peft_adapter(adapter: Path, tmp_path: Path) -> None:
    write_mlx(adapter, tmp_path / "mlx", base="org/base", model_config={"num_hidden_layers": 2}, paths={})
    write_peft(tmp_path / "mlx", tmp_path / "peft", base="org/base")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert same_weights(adapter, tmp_path / "peft")


def test_modules_get_the_names_of_mlx_lm_where_they_differ(adapter: Path, tmp_path: Path) -> None:
    paths = {f"model.layers.{layer}.mlp.up_proj": f"model.h.{layer}.ff.up" for layer in range(2)}
    write_mlx(adapter, tmp_path / "out", base="org/base", model_config={"n_layer": 2}, paths=paths)
    assert read_adapter(tmp_path / "out").updates.keys() == set(paths.values())
    keys = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert keys == ["ff.up"]


def test_a_model_without_a_number_of_layers_is_named(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="num_hidden_layers"):
        write_mlx(adapter, tmp_path / "out", base="org/base", model_config={}, paths={})


def test_a_damaged_adapter_is_not_exported(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cannot be read"):
        write_peft(adapter, tmp_path / "out", base="org/base")
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
    comparison=Comparison(120, 1.5e-6, 2.0, 1e-4, "float32 rounding only"),
    data={"rows trained": 1234},
    figures={"perplexity": 3.14159},
    template="chatml",
)


def test_the_card_says_what_how_from_what_and_how_good() -> None:
    card = model_card(FACTS)
    assert card.startswith("---\nbase_model: org/base\n")
    for text in ("- rank: 8", "- rows trained: 1,234", "- perplexity: 3.142", "`chatml`", "1.5e-06", "PeftModel"):
        assert text in card
    assert "checkpoint" not in card.split("## How to load it")[0]


def test_the_card_of_a_bare_adapter_has_no_empty_sections() -> None:
    card = model_card(replace(FACTS, data={}, figures={}, template=None, format="mlx"))
    assert "## Data" not in card
    assert "## Figures" not in card
    assert "mlx_lm" in card
