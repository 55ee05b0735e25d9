"""From a data section of the configuration to rows that a model trains on, with an account of every row."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune.config.schema import DataConfig, DataFile
from finetune.core.errors import DataError
from finetune.data.checks import prompt_key
from finetune.data.load import LoadedData, load_examples, training_files
from finetune.data.notices import describe
from finetune.data.report import DataReport
from finetune.data.rows import EncodedRow, Example
from finetune.data.samples import Sample, make_samples
from finetune.data.selection import Selection, select_rows
from finetune.data.split import split_examples
from finetune.data.templates import Template, choose_template
from finetune.data.tokenizer import TextTokenizer

__all__ = ["EvaluationData", "PreparedData", "Sample", "prepare_data", "prepare_evaluation", "template_for"]

OnNotice = Callable[[str], None]

_BY_WEIGHT = "left out by the weight of its file"


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Everything that a run needs to know about its data."""

    train: Sequence[EncodedRow]  # a row of a file with weight 2 stands here twice
    validation: Sequence[EncodedRow]
    samples: tuple[Sample, ...]  # from the validation rows
    report: DataReport
    template: Template
    max_length: int
    fingerprints: Mapping[str, Any]  # files, rows, tokens, template, tokenizer: for run.json and for resuming
    notices: tuple[str, ...]


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
    """Positions of training rows in the selection (with repeats), and the validation rows."""

    train: list[int]
    validation_examples: list[Example]
    validation_rows: list[EncodedRow]
    report: DataReport
    leaks: int


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
    loaded = _load(training_files(config.train_file), config)
    template = template_for(config.template, tokenizer, loaded.examples)
    chosen = select_rows(loaded, config, template=template, tokenizer=tokenizer, context_length=context_length)
    if config.validation_file is None:
        sides = _split(chosen, config, seed)
    else:
        held_out = select_rows(
            _load([DataFile(path=config.validation_file)], config),
            config,
            template=template,
            tokenizer=tokenizer,
            context_length=context_length,
        )
        sides = _two_files(chosen, held_out, seed)
    if not sides.train:
        raise DataError(f"{loaded.files[0].path}: no row is left to train on: the weights leave all of them out.")
    train = [chosen.rows[position] for position in sides.train]
    notices = describe(sides.report, config, template, chosen.unseen_roles, leaks=sides.leaks)
    _tell(notices, on_notice)
    return PreparedData(
        train=train,
        validation=sides.validation_rows,
        samples=make_samples(
            sides.validation_examples, sides.validation_rows, template=template, tokenizer=tokenizer, limit=samples
        ),
        report=sides.report,
        template=template,
        max_length=chosen.max_length,
        fingerprints=_fingerprints(sides.report, (train, sides.validation_rows), template, tokenizer),
        notices=notices,
    )


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
    loaded = _load([DataFile(path=path)], config)
    template = template_for(config.template, tokenizer, loaded.examples)
    chosen = select_rows(
        loaded,
        config,
        template=template,
        tokenizer=tokenizer,
        context_length=context_length,
        keep_duplicates=True,
    )
    report = _counted(chosen.account, trained=0, validation=len(chosen.rows))
    notices = describe(report, config, template, chosen.unseen_roles)
    _tell(notices, on_notice)
    return EvaluationData(
        rows=chosen.rows,
        samples=make_samples(chosen.examples, chosen.rows, template=template, tokenizer=tokenizer, limit=samples),
        report=report,
        template=template,
        max_length=chosen.max_length,
        fingerprints=_fingerprints(report, ((), chosen.rows), template, tokenizer),
        notices=notices,
    )


def template_for(name: str | None, tokenizer: TextTokenizer, examples: Sequence[Example]) -> Template:
    """The named template; without a name the one that suits the rows: plain for text, else as `choose_template`."""
    conversations = [example for example in examples if example.text is None]
    if name is None and not conversations:
        return choose_template("plain", tokenizer)
    return choose_template(name, tokenizer, conversations=any(map(_is_dialogue, conversations)))


def _is_dialogue(example: Example) -> bool:
    """More than one request with one answer."""
    return bool(example.tools) or [message.role for message in example.messages] != ["user", "assistant"]


def _load(files: Sequence[DataFile], config: DataConfig) -> LoadedData:
    return load_examples(files, columns=config.columns, max_error_rate=config.max_error_rate)


def _split(chosen: Selection, config: DataConfig, seed: int) -> _Sides:
    positions, held_out = split_examples(chosen.examples, share=config.validation_split, seed=seed)
    train, left_out = _weighted(positions, chosen.weights, seed)
    report = _counted(chosen.account, len(positions) - left_out, len(held_out), left_out)
    examples, rows = [chosen.examples[p] for p in held_out], [chosen.rows[p] for p in held_out]
    return _Sides(train, examples, rows, report, leaks=0)


def _two_files(chosen: Selection, held_out: Selection, seed: int) -> _Sides:
    train, left_out = _weighted(range(len(chosen.rows)), chosen.weights, seed)
    report = _counted(chosen.account, len(chosen.rows) - left_out, 0, left_out)
    validation = _counted(held_out.account, 0, len(held_out.rows))
    known = {prompt_key(chosen.examples[position]) for position in train}
    leaks = sum(prompt_key(example) in known for example in held_out.examples)
    return _Sides(train, held_out.examples, held_out.rows, replace(report, validation=validation), leaks)


def _weighted(positions: Sequence[int], weights: Sequence[float], seed: int) -> tuple[list[int], int]:
    """Each position as often as its weight says, and how many not at all.

    Weight 2.5 takes every row twice and, chosen by the seed, half of them a third time.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    rank = {int(position): place for place, position in enumerate(generator.permutation(list(positions)))}
    by_weight: dict[float, list[int]] = {}
    for position in positions:
        by_weight.setdefault(weights[position], []).append(position)
    times: dict[int, int] = {}
    for weight, members in by_weight.items():
        extra = set(sorted(members, key=lambda p: rank[p])[: round((weight - int(weight)) * len(members))])
        times |= {position: int(weight) + (position in extra) for position in members}
    repeated = [position for position in positions for _ in range(times[position])]
    return repeated, sum(count == 0 for count in times.values())


def _counted(account: DataReport, trained: int, validation: int, left_out: int = 0) -> DataReport:
    rows = replace(account.rows, trained=trained, validation=validation, dropped=account.rows.dropped + left_out)
    dropped = {**account.dropped, _BY_WEIGHT: left_out} if left_out else account.dropped
    return replace(account, rows=rows, dropped=dropped)


def _tell(notices: Sequence[str], on_notice: OnNotice | None) -> None:
    if on_notice is not None:
        for notice in notices:
            on_notice(notice)


def _fingerprints(
    report: DataReport, sides: tuple[Sequence[EncodedRow], Sequence[EncodedRow]], template: Template, tok: TextTokenizer
) -> dict[str, Any]:
    """What identifies the data of a run: the bytes of the files, and every token and mask that came of them."""
    train, validation = sides
    files = (*report.files, *(report.validation.files if report.validation else ()))
    return {
        "files": [{"path": file.path, "sha256": file.sha256, "rows": file.rows} for file in files],
        "rows": len(train),
        "validation_rows": len(validation),
        "tokens": sum(map(len, train)),
        "trained_tokens": sum(int(row.loss_mask.sum()) for row in train),
        "sha256": _digest(train, validation),
        "template": template.sha256,
        "tokenizer": tok.fingerprint,
    }


def _digest(*groups: Sequence[EncodedRow]) -> str:
    digest = hashlib.sha256()
    for rows in groups:
        digest.update(f"{len(rows)} rows".encode())
        for row in rows:
            digest.update(len(row).to_bytes(8, "little") + row.input_ids.tobytes() + row.loss_mask.tobytes())
    return digest.hexdigest()
