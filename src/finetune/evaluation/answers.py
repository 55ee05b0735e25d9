"""How good answers are, one by one and together: exact match, JSON, and overlap of words with what was expected.

ROUGE (Lin 2004) and BLEU (Papineni et al. 2002) come from the libraries that papers use, rouge-score and sacrebleu.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from finetune.evaluation.metrics import is_exact_match

_ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rouge_l"}  # by the library's names
Overlap = Callable[[str, str], dict[str, float]]  # (answer, expected) -> ROUGE's F measures by name


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """One answer beside the expected one. The figures of JSON are None where a JSON document is not expected."""

    exact: bool
    json_valid: bool | None = None  # an object or an array, and nothing beside it
    json_equal: bool | None = None  # with equal values, whatever the order of keys
    rouge1: float | None = None
    rouge2: float | None = None
    rouge_l: float | None = None


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """Means over answers, those of JSON over the answers that should be JSON; None for what was not measured."""

    exact_match: float | None = None
    json_valid: float | None = None
    json_equal: float | None = None
    rouge1: float | None = None
    rouge2: float | None = None
    rouge_l: float | None = None
    bleu: float | None = None  # 0 to 100, of all answers as one text


def overlap_is_installed() -> bool:
    """Whether the libraries of ROUGE and BLEU are there (`finetune[metrics]`)."""
    return bool(find_spec("rouge_score") and find_spec("sacrebleu"))


def overlap_scorer() -> Overlap | None:
    """ROUGE of one answer; None without the libraries. Its words are lower-case runs of a-z and 0-9."""
    if not overlap_is_installed():
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_ROUGE))

    def overlap(answer: str, expected: str) -> dict[str, float]:
        found = scorer.score(expected, answer)
        return {ours: found[name].fmeasure for name, ours in _ROUGE.items()}

    return overlap


def score_answer(answer: str, expected: str, overlap: Overlap | None = None) -> AnswerScore:
    """All figures of one answer."""
    wanted, found = parsed_json(expected), parsed_json(answer)
    return AnswerScore(
        exact=is_exact_match(answer, expected),
        json_valid=None if wanted is None else found is not None,
        json_equal=None if wanted is None else found == wanted,
        **(overlap(answer, expected) if overlap else {}),
    )


def figures_of(scores: Sequence[AnswerScore], answers: Sequence[str], expected: Sequence[str]) -> AnswerFigures:
    """The figures of all answers together."""
    if not scores:
        return AnswerFigures()
    with_overlap = scores[0].rouge1 is not None
    return AnswerFigures(
        exact_match=_mean([score.exact for score in scores]),
        json_valid=_mean([score.json_valid for score in scores]),
        json_equal=_mean([score.json_equal for score in scores]),
        rouge1=_mean([score.rouge1 for score in scores]),
        rouge2=_mean([score.rouge2 for score in scores]),
        rouge_l=_mean([score.rouge_l for score in scores]),
        bleu=_bleu(answers, expected) if with_overlap else None,
    )


def parsed_json(text: str) -> str | None:
    """An object or array in a form that equal documents share; None for any other text."""
    try:
        document = json.loads(text, parse_constant=_refuse)
        return json.dumps(_plain(document), sort_keys=True) if isinstance(document, dict | list) else None
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _plain(value: Any) -> Any:
    """1.0 is the number 1."""
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _mean(values: Sequence[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def _bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score)
