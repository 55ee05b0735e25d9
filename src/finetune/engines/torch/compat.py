"""Everything that depends on the version of PyTorch or transformers: private names, moved functions, defaults."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.core.errors import ModelError

# Buffers that older releases of transformers stored with the weights.
_STORED_BUFFERS = (r"\.attn\.bias$", r"\.attn\.masked_bias$", r"rotary_emb\.inv_freq$")

_M_MMAP_THRESHOLD = -3  # of malloc.h
_X86 = {"x86_64", "AMD64"}


def versions() -> dict[str, str]:
    """Installed versions by distribution."""
    return {name: version(name) for name in ("torch", "transformers")}


def read_config(path: Path) -> Any:
    """config.json as transformers reads it. Runs no code of the directory, and asks no network.

    Raises ModelError where it is missing, damaged, or of an architecture that transformers lacks.
    """
    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (KeyError, ValueError, OSError) as error:
        found = re.search(r"model type `([^`]*)`", str(error))
        if found:
            raise _unknown_architecture(repr(found[1])) from None
        raise ModelError(f"{path / 'config.json'} cannot be read: {error}. Copy the model again.") from None
    except (StrictDataclassError, TypeError, ArithmeticError) as error:
        reason = str(error.__cause__ or error)
        raise ModelError(f"{path / 'config.json'} does not describe a model: {reason}. Copy the model again.") from None


def _unknown_architecture(model_type: str) -> ModelError:
    return ModelError(
        f"model_type {model_type} is not an architecture that transformers {version('transformers')} has. "
        "Choose another base model."
    )


class _WithoutWeights(TorchFunctionMode):
    """Gives matrices no memory while a model is built; what is computed from the configuration stays real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_model(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """transformers' model in evaluation mode, its matrices without memory, its buffers computed.

    Raises ModelError for values that no model can have.
    """
    try:
        with _WithoutWeights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
            )
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"config.json does not describe a {config.model_type} model: {error}.") from None
    return model.eval()


def is_stored_buffer(name: str) -> bool:
    """True for a tensor of a file that is no weight, and that today's models compute themselves."""
    return any(re.search(pattern, name) for pattern in _STORED_BUFFERS)


def body_prefix(model: Any) -> str:
    """What precedes the body's parameters in a model with a head, and may be left out in files."""
    return f"{model.base_model_prefix}."


def vocabulary_of(config: Any) -> int:
    """Number of logits."""
    return int(config.get_text_config().vocab_size)


def initializer_range(config: Any) -> float:
    """Standard deviation of a new model's matrices."""
    return float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)


def fast_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 faster than in float32."""
    if device.type == "cpu":
        return _cpu_has_bfloat16()
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "mps"


def fix_order_of_sums(device: torch.device) -> None:
    """On CUDA, for the whole process: kernels that add in a fixed order, with a warning where there is none."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _cpu_has_bfloat16() -> bool:
    if platform.machine() not in _X86:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether products with weights in oneDNN's order are there in this type, and right."""
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and _cpu_has_bfloat16())
    if not known or platform.machine() not in _X86 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    x, weight, bias = (torch.arange(float(rows * 32)).remainder(7).view(rows, 32) for rows in (3, 8, 1))
    x, weight, bias = x.to(dtype), weight.to(dtype), bias[0, :8].to(dtype)
    try:
        found = onednn_product(x, in_onednn_order(weight), bias)
    except (AttributeError, RuntimeError):  # private names of one release
        return False
    return torch.allclose(found, torch.nn.functional.linear(x, weight, bias), rtol=0.01)


def in_onednn_order(weight: Tensor) -> Tensor:
    """W [out, in] in the order in which oneDNN multiplies it, which is the same for all numbers of rows."""
    ordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return ordered


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias of x [N, in] and what `in_onednn_order` made of W. It has no gradient."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def cpu_capability() -> str:
    """The instruction set that PyTorch's own kernels use, such as AVX512."""
    return str(torch.backends.cpu.get_cpu_capability())


def return_large_blocks() -> None:
    """Let glibc give freed blocks of 4 MiB and more back to the system at once, in this process from here on.

    Else it keeps blocks of up to 32 MiB in its heap, where smaller ones that lie between them hold on to their space:
    1.3 times the peak of a 4-bit base of 1,000 million parameters, and twice that of a step with recomputed
    activations. Where neither is asked for, memory gains little and a step takes 3 to 15 % longer. With smaller blocks
    than these the process would be no larger than its arrays, and a step takes 1.3 to 2 times as long.
    """
    allocator = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(allocator, "mallopt"):
        allocator.mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)


def tie_weights(model: Any) -> None:
    """Let modules that share one weight share it again, after their parameters have been replaced."""
    model.tie_weights()


def quantization_of(config: Any) -> Mapping[str, Any] | None:
    """The `quantization_config` of config.json."""
    found = getattr(config, "quantization_config", None)
    return None if found is None else dict(found)


def tied_names(model: Any) -> set[str]:
    """Parameters that are another one under a second name."""
    return set(model.all_tied_weights_keys)
