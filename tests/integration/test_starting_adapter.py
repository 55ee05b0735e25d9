"""`ft train --from-adapter`: values come from the adapter, contradictions are refused, a stopped run goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.in_process import ft_here as ft
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model

import finetune
from finetune.adapters.mlx_lm import write_mlx_lm
from finetune.adapters.store import read_adapter
from finetune.config.load import load_config
from finetune.core.errors import CheckpointError, ConfigError
from finetune.core.paths import RunPaths


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_tiny_model(folder / "model")
    write_tiny_adapter(folder / "adapter", rank=4)
    write_mlx_lm(folder / "mlx", read_adapter(folder / "adapter"), layers=2)
    rows = [{"prompt": f"count from {n}", "completion": f"{n} {n + 1} {n + 2}"} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(material: Path, run: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": str(material / "model")},
        "lora": {"init_from": str(material / "adapter")},
        "training": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3},
        "data": {"train_file": str(material / "rows.jsonl"), "template": "chatml"},
        "output": {"output_dir": str(run), "eval_steps": 2, "checkpoint_steps": 2, "sample_prompts": 0},
    }
    return {name: values | changes.get(name, {}) for name, values in sections.items()}


@pytest.mark.parametrize("kind", ["adapter", "mlx"])
def test_a_run_takes_its_values_from_the_adapter(material: Path, tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    values = config(material, run, lora={"init_from": str(material / kind)})
    result = finetune.train(values)
    lora = load_config(RunPaths(run).config, environ={}).config.lora
    assert (lora.rank, lora.effective_alpha, lora.init_from) == (4, 8.0, str(material / kind))
    record = json.loads(RunPaths(run).run_info.read_text())
    assert len(record["adapter"]["files"]) == 2
    assert "Training starts from" in RunPaths(run).log.read_text()
    assert result.adapter is not None


def test_the_first_evaluation_is_the_last_one_of_the_run_that_made_the_adapter(material: Path, tmp_path: Path) -> None:
    first = finetune.train(config(material, tmp_path / "first"))
    second = finetune.train(config(material, tmp_path / "second", lora={"init_from": str(first.adapter)}))
    assert second.metrics["initial_eval_loss"] == first.metrics["best_eval_loss"]


def test_options_that_contradict_the_adapter_are_named_all_at_once(material: Path, tmp_path: Path) -> None:
    wrong = {"rank": 8, "alpha": 2.0, "use_rslora": True, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}
    values = config(material, tmp_path / "run", lora=wrong, training={"method": "dora"})
    with pytest.raises(ConfigError) as caught:
        finetune.train(values)
    assert len(caught.value.problems) == 6
    text = str(caught.value)
    for part in (
        "lora.rank = 8 (--lora-rank), and the adapter to start from",
        "has 4. Remove it.",
        "training.method = dora (--method)",
        "has lora.",
        "has one rank for all",
        "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_full_tuning_has_no_adapter_to_start_from(material: Path, tmp_path: Path) -> None:
    values = config(material, tmp_path / "run", training={"method": "full"})
    with pytest.raises(ConfigError, match=r"lora\.init_from = .* has no effect: training\.method is full"):
        finetune.train(values)


def test_a_run_goes_on_bit_for_bit_and_only_with_the_same_adapter(material: Path, tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "start", rank=4)
    values = config(material, tmp_path / "run", lora={"init_from": str(adapter)})
    finetune.train(values)
    paths = RunPaths(tmp_path / "run")
    before = (paths.adapter / "adapter_model.safetensors").read_bytes()
    finetune.resume(paths.checkpoint(2))
    assert (paths.adapter / "adapter_model.safetensors").read_bytes() == before
    weights = adapter / "adapter_model.safetensors"
    write_tiny_adapter(adapter, rank=4, seed=9)
    with pytest.raises(CheckpointError, match=r"adapter adapter_model\.safetensors was"):
        finetune.resume(paths.checkpoint(2))
    weights.unlink()
    assert ft("train", "--resume", paths.root).code == 1


def test_the_command_line_says_what_it_starts_from(material: Path, tmp_path: Path) -> None:
    ran = ft("train", "start", material / "model", material / "rows.jsonl", "--from-adapter", material / "mlx",
             "--max-steps", 1, "--output", tmp_path / "run")  # fmt: skip
    assert ran.code == 0, ran.err
    assert "Training starts from" in ran.out + ran.err
    ran = ft("train", "start", material / "model", material / "rows.jsonl", "--from-adapter", tmp_path / "none")
    assert ran.code == 1
    assert "holds no adapter_config.json" in ran.err
