"""What the headers say about size, and what tuning takes."""

from pathlib import Path

from tests.support.model_files import write_model

from finetune.models.info import describe_model
from finetune.models.source import resolve_model
from finetune.workflows.models import list_models


def test_parameters_and_lora_are_counted_by_hand(tmp_path: Path) -> None:
    info = describe_model(resolve_model(str(write_model(tmp_path))))

    # Embedding 8x4, one linear module 6x4, a norm of 4; LoRA of rank 2 adds 2 x (4 + 6).
    assert info.parameters == 32 + 24 + 4
    assert info.weight_bytes == 60 * 4
    assert [module.name for module in info.linear_modules] == ["model.layers.0.self_attn.q_proj"]
    assert info.lora_parameters(2) == 20
    assert not info.has_chat_template


def test_a_quantised_base_counts_what_its_words_stand_for(tmp_path: Path) -> None:
    # 4 bits: 64 columns are 8 words of 32 bits, with one scale and one bias for each group of 64.
    tensors = {"l.up_proj.weight": (3, 8), "l.up_proj.scales": (3, 1), "l.up_proj.biases": (3, 1)}
    model = write_model(
        tmp_path,
        config={"quantization": {"bits": 4, "group_size": 64}},
        tensors=tensors,
        dtypes={"l.up_proj.weight": "U32", "l.up_proj.scales": "BF16", "l.up_proj.biases": "BF16"},
    )

    info = describe_model(resolve_model(str(model)))

    assert (info.parameters, info.bits) == (3 * 64, 4)
    assert info.lora_parameters(1) == 64 + 3


def test_a_chat_template_is_found_in_either_place(tmp_path: Path) -> None:
    inside, beside = write_model(tmp_path / "inside"), write_model(tmp_path / "beside")
    (inside / "tokenizer_config.json").write_text('{"chat_template": "x"}', encoding="utf-8")
    (beside / "chat_template.jinja").write_text("x", encoding="utf-8")

    assert describe_model(resolve_model(str(inside))).has_chat_template
    assert describe_model(resolve_model(str(beside))).has_chat_template


def test_a_list_shows_broken_models_with_their_problem(tmp_path: Path) -> None:
    write_model(tmp_path / "good")
    (write_model(tmp_path / "torn") / "model.safetensors").write_bytes(b"torn")

    good, torn = (model for model in list_models([tmp_path]) if model.origin == "directory")

    assert (good.parameters, good.problem) == (60, None)
    assert torn.problem is not None
    assert "not a whole safetensors file" in torn.problem
