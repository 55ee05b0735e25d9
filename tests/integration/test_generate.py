"""`ft generate` and `ft chat` with the real engine on a tiny model."""

from pathlib import Path

import pytest
from tests.support.in_process import ft_here as ft
from tests.support.tiny_model import write_tiny_adapter, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_tiny_adapter(tmp_path_factory.mktemp("adapters") / "tiny", base=str(model))


def test_raw_leaves_the_template_out(model: Path) -> None:
    document = ft("generate", "--model", model, "--prompt", "Hello", "--max-tokens", 3, "--raw", "--json").json
    assert (document["rendered_prompt"], document["template"]) == ("Hello", None)


def test_an_adapter_changes_the_answer_and_finds_its_base_by_itself(model: Path, adapter: Path) -> None:
    base = ft("generate", "--model", model, "--prompt", "Hello", "--max-tokens", 12, "--json").json
    named = ft(
        "generate", "--model", model, "--adapter", adapter, "--prompt", "Hello", "--max-tokens", 12, "--json"
    ).json
    alone = ft("generate", "--adapter", adapter, "--prompt", "Hello", "--max-tokens", 12, "--json").json
    assert named["text"] == alone["text"] != base["text"]


def test_the_same_seed_gives_the_same_sample(model: Path) -> None:
    def sample(seed: int) -> str:
        options = ["--temperature", 1.0, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01, "--repetition-penalty", 1.1]
        ran = ft("generate", "--model", model, "--prompt", "a", "--max-tokens", 16, *options, "--seed", seed, "--json")
        return str(ran.json["text"])

    assert sample(3) == sample(3) != sample(4)


def test_wrong_requests_end_with_a_message_and_leave_2_or_1(model: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_tiny_adapter(tmp_path / "other", layers=3, rank=2)
    wrong: list[tuple[list[object], int, str]] = [
        (["--max-tokens", 0], 2, "--max-tokens 0"),
        (["--temperature", -1], 2, "--temperature -1.0"),
        (["--top-p", 0.9], 2, "would do nothing at temperature 0"),
        (["--adapter", tmp_path / "none"], 1, "No adapter at"),
        (["--adapter", other], 1, "layers.2"),
        (["--template", "chatlm"], 2, "chatml"),
        (["--raw", "--template", "chatml"], 2, "contradict"),
        (["--checkpoint", "best"], 2, "needs a run"),
        (["--prompt", "x" * 300], 2, "context is 256"),
    ]
    for arguments, code, message in wrong:
        ran = ft("generate", "--model", model, "--prompt", "Hello", *arguments)
        assert (ran.code, message in ran.err) == (code, True), (arguments, ran)
        assert ran.out == ""


def test_chat_answers_piped_lines_and_obeys_commands(model: Path, adapter: Path) -> None:
    lines = [
        "Hello",
        "/adapter off",
        "/reset",
        "Hello",
        "/compare Hello",
        "/system Be brief.",
        "/nonsense",
        "/exit",
        "no",
    ]
    ran = ft("chat", "--model", model, "--adapter", adapter, "--max-tokens", 6, stdin="\n".join(lines))
    tuned = ft(
        "generate", "--model", model, "--adapter", adapter, "--prompt", "Hello", "--max-tokens", 6, "--json"
    ).json
    base = ft("generate", "--model", model, "--prompt", "Hello", "--max-tokens", 6, "--json").json
    assert ran.code == 0
    assert ran.out.startswith(f"{tuned['text']}\n{base['text']}\nbase:  ")
    assert all(words in ran.err for words in ["adapter is off", "forgotten", "system message is changed", "no command"])


def test_a_prompt_that_is_given_is_continued_as_published(shared: Path) -> None:
    prompt = "Once upon a time"
    ran = ft("generate", "--model", shared / "models/stories260K", "--prompt", prompt, "--max-tokens", 40, "--json")
    assert ran.json["text"].startswith(", there was a little girl named Lily. She loved to play outside in the park.")
