"""Rules that join two options. What cannot work, or has no effect, is refused; what is only unusual is advice."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from finetune.config.layers import Problem, short
from finetune.config.schema import RunConfig
from finetune.config.sources import Layer, Source

Sources: TypeAlias = Mapping[str, Source]


@dataclass(frozen=True, slots=True)
class Check:
    """`holds` says whether the rule is broken; `sentence` what to do. The first key is the one that is reported."""

    keys: tuple[str, ...]
    broken: Callable[[RunConfig], bool]
    sentence: str


CHECKS: tuple[Check, ...] = (
    Check(
        ("model.quantization", "training.method"),
        lambda c: c.model.quantization is not None and c.training.method == "full",
        "full fine-tuning changes every weight, and quantised weights cannot be changed. "
        "Set training.method to lora, or model.quantization to null",
    ),
    Check(
        ("model.quantization", "model.init"),
        lambda c: c.model.quantization is not None and c.model.init == "random",
        "weights drawn at random are not quantised. Set model.quantization to null",
    ),
    Check(
        ("training.warmup_steps", "training.max_steps"),
        lambda c: bool(c.training.max_steps and (c.training.warmup_steps or 0) >= c.training.max_steps),
        "the run would end before the warm-up does. Set it below training.max_steps",
    ),
    Check(
        ("training.min_learning_rate", "training.learning_rate"),
        lambda c: c.training.min_learning_rate > c.training.learning_rate,
        "the floor of the schedule is above its peak. Set it below training.learning_rate",
    ),
    Check(
        ("training.max_batch_tokens", "data.max_length"),
        lambda c: (c.training.max_batch_tokens or 10**12) < (c.data.max_length or 0),
        "a row of data.max_length tokens does not fit. Raise it to data.max_length at least",
    ),
    Check(
        ("data.validation_file", "data.train_file"),
        lambda c: c.data.validation_file is not None and c.data.validation_file == c.data.train_file,
        "this is the training file: evaluation would measure what was trained on. "
        "Remove it, and a part of the rows is kept for validation",
    ),
    Check(("data.train_file",), lambda c: c.data.train_file == (), "the list is empty. Name at least one file"),
    Check(
        ("lora.target_modules",),
        lambda c: c.lora.target_modules == (),
        "the list is empty, so nothing would be trained. Name modules, or write all-linear",
    ),
)


@dataclass(frozen=True, slots=True)
class NoEffect:
    """A key that does nothing while another one has a certain value."""

    key: str
    because: str
    switched_off: Callable[[RunConfig], bool]
    sentence: str


def _full(config: RunConfig) -> bool:
    return config.training.method == "full"


LORA_KEYS = ("rank", "alpha", "dropout", "target_modules", "use_rslora", "rank_pattern", "init_from")

NO_EFFECT: tuple[NoEffect, ...] = (
    NoEffect(
        "data.validation_split",
        "data.validation_file",
        lambda c: c.data.validation_file is not None and c.data.validation_split > 0,
        "data.validation_file is given too, so no rows are split off. Keep one of the two",
    ),
    NoEffect(
        "training.min_learning_rate",
        "training.schedule",
        lambda c: c.training.schedule == "constant" and c.training.min_learning_rate > 0,
        "a constant schedule has no floor. Remove it, or choose linear or cosine",
    ),
    NoEffect(
        "training.beta2",
        "training.optimizer",
        lambda c: c.training.optimizer in ("sgd", "adafactor"),
        "this optimizer has no second moment with a fixed decay. Remove it, or choose adamw",
    ),
    NoEffect(
        "training.epsilon",
        "training.optimizer",
        lambda c: c.training.optimizer in ("sgd", "adafactor"),
        "this optimizer does not use it. Remove it, or choose adamw",
    ),
    NoEffect(
        "training.beta1",
        "training.optimizer",
        lambda c: c.training.optimizer == "adafactor",
        "adafactor keeps no first moment. Remove it, or choose adamw",
    ),
    NoEffect(
        "training.early_stopping_threshold",
        "training.early_stopping_patience",
        lambda c: c.training.early_stopping_patience is None,
        "early stopping is off. Set training.early_stopping_patience, or remove it",
    ),
    NoEffect(
        "training.early_stopping_patience",
        "data.validation_split",
        lambda c: c.data.validation_file is None and c.data.validation_split == 0,
        "nothing is evaluated, because no rows are kept for validation. "
        "Give data.validation_file, or a data.validation_split above 0",
    ),
    NoEffect(
        "output.sample_tokens",
        "output.sample_prompts",
        lambda c: c.output.sample_prompts == 0,
        "no samples are asked for. Raise output.sample_prompts, or remove it",
    ),
    *(
        NoEffect(
            f"lora.{name}", "training.method", _full, "training.method is full, so there are no adapters. Remove it"
        )
        for name in LORA_KEYS
    ),
)


def failed_checks(config: RunConfig, sources: Sources, *, ignore: Collection[str] = ()) -> list[Problem]:
    """The broken rules. Rules about keys in `ignore` (already reported) are left out."""
    broken = [
        _report(config, sources, check.keys[0], check.sentence)
        for check in CHECKS
        if not set(check.keys) & set(ignore) and check.broken(config)
    ]
    useless = [
        _report(config, sources, rule.key, f"has no effect: {rule.sentence}")
        for rule in NO_EFFECT
        if not {rule.key, rule.because} & set(ignore) and _was_meant(rule, sources) and rule.switched_off(config)
    ]
    return broken + useless


def idle_keys(config: RunConfig) -> frozenset[str]:
    """The keys that do nothing in this configuration."""
    return frozenset(rule.key for rule in NO_EFFECT if rule.switched_off(config))


def _was_meant(rule: NoEffect, sources: Sources) -> bool:
    """A value is only a mistake where it was given on purpose, and not switched off by a later layer.

    `ft train --config run.yml --method full` may leave the lora section of run.yml unused; a file that says
    both may not.
    """
    own = sources[rule.key].layer
    return own > Layer.PROFILE and own >= sources[rule.because].layer


def _report(config: RunConfig, sources: Sources, key: str, sentence: str) -> Problem:
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    source = sources[key]
    return Problem(source, f"{key} = {short(value)} ({source.place}): {sentence}.")
