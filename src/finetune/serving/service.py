"""What the routes work with: the models, the worker behind them, and what is counted."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.generation.requests import Prompt
from finetune.serving.adapters import Adapters
from finetune.serving.answers import AnswerShape, ChatShape, Envelope, TextShape
from finetune.serving.calls import Call, Choice, Places
from finetune.serving.catalogue import Catalogue, ServedModel
from finetune.serving.constraints import Grammars
from finetune.serving.errors import invalid
from finetune.serving.metrics import Metrics
from finetune.serving.prompts import (
    COMPLETION_TOKENS,
    Asked,
    Limits,
    chat_prompt,
    choices,
    text_prompts,
)
from finetune.serving.schemas import ChatRequest, CompletionRequest, SamplingBody
from finetune.serving.settings import ServerSettings
from finetune.serving.tools import MarkerDecoder, ToolReader, tool_format
from finetune.serving.vocabulary import Vocabulary
from finetune.serving.worker import Worker


@dataclass(frozen=True, slots=True)
class Planned:
    """A request that was understood, before anything is decoded."""

    model: ServedModel
    choices: list[Choice]
    envelope: Envelope


class Service:
    """One running server."""

    def __init__(
        self,
        catalogue: Catalogue,
        worker: Worker,
        adapters: Adapters,
        *,
        limits: Limits,
        settings: ServerSettings,
        version: str,
    ) -> None:
        self.catalogue = catalogue
        self.worker = worker
        self.adapters = adapters
        self.settings = settings
        self.version = version
        self._limits = limits
        self._places = Places(settings.max_batch + settings.max_queue)
        self._vocabulary = Vocabulary(catalogue.base.prompter.tokenizer)
        self._grammars = Grammars(self._vocabulary)
        self.metrics = Metrics(
            active=lambda: worker.active,
            waiting=lambda: max(0, self._places.taken - worker.active),
            alive=lambda: worker.failure is None,
        )

    async def chat(self, body: ChatRequest) -> Planned:
        """Understand a chat completion. Raises ApiError."""
        return await asyncio.to_thread(self._plan_chat, body, self.catalogue.find(body.model))

    async def completion(self, body: CompletionRequest) -> Planned:
        """Understand a text completion. Raises ApiError."""
        return await asyncio.to_thread(self._plan_completion, body, self.catalogue.find(body.model))

    def start(self, body: SamplingBody, planned: Planned) -> Call:
        """Begin to decode. Raises ApiError (429, 503)."""
        settings = self.settings
        call = Call(
            self.worker,
            self._places,
            timeout=settings.timeout,
            whole=not body.stream,
            keepalive=settings.keepalive,
            on_close=lambda call: self._count(planned, call),
        )
        call.start(planned.choices)
        return call

    def _count(self, planned: Planned, call: Call) -> None:
        self.metrics.completed(
            planned.model.id,
            prompt_tokens=planned.envelope.prompt_tokens,
            generated=call.completion_tokens,
            first_token=call.first_token_seconds,
            seconds=call.seconds,
        )

    def _plan_chat(self, body: ChatRequest, model: ServedModel) -> Planned:
        constraint = self._grammars.constraint(body.response_format)
        prompt = chat_prompt(body, model)
        reads = tool_format(model.prompter.template) if body.uses_tools and model.prompter.template else None
        decoder = model.prompter.tokenizer if reads is None else MarkerDecoder(model.prompter.tokenizer, reads)
        names = frozenset(tool["function"]["name"] for tool in body.tools or ())
        reader: Callable[[], ToolReader] | None = None if reads is None else lambda: ToolReader(reads, names)
        shape = ChatShape(self._vocabulary if body.logprobs else None, reader)
        asked = Asked(model, decoder, body.wanted_tokens, top_logprobs=body.top_logprobs or 0, constraint=constraint)
        return self._planned(body, [prompt], asked, shape)

    def _plan_completion(self, body: CompletionRequest, model: ServedModel) -> Planned:
        shape = TextShape(None if body.logprobs is None else self._vocabulary, body.logprobs or 0)
        tokenizer = model.prompter.tokenizer
        asked = Asked(model, tokenizer, body.max_tokens, COMPLETION_TOKENS, top_logprobs=body.logprobs or 0)
        return self._planned(body, text_prompts(body, model, self._limits), asked, shape)

    def _planned(self, body: SamplingBody, prompts: Sequence[Prompt], asked: Asked, shape: AnswerShape) -> Planned:
        count = len(prompts) * (body.n or 1)
        if count > self._places.most:
            raise invalid(f"{count} answers are more than this server has places for ({self._places.most}).", "n")
        envelope = Envelope(
            model=asked.model.id,
            id=f"{shape.prefix}-{uuid.uuid4().hex}",
            shape=shape,
            prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            count=count,
            fingerprint=f"finetune-{self.version}",
        )
        return Planned(asked.model, choices(body, prompts, asked, self._limits), envelope)
