"""Tool calls in answers, in the formats of real templates, whole and piece by piece."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.serving import ScriptedSession, served
from tests.support.tiny_tokenizer import tiny_tokenizer

from finetune.serving.tools import HERMES, LLAMA, MISTRAL, MarkerDecoder, ToolFormat, ToolReader, called

NAMES = frozenset({"weather", "time"})
PARIS = {"name": "weather", "arguments": {"city": "Paris"}}
SEMICOLON = {"name": "weather", "arguments": {"city": "a;b"}}
NOW = {"name": "time", "arguments": {}}
HERMES_PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
HERMES_NOW = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'

CASES = [
    (HERMES, HERMES_PARIS, "", [PARIS]),
    (HERMES, f"Let me look.\n{HERMES_PARIS}\n{HERMES_NOW}", "Let me look.", [PARIS, NOW]),
    (HERMES, "<tool_call>\n{broken", "<tool_call>\n{broken", []),
    (HERMES, "1 < 2 and <tool", "1 < 2 and <tool", []),
    (HERMES, '{"name": "weather", "arguments": {}}', '{"name": "weather", "arguments": {}}', []),
    (HERMES, HERMES_PARIS.replace("weather", "unknown"), HERMES_PARIS.replace("weather", "unknown"), []),
    (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]time[ARGS]{}', "", [PARIS, NOW]),
    (MISTRAL, "I cannot.", "I cannot.", []),
    (LLAMA, '{"name": "weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (LLAMA, json.dumps({"name": "weather", "parameters": {"city": "a;b"}}), "", [SEMICOLON]),
    (LLAMA, '{"name": "time", "parameters": {}}; {"name": "time", "parameters": {}}', "", [NOW, NOW]),
    (LLAMA, "A set {1, 2} is no call.", "A set {1, 2} is no call.", []),
    (LLAMA, '{"alarm": 7}', '{"alarm": 7}', []),
]


def read(format: ToolFormat, pieces: list[str]) -> tuple[str, list[Any]]:
    reader = ToolReader(format, NAMES)
    text = "".join(reader.add(piece) for piece in pieces)
    rest, calls = reader.finish()
    return text + rest, calls


@pytest.mark.parametrize(("format", "answer", "text", "calls"), CASES, ids=[repr(case[1][:30]) for case in CASES])
def test_calls_are_told_from_text_however_the_answer_is_cut(
    format: ToolFormat, answer: str, text: str, calls: list[Any]
) -> None:
    assert read(format, [answer]) == (text, calls)
    assert read(format, list(answer)) == (text, calls)


@given(st.text(alphabet='<tol_ca>{}"[]TOLCAS \n', max_size=60), st.integers(1, 7))
def test_text_without_a_call_comes_through_unchanged(answer: str, size: int) -> None:
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    for format in (HERMES, MISTRAL, LLAMA):
        assert read(format, pieces) == (answer, [])


def test_arguments_are_json_as_text_and_every_call_has_a_number_of_its_own() -> None:
    first, second = called([PARIS, PARIS])
    assert json.loads(first["function"]["arguments"]) == {"city": "Paris"}
    assert first["id"] != second["id"]


def test_markers_that_are_special_tokens_are_seen() -> None:
    tokenizer = tiny_tokenizer()
    format = ToolFormat("<pad>", lambda _text: None, ("<pad>",))
    ids = [int(token) for token in tokenizer.encode("a<s>b<pad>c")[0]]
    assert MarkerDecoder(tokenizer, format).decode(ids) == "ab<pad>c"
    assert tokenizer.decode(ids) == "abc"


TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nCall with <tool_call>: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("stream", [True, False])
def test_a_model_s_calls_reach_the_client_in_openai_s_form(stream: bool) -> None:
    import openai

    session = ScriptedSession(reply=f"Looking.\n{HERMES_PARIS}")
    with served(session, tokenizer=tiny_tokenizer(chat_template=TOOLS_TEMPLATE)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": "Weather?"}]
        answer: Any = client.chat.completions.create(model="base", messages=messages, tools=[TOOL], stream=stream)
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            said = "".join(chunk.delta.content or "" for chunk in chunks)
            calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
            reason = chunks[-1].finish_reason
        else:
            choice = answer.choices[0]
            said, calls, reason = choice.message.content, choice.message.tool_calls, choice.finish_reason
        assert (said, reason) == ("Looking.", "tool_calls")
        assert [call.function.name for call in calls] == ["weather"]
        assert json.loads(calls[0].function.arguments) == {"city": "Paris"}
        turn = {"role": "assistant", "content": said, "tool_calls": [calls[0].model_dump(exclude={"index"})]}
        result = {"role": "tool", "tool_call_id": calls[0].id, "content": "Rain."}
        client.chat.completions.create(model="base", messages=[*messages, turn, result], tools=[TOOL])
        client.close()


def test_with_tool_choice_none_the_model_is_shown_no_tools() -> None:
    with served(tokenizer=tiny_tokenizer(chat_template=TOOLS_TEMPLATE)) as server:
        shown = server.chat(tools=[TOOL]).json()["usage"]["prompt_tokens"]
        hidden = server.chat(tools=[TOOL], tool_choice="none").json()["usage"]["prompt_tokens"]
        assert hidden == server.chat().json()["usage"]["prompt_tokens"] < shown
