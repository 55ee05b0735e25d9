"""Adapter files: PEFT's layout, mlx-lm's layout, and everything that can be wrong with them."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.adapters import patterns
from finetune.adapters.adapter import Adapter, AdapterConfig, LoraUpdate, compact_targets
from finetune.adapters.lora import lora_scale, seeded_init
from finetune.adapters.peft import write_adapter
from finetune.adapters.store import is_adapter, read_adapter, read_adapter_config
from finetune.adapters.tensors import read_tensors
from finetune.core.errors import ModelError

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")


def pair(rank: int, seed: int = 0) -> LoraUpdate:
    rng = np.random.default_rng(seed)
    return LoraUpdate(rng.normal(size=(rank, 6)).astype(np.float32), rng.normal(size=(8, rank)).astype(np.float32))


def adapter(**config: object) -> Adapter:
    values = {"rank": 4, "alpha": 8.0, "target_modules": ("q_proj", "up_proj"), "base_model": "base", **config}
    return Adapter(AdapterConfig(**values), {module: pair(4, index) for index, module in enumerate(MODULES)})  # type: ignore[arg-type]


def assert_same_pairs(left: Adapter, right: Adapter) -> None:
    assert left.updates.keys() == right.updates.keys()
    for module in left.updates:
        np.testing.assert_array_equal(left.updates[module].a, right.updates[module].a)
        np.testing.assert_array_equal(left.updates[module].b, right.updates[module].b)


def rewrite(directory: Path, **values: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_adapter_reads_back_as_it_was_written(tmp_path: Path) -> None:
    written = adapter(
        dropout=0.1, use_rslora=True, fan_in_fan_out=True, rank_pattern={}, alpha_pattern={"up_proj": 2.5}
    )
    write_adapter(tmp_path, written)
    found = read_adapter(tmp_path)
    assert found.config == written.config
    assert read_adapter_config(tmp_path) == written.config
    assert is_adapter(tmp_path)
    assert not is_adapter(tmp_path / "elsewhere")
    assert found.parameters == 2 * 4 * (6 + 8)
    assert_same_pairs(found, written)


def test_files_have_pefts_names_and_keys(tmp_path: Path) -> None:
    write_adapter(tmp_path, adapter())
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == sorted(
        f"base_model.model.{module}.lora_{which}.weight" for module in MODULES for which in "AB"
    )
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    needed = "r lora_alpha lora_dropout bias task_type base_model_name_or_path use_dora use_rslora rank_pattern "
    needed += "alpha_pattern modules_to_save fan_in_fan_out inference_mode peft_type target_modules"
    assert set(needed.split()) <= document.keys()
    assert (document["r"], document["lora_alpha"], document["task_type"]) == (4, 8, "CAUSAL_LM")


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / name, adapter())
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_scale_follows_pattern_and_rslora() -> None:
    plain = AdapterConfig(rank=4, alpha=8.0, target_modules=(), alpha_pattern={"layers.1.mlp.up_proj": 2.0})
    assert plain.scale("model.layers.0.mlp.up_proj", 4) == 2.0
    assert plain.scale("model.layers.1.mlp.up_proj", 4) == 0.5
    assert plain.scale("model.layers.11.mlp.up_proj", 4) == 2.0
    assert lora_scale(8.0, 4, use_rslora=True) == 8.0 / math.sqrt(4)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_dora": True}, "use_dora is True, and the magnitude is missing"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"r": 0}, "r = 0 is not a rank"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
        ({"lora_alpha": 0}, "lora_alpha = 0 is not a scale numerator"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is no pattern"),
        ({"rank_pattern": {"(" * 500 + ")" * 500: 2}}, r"rank_pattern: '\(\(.*\.\.\. is no pattern"),
        ({"rank_pattern": {"a" * 2000: 2}}, "is no pattern"),
        ({"alpha_pattern": {"a{99999999999999999999}": 2}}, "is no pattern"),
        ({"target_modules": 7}, "target_modules = 7 is neither a pattern nor a list of names"),
        ({"target_modules": [["q_proj"]]}, "target_modules = .* is neither a pattern nor a list of names"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: None is not a scale numerator"),
        ({"rank_pattern": [1]}, r"rank_pattern = \[1\] is not a mapping"),
        ({"init_lora_weights": "pissa_niter_4"}, "the base's own weights were changed"),
        ({"trainable_token_indices": [1]}, "rows of the embedding were trained"),
        ({"r": 3}, "rank 4, and the configuration says 3"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    write_adapter(tmp_path, adapter())
    rewrite(tmp_path, **change)
    with pytest.raises(ModelError, match=expected):
        read_adapter(tmp_path)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_be_matched_for_ever_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    write_adapter(tmp_path, adapter())
    forever = r"((.|\w)*)*[^\w.]"
    rewrite(tmp_path, **{key: {"up_proj": 4, forever: 4}})
    began = time.process_time()
    with pytest.raises(ModelError, match=r"takes more than 0\.5 s to compare") as caught:
        read_adapter(tmp_path)
    assert repr(forever) in str(caught.value)
    assert time.process_time() - began < patterns.SECONDS + 5


def test_all_problems_of_the_tensors_are_reported_at_once(tmp_path: Path) -> None:
    write_adapter(tmp_path, adapter())
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.{MODULES[0]}.lora_B.weight"]
    tensors[f"base_model.model.{MODULES[1]}.lora_A.weight"] = np.zeros((3, 6), np.float32)
    tensors["strange"] = np.zeros(1, np.float32)
    save_file(tensors, file)
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path)
    for part in (
        f"{MODULES[0]}: lora_B is missing",
        f"{MODULES[1]}: A (3, 6) and B (8, 4)",
        "unexpected tensor strange",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "holds no adapter_config.json"),
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ("{}", "neither PEFT"),
    ],
)
def test_a_directory_that_is_no_adapter_is_refused(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=expected):
        read_adapter(tmp_path)


def test_damaged_or_missing_weights_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, adapter())
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ModelError, match="cannot be read"):
        read_adapter(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        read_adapter(tmp_path)
    save_file({}, file)
    with pytest.raises(ModelError, match="holds no LoRA tensor"):
        read_adapter(tmp_path)
    save_file({"x": np.zeros(3, np.int32)}, file)
    with pytest.raises(ModelError, match="tensors of type I32"):
        read_adapter(tmp_path)


def test_bfloat16_and_half_tensors_become_float32(tmp_path: Path) -> None:
    """bfloat16 is the upper half of a float32: 1.5 is 0x3FC0, -2 is 0xC000."""
    header = json.dumps(
        {
            "brain": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
            "half": {"dtype": "F16", "shape": [1, 2], "data_offsets": [4, 8]},
        }
    ).encode()
    data = np.array([0x3FC0, 0xC000], "<u2").tobytes() + np.array([0.25, 3.0], "<f2").tobytes()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + data)
    found = read_tensors(tmp_path / "x")
    np.testing.assert_array_equal(found["brain"], np.array([1.5, -2.0], np.float32))
    np.testing.assert_array_equal(found["half"], np.array([[0.25, 3.0]], np.float32))


def test_targets_are_compact_where_that_says_the_same() -> None:
    available = ["a.0.q_proj", "a.1.q_proj", "a.0.up_proj"]
    assert compact_targets(["a.0.q_proj", "a.1.q_proj"], available) == ("q_proj",)
    assert compact_targets(["a.0.q_proj"], available) == ("a.0.q_proj",)


def test_the_draw_of_a_follows_seed_and_name_alone() -> None:
    draw = seeded_init(3)
    np.testing.assert_array_equal(draw("m", 4, 16), seeded_init(3)("m", 4, 16))
    assert np.abs(draw("m", 4, 16) - draw("n", 4, 16)).max() > 0.01
    assert np.abs(draw("m", 64, 16)).max() <= 0.25
    assert draw("m", 64, 16).std() == pytest.approx(0.25 / math.sqrt(3), rel=0.05)
