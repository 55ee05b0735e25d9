"""From a request's body to what the engine is asked for: prompts as in training, samplings, limits."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.core.errors import FinetuneError
from finetune.core.types import GenerationRequest, Sampling, TokenConstraint
from finetune.data.conversations import RowError, parse_messages, parse_tools
from finetune.data.rows import Message
from finetune.generation.answers import AnswerText
from finetune.generation.prompts import Prompter
from finetune.generation.requests import Prompt
from finetune.generation.text import Decoder
from finetune.serving.calls import Choice
from finetune.serving.catalogue import ServedModel
from finetune.serving.errors import ApiError, invalid
from finetune.serving.schemas import ChatRequest, CompletionRequest, SamplingBody

SEEDS = 2**32
COMPLETION_TOKENS = 16  # OpenAI's default for the older of the two endpoints


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds one answer, in tokens. `context` None: the architecture has no limit."""

    context: int | None
    max_tokens: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What all answers to one request share."""

    model: ServedModel
    decoder: Decoder
    wanted: int | None  # tokens of an answer
    default: int | None = None  # where the request says nothing; None: as many as there is room for
    top_logprobs: int = 0
    constraint: Callable[[Prompt], TokenConstraint] | None = None  # makes one for each answer


def chat_prompt(body: ChatRequest, model: ServedModel) -> Prompt:
    """The conversation through the model's template, tokens and all as in training."""
    if model.prompter.template is None:
        raise invalid(
            f"{model.id!r} has no chat template, so it cannot hold a conversation. Use /v1/completions, "
            "or start the server with --template.",
            "model",
            "no_chat_template",
        )
    messages = _messages(body)
    tools = parse_tools(body.tools) if body.uses_tools else ()
    try:
        prompt = model.prompter.messages(messages, tools)
        if tools and prompt.text == model.prompter.messages(messages).text:
            raise invalid(f"The template of {model.id!r} has no place for tools. Leave `tools` out.", "tools")
    except FinetuneError as error:
        raise invalid(f"{model.id!r} cannot take these messages: {error}", "messages") from None
    return prompt


def _messages(body: ChatRequest) -> tuple[Message, ...]:
    raw: list[dict[str, Any]] = [message.model_dump(exclude_none=True) for message in body.messages]
    try:
        return parse_messages(raw)
    except RowError as error:
        raise invalid(f"Invalid messages: {error}.", "messages") from None


def text_prompts(body: CompletionRequest, model: ServedModel, limits: Limits) -> list[Prompt]:
    """Each text as it is, or the tokens that the client made itself."""
    given: Sequence[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    tokens = [token for prompt in given if not isinstance(prompt, str) for token in prompt]
    unknown = [token for token in tokens if token >= limits.vocabulary]
    if unknown:
        raise invalid(f"The prompt has token {unknown[0]}, and the model has {limits.vocabulary:,} tokens.", "prompt")
    return [_text_prompt(prompt, model.prompter) for prompt in given]


def _text_prompt(given: str | list[int], prompter: Prompter) -> Prompt:
    if isinstance(given, str):
        try:
            return prompter.raw(given)
        except FinetuneError as error:
            raise invalid(str(error), "prompt") from None
    eos = prompter.tokenizer.eos_id
    return Prompt("", tuple(given), frozenset() if eos is None else frozenset({eos}))


def answer_length(asked: Asked, prompt: Prompt, limits: Limits, place: str) -> int:
    """How many tokens the answer may have. Raises ApiError (400) where it does not fit, with both counts.

    `place` is the field that holds the prompt.
    """
    wanted, default = asked.wanted, asked.default
    if wanted is not None and wanted > limits.max_tokens:
        raise invalid(
            f"{wanted:,} tokens are more than this server gives to one answer ({limits.max_tokens:,}).", "max_tokens"
        )
    length = len(prompt.ids)
    if limits.context is None:
        return wanted or default or limits.max_tokens
    if length + (wanted or 1) > limits.context:
        raise _too_long(length, wanted, limits.context, place)
    return wanted or min(default or limits.max_tokens, limits.max_tokens, limits.context - length)


def _too_long(length: int, wanted: int | None, context: int, place: str) -> ApiError:
    answer = f" and {wanted:,} for the answer, {length + wanted:,} together" if wanted else ""
    message = (
        f"This model's maximum context length is {context:,} tokens. You asked for {length:,} tokens in the prompt"
        f"{answer}. Shorten the prompt{' or the answer' if wanted else ''}."
    )
    return invalid(message, place, "context_length_exceeded")


def samplings(body: SamplingBody, count: int) -> list[Sampling]:
    """One for each answer; without a seed every request draws its own."""
    seed = random.randrange(SEEDS) if body.seed is None else body.seed
    common = Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
    )
    return [replace(common, seed=(seed + number) % SEEDS) for number in range(count)]


def choices(body: SamplingBody, prompts: Sequence[Prompt], asked: Asked, limits: Limits) -> list[Choice]:
    """`n` answers to each prompt, those of the first prompt first."""
    made, place = [], "messages" if isinstance(body, ChatRequest) else "prompt"
    for prompt in prompts:
        length = answer_length(asked, prompt, limits, place)
        for sampling in samplings(body, body.n or 1):
            request = GenerationRequest(
                prompt=prompt.ids,
                max_tokens=length,
                sampling=sampling,
                stop_tokens=prompt.stop_tokens,
                adapter=asked.model.adapter,
                top_logprobs=asked.top_logprobs,
                constraint=None if asked.constraint is None else asked.constraint(prompt),
            )
            stops = (*body.stops, *prompt.stop_strings)
            made.append(Choice(request, AnswerText(asked.decoder, prompt.ids, stops)))
    return made
