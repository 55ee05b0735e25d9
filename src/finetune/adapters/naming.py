"""How the same module is called in transformers (PEFT's names) and in mlx-lm."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from finetune.core.errors import ModelError

_GPT2 = "gpt2"
# What Llama's family is called in both libraries.
_ALIKE = re.compile(r"model\.layers\.\d+\.(self_attn\.(q|k|v|o|qkv)_proj|mlp\.(gate|up|down|gate_up)_proj)|lm_head")


def within_layers(module: str) -> str:
    """The name from the list of layers on, `h.0.attn.c_attn`; outside of the layers the last part, `lm_head`."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[max(0, number - 1) :])


def transformers_names(modules: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """Modules of any library's names -> PEFT's, given those of the model; what is not found stays as it is.

    A module of another name (GPT-2's are `model.h.0...` in mlx-lm, `transformer.h.0...` in transformers) is the one
    module that is called the same from the number of its layer on.
    """
    known = set(available)
    counts = Counter(map(within_layers, known))
    tails = {tail: name for name in known if counts[tail := within_layers(name)] == 1}
    return {module: module if module in known else tails.get(within_layers(module), module) for module in modules}


def mlx_lm_names(modules: Iterable[str], *, model_type: str, paths: Mapping[str, str] | None) -> dict[str, str]:
    """PEFT's names -> mlx-lm's. `paths` is MLX's own list for this model, None where MLX is not at hand.

    Raises ModelError with every module whose name in mlx-lm is not certain then.
    """
    if paths is not None:
        return {module: paths.get(module, module) for module in modules}
    if model_type == _GPT2:
        return {module: f"model.{module.removeprefix('transformer.')}" for module in modules}
    names = list(modules)
    require_alike(names, "Export on a machine with MLX.")
    return {module: module for module in names}


def require_alike(modules: Iterable[str], cure: str) -> None:
    """Raise ModelError with every module whose name may differ between transformers and mlx-lm."""
    unknown = [module for module in modules if _ALIKE.fullmatch(module) is None]
    if unknown:
        title = "These modules may have other names in transformers than in mlx-lm, and the base cannot be asked:"
        raise ModelError("\n  ".join([title, *unknown]) + f"\n{cure}")


def stores_transposed(model_type: str) -> bool:
    """Whether transformers keeps linear weights as (in, out), which PEFT calls fan_in_fan_out."""
    return model_type == _GPT2
