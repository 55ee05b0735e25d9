"""The same calls of the real client to `ft serve` and to llama.cpp's own server, with the same weights in both."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.support.in_process import ft_here
from tests.support.llamacpp_reference import llamacpp_server
from tests.support.serving import ServeProcess

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

CONTEXT = 2048
QUESTION: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wake me at seven"}]
Both = dict[str, openai.OpenAI]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """A client for each server. The demo's weights are the same bits in both: float32."""
    place = tmp_path_factory.mktemp("reference")
    gguf = place / "demo.gguf"
    ran = ft_here("export", "demo", "--format", "gguf", "--quantize", "f32", "--output", gguf, "--backend", "mlx")
    assert ran.code == 0, ran.err
    with (
        ServeProcess("demo", "--backend", "mlx", log=place / "ours.log") as ours,
        llamacpp_server(gguf, place / "theirs.log", context=CONTEXT) as theirs,
        openai.OpenAI(base_url=f"{ours.url}/v1", api_key="none", max_retries=0, timeout=60) as our_client,
        openai.OpenAI(base_url=f"{theirs}/v1", api_key="none", max_retries=0, timeout=60) as their_client,
    ):
        yield {"ours": our_client, "theirs": their_client}


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(**asked)


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": "demo", "prompt": "Wake me", "temperature": 0, "max_tokens": 8, **fields}
    return client.completions.create(**asked)


def seen(both: Both, look: Callable[[openai.OpenAI], Any]) -> Any:
    """What both show, which must be the same."""
    ours, theirs = look(both["ours"]), look(both["theirs"])
    assert ours == theirs
    return ours


def test_a_whole_answer_is_the_same_with_the_same_counts(both: Both) -> None:
    def look(client: openai.OpenAI) -> Any:
        answer = chat(client)
        choice = answer.choices[0]
        usage = answer.usage
        return (
            answer.object,
            answer.id.split("-")[0],
            (
                choice.index,
                choice.message.role,
                choice.message.content,
                choice.finish_reason,
                choice.message.tool_calls,
            ),
            (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens),
        )

    assert seen(both, look)[2][2]


def test_an_answer_that_ends_by_itself_says_so(both: Both) -> None:
    def look(client: openai.OpenAI) -> Any:
        choice = chat(client, max_completion_tokens=200, max_tokens=openai.omit).choices[0]
        return choice.message.content, choice.finish_reason

    assert seen(both, look)[1] == "stop"


def test_a_stream_has_the_same_parts_in_the_same_order(both: Both) -> None:
    def look(client: openai.OpenAI) -> Any:
        chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        return (
            {chunk.object for chunk in chunks},
            len({chunk.id for chunk in chunks}),
            (choices[0].delta.role, choices[0].delta.content or ""),
            "".join(choice.delta.content or "" for choice in choices),
            [choice.finish_reason for choice in choices if choice.finish_reason],
            (choices[-1].delta.content, choices[-1].delta.role),
            chunks[-1].choices,
            chunks[-1].usage.completion_tokens,
            [chunk.usage for chunk in chunks[:-1] if chunk.usage],
        )

    seen(both, look)


def test_a_stop_string_ends_both_at_the_same_place(both: Both) -> None:
    whole = chat(both["ours"]).choices[0].message.content
    stop = whole[4:7]

    def look(client: openai.OpenAI) -> Any:
        choice = chat(client, stop=[stop, "never"]).choices[0]
        return choice.message.content, choice.finish_reason

    assert seen(both, look) == (whole[: whole.find(stop)], "stop")


def test_log_probabilities_are_the_same_numbers_in_the_same_places(both: Both) -> None:
    def listed(client: openai.OpenAI) -> Any:
        return chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content

    def look(client: openai.OpenAI) -> Any:
        return [
            (entry.token, entry.bytes, [(other.token, other.bytes) for other in entry.top_logprobs])
            for entry in listed(client)
        ]

    seen(both, look)
    ours, theirs = listed(both["ours"]), listed(both["theirs"])
    # float32 in another order of sums; llama.cpp computes softmax in its own way
    assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-3)


def test_several_answers_repeat_with_their_seed(both: Both) -> None:
    def look(client: openai.OpenAI) -> Any:
        texts = [
            [choice.message.content for choice in chat(client, n=3, seed=seed, temperature=1.5).choices]
            for seed in (1, 1, 2)
        ]
        return texts[0] == texts[1], texts[0] == texts[2], len(set(texts[0])) > 1

    assert seen(both, look) == (True, False, True)


def test_completions_of_one_and_of_several_prompts_are_the_same(both: Both) -> None:
    def look(client: openai.OpenAI) -> Any:
        answers = complete(client), complete(client, prompt=["Wake me", "Turn on"])
        return [[(choice.index, choice.text, choice.finish_reason) for choice in one.choices] for one in answers]

    seen(both, look)


def test_a_streamed_completion_has_the_same_text(both: Both) -> None:
    def look(client: openai.OpenAI) -> Any:
        chunks = list(complete(client, stream=True))
        text = "".join(chunk.choices[0].text for chunk in chunks)
        return text, {chunk.object for chunk in chunks}, chunks[-1].choices[0].finish_reason

    seen(both, look)


def test_mistakes_are_the_same_exceptions(both: Both) -> None:
    def kind(client: openai.OpenAI, **fields: Any) -> Any:
        try:
            chat(client, **fields)
        except openai.APIStatusError as error:
            return error.status_code, isinstance(error.body, dict) and {"message", "type"} <= error.body.keys()
        return None

    long = [{"role": "user", "content": "Wake me " * CONTEXT}]
    for fields in ({"messages": "no list"}, {"messages": long}, {"messages": [{"role": "user", "content": 3}]}):
        assert seen(both, lambda client, fields=fields: kind(client, **fields)) == (400, True)


def test_health_and_models_answer_alike(both: Both) -> None:
    def look(client: openai.OpenAI) -> Any:
        root = str(client.base_url).removesuffix("/v1/")
        health = httpx.get(f"{root}/health", trust_env=False)
        models = client.models.list()
        return health.status_code, health.json(), [model.object for model in models]

    assert seen(both, look) == (200, {"status": "ok"}, ["model"])
