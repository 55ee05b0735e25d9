"""What clients may send. A field that is not listed is refused; one that would be ignored takes its default alone."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from finetune.data.conversations import RowError, parse_tools

LONGEST_STOP = 256  # characters
MOST_STOPS = 16
MOST_CHOICES = 64
MOST_MESSAGES = 10_000
MOST_BIASES = 1_024


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is the integer 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Absent = Annotated[None, Field(description="Not supported: null or absent.")]
Off = Annotated[Literal[False] | None, Field(description="Not supported: false, null or absent.")]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Label = Annotated[str | None, Field(max_length=1024, description="A label of the client's; has no influence.")]


class Body(BaseModel):
    """Unknown fields are errors, and text is never taken for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A part of a message; others than text are not supported."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """A call that the model made."""

    name: str = Field(min_length=1, max_length=256)
    arguments: str = Field(description="A JSON object as text.")


class ToolCall(Body):
    """An entry of `tool_calls`."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(default=None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=128)
    tool_call_id: str | None = Field(default=None, max_length=256)
    reasoning_content: str | None = Field(default=None, description="Reasoning in front of an assistant's answer.")
    refusal: Absent = None
    audio: Absent = None
    annotations: list[Any] | None = Field(default=None, max_length=0, description="Not supported: empty or absent.")
    function_call: Absent = None


def _known_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Only functions; the definition reaches the template as the client wrote it, as in training."""
    if tool.get("type") != "function" or set(tool) - {"type", "function"}:
        raise ValueError('a tool is {"type": "function", "function": {...}}')
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("a tool's function needs a name")
    unknown = set(function) - {"name", "description", "parameters", "strict"}
    if unknown or function.get("strict"):
        raise ValueError(f"a tool's function has no {', '.join(sorted(unknown)) or 'strict mode'} here")
    try:
        parse_tools([tool])
    except RowError as error:
        raise ValueError(str(error)) from None
    return tool


_TOOL_SCHEMA = {
    "type": "object",
    "required": ["type", "function"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "description": {},
                "parameters": {},
                "strict": {"enum": [False, None]},
            },
        },
    },
}
Tool = Annotated[dict[str, Any], AfterValidator(_known_tool), WithJsonSchema(_TOOL_SCHEMA)]


class StreamOptions(Body):
    """What a stream has beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Off = None


class JsonSchema(Body):
    """A schema that the answer has to match."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """Free text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class SamplingBody(Body):
    """What both kinds of completion share."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0: the likeliest token; default 1.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Whole | None = Field(default=None, ge=0, description="Extension: 0 is no limit.")
    min_p: float | None = Field(default=None, ge=0, lt=1, description="Extension.")
    repetition_penalty: float | None = Field(default=None, gt=0, le=10, description="Extension: 1 is none.")
    seed: Whole | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: Whole | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    max_tokens: Whole | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[TokenId, Bias] | None = Field(default=None, max_length=MOST_BIASES)

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """All stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(SamplingBody):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: Whole | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Annotated[Literal[True] | None, Field(description="Not supported: true or absent.")] = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, str] | None = Field(default=None, description="Labels of the client's; have no influence.")
    safety_identifier: Label = None
    prompt_cache_key: Label = None
    store: Off = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = Field(default=None, min_length=1, max_length=1)
    audio: Absent = None
    prediction: Absent = None
    web_search_options: Absent = None
    reasoning_effort: Absent = None
    verbosity: Absent = None
    functions: Absent = None
    function_call: Absent = None

    @property
    def uses_tools(self) -> bool:
        """Whether the model is shown tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def wanted_tokens(self) -> int | None:
        """The limit by either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens not in {None, self.max_tokens}:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.uses_tools and not isinstance(self.response_format, TextFormat | None):
            raise ValueError("tools and response_format cannot be combined; give one of them")
        if self.tool_choice is not None and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


Tokens = Annotated[list[Annotated[Whole, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(SamplingBody):
    """`POST /v1/completions`: text to continue as it is, without a template."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: Whole | None = Field(default=None, ge=0, le=20)
    echo: Off = None
    suffix: Absent = None
    best_of: Annotated[Whole | None, Field(ge=1, le=1, description="Not supported: 1, null or absent.")] = None


class LoadAdapter(Body):
    """`POST /v1/load_lora_adapter`."""

    lora_name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    lora_path: str = Field(min_length=1, max_length=4096, description="Relative to the server's adapter directory.")


class UnloadAdapter(Body):
    """`POST /v1/unload_lora_adapter`."""

    lora_name: str = Field(min_length=1, max_length=128)


def unsupported_fields() -> frozenset[str]:
    """Fields that are listed only so that clients which always send them are understood."""
    fields = [*ChatMessage.model_fields.items(), *ChatRequest.model_fields.items()]
    fields += CompletionRequest.model_fields.items()
    return frozenset(name for name, field in fields if (field.description or "").startswith("Not supported"))
