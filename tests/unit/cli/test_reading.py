"""A person sees how far the reading of large data is."""

from pathlib import Path

import pytest
from tests.unit.data.test_large_data import as_large, prepared

from finetune.cli import reading
from finetune.data.progress import Progress, tell, watched


def test_without_a_terminal_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SECONDS_BETWEEN_LINES", 0.0)
    with reading.reading_shown():
        tell(Progress("Reading rows.jsonl", 1_200, 0.25))
        tell(Progress("Reading rows.csv", 7, None))
    tell(Progress("Reading more", 1, None))

    assert capsys.readouterr().err == "Reading rows.jsonl: 1,200 rows, 25%\nReading rows.csv: 7 rows\n"


class FakeBar:
    """Records whether it is shown."""

    shown = False

    def start(self) -> None:
        self.shown = True

    def stop(self) -> None:
        self.shown = False

    def add_task(self, *_: object, **__: object) -> int:
        return 0

    def update(self, *_: object, **__: object) -> None:
        assert self.shown


def test_on_a_terminal_a_bar_goes_when_the_work_is_done_or_the_block_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[FakeBar] = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(reading, "_make_bar", lambda: bars.append(FakeBar()) or bars[-1])
    with reading.reading_shown():
        tell(Progress("Reading a", 10, 0.5))
        assert [bar.shown for bar in bars] == [True]
        tell(Progress("Reading a", 20, 1.0, done=True))
        tell(Progress("Reading b", 10, None))
        assert [bar.shown for bar in bars] == [False, True]
    assert [bar.shown for bar in bars] == [False, False]


def test_a_large_file_tells_how_much_of_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    as_large(monkeypatch, processes=1)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{n} {"x" * 900}", "completion": "b"}}\n' for n in range(1_500)))
    said: list[Progress] = []
    with watched(said.append):
        prepared(path)

    shares = [progress.share for progress in said]
    assert {progress.what for progress in said} == {"Reading rows.jsonl"}
    assert len(said) >= 3
    assert shares == sorted(shares)
    assert (said[-1].rows, said[-1].share, said[-1].done) == (1_500, 1.0, True)
