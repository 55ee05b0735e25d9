"""Files to encoded rows: read, shape found, each row checked, rendered and tokenised, bad rows counted.

A file goes through once, chunk by chunk, with the shape that its first chunk has; where most rows turn out to have
another, it goes through again with that one.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.config.schema import DataFile
from finetune.core.errors import DataError, UsageError
from finetune.core.machine import allow_open_files, return_freed_memory, tidied, usable_cores
from finetune.data import parsers
from finetune.data.blocks import Block, is_zipped
from finetune.data.checks import check_error_rate
from finetune.data.encoding import Encoder, Reading, RowFault, ids_type, read_chunk
from finetune.data.formats import Shape, ShapeCounts
from finetune.data.loaded import LoadedData, LoadedFile, RowKinds
from finetune.data.parsers import BrokenLines
from finetune.data.progress import Progress, tell
from finetune.data.readers import Chunk, SourceFile, data_files, open_path, suffix_of
from finetune.data.rows import Origin, Problem
from finetune.data.token_cache import TokenCache, key_of, token_cache
from finetune.data.token_store import FILES_OF_ENTRY, MemoryWriter, StoreWriter, TokenStore
from finetune.data.workers import Processing, processing

LARGE = 8 * 2**20  # bytes of data from which processes and the cache pay: about three seconds of work
_GZIP_FACTOR = 4  # what gzip makes of text, about
_MOST_PROCESSES = 16
_OTHER_FILES = 128  # that a process may need besides


@dataclass(frozen=True, slots=True)
class Means:
    """How many processes work on rows, and where they are kept. `cache` None: in memory."""

    processes: int
    cache: TokenCache | None


def means_for(paths: Sequence[str]) -> Means:
    """What suits the size of these files and directories. Raises DataError where one is missing, UsageError."""
    files = [file for path in paths for file in data_files(Path(path).expanduser())]
    size = sum(file.stat().st_size * (_GZIP_FACTOR if is_zipped(file) else 1) for file in files)
    if size < LARGE:
        return Means(1, None)
    if not allow_open_files(len(files) * FILES_OF_ENTRY + _OTHER_FILES):
        raise UsageError(
            f"{len(files):,} data files need {FILES_OF_ENTRY} open files each, more than this system allows. "
            f"Allow more (`ulimit -n {len(files) * FILES_OF_ENTRY + 2 * _OTHER_FILES}`), or join files."
        )
    return Means(_processes(), token_cache())


def _processes() -> int:
    """FT_DATA_PROCESSES, else one for each core."""
    given = os.environ.get("FT_DATA_PROCESSES")
    if given is None:
        return min(_MOST_PROCESSES, usable_cores())
    if not given.isdigit() or int(given) < 1:
        raise UsageError(f"FT_DATA_PROCESSES={given}: give the number of processes that read data, 1 or more.")
    return int(given)


@dataclass(slots=True)
class _Going:
    """Tells how far a large file is read."""

    source: SourceFile
    read: int = 0  # bytes

    def through(self) -> Iterator[Chunk]:
        """The chunks of the file."""
        for chunk in self.source.chunks():
            self.read += len(chunk.content) if isinstance(chunk, Block) else 0
            yield chunk

    def tell(self, rows: int, *, done: bool = False) -> None:
        """So many rows are there."""
        share = self.read / self.source.bytes if 0 < self.read <= self.source.bytes else None
        if self.source.bytes >= LARGE:
            tell(Progress(f"Reading {self.source.path.name}", rows, share, done))


@dataclass(slots=True)
class _Facts:
    """What is known of a file besides its rows."""

    rows: int = 0
    shape: Shape | None = None
    problems: list[RowFault] = field(default_factory=list)  # by line
    refused: list[RowFault] = field(default_factory=list)  # by place in the table

    def as_json(self) -> dict[str, Any]:
        assert self.shape is not None
        reasons = {fault.reason: 0 for fault in (*self.problems, *self.refused)}
        numbers = {reason: number for number, reason in enumerate(reasons)}
        return {
            "rows": self.rows,
            "shape": asdict(self.shape),
            "reasons": list(numbers),
            "problems": [(fault.at, numbers[fault.reason]) for fault in self.problems],
            "refused": [(fault.at, numbers[fault.reason]) for fault in self.refused],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "_Facts":
        reasons = stored["reasons"]
        faults = {key: [RowFault(at, reasons[number]) for at, number in stored[key]] for key in ("problems", "refused")}
        return cls(stored["rows"], Shape(**stored["shape"]), faults["problems"], faults["refused"])


def open_files(files: Sequence[DataFile]) -> list[tuple[SourceFile, float]]:
    """Each file with its weight. Raises DataError."""
    return [(source, entry.weight) for entry in files for source in open_path(Path(entry.path).expanduser())]


def load(
    sources: Sequence[tuple[SourceFile, float]],
    *,
    columns: Mapping[str, str],
    encoder: Encoder | None,
    means: Means,
    max_error_rate: float | None,
) -> LoadedData:
    """All usable rows, with tokens where there is an encoder.

    Raises DataError for a damaged file, an unknown shape, labels that mean nothing known, and a file with more bad rows
    than the rate allows (None: any).
    """
    files = []
    with processing(means.processes) as process:
        for source, weight in sources:
            store, facts = _stored(source, columns, encoder, process, means.cache)
            file = _loaded_file(source, weight, store, facts)
            if max_error_rate is not None:
                check_error_rate(str(source.path), file.problems, file.rows, max_error_rate)
            files.append(file)
    return LoadedData(files)


def first_kinds(sources: Sequence[tuple[SourceFile, float]], columns: Mapping[str, str]) -> RowKinds:
    """What is among the first rows of each file: most often what is among all."""
    return RowKinds.of(_first_chunk(source, columns)[1] for source, _ in sources)


def _loaded_file(source: SourceFile, weight: float, store: TokenStore, facts: _Facts) -> LoadedFile:
    assert facts.shape is not None
    problems = tuple(Problem(Origin(source.path.name, fault.at), fault.reason) for fault in facts.problems)
    refused = {fault.at: fault.reason for fault in facts.refused}
    return LoadedFile(source, facts.shape, facts.rows, store, problems, refused, weight)


def _stored(
    source: SourceFile,
    columns: Mapping[str, str],
    encoder: Encoder | None,
    process: Processing,
    cache: TokenCache | None,
) -> tuple[TokenStore, _Facts]:
    """The rows, from the cache where they are in it."""
    key = cache_key(source, columns, encoder)
    found = None if cache is None else cache.find(key)
    if found is not None:
        return found.store, _Facts.from_json(found.facts)
    shape = _first_chunk(source, columns)[0]
    while True:
        if cache is None:
            memory = MemoryWriter()
            facts = _read(source, Reading(source.path, columns, shape), encoder, process, memory)
            if facts.shape is not None and facts.shape.name == shape:
                return memory.finish(), facts
        else:
            with cache.writing(key) as unfinished:
                facts = _read(source, Reading(source.path, columns, shape), encoder, process, unfinished.writer)
                if facts.shape is not None and facts.shape.name == shape:
                    entry = unfinished.publish(np.dtype(ids_type(encoder)).str, facts.as_json())
                    return_freed_memory()  # that of chunks, before the account of the rows takes its own
                    return entry.store, facts
        shape = facts.shape.name if facts.shape else None


def cache_key(source: SourceFile, columns: Mapping[str, str], encoder: Encoder | None) -> str:
    """The name of the entry of a file: it changes with everything that its rows depend on."""
    how = None
    if encoder is not None:
        template, tokenizer = encoder.template, encoder.tokenizer
        how = {
            "template": [template.name, template.sha256],
            "tokenizer": tokenizer.fingerprint,
            "settings": [*asdict(tokenizer.settings).values(), tokenizer.adds_bos],
            "train_on_prompt": encoder.train_on_prompt,
            "include_undesirable": encoder.include_undesirable,
        }
    name = suffix_of(source.path)
    return key_of({"sha256": source.sha256, "name": name, "columns": dict(columns), "encoder": how})


def _first_chunk(source: SourceFile, columns: Mapping[str, str]) -> tuple[str | None, npt.NDArray[Any]]:
    """The shape of a file's first rows (None: not known), and their flags."""
    looking = Reading(source.path, columns, None)
    try:
        chunk = next(source.chunks(), None)
        if chunk is None:
            return None, np.empty(0, np.uint8)
        shape = read_chunk(chunk, looking, None).shapes.shape(source.path.name, columns).name
        return shape, read_chunk(chunk, Reading(source.path, columns, shape), None).table["flags"]
    except DataError:  # the whole file may have another shape; if not, reading it says all that is wrong
        return None, np.empty(0, np.uint8)


def _read(
    source: SourceFile, reading: Reading, encoder: Encoder | None, process: Processing, writer: StoreWriter
) -> _Facts:
    """Every chunk into `writer`. Raises DataError for what no other shape would mend."""
    facts, shapes, broken = _Facts(), ShapeCounts(), BrokenLines()
    unknown_labels: list[RowFault] = []
    places, reasons = 0, dict[str, str]()
    progress = _Going(source)
    for found in tidied(process(progress.through(), reading, encoder)):
        if reading.shape is not None and (found.broken.count or (found.unknown_labels and encoder)):
            # The file will be refused. What else is wrong with it is found sooner without tokenising the rest.
            shape = None if found.broken.count else reading.shape
            return _read(source, Reading(source.path, reading.columns, shape), None, process, MemoryWriter())
        shapes.add(found.shapes)
        broken.merge(found.broken)
        unknown_labels += found.unknown_labels
        facts.problems += [_kept(fault, 0, reasons) for fault in found.problems]
        facts.refused += [_kept(fault, places, reasons) for fault in found.refused]
        found.table["number"] += facts.rows
        writer.add(found.table, found.ids, found.mask)
        facts.rows += found.rows
        places += len(found.table)
        progress.tell(facts.rows)
    progress.tell(facts.rows, done=True)
    broken.refuse(source.path, parsers.JSON_ADVICE)
    if not facts.rows:
        raise DataError(f"{source.path}: the file ({source.format}) has no rows.")
    source.check_unchanged()
    facts.shape = shapes.shape(source.path.name, reading.columns)
    if facts.shape.name == reading.shape:
        _refuse_labels(source, unknown_labels)
    return facts


def _kept(fault: RowFault, offset: int, reasons: dict[str, str]) -> RowFault:
    """One text for each reason: thousands of rows may have the same."""
    return RowFault(fault.at + offset, reasons.setdefault(fault.reason, fault.reason))


def _refuse_labels(source: SourceFile, unknown: Sequence[RowFault]) -> None:
    if not unknown:
        return
    shown = "\n".join(f"  {source.path.name}:{fault.at}: {fault.reason}" for fault in unknown[:5])
    count = len(unknown)
    more = f"\n  and {count - 5:,} more" if count > 5 else ""
    noun = "row has" if count == 1 else "rows have"
    raise DataError(f"{source.path}: {count:,} {noun} a label that is not known:\n{shown}{more}")


def training_files(train_file: str | Sequence[str | DataFile]) -> list[DataFile]:
    """`data.train_file` in its three forms as a list of files with weights."""
    entries = [train_file] if isinstance(train_file, str) else train_file
    return [DataFile(path=entry) if isinstance(entry, str) else entry for entry in entries]
