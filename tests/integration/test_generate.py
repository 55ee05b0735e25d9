"""`ft generate` and `ft chat` with the real engine on a tiny model."""

import json
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
        "/adapter base",
        "/reset",
        "Hello",
        "/compare Hello",
        "/compare",
        "/system Be brief.",
        "/nonsense",
        "/exit",
        "no",
    ]
    ran = ft("chat", "--model", model, "--adapter", f"mine={adapter}", "--max-tokens", 6, stdin="\n".join(lines))
    tuned = ft(
        "generate", "--model", model, "--adapter", adapter, "--prompt", "Hello", "--max-tokens", 6, "--json"
    ).json
    base = ft("generate", "--model", model, "--prompt", "Hello", "--max-tokens", 6, "--json").json
    assert ran.code == 0
    assert ran.out.startswith(f"{tuned['text']}\n{base['text']}\nbase: ")
    assert all(
        words in ran.err
        for words in ["The base answers", "forgotten", "system message is changed", "no command", "needs a message"]
    )


def test_chat_switches_between_adapters_that_it_loaded(model: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_tiny_adapter(tmp_path / "other", base=str(model), rank=2, seed=5)
    asked = ["--model", model, "--max-tokens", 12, "--template", "chatml"]
    expected = [
        ft("generate", *asked, *given, "--prompt", "Hello", "--json").json["text"]
        for given in (["--adapter", adapter], ["--adapter", other], [])
    ]
    lines = ["Hello", "/reset", "/adapter other", "Hello", "/reset", "/adapter none", "Hello", "/adapter x", "/adapter"]
    ran = ft("chat", *asked, "--adapter", f"mine={adapter}", "--adapter", other, stdin="\n".join(lines))
    assert ran.out == "".join(f"{text}\n" for text in expected)
    assert len(set(expected)) == 3
    assert "There is no adapter 'x'. Adapters: mine, other." in ran.err
    compared = ft("chat", *asked, "--adapter", f"mine={adapter}", "--adapter", other, stdin="/compare Hello\n")
    assert compared.out == f"base:  {expected[2]}\nmine:  {expected[0]}\nother: {expected[1]}\n"
    twice = ft("chat", *asked, "--adapter", adapter, "--adapter", adapter, stdin="")
    assert (twice.code, "is taken" in twice.err) == (2, True)


def test_a_prompt_that_is_given_is_continued_as_published(shared: Path) -> None:
    prompt = "Once upon a time"
    ran = ft("generate", "--model", shared / "models/stories260K", "--prompt", prompt, "--max-tokens", 40, "--json")
    assert ran.json["text"].startswith(", there was a little girl named Lily. She loved to play outside in the park.")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [{"prompt": "Hello"}, {"messages": [{"role": "user", "content": "Hi there, you"}]}, {"prompt": "Hello"}]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def test_prompts_of_a_file_are_answered_as_each_would_be_alone(model: Path, questions: Path, tmp_path: Path) -> None:
    asked = ["--model", model, "--max-tokens", 9, "--temperature", 1.0, "--seed", 4]
    alone = ft("generate", *asked, "--prompt", "Hello", "--json").json
    written = tmp_path / "answers.jsonl"
    ran = ft("generate", *asked, "--input", questions, "--output", written, "--json")
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert rows[0]["text"] == rows[2]["text"] == alone["text"]
    assert rows[1]["messages"] == [{"role": "user", "content": "Hi there, you"}]
    assert ran.json["tokens"] == sum(row["tokens"] for row in rows)
    assert "3 answers" in ran.err


def test_prompts_come_through_a_pipe_and_answers_in_their_order(model: Path) -> None:
    asked = ["generate", "--model", model, "--max-tokens", 5]
    lines = ft(*asked, "--json", stdin="Hello\n\nHi\n")
    rows = [json.loads(line) for line in lines.out.splitlines()]
    assert [row["prompt"] for row in rows] == ["Hello", "Hi"]
    shown = ft(*asked, "--input", "-", stdin="Hello\nHi\n")
    assert shown.out == "".join(f"{row['text']}\n\n" for row in rows)
    whole = ft(*asked, "--prompt", "-", "--json", stdin="Hello\nHi")
    assert whole.json["prompt"] == "Hello\nHi"


def test_wrong_files_of_prompts_end_with_a_message(model: Path, questions: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text("fine\n" + "x" * 300 + "\n", encoding="utf-8")
    wrong: list[tuple[list[object], int, str]] = [
        (["--input", tmp_path / "none.txt"], 1, "none.txt cannot be read"),
        (["--input", questions, "--prompt", "Hi"], 2, "both given"),
        (["--prompt", "Hi", "--output", tmp_path / "a.jsonl"], 2, "--output is for a file of prompts"),
        (["--input", questions, "--output", questions], 2, "is the file of the prompts"),
        (["--input", questions, "--output", tmp_path / "no" / "a.jsonl"], 2, "cannot be written"),
        (["--input", long], 2, "long.txt:2: The prompt has"),
    ]
    for arguments, code, message in wrong:
        ran = ft("generate", "--model", model, *arguments)
        assert (ran.code, message in ran.err, ran.out) == (code, True, ""), (arguments, ran)
    assert len(questions.read_text(encoding="utf-8").splitlines()) == 3
