"""From a data section of the configuration to rows that a model trains on, with an account of every row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

from finetune.config.schema import DataConfig, DataFile
from finetune.core.errors import DataError
from finetune.core.types import IntArray
from finetune.data.columns import at
from finetune.data.encoding import Encoder
from finetune.data.fingerprint import fingerprints
from finetune.data.groups import Keyed
from finetune.data.listing import RowListing
from finetune.data.load import Means, load, means_for, open_files, training_files
from finetune.data.loaded import LoadedData
from finetune.data.notices import describe
from finetune.data.rendering import load_in_template
from finetune.data.report import DataReport
from finetune.data.rows import EncodedRow
from finetune.data.samples import Sample, make_samples
from finetune.data.selection import Selection, select_rows
from finetune.data.split import split_rows
from finetune.data.stored_rows import StoredRows, lengths_of
from finetune.data.templates import Template
from finetune.data.token_store import DamagedStoreError
from finetune.data.tokenizer import TextTokenizer
from finetune.data.weights import weighted

__all__ = ["EvaluationData", "PreparedData", "Sample", "prepare_data", "prepare_evaluation"]

OnNotice = Callable[[str], None]
T = TypeVar("T")

_BY_WEIGHT = "left out by the weight of its file"


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Everything that a run needs to know about its data."""

    train: Sequence[EncodedRow]  # a row of a file with weight 2 stands here twice
    validation: StoredRows
    samples: tuple[Sample, ...]  # from the validation rows
    report: DataReport
    left_out: RowListing  # rows that are dropped, left out or cut
    template: Template
    max_length: int
    fingerprints: Mapping[str, Any]  # files, rows, tokens, template, tokenizer: for run.json and for resuming
    notices: tuple[str, ...]

    @property
    def train_lengths(self) -> IntArray:
        """Tokens of each training row [rows]."""
        return lengths_of(self.train)


@dataclass(frozen=True, slots=True)
class EvaluationData:
    """The rows of a data set, all of them, for scoring. `report.rows.validation` counts them."""

    rows: Sequence[EncodedRow]
    samples: tuple[Sample, ...]
    report: DataReport
    template: Template
    max_length: int
    fingerprints: Mapping[str, Any]
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Sides:
    """The training rows (with repeats) and the validation rows, and what they were chosen from."""

    train: StoredRows
    validation: StoredRows
    held_out: LoadedData  # that the validation rows are of
    report: DataReport
    left_out: RowListing
    leaks: int


@dataclass(frozen=True, slots=True)
class _Preparing:
    """What holds for every file of one preparation."""

    config: DataConfig
    tokenizer: TextTokenizer
    context_length: int | None
    means: Means

    def load(self, files: Sequence[DataFile]) -> tuple[LoadedData, Template]:
        """The rows, with the template that suits them."""
        config = self.config
        return load_in_template(
            open_files(files),
            config.template,
            self._encoder,
            tokenizer=self.tokenizer,
            columns=config.columns,
            means=self.means,
            max_error_rate=config.max_error_rate,
        )

    def load_with(self, template: Template, files: Sequence[DataFile]) -> LoadedData:
        """The rows, in a template that is chosen already."""
        return load(
            open_files(files),
            columns=self.config.columns,
            encoder=self._encoder(template),
            means=self.means,
            max_error_rate=self.config.max_error_rate,
        )

    def select(self, loaded: LoadedData, *, keep_duplicates: bool = False) -> Selection:
        """The rows that remain."""
        return select_rows(loaded, self.config, context_length=self.context_length, keep_duplicates=keep_duplicates)

    def samples(
        self, loaded: LoadedData, rows: StoredRows, template: Template, limit: int | None
    ) -> tuple[Sample, ...]:
        """Prompts and answers from some of the rows."""
        return make_samples(
            loaded,
            rows,
            columns=self.config.columns,
            template=template,
            tokenizer=self.tokenizer,
            limit=limit,
        )

    def _encoder(self, template: Template) -> Encoder:
        config = self.config
        return Encoder(template, self.tokenizer, config.train_on_prompt, config.include_undesirable)


def prepare_data(
    config: DataConfig,
    *,
    tokenizer: TextTokenizer,
    context_length: int | None,
    seed: int,
    samples: int = 0,
    on_notice: OnNotice | None = None,
) -> PreparedData:
    """Read, check, render, tokenise, mask, limit and split. Raises DataError and UsageError.

    The result is a function of the files, the configuration, the tokenizer and the seed alone.
    """
    files = training_files(config.train_file)
    held_out = [] if config.validation_file is None else [DataFile(path=config.validation_file)]

    def prepared(means: Means) -> PreparedData:
        preparing = _Preparing(config, tokenizer, context_length, means)
        loaded, template = preparing.load(files)
        chosen = preparing.select(loaded)
        if held_out:
            sides = _two_files(chosen, preparing.select(preparing.load_with(template, held_out)), seed)
        else:
            sides = _split(chosen, config, seed)
        if not len(sides.train):
            path = loaded.files[0].source.path
            raise DataError(f"{path}: no row is left to train on: the weights leave all of them out.")
        return PreparedData(
            train=sides.train,
            validation=sides.validation,
            samples=preparing.samples(sides.held_out, sides.validation, template, samples),
            report=sides.report,
            left_out=sides.left_out,
            template=template,
            max_length=chosen.fates.max_length,
            fingerprints=fingerprints(sides.report, sides.train, sides.validation, template, tokenizer),
            notices=describe(sides.report, config, template, chosen.unseen_roles, leaks=sides.leaks),
        )

    data = _with_means([*files, *held_out], prepared)
    _tell(data.notices, on_notice)
    return data


def prepare_evaluation(
    path: str,
    config: DataConfig,
    *,
    tokenizer: TextTokenizer,
    context_length: int | None,
    samples: int | None = None,
    on_notice: OnNotice | None = None,
) -> EvaluationData:
    """All usable rows of `path`, copies included, rendered as `config` says; `samples` None: one for each row."""
    files = [DataFile(path=path)]

    def prepared(means: Means) -> EvaluationData:
        preparing = _Preparing(config, tokenizer, context_length, means)
        loaded, template = preparing.load(files)
        chosen = preparing.select(loaded, keep_duplicates=True)
        rows = chosen.rows(chosen.positions)
        report = _counted(chosen.account, trained=0, validation=len(rows))
        return EvaluationData(
            rows=rows,
            samples=preparing.samples(loaded, rows, template, samples),
            report=report,
            template=template,
            max_length=chosen.fates.max_length,
            fingerprints=fingerprints(report, None, rows, template, tokenizer),
            notices=describe(report, config, template, chosen.unseen_roles),
        )

    data = _with_means(files, prepared)
    _tell(data.notices, on_notice)
    return data


def _with_means(files: Sequence[DataFile], work: Callable[[Means], T]) -> T:
    """The result of `work`. Entries of the cache that turn out to be damaged are made again, once."""
    means = means_for([file.path for file in files])
    try:
        return work(means)
    except DamagedStoreError as error:
        if means.cache is None:
            raise
        means.cache.remove(error.store)
        return work(means)


def _split(chosen: Selection, config: DataConfig, seed: int) -> _Sides:
    loaded = chosen.fates.loaded
    sides = split_rows(chosen.rows(chosen.positions).by_request(), share=config.validation_split, seed=seed)
    train, held_out = (at(chosen.positions, numbers) for numbers in sides)
    positions, left_out = weighted(train, loaded, seed)
    report = _counted(chosen.account, len(train) - len(left_out), len(held_out), len(left_out))
    return _Sides(
        chosen.rows(positions),
        chosen.rows(held_out),
        loaded,
        report,
        RowListing([chosen.fates.without(left_out)]),
        leaks=0,
    )


def _two_files(chosen: Selection, held_out: Selection, seed: int) -> _Sides:
    positions, left_out = weighted(chosen.positions, chosen.fates.loaded, seed)
    report = _counted(chosen.account, len(chosen.positions) - len(left_out), 0, len(left_out))
    validation = _counted(held_out.account, 0, len(held_out.positions))
    train, other = chosen.rows(positions), held_out.rows(held_out.positions)
    return _Sides(
        train,
        other,
        held_out.fates.loaded,
        replace(report, validation=validation),
        RowListing([chosen.fates.without(left_out), held_out.fates]),
        _leaks(train, other),
    )


def _leaks(train: StoredRows, held_out: StoredRows) -> int:
    """Validation rows whose request is trained on too."""
    count = len(train)
    requests = Keyed(lambda: chain(train.requests(), held_out.requests(count)), count + len(held_out))
    return sum(
        int(groups.having(part["row"] < count)[groups.of_row[part["row"] >= count]].sum()) for part, groups in requests
    )


def _counted(account: DataReport, trained: int, validation: int, left_out: int = 0) -> DataReport:
    rows = replace(account.rows, trained=trained, validation=validation, dropped=account.rows.dropped + left_out)
    dropped = {**account.dropped, _BY_WEIGHT: left_out} if left_out else account.dropped
    return replace(account, rows=rows, dropped=dropped)


def _tell(notices: Sequence[str], on_notice: OnNotice | None) -> None:
    if on_notice is not None:
        for notice in notices:
            on_notice(notice)
