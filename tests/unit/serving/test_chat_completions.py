"""Chat completions over a scripted engine: shapes, streams, limits, and what clients do wrong."""

import json
from typing import Any

import httpx
import pytest
from tests.support.serving import CONTEXT, ScriptedSession, Served, byte_values, chat_body, served, wait_until

from finetune.serving.documents import ChatCompletion, Completion, Error


@pytest.fixture(scope="module")
def server() -> Any:
    with served() as running:
        yield running


def events(response: httpx.Response) -> list[Any]:
    """The documents of a stream; its end must be marked."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refusal(response: httpx.Response) -> Any:
    Error.model_validate(response.json())
    return response.json()["error"]


def test_an_answer_has_openai_s_shape_and_counts_its_tokens(server: Served) -> None:
    response = server.chat("Hi")
    document = response.json()
    ChatCompletion.model_validate(document)
    assert document["choices"][0]["message"] == {"role": "assistant", "content": "Hello world.", "refusal": None}
    assert document["choices"][0]["finish_reason"] == "stop"
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    prompt = len(rendered) - len("<|im_start|>") * 2 - len("<|im_end|>") + 3 + 1  # three special tokens, and BOS
    assert document["usage"]["prompt_tokens"] in {prompt, prompt - 1}
    assert document["usage"]["completion_tokens"] == len("Hello world.")
    assert document["usage"]["total_tokens"] == sum(list(document["usage"].values())[:2])


def test_a_stream_opens_with_the_role_and_ends_with_the_reason_and_the_usage(server: Served) -> None:
    chunks = events(server.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant"}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len("Hello world.")
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert text == "Hello world."
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_without_being_asked_a_stream_says_nothing_of_usage(server: Served) -> None:
    assert all("usage" not in chunk for chunk in events(server.chat(stream=True)))


def test_a_stop_string_across_tokens_ends_the_answer_before_it(server: Served) -> None:
    choice = server.chat(stop=["lo w", "never"]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hel", "stop")
    chunks = events(server.chat(stop="world", stream=True))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello "


def test_log_probabilities_belong_to_the_tokens_of_the_text(server: Served) -> None:
    choice = server.chat(stop="o w", logprobs=True, top_logprobs=2).json()["choices"][0]
    listed = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in listed) == choice["message"]["content"] == "Hell"
    assert listed[0]["bytes"] == [ord("H")]
    assert [len(entry["top_logprobs"]) for entry in listed] == [2] * 4


def test_several_answers_have_seeds_of_their_own(server: Served) -> None:
    document = server.chat(n=3, seed=7).json()
    assert [choice["index"] for choice in document["choices"]] == [0, 1, 2]
    assert document["usage"]["completion_tokens"] == 3 * len("Hello world.")
    requests = server.session.generators[-1].seen[-3:]
    assert [request.sampling.seed for request in requests] == [7, 8, 9]


def test_the_limit_of_tokens_is_taken_by_either_of_its_names(server: Served) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        choice = server.chat(**{name: 5}).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "length")


def test_text_parts_are_joined_and_sampling_reaches_the_engine(server: Served) -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
    ]
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    fields |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"65": 2}}
    assert server.post("/v1/chat/completions", {"model": "base", "messages": messages, **fields}).status_code == 200
    sampling = server.session.generators[-1].seen[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.5, -0.5)
    assert sampling.logit_bias == ((65, 2.0),)
    assert b"AB" in byte_values(server.session.generators[-1].seen[-1].prompt)


def test_completions_continue_texts_and_tokens(server: Served) -> None:
    for prompt, count in (("Once", 1), ([70, 71], 1), (["a", "b"], 2), ([[70], [71, 72]], 2)):
        document = server.post("/v1/completions", {"model": "base", "prompt": prompt, "logprobs": 1}).json()
        Completion.model_validate(document)
        assert [choice["text"] for choice in document["choices"]] == ["Hello world."] * count
        logprobs = document["choices"][0]["logprobs"]
        assert "".join(logprobs["tokens"]) == "Hello world."
        assert logprobs["text_offset"] == list(range(12))
        assert [len(found) for found in logprobs["top_logprobs"]] == [1] * 12


def test_a_streamed_completion_ends_with_its_reason(server: Served) -> None:
    chunks = events(server.post("/v1/completions", {"model": "base", "prompt": "A", "stream": True, "max_tokens": 4}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hell"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]


UNSUPPORTED = [
    ({"frobnicate": 1}, "frobnicate"),
    ({"functions": []}, "functions"),
    ({"audio": {}}, "audio"),
    ({"store": True}, "store"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}, "tool_choice"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "weight"),
    ({"temperature": 3}, "temperature"),
    ({"n": "2"}, "n"),
    ({"stop": [""]}, "stop"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools"),
    ({"messages": []}, "messages"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("fields", "named"), UNSUPPORTED, ids=[str(fields) for fields, _ in UNSUPPORTED])
def test_what_is_not_supported_is_refused_by_name(server: Served, fields: dict[str, Any], named: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == 400
    assert refusal(response)["type"] == "invalid_request_error"
    assert named in refusal(response)["message"]


def test_what_says_the_same_as_nothing_is_accepted(server: Served) -> None:
    idle = {
        "n": 1,
        "logprobs": False,
        "stop": None,
        "tools": None,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
    }
    idle |= {"presence_penalty": 0, "logit_bias": {}, "parallel_tool_calls": True, "response_format": {"type": "text"}}
    answer = {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None, "function_call": None}
    messages = [
        {"role": "user", "content": "A"},
        {**answer, "annotations": [], "audio": None},
        {"role": "user", "content": "B"},
    ]
    assert server.chat(**{**idle, "messages": messages}).status_code == 200


def test_tools_are_refused_where_the_template_has_no_place_for_them(server: Served) -> None:
    response = server.chat(tools=[{"type": "function", "function": {"name": "f"}}])
    assert response.status_code == 400
    assert "no place for tools" in refusal(response)["message"]


def test_an_unknown_model_is_named_with_those_there_are(server: Served) -> None:
    response = server.chat(model="gpt-9")
    assert (response.status_code, refusal(response)["code"]) == (404, "model_not_found")
    assert "gpt-9" in refusal(response)["message"]
    assert "base" in refusal(response)["message"]


def test_a_prompt_that_does_not_fit_is_refused_with_both_counts(server: Served) -> None:
    response = server.chat("x" * CONTEXT)
    assert (response.status_code, refusal(response)["code"]) == (400, "context_length_exceeded")
    assert f"{CONTEXT:,}" in refusal(response)["message"]
    response = server.chat("x" * 100, max_tokens=CONTEXT - 50)
    assert refusal(response)["code"] == "context_length_exceeded"


def test_without_a_limit_an_answer_may_fill_the_context(server: Served) -> None:
    usage = server.chat("forever").json()["usage"]
    assert usage["total_tokens"] == CONTEXT


BAD_BODIES = [b"", b"{", b"[]", b'"x"', b"null", b'{"model": NaN}', b"\xff\xfe", b'{"a":"\\ud800"}', b"[" * 100_000]


@pytest.mark.parametrize("content", BAD_BODIES, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_a_body_that_is_no_request_is_refused(server: Served, content: bytes, kind: str) -> None:
    response = server.post("/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert response.status_code == 400
    assert refusal(response)["message"]


def test_other_addresses_and_methods_have_openai_s_errors(server: Served) -> None:
    assert refusal(server.get("/v1/nothing"))["message"].startswith("There is nothing at")
    assert server.get("/v1/nothing").status_code == 404
    response = server.get("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert "GET is not possible" in refusal(response)["message"]


def test_models_are_listed_with_their_parents() -> None:
    with served(adapters=["tuned"]) as server:
        listed = server.get("/v1/models").json()["data"]
        assert [(model["id"], model["parent"]) for model in listed] == [("base", None), ("tuned", "base")]
        assert server.get("/v1/models/tuned").json() == listed[1]
        assert server.get("/v1/models/none").status_code == 404
        assert server.chat(model="tuned").json()["model"] == "tuned"
        assert server.session.generators[-1].seen[-1].adapter == "tuned"


def test_a_model_without_a_template_completes_but_does_not_chat() -> None:
    from tests.support.tiny_tokenizer import tiny_tokenizer

    with served(tokenizer=tiny_tokenizer()) as server:
        assert refusal(server.chat())["code"] == "no_chat_template"
        assert server.post("/v1/completions", {"model": "base", "prompt": "A"}).status_code == 200


def test_a_json_schema_holds_even_a_model_that_knows_nothing_of_json(server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [12, 34]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
    choice = server.chat(response_format=format).json()["choices"][0]
    assert json.loads(choice["message"]["content"])["n"] in {12, 34}
    assert choice["finish_reason"] == "stop"


BAD_SCHEMAS: list[dict[str, Any]] = [
    {"type": "no such type"},
    {"type": "object", "properties": 3},
    {"$ref": "#/nowhere"},
    {"type": "string", "pattern": "(" * 50},
    {"enum": ["x" * 70_000]},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=lambda schema: str(schema)[:30])
def test_a_schema_that_cannot_be_used_is_refused(server: Served, schema: dict[str, Any]) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}}
    response = server.chat(response_format=format)
    assert (response.status_code, refusal(response)["param"]) == (400, "response_format")


def test_every_call_comes_from_one_thread() -> None:
    with served(adapters=["tuned"]) as server:
        for _ in range(3):
            server.chat()
        assert len(server.session.threads) == 1


def test_requests_decode_together_up_to_the_limit() -> None:
    with served(ScriptedSession(pause=0.01), max_batch=3) as server:
        server.chat(n=7)
        assert server.session.most == 3
        assert chat_body()["model"] == "base"
        wait_until(lambda: server.session.active == 0)
