"""What the serving guide shows is what happens: its curl lines, its Python, the example, the API reference."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.serving import ServeProcess
from tests.support.tiny_adapters import adapt

from finetune.config.schema import ModelConfig
from finetune.engines.registry import choose_engine
from finetune.models.source import DEMO_DIRECTORY
from finetune.serving.reference import reference

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
IN_GUIDE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    root = tmp_path_factory.mktemp("outputs")
    adapt(choose_engine(ModelConfig(name="any", backend="mlx")), DEMO_DIRECTORY, root / "mine")
    loading = ("--allow-adapter-loading", "--adapter-root", root)
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with ServeProcess("demo", "--backend", "mlx", "--adapter", f"mine={root / 'mine'}", *loading, log=log) as running:
        yield running


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


A_CURL = re.compile(r"^curl .*?(?=\n(?:curl|$|\n))", re.DOTALL | re.MULTILINE)
CURL = [line for block in blocks("bash") for line in A_CURL.findall(block)]


def test_the_guide_has_the_examples_that_are_tried_here() -> None:
    assert len(CURL) == 5
    assert len(blocks("python")) == 2


def test_every_curl_line_of_the_guide_works(server: ServeProcess) -> None:
    for line in CURL:
        command = line.replace(IN_GUIDE, server.url).replace("curl -s", "curl --noproxy '*' --fail-with-body -s", 1)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if "stream" in line:
            assert done.stdout.endswith("data: [DONE]\n\n")
        else:
            assert "error" not in json.loads(done.stdout)


@pytest.mark.parametrize("number", [0, 1])
def test_every_python_block_of_the_guide_works(server: ServeProcess, number: int) -> None:
    code = blocks("python")[number].replace(IN_GUIDE, server.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_example_chats(server: ServeProcess) -> None:
    def example(*arguments: str, typed: str) -> "subprocess.CompletedProcess[str]":
        script = str(REPOSITORY / "examples" / "chat_client.py")
        command = [sys.executable, script, "--base-url", f"{server.url}/v1", "--max-tokens", "8", *arguments]
        return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, check=False)

    done = example(typed="Hello\nAgain\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    assert "Talking to mine" in done.stderr
    done = example("--model", "none", typed="Hello\n")
    assert done.returncode == 1
    assert "does not exist" in done.stderr


def test_the_api_reference_is_up_to_date() -> None:
    page = (REPOSITORY / "docs" / "serving-api.md").read_text(encoding="utf-8")
    assert page == reference(), (
        "docs/serving-api.md is out of date. Run: python -m finetune.serving.reference > docs/serving-api.md"
    )


def test_every_option_of_the_command_is_in_the_guide() -> None:
    from finetune.cli import serve

    source = Path(serve.__file__).read_text(encoding="utf-8")
    own = set(re.findall(r'typer\.Option\(\s*"(--[a-z-]+)"', source))
    assert {option for option in own if option not in GUIDE} <= {"--name", "--port"}
