"""A server under pressure: full queues, late and lost clients, keys, bodies, a dead engine."""

import asyncio
import json
import logging
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from tests.support.serving import ScriptedSession, Served, chat_body, served, wait_until

from finetune.core.types import GenerationRequest
from finetune.serving.watch import STEP_SECONDS, TOKEN_SECONDS, step_seconds

KEY = "correct-horse-battery-staple"


def code_of(response: httpx.Response) -> Any:
    return response.json()["error"]["code"]


def test_a_full_queue_is_429_and_says_when_to_come_back() -> None:
    with served(ScriptedSession(pause=0.02), max_batch=1, max_queue=1) as server:
        background = [
            threading.Thread(target=server.chat, args=("forever",), kwargs={"max_tokens": 40}) for _ in range(2)
        ]
        for thread in background:
            thread.start()
        wait_until(lambda: server.service._places.taken == 2)
        response = server.chat()
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        for thread in background:
            thread.join()
        assert server.chat().status_code == 200


def test_more_answers_than_there_are_places_can_never_be_had() -> None:
    with served(max_batch=1, max_queue=1) as server:
        assert server.chat(n=3).status_code == 400


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(stream: bool) -> None:
    with served(ScriptedSession(pause=0.01), max_batch=1) as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                server.url + "/v1/chat/completions",
                json=chat_body("forever", stream=stream),
                timeout=httpx.Timeout(0.3) if not stream else httpx.Timeout(5, read=0.0001),
                trust_env=False,
                verify=False,
            )
        wait_until(lambda: server.session.active == 0)
        assert server.service._places.taken == 0
        assert server.chat().status_code == 200


def test_an_answer_that_takes_too_long_is_ended_with_an_error() -> None:
    with served(ScriptedSession(pause=0.05), timeout=1.0) as server:
        response = server.chat("forever")
        assert (response.status_code, code_of(response)) == (504, "timeout")
        streamed = server.chat("forever", stream=True)
        assert streamed.status_code == 200
        last = streamed.text.strip().split("\n\n")[-2:]
        assert json.loads(last[0].removeprefix("data: "))["error"]["code"] == "timeout"
        assert last[1] == "data: [DONE]"
        wait_until(lambda: server.session.active == 0)


def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    with served(ScriptedSession(pause=0.3), keepalive=0.05) as server:
        text = server.chat(stream=True, max_tokens=2).text
        assert ": keepalive\n\n" in text
        assert text.endswith("data: [DONE]\n\n")


def test_when_the_engine_dies_everybody_who_waits_is_told() -> None:
    with served(ScriptedSession(pause=0.02)) as server:
        answers: list[httpx.Response] = []
        waiting = [threading.Thread(target=lambda: answers.append(server.chat("forever"))) for _ in range(3)]
        for thread in waiting:
            thread.start()
        wait_until(lambda: server.session.active == 3)
        assert server.get("/health").status_code == 200
        assert server.chat("crash").status_code == 503
        for thread in waiting:
            thread.join(timeout=60)
        assert [response.status_code for response in answers] == [503] * 3
        assert server.get("/health").status_code == 503
        assert server.chat().status_code == 503
        assert server.chat(stream=True).status_code == 503
        assert "finetune_engine_up 0.0" in server.get("/metrics").text


def test_an_engine_that_does_not_come_back_is_seen_by_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.serving.watch.STEP_SECONDS", 0.1)
    monkeypatch.setattr("finetune.serving.watch.TOKEN_SECONDS", 0.0)
    with served(ScriptedSession(pause=2.0)) as server:
        assert server.get("/health").status_code == 200
        thread = threading.Thread(target=server.chat, kwargs={"max_tokens": 1})
        thread.start()
        seen: list[httpx.Response] = []
        wait_until(lambda: seen.append(server.get("/health")) or seen[-1].status_code == 503)
        assert "hang" in seen[-1].json()["error"]["message"]
        thread.join(timeout=60)
        assert server.get("/health").status_code == 200  # it has come back


def test_an_engine_that_does_not_come_back_does_not_keep_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.serving.watch.STEP_SECONDS", 0.1)
    monkeypatch.setattr("finetune.serving.watch.TOKEN_SECONDS", 0.0)
    with served(ScriptedSession(pause=3.0)) as server:
        thread = threading.Thread(target=server.chat)
        thread.start()
        wait_until(lambda: server.get("/health").status_code == 503)
        server.worker.stop()
        assert not server.session.closed
        thread.join(timeout=60)


def test_a_step_may_take_longer_the_more_it_reads() -> None:
    short, long = GenerationRequest((1,) * 10, 5), GenerationRequest((1,) * 10_000, 5)
    assert step_seconds([short]) == STEP_SECONDS + 11 * TOKEN_SECONDS
    assert step_seconds([short] * 16) == STEP_SECONDS + 176 * TOKEN_SECONDS
    assert step_seconds([long]) == step_seconds([long, long]) - TOKEN_SECONDS == STEP_SECONDS + 513 * TOKEN_SECONDS


def test_a_stream_that_the_engine_leaves_ends_with_an_error() -> None:
    with served(ScriptedSession(pause=0.02)) as server:
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(server.chat("forever", stream=True).text))
        thread.start()
        wait_until(lambda: server.session.active == 1)
        server.chat("crash")
        thread.join(timeout=60)
        assert '"code":"unavailable"' in texts[0]
        assert texts[0].endswith("data: [DONE]\n\n")


def test_running_out_of_memory_costs_the_answers_and_not_the_server() -> None:
    with served() as server:
        response = server.chat("no memory")
        assert response.status_code == 503
        assert "Memory ran out" in response.json()["error"]["message"]
        assert server.chat().status_code == 200


def test_only_a_right_key_opens_and_no_key_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(api_keys=("other", KEY)) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"X-Api-Key": KEY}):
            response = server.post("/v1/chat/completions", chat_body(), headers=headers)
            assert (response.status_code, code_of(response)) == (401, "invalid_api_key")
            assert server.get("/v1/models", headers=headers).status_code == 401
            assert server.get("/metrics", headers=headers).status_code == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert server.post("/v1/chat/completions", chat_body(), headers=right).status_code == 200
        assert server.get("/health").status_code == 200
        assert server.get(f"/v1/models?api_key={KEY}", headers=right).status_code == 200
    said = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))
    assert KEY not in said
    assert "wrong" not in said
    assert "/v1/chat/completions" in said


def test_a_wrong_key_is_refused_before_the_body_is_looked_at() -> None:
    with served(api_keys=(KEY,), max_body=1000) as server:
        assert server.post("/v1/chat/completions", content=b"x" * 5000).status_code == 401


def test_an_oversized_body_is_413_however_it_is_sent() -> None:
    with served(max_body=2000) as server:
        big = json.dumps(chat_body("x" * 5000)).encode()
        headers = {"Content-Type": "application/json"}
        assert server.post("/v1/chat/completions", content=big, headers=headers).status_code == 413
        pieces = (big[start : start + 500] for start in range(0, len(big), 500))
        assert server.post("/v1/chat/completions", content=pieces, headers=headers).status_code == 413
        assert server.chat().status_code == 200


def test_a_body_that_never_comes_is_given_up() -> None:
    with served(body_timeout=0.2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            client.settimeout(5)
            assert b" 408 " in client.recv(1000)


def test_nothing_passes_from_one_client_to_another() -> None:
    with served() as server:
        first = server.chat("one", user="alice")
        marked = server.post(
            "/v1/chat/completions", chat_body("two"), headers={"X-Request-Id": "mine", "X-Secret": "s"}
        )
        third = server.chat("three")
        numbers = {response.headers["x-request-id"] for response in (first, marked, third)}
        assert len(numbers) == 3
        assert "mine" not in numbers
        assert not any("secret" in f"{dict(response.headers)}{response.text}".lower() for response in (marked, third))
        assert len({response.json()["id"] for response in (first, marked, third)}) == 3


def test_web_pages_of_others_get_nothing() -> None:
    with served() as server:
        response = server.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers
        for host, status in (("evil.example", 403), ("evil.example:80", 403), ("[::1]", 200), ("LOCALHOST:1", 200)):
            assert server.get("/v1/models", headers={"Host": host}).status_code == status
        plain = server.post(
            "/v1/chat/completions", content=json.dumps(chat_body()), headers={"Content-Type": "text/plain"}
        )
        assert plain.status_code == 400
        assert "Content-Type: application/json" in plain.json()["error"]["message"]
    with served(allowed_origins=("https://mine.example",)) as server:
        response = server.get("/v1/models", headers={"Origin": "https://mine.example"})
        assert response.headers["access-control-allow-origin"] == "https://mine.example"


def test_metrics_count_requests_tokens_and_times() -> None:
    with served(adapters=["tuned"]) as server:
        server.chat(model="tuned")
        server.chat("forever", max_tokens=7, stream=True)
        server.chat(model="nobody")
        text = server.get("/metrics").text
    assert 'finetune_requests_total{route="/v1/chat/completions",status="200"} 2.0' in text
    assert 'finetune_requests_total{route="/v1/chat/completions",status="404"} 1.0' in text
    assert 'finetune_generated_tokens_total{model="tuned"} 12.0' in text
    assert 'finetune_generated_tokens_total{model="base"} 7.0' in text
    assert 'finetune_time_to_first_token_seconds_count{model="base"} 1.0' in text
    assert "finetune_active_answers 0.0" in text
    assert "nobody" not in text


def test_many_requests_of_all_kinds_leak_nothing_and_harm_no_good_one() -> None:
    with served(ScriptedSession(pause=0.001), max_batch=8, max_queue=200) as server:
        statuses = asyncio.run(_storm(server, 300))
        assert set(statuses["good"]) == {"Hello world."}
        assert set(statuses["bad"]) <= {400, 404}
        wait_until(lambda: server.session.active == 0)
        assert server.service._places.taken == 0
        assert (server.worker.active, server.worker.waiting) == (0, 0)


async def _storm(server: Served, count: int) -> dict[str, list[Any]]:
    """Good requests, bad ones, and clients that leave, all at once."""
    seen: dict[str, list[Any]] = {"good": [], "bad": [], "left": []}
    limits = asyncio.Semaphore(32)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, verify=False, timeout=60) as client:

        async def one(number: int) -> None:
            async with limits:
                kind = ("good", "bad", "left")[number % 3]
                if kind == "good":
                    response = await client.post("/v1/chat/completions", json=chat_body(f"n{number}"))
                    seen["good"].append(response.json()["choices"][0]["message"]["content"])
                elif kind == "bad":
                    body = [{"model": "base"}, chat_body(model="none"), chat_body(n=0), chat_body(x=1)][number % 4]
                    seen["bad"].append((await client.post("/v1/chat/completions", json=body)).status_code)
                else:
                    await _leave(client, number)

        await asyncio.gather(*(one(number) for number in range(count)))
    return seen


async def _leave(client: httpx.AsyncClient, number: int) -> None:
    body = chat_body("forever", stream=number % 2 == 0, max_tokens=400)
    try:
        async with asyncio.timeout(0.01 * (number % 10)):
            await client.post("/v1/chat/completions", json=body)
    except TimeoutError:
        return


def test_stopping_ends_streams_cleanly() -> None:
    began = time.monotonic()
    with served(ScriptedSession(pause=0.02)) as server:
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(server.chat("forever", stream=True).text))
        thread.start()
        wait_until(lambda: server.session.active == 1)
        server.worker.stop()
        thread.join(timeout=60)
    assert "shutting down" in texts[0]
    assert texts[0].endswith("data: [DONE]\n\n")
    assert server.session.closed
    assert time.monotonic() - began < 10
