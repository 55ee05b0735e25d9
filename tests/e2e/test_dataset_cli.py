"""`ft dataset` as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.ft import ft
from tests.support.in_process import ft_here

ROWS = [{"prompt": f"Is {n} even?", "completion": "yes" if n % 2 == 0 else "no"} for n in range(30)]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0], {"prompt": "And?", "completion": ""}])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tokenizer and a configuration: no weights are needed to look at data."""
    from tests.support.tiny_tokenizer import tiny_backend

    folder = tmp_path / "model"
    folder.mkdir()
    tiny_backend().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = {"model_type": "llama", "vocab_size": 261, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_info_counts_rows_and_lists_bad_ones_with_their_lines(data, model):
    result = ft("dataset", "info", data, "--model", model, "--json")
    found = result.json

    assert result.code == 0, result.err
    assert (found["rows"], found["usable_rows"], found["duplicates"]) == (32, 31, 1)
    assert (found["format"], found["shape"], found["encoding"]) == ("JSONL", "prompt/completion", "UTF-8")
    assert [(error["file"], error["line"]) for error in found["errors"]] == [("rows.jsonl", 32)]
    assert found["tokens"]["template"] == "alpaca"
    assert found["tokens"]["longest"] > found["characters"]["longest"]
    assert "rows.jsonl:32: the row has no answer" in ft_here("dataset", "info", data).out


def test_show_lists_each_row_that_is_left_out_with_its_reason(tmp_path, model):
    rows = [
        *({"prompt": f"Is {n} even?", "completion": "no", "label": True} for n in range(60)),
        {"prompt": "Is 0 even?", "completion": "no", "label": True},
        {"prompt": "Is 90 even?", "completion": "no", "label": False},
        {"prompt": "And?", "completion": ""},
        {"prompt": "Long?", "completion": "a b " * 100, "label": True},
        {"prompt": "x" * 400, "completion": "Long?", "label": True},
    ]
    data = write(tmp_path / "rows.jsonl", rows)
    as_json = ft_here("dataset", "info", data, "--model", model, "--show", "--json").json["left_out"]
    said = ft_here("dataset", "info", data, "--show").out
    config = tmp_path / "run.yml"
    config.write_text(f"model: {{name: demo}}\ndata: {{train_file: {data}, on_long: drop, max_length: 100}}\n")
    checked = ft_here("train", "validate", config, "--show")

    assert [(row["line"], row["reason"].split(" ", 1)[0]) for row in as_json] == [
        (61, "an"),
        (62, "labelled"),
        (63, "the"),
        (64, "cut:"),
        (65, "dropped:"),
    ]
    assert as_json[0]["reason"] == "an exact duplicate of rows.jsonl:1"
    assert "Rows that are dropped, left out or cut: 3\n  rows.jsonl:61: an exact duplicate of rows.jsonl:1\n" in said
    assert "rows.jsonl:64: dropped: " in checked.out, checked.err
    assert "tokens, more than 100" in checked.out


def test_show_is_bounded_and_counts_the_rest(tmp_path):
    data = write(tmp_path / "rows.jsonl", [*ROWS * 3])
    said = ft_here("dataset", "info", data, "--show").out

    assert "Rows that are dropped, left out or cut: 60" in said
    assert "  and 10 more (--json lists all)" in said


def test_inspect_shows_what_is_trained_on(data, model):
    document = ft_here("dataset", "inspect", data, "--model", model, "--rows", 1, "--json").json
    row = document["rows"][0]

    assert len(row["tokens"]) == len(row["mask"]) == len(row["token_texts"])
    assert [text for text, trained in zip(row["token_texts"], row["mask"], strict=True) if trained] == [
        *"yes",
        "</s>",
    ]
    plain = ft_here("dataset", "inspect", data, "--model", model, "--rows", 1).out
    assert "\u27e6yes</s>\u27e7" in plain
    assert "not trained" in plain


def test_prepare_writes_a_clean_copy_in_two_parts_and_never_over_a_file(data, tmp_path):
    output = tmp_path / "clean.jsonl"
    arguments = ("dataset", "prepare", data, "--output", output, "--split", 0.1, "--json")
    document = ft_here(*arguments).json
    written = [json.loads(line) for path in document["files"] for line in Path(path).read_text("utf-8").splitlines()]

    assert document["duplicates"] == 1
    assert sorted(document["files"].values()) == [3, 27]
    assert len(written) == 30
    assert written[0]["messages"][0] == {"role": "user", "content": ROWS[0]["prompt"]}
    again = ft_here(*arguments)
    assert again.code == 2
    assert "exists already" in again.err


def test_template_lists_and_shows(model):
    listed = ft_here("dataset", "template", "--json").json["templates"]
    shown = ft_here("dataset", "template", "chatml", "--model", model, "--json").json

    assert {"alpaca", "chatml", "llama2", "llama3", "mistral"} <= set(listed)
    assert shown["turn_end"] == "<|im_end|>"
    assert "<|im_start|>assistant\nOslo.<|im_end|>" in shown["rendered"]


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 1, "there is no such file"),
        (b"", 1, "the file is empty"),
        (b'{"text": "a"}\n' * 16 + b'{"text": \n' + b'{"text": "b"}\n' * 90, 1, "bad.jsonl:17: invalid JSON"),
        ("caf\u00e9\n".encode("latin-1"), 1, "bad.jsonl:1: byte 0xe9"),
        (b'{"prompt": "a", "completion": "b", "label": "maybe"}\n', 1, "bad.jsonl:1: the label 'maybe'"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', 1, "preference pairs"),
    ],
    ids=["missing", "empty", "line 17", "latin-1", "label", "preference"],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, monkeypatch, content, code, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "bad.jsonl").write_bytes(content)
    result = ft_here("dataset", "info", "bad.jsonl", "--json")

    assert result.code == code
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.json["error"]["exit_code"] == code


def test_too_many_bad_rows_write_nothing(tmp_path):
    rows = write(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "" if n < 6 else f"{n}"} for n in range(100)])
    result = ft_here("dataset", "prepare", rows, "--output", tmp_path / "out" / "clean.jsonl")

    assert result.code == 1
    assert "6 of 100 rows cannot be used (6.0%)" in result.err
    assert "bad.jsonl:1: the row has no answer" in result.err
    assert not (tmp_path / "out").exists()


def test_looking_at_a_file_loads_no_engine(data):
    code = (
        "import sys; from finetune.cli.main import run; "
        f"run(['dataset', 'info', {str(data)!r}]); "
        "sys.exit(bool({'mlx', 'torch', 'transformers'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_check_names_what_is_suspicious(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0], {"prompt": "Is 3 even?", "completion": "maybe"}])
    held_out = write(tmp_path / "test.jsonl", [{"prompt": "Is 4 even?", "completion": "yes"}])
    done = ft_here("dataset", "check", data, "--validation", held_out, "--model", "demo")
    assert done.code == 0, done.err
    assert "32 rows, of which 0 cannot be used" in done.out
    assert "same request, different answers: 1\n  rows.jsonl:4, rows.jsonl:32: Is 3 even?" in done.out
    assert "exact copies: 1\n  rows.jsonl:1, rows.jsonl:31: Is 0 even?" in done.out
    assert "in validation too: 1\n  test.jsonl:1, rows.jsonl:5: Is 4 even?" in done.out
    as_json = ft_here("dataset", "check", data, "--json").json
    assert {check["name"]: len(check["findings"]) for check in as_json["checks"]}["exact copies"] == 1
