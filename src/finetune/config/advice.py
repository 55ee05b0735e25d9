"""Sentences about values that work but are unusual. Nothing here fails: the person decides.

The ranges are common practice for tuning language models of 0.1 to 70 billion parameters with Adam-like
optimizers; each sentence names the value, the usual one, and the option to change.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from finetune.config.schema import RunConfig

LORA_RATES = (2e-5, 1e-3)
FULL_RATES = (1e-6, 1e-4)
SCRATCH_RATES = (1e-4, 1e-2)  # weights that start at random
ENOUGH_TO_EVALUATE = 1_000  # rows, for a trend
SMALL_MODEL = 100_000_000  # parameters; below it, learning rates go ten times higher


@dataclass(frozen=True, slots=True)
class LengthFacts:
    """Rows in tokens, before they are cut or left out for their length."""

    rows: int
    longest: int
    beyond: int  # rows longer than the limit


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the data when advice is asked for; None where it is not."""

    rows: int = 0  # in the training set; 0: not known
    lengths: LengthFacts | None = None
    validation_rows: int | None = None
    evaluated_rows: int = 0  # in all evaluations together
    total_steps: int | None = None
    parameters: int | None = None  # of the model


def advise(
    config: RunConfig,
    *,
    rows: int = 0,
    lengths: LengthFacts | None = None,
    validation_rows: int | None = None,
    evaluated_rows: int = 0,
    total_steps: int | None = None,
    parameters: int | None = None,
) -> tuple[str, ...]:
    """Recommendations for a configuration, and for its data where that is measured.

    `rows` are those of the training set, `evaluated_rows` those that all evaluations read, `total_steps` the optimizer
    steps of the run, `parameters` those of the model.
    """
    facts = Facts(rows, lengths, validation_rows, evaluated_rows, total_steps or config.training.max_steps, parameters)
    found = (rule(config, facts) for rule in RULES)
    return tuple(sentence for sentence in found if sentence)


def _alpha(config: RunConfig, _: Facts) -> str | None:
    lora = config.lora
    if config.training.method == "full" or lora.alpha is None or lora.use_rslora:
        return None
    if lora.rank <= lora.alpha <= 4 * lora.rank:
        return None
    return (
        f"lora.alpha = {lora.alpha:g} is far from 2 x rank ({2 * lora.rank}): "
        f"the adapter acts {lora.alpha / lora.rank:.3g} times, usual is 2 times. Leave alpha out to get 2 x rank."
    )


def _rslora(config: RunConfig, _: Facts) -> str | None:
    scale = config.lora.effective_alpha / math.sqrt(config.lora.rank)
    if config.training.method == "full" or not config.lora.use_rslora or scale <= 4:
        return None
    return (
        f"lora.use_rslora with rank {config.lora.rank} and alpha {config.lora.effective_alpha:g} scales the update by "
        f"{scale:.3g}, usual is about 2. Set lora.alpha to {2 * math.sqrt(config.lora.rank):.3g}."
    )


def _learning_rate(config: RunConfig, facts: Facts) -> str | None:
    training = config.training
    if training.optimizer not in ("adamw", "adam"):
        return None
    what = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[training.method]
    low, high = FULL_RATES if training.method == "full" else LORA_RATES
    if config.model.init == "random":
        what, (low, high) = "training from random weights", SCRATCH_RATES
    elif facts.parameters is not None and facts.parameters < SMALL_MODEL:
        what, high = f"{what} of a small model", high * 10
    if low <= training.learning_rate <= high:
        return None
    effect = "may diverge or forget" if training.learning_rate > high else "may learn hardly anything"
    return (
        f"training.learning_rate = {training.learning_rate:g} is outside the usual {low:g} to {high:g} "
        f"for {what}: it {effect}."
    )


def _dropout(config: RunConfig, _: Facts) -> str | None:
    if config.training.method == "full" or config.lora.dropout <= 0.3:
        return None
    return f"lora.dropout = {config.lora.dropout:g} hides much of the input. Usual is 0 to 0.1."


def _dora_dropout(config: RunConfig, _: Facts) -> str | None:
    if config.training.method != "dora" or not config.lora.dropout:
        return None
    return (
        f"lora.dropout = {config.lora.dropout:g} with DoRA reaches the low-rank branch alone, not the product with the "
        "base: a run does not repeat one of PEFT's, which drops in both. Set it to 0 to compare."
    )


def _random_base(config: RunConfig, _: Facts) -> str | None:
    if config.model.init != "random" or config.training.method == "full":
        return None
    return "model.init = random with adapters tunes a base that knows nothing. Set training.method to full to train it."


def _half(config: RunConfig, _: Facts) -> str | None:
    if config.model.dtype != "float16":
        return None
    return "model.dtype = float16 overflows easily in training. bfloat16 needs as little memory and does not."


def _smoothing(config: RunConfig, _: Facts) -> str | None:
    if config.training.label_smoothing <= 0.2:
        return None
    return f"training.label_smoothing = {config.training.label_smoothing:g} blurs the answers. Usual is 0 to 0.1."


def _max_length(config: RunConfig, facts: Facts) -> str | None:
    limit, lengths = config.data.max_length, facts.lengths
    if limit is None or lengths is None:
        return None
    if lengths.beyond * 10 >= lengths.rows:
        fate = {"truncate": "are cut", "drop": "are left out", "error": "end the run"}[config.data.on_long]
        return (
            f"{lengths.beyond:,} of {lengths.rows:,} rows are longer than data.max_length = {limit} and {fate}. "
            f"The longest has {lengths.longest:,} tokens."
        )
    if limit > 2 * lengths.longest:
        return (
            f"data.max_length = {limit} is far above the data: the longest row has {lengths.longest:,} tokens. "
            f"{recommended_length(lengths.longest)} does the same."
        )
    return None


def recommended_length(longest: int) -> int:
    """The next multiple of 64 that holds the longest row."""
    return max(64, math.ceil(longest / 64) * 64)


def _step_size(config: RunConfig, facts: Facts) -> str | None:
    rows = _rows_per_step(config)
    name = "training.batch_size x training.gradient_accumulation_steps"
    if facts.rows and rows > facts.rows:
        return f"{name} = {rows} is more than the {facts.rows:,} training rows: every step is a whole epoch. Lower it."
    if rows < 4 and config.training.optimizer != "sgd":
        return f"{name} = {rows}: steps of so few rows are noisy. Usual is 8 to 64."
    if rows > 512:
        return f"{name} = {rows}: so large a step learns little more than one of 64. Lower it for more steps."
    return None


def _rows_per_step(config: RunConfig) -> int:
    return config.training.rows_per_step


def _warmup(config: RunConfig, facts: Facts) -> str | None:
    steps, warmup = facts.total_steps, config.training.warmup_steps
    if not steps or not warmup or warmup <= steps // 5:
        return None
    return (
        f"training.warmup_steps = {warmup} is {warmup / steps:.0%} of the {steps:,} steps. Usual is 3 to 10 %: "
        f"about {max(1, round(steps * 0.05))} here, or leave it out."
    )


def _length_of_run(config: RunConfig, facts: Facts) -> str | None:
    steps = facts.total_steps
    if not facts.rows or not steps:
        return None
    passes = steps * _rows_per_step(config) / facts.rows
    if passes > 20:
        return (
            f"The run reads each row about {passes:.0f} times: the model may learn the rows by heart. Usual is 1 to 5."
        )
    if steps < 20:
        accumulates = config.training.gradient_accumulation_steps > 1
        lower = "training.gradient_accumulation_steps" if accumulates else "training.batch_size"
        return f"The run has only {steps} steps, which is little to learn in. Lower {lower}, or raise training.epochs."
    return None


def _never_evaluated(config: RunConfig, facts: Facts) -> str | None:
    steps, every = facts.total_steps, config.output.eval_steps
    if not steps or not every or every <= steps:
        return None
    return f"output.eval_steps = {every} is more than the {steps:,} steps: there is an evaluation at the end only."


def _evaluations(config: RunConfig, facts: Facts) -> str | None:
    trained = (facts.total_steps or 0) * _rows_per_step(config)
    if not trained or facts.evaluated_rows <= trained:
        return None
    if min(facts.validation_rows or 0, config.output.eval_rows or math.inf) <= ENOUGH_TO_EVALUATE:
        return None
    return (
        f"Evaluations read {facts.evaluated_rows:,} rows and training {trained:,}, each of which costs about three "
        f"times as much. output.eval_rows={ENOUGH_TO_EVALUATE} shows the same trend sooner, or raise output.eval_steps."
    )


def _early_stopping(config: RunConfig, facts: Facts) -> str | None:
    if config.training.early_stopping_patience is None or facts.validation_rows != 0:
        return None
    return "training.early_stopping_patience does nothing: there is no validation row to measure an improvement on."


Rule = Callable[[RunConfig, Facts], str | None]

RULES: tuple[Rule, ...] = (
    _alpha,
    _rslora,
    _learning_rate,
    _dropout,
    _dora_dropout,
    _random_base,
    _half,
    _smoothing,
    _max_length,
    _step_size,
    _warmup,
    _length_of_run,
    _never_evaluated,
    _evaluations,
    _early_stopping,
)
