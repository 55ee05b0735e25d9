"""`ft generate` and `ft chat`, on a real model and on a tiny one; each once in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.ft import ft
from tests.support.in_process import ft_here
from tests.support.serving import wait_until
from tests.support.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def published_story(shared: Path) -> str:
    """The text that `./run -t 0.0` of llama2.c printed."""
    page = (shared / "models/stories260K/stories260K.md").read_text(encoding="utf-8")
    return page.split("-t 0.0\n")[1].split("\n```")[0]


@pytest.mark.parametrize("backend", ["mlx", "pytorch"])
def test_greedy_generation_reproduces_the_published_text(shared: Path, backend: str) -> None:
    asked = ("--prompt", "", "--max-tokens", 260, "--backend", backend, "--json")
    ran = ft_here("generate", "--model", shared / "models/stories260K", *asked)
    document = ran.json
    expected = published_story(shared)
    assert document["text"][: len(expected)] == expected
    assert document["template"] is None
    assert "raw text" in ran.err


def test_an_answer_is_streamed_to_standard_output_and_the_rest_to_standard_error(model: Path) -> None:
    arguments = ["generate", "--model", model, "--prompt", "Hello", "--max-tokens", 12, "--backend", "mlx"]
    plain, document = ft(*arguments), ft_here(*arguments, "--json").json
    assert plain.code == 0
    assert plain.out == document["text"] + "\n"
    assert "tokens/s" in plain.err
    assert document["rendered_prompt"] == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert document["finish_reason"] in {"stop", "length"}


def test_a_missing_model_is_an_error_in_json_too(tmp_path: Path) -> None:
    ran = ft_here("generate", "--model", tmp_path / "none", "--prompt", "Hello", "--json")
    assert ran.code == 1
    assert "none" in ran.json["error"]["message"]


def test_chat_ends_politely_with_its_input(model: Path) -> None:
    ran = ft("chat", "--model", model, "--max-tokens", 3, "--backend", "mlx", stdin="Hello\n\n/adapter on\n")
    assert ran.code == 0
    assert "no adapter" in ran.err


@pytest.mark.parametrize("backend", ["mlx", "pytorch"])
def test_ctrl_c_ends_a_file_of_prompts_with_whole_lines(model: Path, tmp_path: Path, backend: str) -> None:
    (tmp_path / "prompts.txt").write_text("Tell me more.\n" * 5_000)
    output = tmp_path / "answers.jsonl"
    given = ["--input", str(tmp_path / "prompts.txt"), "--output", str(output), "--max-tokens", "8"]
    command = [sys.executable, "-m", "finetune", "generate", "--model", str(model), "--backend", backend, *given]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: output.exists() and output.stat().st_size > 0, seconds=60)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.splitlines()[-1]) == (130, "Stopped.")
    assert "Traceback" not in said
    text = output.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert [json.loads(line)["index"] for line in text.splitlines()] == list(range(text.count("\n")))
