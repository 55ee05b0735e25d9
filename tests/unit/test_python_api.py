"""`import finetune` and what it offers."""

import subprocess
import sys

import pytest

import finetune

HEAVY = ("mlx", "mlx_lm", "torch", "transformers", "numpy", "matplotlib", "pydantic", "rich", "typer")


def test_importing_the_package_imports_no_library():
    code = "import sys, finetune; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not set(done.stdout.split()) & set(HEAVY)


def test_every_name_that_is_offered_is_there():
    for name in finetune.__all__:
        assert getattr(finetune, name) is not None
        assert name in dir(finetune)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        _ = finetune.fly


def test_a_mapping_without_sections_is_refused_with_an_example():
    with pytest.raises(finetune.FinetuneError, match=r"model: give a mapping"):
        finetune.train({"model": "demo"})


def test_a_mapping_is_checked_like_a_file():
    with pytest.raises(finetune.FinetuneError, match=r"learning_rat"):
        finetune.train({"model": {"name": "demo"}, "data": {"train_file": "x"}, "training": {"learning_rat": 1e-3}})
