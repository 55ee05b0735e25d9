"""The PyTorch engine takes the head of each architecture apart, in each type that it computes in."""

import pytest
import torch
from tests.support.tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

from finetune.engines.torch.attention import register
from finetune.engines.torch.head import split_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_never_needs_the_whole_model(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=register(), dtype=dtype).eval()
    split = split_model(model)
    assert split.head.path == "lm_head"
    capped = getattr(model.config, "final_logit_softcapping", None)
    assert float(split.head.finish(torch.tensor(1e6))) == pytest.approx(capped or 1e6)  # float32 holds both exactly
