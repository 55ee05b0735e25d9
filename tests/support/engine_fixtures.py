"""Fixtures of the tests that use an engine; each folder's conftest.py takes the ones it needs."""

from pathlib import Path

import pytest
from tests.support.tiny_models import make_model

from finetune.config.schema import ModelConfig
from finetune.engines.base import Engine
from finetune.engines.registry import choose_engine


@pytest.fixture(scope="session", params=["mlx", "pytorch"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return choose_engine(ModelConfig(name="any", backend=request.param))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "llama-tied", "llama-tied")
