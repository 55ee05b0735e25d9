"""Whether a run may go on: what may differ from when it was started, and what may not."""

from collections.abc import Mapping
from typing import Any

from finetune.config.checks import idle_keys
from finetune.config.load import value_of
from finetune.config.options import options
from finetune.config.schema import RunConfig

BY_CONTENT = "compared by its content, so the files may have moved"
CADENCE = "when and what is written, not what is learned"
STOPPING = "when to stop, not how a step is done"

# Everything else must be as it was, because a step would be another one. The length of the run too
# (training.max_steps, training.epochs): the schedule depends on it. So must the engine, the type and the layout of
# rows (model.backend, model.dtype, training.packing): they change no more than rounding, but resuming promises bits.
MAY_CHANGE: Mapping[str, str] = {
    "model.name": BY_CONTENT,
    "model.revision": BY_CONTENT,
    "model.device": "where steps are computed; another one is warned of, because the last bits may differ",
    "lora.init_from": BY_CONTENT,
    "data.train_file": BY_CONTENT,
    "data.validation_file": BY_CONTENT,
    "output.output_dir": "the run stays where it is",
    "output.checkpoint_steps": CADENCE,
    "output.eval_steps": CADENCE,
    "output.eval_rows": CADENCE,
    "output.keep_checkpoints": CADENCE,
    "output.sample_prompts": CADENCE,
    "output.sample_tokens": CADENCE,
    "training.early_stopping_patience": STOPPING,
    "training.early_stopping_threshold": STOPPING,
}


def config_differences(started: RunConfig, now: RunConfig) -> list[str]:
    """One phrase for each option that must be as it was and is not. Options without effect do not count."""
    idle = idle_keys(started) & idle_keys(now)
    return [
        f"{key} was {before!r} and is now {after!r}"
        for key in options()
        if key not in MAY_CHANGE and key not in idle
        if (before := value_of(started, key)) != (after := value_of(now, key))
    ]


def fact_differences(started: Mapping[str, Any], now: Mapping[str, Any], *, of: str = "") -> list[str]:
    """One phrase for each value that differs between two nested mappings of plain JSON values."""
    found = []
    for key in [*started, *(key for key in now if key not in started)]:
        name = f"{of} {key}".strip()
        before, after = started.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += fact_differences(before, after, of=name)
        elif before != after:
            found.append(f"{name} was {_short(before)} and is now {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}…"
