"""Models of mlx-lm whose rows cannot share a pass are decoded row by row, with the same tokens as alone."""

from pathlib import Path

import pytest
from tests.support.decoding import decode
from tests.support.engines import BASE, open_inference
from tests.support.subjects import prompt
from tests.support.tiny_models import CONFIGS, VOCABULARY, WINDOWED, make_model
from transformers import AutoModelForCausalLM, MambaConfig

from finetune.config.schema import ModelConfig
from finetune.core.types import GenerationRequest, Sampling
from finetune.engines.mlx.loading import load_base
from finetune.engines.mlx.sharing import rows_can_share
from finetune.engines.registry import choose_engine

REQUESTS = (
    GenerationRequest(prompt(9), 8),
    GenerationRequest(prompt(1), 5),
    GenerationRequest(prompt(9), 8, Sampling(temperature=1.0, seed=3)),
)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its layers keep a state, and no keys or values."""
    directory = tmp_path_factory.mktemp("models") / "mamba"
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def test_rows_of_another_kind_of_cache_are_decoded_one_by_one(mamba: Path) -> None:
    assert not rows_can_share(load_base(mamba, BASE))
    session = open_inference(choose_engine(ModelConfig(name="any", backend="mlx")), mamba)
    together = decode(session.generator(), *REQUESTS)
    assert together == [decode(session.generator(), request)[0] for request in REQUESTS]


@pytest.mark.parametrize("kind", sorted({*CONFIGS, *WINDOWED}))
def test_rows_of_every_proven_architecture_share_a_pass(kind: str, tmp_path: Path) -> None:
    assert rows_can_share(load_base(make_model(tmp_path, kind), BASE))
