"""Files to raw rows: formats by content, encodings, and messages that name the line."""

import gzip
import json
from pathlib import Path

import pytest

from finetune.core.errors import DataError
from finetune.data.readers import RawRow, SourceFile, open_file, open_path

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c\u00e9", "completion": "d"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read_file(path: Path) -> tuple[SourceFile, list[RawRow]]:
    source = open_file(path)
    return source, list(source.rows())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("name", "content", "kind", "lines"),
    [
        ("rows.jsonl", JSONL, "JSONL", [1, 2]),
        ("rows.json", JSONL, "JSONL", [1, 2]),
        ("rows.json", json.dumps(ROWS), "JSON array", [1, 1]),
        ("rows.jsonl", json.dumps(ROWS, indent=2), "JSON array", [2, 6]),
        ("rows.json", json.dumps({"version": 1, "data": ROWS}), 'JSON object with the rows in "data"', [1, 1]),
        ("rows.csv", "prompt,completion\na,b\nc\u00e9,d\n", "CSV", [2, 3]),
        ("rows.tsv", "prompt\tcompletion\na\tb\nc\u00e9\td\n", "TSV", [2, 3]),
        ("rows.csv", "prompt;completion\na;b\nc\u00e9;d\n", "CSV", [2, 3]),
        ("rows", JSONL, "JSONL", [1, 2]),
    ],
    ids=["jsonl", "jsonl as json", "array", "array as jsonl", "object", "csv", "tsv", "semicolons", "no suffix"],
)
def test_the_content_decides_the_format(tmp_path, name, content, kind, lines):
    source, rows = read_file(write(tmp_path / name, content))

    assert source.format == kind
    assert [row.value for row in rows] == ROWS
    assert [row.origin.line for row in rows] == lines


@pytest.mark.parametrize("compressed", [False, True])
def test_bom_and_crlf_and_gzip_change_nothing(tmp_path, compressed):
    content = b"\xef\xbb\xbf" + JSONL.replace("\n", "\r\n").encode("utf-8")
    path = tmp_path / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    source, rows = read_file(write(path, gzip.compress(content) if compressed else content))

    assert [row.value for row in rows] == ROWS
    assert source.encoding == "UTF-8 with BOM"


def test_a_quoted_csv_field_may_hold_line_breaks_and_rows_keep_their_lines(tmp_path):
    _, rows = read_file(write(tmp_path / "rows.csv", 'text,label\n"one\ntwo, three",x\nfour,y\n'))

    assert [row.value["text"] for row in rows] == ["one\ntwo, three", "four"]
    assert [row.origin.line for row in rows] == [2, 4]


@pytest.mark.parametrize(
    ("text", "rows", "lines"),
    [
        ("one\ntwo\n", ["one", "two"], [1, 2]),
        ("one\nmore\n\n\ntwo\n", ["one\nmore", "two"], [1, 5]),
        ("one\n\nmore\n<|endoftext|>\ntwo\n", ["one\n\nmore", "two"], [1, 5]),
    ],
    ids=["lines", "paragraphs", "documents"],
)
def test_plain_text_is_cut_at_its_strongest_separator(tmp_path, text, rows, lines):
    _, found = read_file(write(tmp_path / "book.txt", text))

    assert [row.value for row in found] == rows
    assert [row.origin.line for row in found] == lines


def test_parquet_rows_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")

    assert [row.value for row in read_file(tmp_path / "rows.parquet")[1]] == ROWS


def test_a_directory_is_read_in_the_order_of_names_without_other_files(tmp_path):
    write(tmp_path / "b.jsonl", json.dumps(ROWS[1]))
    write(tmp_path / "a.jsonl", json.dumps(ROWS[0]))
    write(tmp_path / "LICENSE", "free")

    assert [source.path.name for source in open_path(tmp_path)] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", r"x\.jsonl: the file is empty"),
        ("x.jsonl", b" \n\n", r"the file is empty"),
        (
            "x.jsonl",
            "\n".join(['{"text": "a"}'] * 16 + ['{"text": '] + ['{"text": "b"}'] * 83),
            r"x\.jsonl:17: invalid",
        ),
        ("x.json", '[{"text": "a"},\n {"text" "b"}]', r"x\.json:2: invalid JSON"),
        ("x.json", '[{"text": "a"}\n', r"x\.json:2: invalid JSON \(expected , or \]"),
        ("x.csv", "a,b\n1,2\n1,2,3\n", r"x\.csv:3: 3 fields where the header has 2"),
        ("x.csv", 'a,b\n1,"2\n', r"x\.csv:"),
        ("x.csv", "a,a\n1,2\n", r"x\.csv:1: the first line must name each column once"),
        ("x.txt", "first\ncaf\u00e9\n".encode("latin-1"), r"x\.txt:2: byte 0xe9 .*Latin-1.*iconv -f LATIN1 -t UTF-8"),
        ("x.txt", "text".encode("utf-16"), r"UTF-16.*iconv"),
        ("x.txt", b"a\nb\x00c", r"x\.txt:2: NUL bytes"),
        ("x.jsonl.gz", gzip.compress(b"some rows of text")[:-9], r"gzip file is damaged"),
        ("x.parquet", b"PAR1 but not really", r"not a readable Parquet file"),
    ],
    ids=[
        "empty",
        "blank",
        "line 17",
        "array",
        "cut array",
        "csv fields",
        "csv quote",
        "csv names",
        "latin-1",
        "utf-16",
        "nul",
        "gzip",
        "parquet",
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_file(write(tmp_path / name, content))


def test_a_missing_file_is_named_with_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", JSONL)

    with pytest.raises(DataError, match=r"tran\.jsonl: there is no such file\. Did you mean .*train\.jsonl"):
        open_path(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match="no directory"):
        open_path(tmp_path / "nowhere" / "train.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        open_path(tmp_path / "empty")
