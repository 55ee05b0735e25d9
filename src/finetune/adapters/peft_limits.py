"""What PEFT's files may say and this project does not do: each with the reason, so that nothing is dropped silently."""

from collections.abc import Mapping
from typing import Any

# Options that change what an adapter computes. A value that is not empty is refused.
_REFUSED: Mapping[str, str] = {
    "modules_to_save": "whole modules were trained beside the adapter, and only adapters can be loaded",
    "trainable_token_indices": "rows of the embedding were trained beside the adapter, and only adapters can be loaded",
    "lora_bias": "the update has biases, and only matrices are supported",
    "layer_replication": "the adapter belongs to a model with repeated layers",
    "target_parameters": "bare parameters were adapted, and only linear modules are supported",
    "alora_invocation_tokens": "the adapter acts from certain tokens on (aLoRA)",
    "use_qalora": "its inputs are pooled (QALoRA)",
    "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
    "arrow_config": "it chooses among several adapters (Arrow)",
    "kasa_config": "its update has singular values of its own (KaSA)",
    "monteclora_config": "its matrices are drawn at random (MonteCLoRA)",
}
# Starting points for which PEFT rewrites the base's own weights: the adapter means nothing beside the original base.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mifa")


def refused_options(document: Mapping[str, Any]) -> list[str]:
    """One phrase for each option of `adapter_config.json` that this project does not do."""
    kind = document.get("peft_type")
    if kind != "LORA":
        return [f"peft_type = {kind!r}, and only LORA is supported"]
    problems = [f"{key} = {document[key]!r}: {why}" for key, why in _REFUSED.items() if document.get(key)]
    if document.get("bias", "none") not in ("none", None):
        problems.append(
            f"bias = {document['bias']!r}: biases of the base were trained, and only adapters can be loaded"
        )
    start = document.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        problems.append(
            f"init_lora_weights = {start!r}: the base's own weights were changed for it. Save it as plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return problems


def refused_tensor(key: str) -> str:
    """A phrase for a tensor that is no part of a LoRA update of a linear module."""
    if ".lora_embedding_" in key:
        return f"{key}: an embedding was adapted, and only linear modules are supported"
    if ".modules_to_save." in key or key.endswith((".embed_tokens.weight", ".lm_head.weight")):
        return f"{key}: a whole module was trained beside the adapter, and only adapters can be loaded"
    if key.endswith(".bias"):
        return f"{key}: a bias was trained beside the adapter, and only adapters can be loaded"
    if any(f".{name}" in key for name in ("hada_w", "lokr_w", "ia3_l", "oft_", "vera_lambda")):
        return f"{key}: not LoRA"
    return f"unexpected tensor {key}"
