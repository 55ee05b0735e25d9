"""Strategies for hypothesis: files of examples that were good once, and values that nobody means."""

import csv
import gzip
import io
import json
import re
from typing import Any

from hypothesis import strategies as st

DEEP = 3_000

ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": str(n)}]}
        for n in range(6)
    ],
    "prompt": [{"prompt": f"Say {n}", "completion": str(n), "label": n % 2 == 0} for n in range(6)],
    "alpaca": [{"instruction": f"Say {n}", "input": "", "output": str(n), "history": [["a", "b"]]} for n in range(6)],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"{n}"}, {"from": "gpt", "value": "x"}]} for n in range(6)
    ],
    "preference": [{"prompt": f"Say {n}", "chosen": "yes", "rejected": "no"} for n in range(6)],
    "tools": [
        {
            "messages": [
                {"role": "user", "content": f"Weather in {n}?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "w", "arguments": '{"city": "x"}'}}],
                },
            ],
            "tools": [{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}],
        }
        for n in range(6)
    ],
    "text": [{"text": f"A line about {n}."} for n in range(6)],
}


class _Nested:
    """A value whose JSON is deep: within what a parser can recurse, or beyond it."""

    def __init__(self, depth: int) -> None:
        self.depth = depth


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20).map(lambda raw: raw.decode("latin-1")),
    st.sampled_from(
        [
            10**400,
            -(10**30),
            "\ud800",
            "x\ud83d",
            "\x00",
            "\u2028",
            "",
            " ",
            "x" * 50_000,
            [],
            {},
            [[]],
            [None],
            {"": ""},
        ]
    ),
    st.sampled_from(["user", "assistant", "system", "tool", "function_call", "nobody"]),
    st.sampled_from([_Nested(100), _Nested(240), _Nested(480), _Nested(DEEP)]),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
)


def dumped(value: Any) -> str:
    text = json.dumps(value, default=lambda nested: f"@deep{nested.depth}@")
    return re.sub('"@deep([0-9]+)@"', lambda found: '{"a":[' * int(found[1]) + "1" + "]}" * int(found[1]), text)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    found = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in pairs for place in places(inner, (*path, key))]


def _put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@st.composite
def odd_rows(draw: st.DrawFn) -> list[Any]:
    """Rows of a known format with up to four values of another kind, and rows that are none."""
    rows: list[Any] = json.loads(json.dumps(draw(st.sampled_from(list(ROWS.values())))))
    for _ in range(draw(st.integers(1, 4))):
        number = draw(st.integers(0, len(rows) - 1))
        inside = places(rows[number])
        if not inside or draw(st.integers(0, 5)) == 0:
            rows[number] = draw(ODD_VALUES)
        else:
            _put(rows[number], draw(st.sampled_from(inside)), draw(ODD_VALUES))
    return rows


def _as_table(rows: list[Any], delimiter: str) -> bytes:
    objects = [row for row in rows if isinstance(row, dict)] or [{"prompt": "a"}]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    names = list(objects[0])
    writer.writerow(names)
    for row in objects:
        writer.writerow([row.get(name) if isinstance(row.get(name), str) else dumped(row.get(name)) for name in names])
    return out.getvalue().encode("utf-8", "surrogatepass")


def _as_parquet(rows: list[Any]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    objects = [row for row in rows if isinstance(row, dict)]
    try:
        table = pa.Table.from_pylist(objects)
    except (pa.ArrowException, OverflowError, TypeError, ValueError, UnicodeError):
        table = pa.Table.from_pylist([{"row": dumped(row).encode("utf-8", "surrogatepass")} for row in rows])
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


@st.composite
def odd_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A name and content: odd rows in one of the formats, then perhaps damaged as bytes."""
    rows = draw(odd_rows() | st.sampled_from(list(ROWS.values())))
    kind = draw(st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "parquet", "md", "ndjson"]))
    if kind == "json":
        content = dumped(draw(st.sampled_from([rows, {"data": rows}, rows[0]]))).encode()
    elif kind in {"csv", "tsv"}:
        content = _as_table(rows, "," if kind == "csv" else "\t")
    elif kind == "parquet":
        content = _as_parquet(rows)
    else:
        content = "\n".join(map(dumped, rows)).encode()
    for _ in range(draw(st.integers(0, 3))):
        content = draw(damaged(content))
    if draw(st.integers(0, 5)) == 0:
        content = gzip.compress(content)
        if draw(st.booleans()):
            content = draw(damaged(content))
    suffix = draw(st.sampled_from([f".{kind}", f".{kind}", f".{kind}.gz", ".json", ".dat", ""]))
    return f"rows{suffix}", content


PIECES = (
    *(b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b'"\\ud800"', b"\xef\xbb\xbf", b"\r", b"\n\n\n", b"\t", b","),
    *(b'"', b"'", b"}", b"{", b"]", b"[" * DEEP, b'{"a":' * DEEP, b"9" * 5_000, b"1e999", b"NaN", b"-Infinity"),
    *(b'"a":1,"a":2,', b"null", b"x" * 100_000, b'"x"\n' * 200, b"\x1f\x8b\x08", b"PAR1", b"\\", b"\xc3\x28", b"#"),
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with one thing done to them."""
    if not content:
        return draw(st.sampled_from(PIECES))
    at = draw(st.integers(0, len(content) - 1))
    to = draw(st.integers(at, min(len(content), at + 200)))
    ways = {
        "flip": content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :],
        "cut": content[:at],
        "remove": content[:at] + content[to:],
        "double": content[:to] + content[at:],
        "insert": content[:at] + draw(st.sampled_from(PIECES)) + content[at:],
        "replace": content[:at] + draw(st.binary(max_size=8)) + content[to:],
        "utf-16": content.decode("utf-8", "replace").encode("utf-16"),
        "latin-1": content.decode("utf-8", "replace").replace("a", "\xe4").encode("latin-1", "replace"),
    }
    return ways[draw(st.sampled_from(list(ways)))]


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


ODD_YAML = (
    *(
        "",
        "\t",
        "---\n---\n",
        "a: b: c",
        "[",
        "{",
        "- a\n- b",
        "null",
        "7",
        "'",
        '"',
        "%YAML 9.9\n---\n",
        "!!python/none",
    ),
    *("!!python/object/apply:os.system ['touch trap.txt']", "!!python/object:os.system {}", "!!binary x", "!!set {a}"),
    *(
        "&a [*a]",
        "? [a, b]\n: c",
        "1: 2",
        "null: 3",
        "~: ~",
        "a: 1\na: 2",
        "2001-01-01",
        "0x1F",
        "0o17",
        "1_000",
        ".inf",
    ),
    *(_bomb(9), "[" * DEEP, "- " * DEEP, "a: " * 500, "\x00", "\ufeff", "\u2028", "key: |\n  text", "<<: {a: b}"),
)
ODD_SCALARS = (
    *(
        "null",
        "~",
        "true",
        "yes",
        "-1",
        "0",
        "1e999",
        "-.inf",
        ".nan",
        "9" * 400,
        "1e-400",
        "''",
        '" "',
        "[]",
        "{}",
        "[1]",
    ),
    *(
        "{a: b}",
        "2001-01-01",
        "!!binary aGk=",
        "!!python/name:os.system",
        "'\\ud800'",
        '"\\uD800"',
        "x" * 5_000,
        "auto",
    ),
    *("1.5", "4bit", "demo", "../..", "/", "/dev/null", "NaN", "*x", "&x y", "0x10", "١٢", "😀", "'1'", "1e-4", "1:30"),
)
