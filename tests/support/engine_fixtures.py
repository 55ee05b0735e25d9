"""Fixtures of the tests that use an engine; each folder's conftest.py takes the ones it needs."""

from pathlib import Path

import pytest
from tests.support.tiny_models import VOCABULARY, make_model

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


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that dominate: eight layers, 26 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tmp_path_factory.mktemp("models") / "wide"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    return model
