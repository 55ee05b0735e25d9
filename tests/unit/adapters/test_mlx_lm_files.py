"""mlx-lm's files of all years: scale alone, scale and alpha, no scale, no configuration at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.unit.adapters.samples import MODULES, dora_adapter, plain_adapter, same_updates

from finetune.adapters.mlx_lm import write_mlx_lm
from finetune.adapters.store import adapter_files, is_adapter, read_adapter, read_adapter_config
from finetune.core.errors import ModelError

TODAY = {"fine_tune_type": "lora", "num_layers": 2}
BEFORE_SEPTEMBER_2024 = {"lora_layers": 2}


def write_old(directory: Path, document: dict[str, Any] | None, *, npz: bool = False) -> Path:
    """Files as mlx-lm wrote them before this project existed."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, update in plain_adapter().updates.items():
        tensors |= {f"{module}.lora_a": update.a.T, f"{module}.lora_b": update.b.T}
    if npz:
        np.savez(directory / "adapters.npz", **tensors)
    else:
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(contiguous, directory / "adapters.safetensors")
    if document is not None:
        (directory / "adapter_config.json").write_text(json.dumps(document))
    return directory


def test_files_are_transposed_and_carry_the_scale(tmp_path: Path) -> None:
    ours = plain_adapter()
    assert write_mlx_lm(tmp_path, ours, layers=2) == ()
    tensors = load_file(tmp_path / "adapters.safetensors")
    np.testing.assert_array_equal(tensors[f"{MODULES[0]}.lora_a"], ours.updates[MODULES[0]].a.T)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    keys = ["mlp.up_proj", "self_attn.q_proj"]
    assert document["lora_parameters"] == {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
    assert (document["num_layers"], document["fine_tune_type"]) == (2, "lora")
    same_updates(read_adapter(tmp_path), ours)


def test_dora_has_a_magnitude_of_one_axis(tmp_path: Path) -> None:
    ours = dora_adapter()
    write_mlx_lm(tmp_path, ours, layers=None)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (document["fine_tune_type"], document["num_layers"]) == ("dora", -1)
    assert load_file(tmp_path / "adapters.safetensors")[f"{MODULES[0]}.m"].shape == (8,)
    same_updates(read_adapter(tmp_path), ours)


def test_layers_are_counted_from_the_lowest_adapted_one(tmp_path: Path) -> None:
    adapter = plain_adapter()
    upper = type(adapter)(adapter.config, {MODULES[1]: adapter.updates[MODULES[1]]})
    write_mlx_lm(tmp_path, upper, layers=5)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_layers"] == 4


def test_ranks_and_scales_that_differ_are_said(tmp_path: Path) -> None:
    notices = write_mlx_lm(tmp_path, plain_adapter(ranks=(4, 3)), layers=2)
    assert "1 of 2 are filled up with zeros to 4" in notices[0]
    assert "B of 1 of 2 modules is rounded once" in notices[1]


def test_problems_are_reported_at_once(tmp_path: Path) -> None:
    write_old(tmp_path, {**TODAY, "fine_tune_type": "dora", "lora_parameters": {"rank": 4}})
    file = tmp_path / "adapters.safetensors"
    save_file({**load_file(file), "model.layers.0.weight": np.zeros(1, np.float32)}, file)
    with pytest.raises(ModelError) as caught:
        read_adapter(tmp_path)
    parts = ("scale = None", "unexpected tensor model.layers.0.weight", "the magnitude m is missing")
    assert all(part in str(caught.value) for part in parts)


def test_full_fine_tuning_is_no_adapter(tmp_path: Path) -> None:
    write_old(tmp_path, {"fine_tune_type": "full", "num_layers": 2, "lora_parameters": {}})
    with pytest.raises(ModelError, match="fine_tune_type 'full'"):
        read_adapter(tmp_path)
    write_old(tmp_path, {"fine_tune_type": "full", "num_layers": 2})
    with pytest.raises(ModelError, match="fine_tune_type is 'full'"):
        read_adapter(tmp_path)


def test_a_scale_beside_an_alpha_counts_alone_since_the_rule_is_certain(tmp_path: Path) -> None:
    parameters = {"rank": 4, "alpha": 16, "dropout": 0.0, "scale": 10.0}
    found = read_adapter(write_old(tmp_path, {**TODAY, "lora_parameters": parameters}))
    assert [found.scale(module) for module in MODULES] == [10.0, 10.0]
    assert "alpha = 16 has no effect" in found.notices[0]


def test_a_scale_beside_an_alpha_is_asked_for_where_the_rule_is_not_certain(tmp_path: Path) -> None:
    parameters = {"rank": 4, "alpha": 16, "dropout": 0.0, "scale": 10.0}
    write_old(tmp_path, {**BEFORE_SEPTEMBER_2024, "lora_parameters": parameters})
    with pytest.raises(ModelError, match=r"multiplied by 40 .* since then by 10 .*--scale SCALE"):
        read_adapter(tmp_path)
    assert read_adapter(tmp_path, scale=40.0).scale(MODULES[0]) == 40.0
    parameters["alpha"] = 4  # then both rules say the same
    write_old(tmp_path, {**BEFORE_SEPTEMBER_2024, "lora_parameters": parameters})
    assert read_adapter(tmp_path).scale(MODULES[0]) == 10.0


def test_a_missing_scale_is_asked_for_and_a_known_one_is_not_overruled(tmp_path: Path) -> None:
    write_old(tmp_path, {**TODAY, "lora_parameters": {"rank": 4, "alpha": 16}})
    with pytest.raises(ModelError, match="--scale SCALE"):
        read_adapter(tmp_path)
    assert read_adapter(tmp_path, scale=4.0).scale(MODULES[0]) == 4.0
    write_old(tmp_path, {**TODAY, "lora_parameters": {"rank": 4, "scale": 10.0}})
    with pytest.raises(ModelError, match=r"scale = 10, and --scale 4 says otherwise"):
        read_adapter(tmp_path, scale=4.0)


def test_an_npz_without_a_configuration_takes_the_default_of_its_time_and_says_so(tmp_path: Path) -> None:
    write_old(tmp_path, None, npz=True)
    for place in (tmp_path, tmp_path / "adapters.npz"):
        assert is_adapter(place)
        found = read_adapter(place)
        assert found.scale(MODULES[0]) == 20.0
        assert "the scale is taken to be 20" in found.notices[0]
        assert adapter_files(place) == (tmp_path / "adapters.npz",)
    np.testing.assert_array_equal(found.updates[MODULES[0]].a, plain_adapter().updates[MODULES[0]].a)
    assert read_adapter(tmp_path, scale=2.0).scale(MODULES[0]) == 2.0
    assert read_adapter(tmp_path, scale=2.0).notices == ()
    assert read_adapter_config(tmp_path).alpha == 80.0


def test_bfloat16_in_an_npz_is_read_as_mlx_saves_it(tmp_path: Path) -> None:
    """Two bytes without a type: the upper half of a float32. 1.5 is 0x3FC0, -2 is 0xC000."""
    values = np.array([[0x3FC0, 0xC000]], "<u2").view("V2")
    np.savez(tmp_path / "adapters.npz", **{"m.lora_a": values.T.copy(), "m.lora_b": values})
    np.testing.assert_array_equal(read_adapter(tmp_path).updates["m"].b, np.array([[1.5], [-2.0]], np.float32))


def test_an_npz_beside_a_configuration_follows_it(tmp_path: Path) -> None:
    write_old(tmp_path, {**TODAY, "lora_parameters": {"rank": 4, "scale": 3.0}}, npz=True)
    assert read_adapter(tmp_path).scale(MODULES[0]) == 3.0


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 torn"])
def test_a_torn_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapters.npz").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        read_adapter(tmp_path)


def test_an_npz_with_objects_runs_nothing(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return witness.touch, ()

    np.savez(tmp_path / "adapters.npz", **{"m.lora_a": np.array([Trap()], dtype=object)})
    with pytest.raises(ModelError, match="cannot be read"):
        read_adapter(tmp_path)
    assert not witness.exists()


def test_a_checkpoint_is_chosen_by_its_file(shared: Path) -> None:
    """mlx-lm keeps `0000100_adapters.safetensors` beside the result."""
    directory = shared / "adapters/mlx_qwen2.5-0.5b"
    result, early = read_adapter(directory), read_adapter(directory / "0000100_adapters.safetensors")
    module = "model.layers.20.self_attn.q_proj"
    expected = load_file(directory / "0000100_adapters.safetensors")[f"{module}.lora_b"].T
    np.testing.assert_array_equal(early.updates[module].b, expected)
    assert not np.array_equal(early.updates[module].b, result.updates[module].b)


def test_a_real_adapter_is_read(shared: Path) -> None:
    """Rank 8, q and v of layers 20 to 23. Trained after February 2025 (`mask_prompt`): alpha 16 had no effect."""
    found = read_adapter(shared / "adapters/mlx_qwen2.5-0.5b")
    expected = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(20, 24) for name in "qv"}
    assert found.updates.keys() == expected
    assert {found.scale(module) for module in expected} == {10.0}
    assert {update.rank for update in found.updates.values()} == {8}
    assert "alpha = 16 has no effect" in found.notices[0]
