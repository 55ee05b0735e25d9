"""Which engine runs a configuration, and what is said where it cannot."""

from pathlib import Path

import pytest
from tests.support.model_files import write_model

from finetune.config.load import load_config
from finetune.config.schema import ModelConfig
from finetune.core.errors import ConfigError, UsageError
from finetune.engines import registry
from finetune.engines.base import Feature
from finetune.engines.registry import EngineChoice, choose, load_engine, needed_features, require


def machine(monkeypatch: pytest.MonkeyPatch, *installed: str, apple: bool = False) -> None:
    monkeypatch.setattr(registry, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(registry, "on_apple_silicon", lambda: apple)


@pytest.mark.parametrize(
    ("installed", "apple", "engine", "reason"),
    [
        (("mlx", "pytorch"), True, "mlx", "the faster one on Apple silicon"),
        (("mlx", "pytorch"), False, "pytorch", "PyTorch is installed, and this is not Apple silicon"),
        (("mlx",), False, "mlx", "PyTorch, faster on this machine, is not installed"),
    ],
)
def test_auto_takes_the_faster_engine_that_is_there_and_says_why(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], apple: bool, engine: str, reason: str
) -> None:
    machine(monkeypatch, *installed, apple=apple)

    assert choose(ModelConfig(name="demo")) == EngineChoice(engine, f"auto: {reason}")


def test_a_named_engine_is_taken_whatever_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, "mlx", "pytorch", apple=True)

    assert str(choose(ModelConfig(name="demo", backend="pytorch"))) == "pytorch (model.backend=pytorch)"


def test_auto_takes_mlx_for_files_that_only_mlx_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, "mlx", "pytorch")
    model = write_model(tmp_path / "model", config={"quantization": {"bits": 4, "group_size": 64}})

    assert choose(ModelConfig(name=str(model))).name == "mlx"


@pytest.mark.parametrize(("engine", "install"), [("mlx", "pip install 'mlx[cpu]'"), ("pytorch", "finetune[torch]")])
def test_a_library_that_is_missing_is_named_with_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, engine: str, install: str
) -> None:
    machine(monkeypatch)

    with pytest.raises(UsageError, match="is not installed") as error:
        load_engine(choose(ModelConfig(name="demo", backend=engine)))
    assert install in str(error.value)


def test_an_option_that_an_engine_lacks_is_refused_with_the_engine_that_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, "mlx")
    features = {"mlx": frozenset({Feature.LORA}), "pytorch": frozenset({Feature.LORA, Feature.DORA})}
    monkeypatch.setattr(registry, "FEATURES", features)

    with pytest.raises(ConfigError) as error:
        require("mlx", [Feature.LORA, Feature.DORA, Feature.PACKING])
    dora, packing = error.value.problems
    assert dora.startswith("training.method=dora: the mlx engine of this version cannot do it; the pytorch engine can.")
    assert "Set model.backend: pytorch, or leave it out. Install PyTorch: `pip install 'finetune[torch]'`" in dora
    assert packing == "training.packing: no engine of this version can do it. Leave it out."


def test_only_what_a_configuration_asks_for_is_needed() -> None:
    needed = ["model.name=demo", "data.train_file=rows.jsonl"]
    plain = load_config(None, environ={}, overrides=needed).config
    rich = [*needed, "training.method=dora", "training.packing=true", "model.quantization=4bit"]

    assert needed_features(plain) == {Feature.LORA}
    assert needed_features(load_config(None, environ={}, overrides=rich).config) == {
        Feature.DORA,
        Feature.PACKING,
        Feature.QUANTIZATION,
    }
