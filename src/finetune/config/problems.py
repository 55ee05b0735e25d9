"""Pydantic's findings, said as a person would: the key, the value, its place, and what it must be."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from finetune.config.layers import Given, Problem, kind_of, short
from finetune.config.options import options
from finetune.config.sources import DEFAULT, Layer, Source
from finetune.config.yaml_lines import KeyPath, YamlProblem, read_yaml

# Options that take one of several shapes: pydantic reports a finding for each shape that does not fit.
SHAPES: Mapping[str, str] = {
    "data.train_file": "must be a path, or a list of paths and of mappings with path and weight",
    "lora.target_modules": "must be all-linear, or a list of module names",
    "training.batch_size": "must be a whole number above 0, or auto",
}
# Words that other tools use for a value, and what to write here.
MEANT: Mapping[tuple[str, str], str] = {
    ("training.method", "qlora"): "QLoRA is training.method: lora with model.quantization: 4bit",
    ("training.method", "qdora"): "quantised DoRA is training.method: dora with model.quantization: 4bit",
    ("training.method", "rslora"): "rsLoRA is training.method: lora with lora.use_rslora: true",
    ("model.backend", "cuda"): "the engine for CUDA is pytorch. Set model.device: cuda for the card",
    ("model.backend", "metal"): "the engine for Metal is mlx",
    ("model.device", "mps"): "the name for it here is metal",
    ("model.device", "gpu"): "must be auto, cpu, cuda (NVIDIA) or metal (Apple); auto takes a GPU where there is one",
}
# Findings inside a value of the right shape, which say more than the shape.
_SPECIFIC = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "missing", "extra_forbidden"}


def explain(errors: Sequence[ErrorDetails], given: Mapping[str, Given]) -> dict[str, list[Problem]]:
    """Key to its problems, one sentence each."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        by_key.setdefault(".".join(str(part) for part in error["loc"][:2]), []).append(error)
    return {key: _explain_key(key, found, given.get(key)) for key, found in by_key.items()}


def _explain_key(key: str, errors: Sequence[ErrorDetails], given: Given | None) -> list[Problem]:
    if given is None:
        hint = options()[key].description
        how = f"Give it in the file, or with --set {key}=... ({hint[:1].lower()}{hint[1:]})."
        return [Problem(DEFAULT, f"{key}: missing. {how}")]
    if key in SHAPES:
        inside = [error for error in errors if error["type"] in _SPECIFIC]
        if isinstance(given.value, int | float):  # a number, if not a right one
            inside += [error for error in errors if error["type"].startswith("int_")]
        if not (isinstance(given.value, list | int | float) and inside):
            return [_problem(key, given.value, given.source, f"{SHAPES[key]}, not {kind_of(given.value)}")]
        errors = inside
    return [_explain_one(key, error, given) for error in errors]


def _explain_one(key: str, error: ErrorDetails, given: Given) -> Problem:
    path = [part for part in error["loc"][2:] if not _is_shape_tag(part)]
    where = key + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    source = given.source
    if source.layer is Layer.FILE:
        source = Source(source.layer, source.name, _line(given, (*key.split("."), *path)))
    if error["type"] == "missing":
        return Problem(source, f"{where.rpartition('.')[0]} ({source.place}): has no {path[-1]}.")
    value = error["input"] if path else given.value
    return _problem(where, value, source, _must(key, error, value))


def _line(given: Given, path: KeyPath) -> int | None:
    """The line of a place inside a value, or of the nearest thing around it."""
    around = (given.lines.get(path[:length]) for length in range(len(path), 0, -1))
    return next((line for line in around if line), given.source.line)


def _is_shape_tag(part: str | int) -> bool:
    """Pydantic puts the name of the tried shape into the location: `tuple[union[str,DataFile],...]`, `DataFile`."""
    return isinstance(part, str) and (
        part in ("str", "DataFile", "constrained-int") or part.startswith(("tuple[", "literal["))
    )


def _problem(where: str, value: Any, source: Source, must: str) -> Problem:
    return Problem(source, f"{where} = {short(value)} ({source.place}): {must}{'' if must.endswith('?') else '.'}")


# Finding to phrase and to the name of its bound in pydantic's context.
_BOUNDS: Mapping[str, tuple[str, str]] = {
    "greater_than": ("must be greater than", "gt"),
    "greater_than_equal": ("must be at least", "ge"),
    "less_than": ("must be less than", "lt"),
    "less_than_equal": ("must be at most", "le"),
}


def _must(key: str, error: ErrorDetails, value: Any) -> str:
    kind = error["type"]
    if kind in _BOUNDS:
        phrase, bound = _BOUNDS[kind]
        return f"{phrase} {error['ctx'][bound]:g}"
    match kind:
        case "literal_error":
            return _one_of(key, value)
        case "extra_forbidden":
            return "unknown key. Known here: path, weight"
        case _:
            return _right_type(kind, value)


def _one_of(key: str, value: Any) -> str:
    choices, word = options()[key].choices, str(value).lower()
    if (key, word) in MEANT:
        return MEANT[key, word]
    bits = re.fullmatch(r"(?:int|nf|fp|q)?(\d+)[ _-]?(?:bits?)?", word) if key == "model.quantization" else None
    if bits is not None and f"{bits[1]}bit" not in choices:
        return f"{bits[1]} bits are not offered. Choose 4bit (least memory) or 8bit (closest to the original)"
    near = [f"{bits[1]}bit"] if bits is not None else difflib.get_close_matches(word, choices, n=1)
    return f"must be one of {', '.join(choices)}" + (f". Did you mean {near[0]}?" if near else "")


def _right_type(kind: str, value: Any) -> str:
    wanted = {"int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false"}
    wanted |= {"string": "text", "dict": "a mapping of names to values", "tuple": "a list"}
    want = wanted.get(kind.partition("_")[0], "another kind of value")
    if isinstance(value, float) and kind.startswith(("int", "finite")):
        return f"must be {want}"
    if isinstance(value, str) and _is_quoted(value):
        return f"must be {want}, not text. Write it without quotes"
    return f"must be {want}, not {kind_of(value)}"


def _is_quoted(text: str) -> bool:
    """Whether text would be a number or a truth if it stood in the file without its quotes."""
    try:
        return isinstance(read_yaml(text).value, bool | int | float)
    except YamlProblem:
        return False
