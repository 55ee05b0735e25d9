"""Options that `ft generate` and `ft chat` share: which model answers, and how."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from finetune.core.types import Sampling
from finetune.generation.requests import AnswerOptions


class EngineName(StrEnum):
    """Values of model.backend."""

    auto = "auto"
    mlx = "mlx"
    pytorch = "pytorch"


class DeviceName(StrEnum):
    """Values of model.device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    metal = "metal"


Model = Annotated[
    str | None, typer.Option("--model", "-m", help="A local directory, a cached model, `demo`, or a run.")
]
Adapter = Annotated[Path | None, typer.Option("--adapter", "-a", help="An adapter's directory, or a run.")]
Checkpoint = Annotated[str | None, typer.Option("--checkpoint", help="Of a run: best, last, or a step.")]
Backend = Annotated[
    EngineName | None, typer.Option("--backend", help="The engine; default: the run's, else auto.", show_default=False)
]
Device = Annotated[
    DeviceName | None, typer.Option("--device", help="Where it computes; default: the run's.", show_default=False)
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens of an answer.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0 takes the most probable token; 1 samples as it is.")
]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this total probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from this many of the likeliest tokens; 0: no limit.")]
MinP = Annotated[float, typer.Option("--min-p", help="Leave out tokens below this share of the likeliest one.")]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1: tokens already used become less likely.")
]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends an answer; may be given several times.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling.")]
Template = Annotated[
    str | None, typer.Option("--template", help="Template of the prompt; default: the run's, else the tokenizer's.")
]
System = Annotated[str | None, typer.Option("--system", help="A system message in front.")]


def answer_options(
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    stop: list[str] | None,
    seed: int,
) -> AnswerOptions:
    """The options as one value; ranges are checked where they are used."""
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    return AnswerOptions(max_tokens=max_tokens, sampling=sampling, stop=tuple(stop or ()))
