"""What `ft evaluate` hands to scripts: one document of all figures and answers, or a line for each answer."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.core.errors import UsageError
from finetune.core.files import write_atomically
from finetune.evaluation.evaluator import Scores
from finetune.workflows.evaluate import EvaluationResult, SampleComparison

LINES, DOCUMENT = ".jsonl", ".json"


def check_output(path: Path) -> None:
    """Refuse (UsageError) a file that cannot be written, before anything is measured."""
    if path.suffix not in {LINES, DOCUMENT}:
        raise UsageError(f"--output {path}: give a name that ends in .json (figures and answers) or .jsonl (answers).")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: the directory {path.parent} does not exist. Make it first.")
    if path.is_dir():
        raise UsageError(f"--output {path} is a directory. Give the name of a file.")


def write_results(path: Path, result: EvaluationResult) -> None:
    """All figures and answers, or, for a name that ends in .jsonl, an answer a line. Replaces the file."""
    if path.suffix == LINES:
        text = "".join(f"{_dumped(sample_document(sample))}\n" for sample in result.samples)
    else:
        text = f"{_dumped(document(result), indent=2)}\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}. Choose another place.") from None


def document(result: EvaluationResult) -> dict[str, Any]:
    """The JSON document: answers stand in `samples`, beside each other."""
    head = {key: value for key, value in asdict(result).items() if key not in {"base", "tuned", "samples", "seconds"}}
    scores = {"base": _figures(result.base)}
    if result.tuned is not None:
        scores["tuned"] = _figures(result.tuned)
    samples = [sample_document(sample) for sample in result.samples]
    return {**head, **scores, "samples": samples, "seconds": result.seconds}


def sample_document(sample: SampleComparison) -> dict[str, Any]:
    """One answer of each model and its figures, where they were measured."""
    found: dict[str, Any] = {"prompt": sample.prompt, "expected": sample.expected, "base": sample.base}
    scores = {"base": sample.base_score}
    if sample.tuned is not None:
        found["tuned"], scores["tuned"] = sample.tuned, sample.tuned_score
    measured = {name: _measured(asdict(score)) for name, score in scores.items() if score is not None}
    return {**found, "scores": measured} if measured else found


def _figures(scores: Scores) -> dict[str, Any]:
    named = {"loss", "perplexity", "accuracy", "tokens", "undesirable"}
    figures = {key: value for key, value in asdict(scores).items() if key in named}
    answers = _measured(asdict(scores.figures))
    times = {"seconds": scores.seconds, "generation_seconds": scores.generation_seconds}
    return {**_measured(figures), **answers, **times}


def _measured(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _dumped(value: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
