"""Names of modules in transformers and in mlx-lm."""

import pytest

from finetune.adapters.naming import mlx_lm_names, stores_transposed, transformers_names
from finetune.core.errors import ModelError


def test_gpt2_has_other_names_and_is_stored_transposed() -> None:
    theirs = {"transformer.h.0.attn.c_attn": "model.h.0.attn.c_attn"}
    assert mlx_lm_names(theirs, model_type="gpt2", paths=None) == theirs
    available = [*theirs, "transformer.h.1.attn.c_attn", "lm_head"]
    assert transformers_names(theirs.values(), available) == {ours: name for name, ours in theirs.items()}
    assert stores_transposed("gpt2")
    assert not stores_transposed("llama")


def test_the_list_of_the_engine_counts_where_there_is_one() -> None:
    assert mlx_lm_names(["a.b", "lm_head"], model_type="any", paths={"a.b": "c.b"}) == {
        "a.b": "c.b",
        "lm_head": "lm_head",
    }


def test_llamas_family_is_called_the_same_and_anything_else_is_refused_at_once() -> None:
    alike = ["model.layers.3.self_attn.q_proj", "model.layers.0.mlp.gate_up_proj", "lm_head"]
    assert mlx_lm_names(alike, model_type="llama", paths=None) == {name: name for name in alike}
    with pytest.raises(ModelError) as caught:
        mlx_lm_names([*alike, "gpt_neox.layers.0.attention.dense", "x.y"], model_type="gpt_neox", paths=None)
    assert all(name in str(caught.value) for name in ("gpt_neox.layers.0.attention.dense", "x.y"))
    assert "q_proj" not in str(caught.value)


def test_a_name_that_the_model_does_not_have_stays() -> None:
    assert transformers_names(["model.layers.9.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]) == {
        "model.layers.9.mlp.up_proj": "model.layers.9.mlp.up_proj"
    }
