"""`ft serve` in a process of its own, on both engines, spoken to by the clients that people use."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.support.in_process import ft_here
from tests.support.serving import SOURCE, ServeProcess
from tests.support.tiny_model import CONTEXT, write_tiny_adapter, write_tiny_model

KEY = "a-key-that-nobody-guesses"
QUESTION: Any = [{"role": "user", "content": "Hello"}]


@dataclass(frozen=True)
class World:
    """A tiny base, two adapters for it, one for another base, and a directory that clients may load from."""

    model: Path
    root: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    place = tmp_path_factory.mktemp("serve")
    model, root = write_tiny_model(place / "tiny"), place / "adapters"
    for number, name in enumerate(("one", "two"), start=1):
        write_tiny_adapter(root / name, seed=number, base=str(model))
    write_tiny_adapter(root / "deeper", layers=3, base=str(model))
    outside = write_tiny_adapter(place / "outside", seed=9, base=str(model))
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "half" / name).symlink_to(outside / name)
    return World(model, root)


@pytest.fixture(scope="module", params=["mlx", "pytorch"])
def server(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    arguments = (world.model, "--backend", request.param, "--adapter", f"tuned={world.root / 'one'}")
    loading = ("--allow-adapter-loading", "--adapter-root", world.root, "--max-body", 100_000)
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with ServeProcess(*arguments, *loading, log=log, env={"FT_API_KEY": KEY}) as running:
        yield running
        assert running.stop(signal.SIGTERM) == 143
        assert KEY not in running.text
        assert "Traceback" not in running.text


@pytest.fixture
def client(server: ServeProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as opened:
        yield opened


def answer(client: openai.OpenAI, **fields: Any) -> Any:
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(**asked)


def text(client: openai.OpenAI, **fields: Any) -> str:
    return str(answer(client, **fields).choices[0].message.content)


def load(server: ServeProcess, name: str, path: str, *, what: str = "load") -> httpx.Response:
    body = {"lora_name": name, "lora_path": path} if what == "load" else {"lora_name": name}
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{server.url}/v1/{what}_lora_adapter"
    return httpx.post(url, json=body, headers=headers, trust_env=False, timeout=30)


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"tiny", "tuned"}
    assert listed["tuned"].model_extra["parent"] == "tiny"
    assert client.models.retrieve("tuned").id == "tuned"


def test_the_answer_is_that_of_ft_generate(client: openai.OpenAI, server: ServeProcess, world: World) -> None:
    command = (
        "generate",
        "--model",
        world.model,
        "--prompt",
        "Hello",
        "--max-tokens",
        12,
        "--backend",
        "mlx",
        "--json",
    )
    assert text(client) == ft_here(*command).json["text"]
    assert text(client, model="tuned") == ft_here(*command, "--adapter", world.root / "one").json["text"]


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    chunks = list(answer(client, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    whole = answer(client)
    assert said == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_many_at_once_over_several_adapters_answer_as_each_alone(client: openai.OpenAI) -> None:
    names = ["tiny", "tuned"] * 4
    alone = {name: text(client, model=name, max_tokens=20) for name in set(names)}
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = text(client, model=names[number], max_tokens=20)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(names))] == [alone[name] for name in names]


def test_a_seed_repeats_an_answer_and_choices_differ(client: openai.OpenAI) -> None:
    drawn = [answer(client, temperature=1.0, seed=seed, n=3) for seed in (5, 5, 6)]
    texts = [[choice.message.content for choice in one.choices] for one in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3


def test_log_probabilities_are_the_likeliest_first_and_sum_to_less_than_one(client: openai.OpenAI) -> None:
    listed = answer(client, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    for entry in listed:
        values = [other.logprob for other in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 4
        assert entry.logprob == pytest.approx(values[0])  # greedy takes the likeliest
    completion = client.completions.create(model="tiny", prompt="A", max_tokens=3, temperature=0, logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert "".join(logprobs.tokens) == completion.choices[0].text
    assert [len(found) for found in logprobs.top_logprobs] == [2, 2, 2]


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    whole = text(client, max_tokens=20)
    stopped = answer(client, max_tokens=20, stop=[whole[5:8]]).choices[0]
    assert stopped.message.content == whole[: whole.find(whole[5:8])]
    assert stopped.finish_reason == "stop"


def test_a_schema_is_held(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
    for seed in range(3):
        content = text(client, response_format=wanted, max_tokens=100, temperature=1, seed=seed, model="tuned")
        assert isinstance(json.loads(content)["ok"], bool)


def test_adapters_come_and_go_while_it_runs(client: openai.OpenAI, server: ServeProcess) -> None:
    base = text(client)
    assert load(server, "new", "two").status_code == 200
    tuned = text(client, model="new")
    assert tuned not in {base, text(client, model="tuned")}
    assert load(server, "new", "one").status_code == 400
    assert load(server, "new", "", what="unload").status_code == 200
    with pytest.raises(openai.NotFoundError):
        text(client, model="new")
    assert load(server, "new", "one").status_code == 200
    assert text(client, model="new") == text(client, model="tuned")
    assert load(server, "new", "", what="unload").status_code == 200
    assert load(server, "new", "", what="unload").status_code == 404
    assert load(server, "tiny", "", what="unload").status_code == 400


OUTSIDE = ["../outside", "/etc", "one/../../outside", "link", "half", "one\0", "~", "..", ".", "missing", "x" * 300]
OTHER_BASE = ["deeper"]


@pytest.mark.parametrize("path", [*OUTSIDE, *OTHER_BASE], ids=lambda path: repr(path[:20]))
def test_nothing_outside_the_allowed_directory_is_loaded(
    client: openai.OpenAI, server: ServeProcess, world: World, path: str
) -> None:
    response = load(server, "evil", path)
    assert response.status_code == 400
    assert str(world.root) not in response.text
    assert {model.id for model in client.models.list()} == {"tiny", "tuned"}


def test_what_goes_wrong_has_the_client_s_own_exceptions(client: openai.OpenAI, server: ServeProcess) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        answer(client, model="gpt-9")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        answer(client, messages=[{"role": "user", "content": "x" * CONTEXT}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        answer(client, reasoning_effort="low")
    with pytest.raises(openai.APIStatusError) as large:
        answer(client, messages=[{"role": "user", "content": "x" * 200_000}])
    assert large.value.status_code == 413
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        answer(stranger)


def test_langchain_talks_to_it(server: ServeProcess, client: openai.OpenAI) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model="tuned", base_url=f"{server.url}/v1", api_key=KEY, temperature=0, max_tokens=12, max_retries=0
    )
    message = chat.invoke("Hello")
    assert message.content == text(client, model="tuned")
    assert message.usage_metadata["output_tokens"] <= 12
    assert "".join(str(chunk.content) for chunk in chat.stream("Hello")) == message.content
    assert len(chat.batch(["Hello", "Hi"])) == 2


def test_a_signal_lets_a_stream_end_and_then_the_server(world: World, tmp_path: Path) -> None:
    with ServeProcess(world.model, "--backend", "mlx", "--grace", 20, log=tmp_path / "log") as server:
        body = {"model": "tiny", "prompt": "A", "max_tokens": 150, "stream": True, "logit_bias": {"257": -100}}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, trust_env=False, timeout=60) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert first.startswith("data: ")
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(timeout=60) == 130
        assert "The server has stopped." in server.text


def test_ctrl_c_while_the_model_opens_ends_the_server(world: World) -> None:
    command = [sys.executable, "-v", "-m", "finetune", "serve", str(world.model), "--backend", "mlx", "--port", "0"]
    opening = {**os.environ, "PYTHONPATH": SOURCE, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=opening, text=True, errors="replace") as process:
        for line in process.stderr or ():  # Python tells each import; the engine's thread does this one
            if line.startswith("import 'mlx_lm.models.llama'"):
                process.send_signal(signal.SIGINT)
                break
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped." in said  # not a line of its own: both threads write


def test_after_the_grace_period_streams_end_with_an_error(world: World, tmp_path: Path) -> None:
    with ServeProcess(world.model, "--backend", "mlx", "--grace", 0, log=tmp_path / "log") as server:
        body = {"model": "tiny", "prompt": ["A"] * 8, "max_tokens": 200, "stream": True, "logit_bias": {"257": -100}}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, trust_env=False, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "shutting down" in rest[-2]
        assert server.process.wait(timeout=60) == 143
        assert time.monotonic() - began < 60


def test_a_port_in_use_and_other_wrong_options_are_said_before_anything_loads(world: World, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = ft_here("serve", world.model, "--port", taken.getsockname()[1])
    assert ran.code == 2
    assert "in use" in ran.err
    for arguments, words in (
        (("--adapter", "nonsense"), "give a name"),
        (("--adapter", "a=x", "--adapter", "a=y"), "two adapters"),
        (("--adapter", f"tiny={world.root / 'one'}"), "Two models"),
        (("--adapter-root", world.root), "belong together"),
        (("--allow-adapter-loading",), "belong together"),
        (("--api-key-file", tmp_path / "none"), "cannot be read"),
        (("--api-key", "not a key"), "no header can carry"),
        (("--host", "no.such.host.invalid"), "cannot be used"),
    ):
        ran = ft_here("serve", world.model, "--port", 0, *arguments)
        assert ran.code == 2, arguments
        assert words in ran.err
