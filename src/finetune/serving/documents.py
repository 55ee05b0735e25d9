"""What clients receive, as the OpenAPI description shows it. The answers themselves are plain dictionaries."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Document(BaseModel):
    """A JSON object that this server sends."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(Document):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Document):
    """Every refusal."""

    error: ErrorBody


class Usage(Document):
    """Tokens of all prompts and answers of a request; the token that ends an answer is not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Document):
    """A token that could have stood in a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of an answer, with the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Document):
    """Log-probabilities (nats, before temperature and filters) of an answer's tokens."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Document):
    """Name and arguments (JSON as text)."""

    name: str
    arguments: str


class CalledTool(Document):
    """An entry of `tool_calls`."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Document):
    """The model's turn; `content` is null where it only calls tools."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] | None = None


class ChatChoice(Document):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Document):
    """The answer to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Document):
    """Log-probabilities of a continuation; `text_offset` counts characters of `text`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(Document):
    """One of `n` continuations of one of the prompts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Document):
    """Continuations of one or more prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class Model(Document):
    """A model that requests can name; an adapter's `parent` is its base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(Document):
    """All models: the base first."""

    object: Literal["list"]
    data: list[Model]


class Health(Document):
    """Whether answers are decoded."""

    status: Literal["ok"]


class AdapterChange(Document):
    """An adapter came or went."""

    status: Literal["success"]
    message: str


Content = dict[str, Any]
