"""Files to examples: read, shape found, each row checked, bad rows counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.config.schema import DataFile
from finetune.core.errors import DataError
from finetune.data.checks import check_error_rate
from finetune.data.conversations import RowError
from finetune.data.formats import LabelError, Shape, detect_shape, to_example
from finetune.data.readers import SourceFile, read_path
from finetune.data.report import FileReport
from finetune.data.rows import Example, Problem


@dataclass(frozen=True, slots=True)
class LoadedData:
    """Examples of all files, in order. `weights` is in step with `examples`."""

    examples: list[Example]
    weights: list[float]
    problems: list[Problem]
    files: list[FileReport]
    rows: int


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """One file's examples and bad rows, before any rate is applied."""

    source: SourceFile
    shape: Shape
    examples: list[Example]
    problems: list[Problem]


def parse_file(source: SourceFile, columns: Mapping[str, str]) -> ParsedFile:
    """Examples of one file. Raises DataError for an unknown shape, and for labels that mean nothing known."""
    shape = detect_shape(source.rows, columns)
    parsed = ParsedFile(source, shape, [], [])
    unknown_labels: list[Problem] = []
    for row in source.rows:
        try:
            parsed.examples.append(to_example(row, shape, columns))
        except LabelError as error:
            unknown_labels.append(Problem(row.origin, str(error)))
        except RowError as error:
            parsed.problems.append(Problem(row.origin, str(error)))
    if unknown_labels:
        shown = "\n".join(f"  {problem}" for problem in unknown_labels[:5])
        count = len(unknown_labels)
        more = f"\n  and {count - 5:,} more" if count > 5 else ""
        noun = "row has" if count == 1 else "rows have"
        raise DataError(f"{source.path}: {count:,} {noun} a label that is not known:\n{shown}{more}")
    return parsed


def load_examples(files: Sequence[DataFile], *, columns: Mapping[str, str], max_error_rate: float) -> LoadedData:
    """All examples of the files. Raises DataError for a file with too many bad rows."""
    loaded = LoadedData([], [], [], [], 0)
    rows = 0
    for entry in files:
        for source in read_path(Path(entry.path).expanduser()):
            parsed = parse_file(source, columns)
            check_error_rate(str(source.path), parsed.problems, len(source.rows), max_error_rate)
            loaded.examples.extend(parsed.examples)
            loaded.weights.extend([entry.weight] * len(parsed.examples))
            loaded.problems.extend(parsed.problems)
            loaded.files.append(file_report(parsed))
            rows += len(source.rows)
    return LoadedData(loaded.examples, loaded.weights, loaded.problems, loaded.files, rows)


def file_report(parsed: ParsedFile) -> FileReport:
    """What there is to say about a file."""
    source, shape = parsed.source, parsed.shape
    return FileReport(
        path=str(source.path),
        format=source.format,
        encoding=source.encoding,
        shape=shape.description,
        sha256=source.sha256,
        rows=len(source.rows),
        bad_rows=len(parsed.problems),
        unused_columns=shape.unused_columns,
    )


def training_files(train_file: str | Sequence[str | DataFile]) -> list[DataFile]:
    """`data.train_file` in its three forms as a list of files with weights."""
    entries = [train_file] if isinstance(train_file, str) else train_file
    return [DataFile(path=entry) if isinstance(entry, str) else entry for entry in entries]
