"""Make one configuration from all the places a person can give values in, and report every problem at once.

Precedence: profile < file < environment (`FT_TRAINING__LEARNING_RATE`) < `--set section.key=value` < named flags.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.config.checks import failed_checks
from finetune.config.layers import (
    Given,
    LayerValues,
    Problem,
    read_environment,
    read_file,
    read_flags,
    read_overrides,
    read_profile,
    short,
)
from finetune.config.options import options, sections
from finetune.config.problems import explain
from finetune.config.schema import RunConfig
from finetune.config.sources import DEFAULT, Layer, Source
from finetune.core.errors import ConfigError

DEFAULT_CONFIG = Path("config/train.yml")


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked configuration, and where each of its values came from (every key of the schema is in `sources`)."""

    config: RunConfig
    sources: Mapping[str, Source]

    def value(self, key: str) -> Any:
        """The value of `section.key`."""
        return value_of(self.config, key)

    def describe(self, key: str) -> str:
        """How an error names a value: `data.max_length = 4096 (run.yml:12)`."""
        return f"{key} = {short(self.value(key))} ({self.sources[key]})"


def plain(config: RunConfig | LoadedConfig) -> RunConfig:
    """The configuration without where its values came from."""
    return config.config if isinstance(config, LoadedConfig) else config


def load_config(
    path: Path | None,
    *,
    profile: str | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> LoadedConfig:
    """Read, merge and check. `flags` maps keys (`training.learning_rate`) to values; None is "not given".

    Raises ConfigError with every problem of every layer.
    """
    layers = [
        read_profile(profile),
        read_file(path),
        read_environment(environ),
        read_overrides(overrides),
        read_flags(flags or {}),
    ]
    given = {key: value for layer in layers for key, value in layer.values.items()}
    config, problems = _check(given, layers)
    if problems or config is None:
        title = f"Configuration {path}" if path else "The configuration"
        raise ConfigError(title, [problem.text for problem in sorted(problems, key=lambda problem: problem.order)])
    return LoadedConfig(config, sources_of(given))


def sources_of(given: Mapping[str, Given]) -> dict[str, Source]:
    """The source of every key of the schema."""
    return {key: given[key].source if key in given else DEFAULT for key in options()}


def _check(given: Mapping[str, Given], layers: Sequence[LayerValues]) -> tuple[RunConfig | None, list[Problem]]:
    problems = [problem for layer in layers for problem in layer.problems]
    config, wrong = _validate(given)
    unread = any(problem.source.layer is Layer.FILE for problem in layers[1].problems) and not layers[1].values
    for key, found in wrong.items():
        # What a file that cannot be read would have given is not missing.
        if not (unread and key not in given):
            problems.extend(found)
    if config is None:
        config, _ = _validate(_without(given, wrong))
    if config is not None:
        problems.extend(failed_checks(config, sources_of(given), ignore=wrong.keys()))
    return config, problems


def _validate(given: Mapping[str, Given]) -> tuple[RunConfig | None, dict[str, list[Problem]]]:
    """The configuration, or what is wrong with which key.

    Validated as JSON in strict mode: a list is a tuple there, but text is never a number, nor a number a truth.
    """
    if broken := {key: [_broken_text(key, item)] for key, item in given.items() if not _is_text(item.value)}:
        return None, broken
    tree: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for key, item in given.items():
        section, _, name = key.partition(".")
        tree[section][name] = item.value
    try:
        return RunConfig.model_validate_json(json.dumps(tree), strict=True), {}
    except ValidationError as error:
        return None, explain(error.errors(include_url=False), given)


def _is_text(value: Any) -> bool:
    """Whether all texts in a value can be written as UTF-8, which names of files on a disk need not."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _broken_text(key: str, item: Given) -> Problem:
    said = str(item.value).encode("utf-8", "backslashreplace").decode()
    return Problem(
        item.source, f"{key} = {said} ({item.source}): this is not UTF-8. Give another text, or rename the file."
    )


def _without(given: Mapping[str, Given], wrong: Mapping[str, Any]) -> dict[str, Given]:
    """The good values, with a stand-in for required ones, so that the cross-checks can still run on the rest."""
    rest = {key: value for key, value in given.items() if key not in wrong}
    stand_ins = {key: Given("", DEFAULT) for key, option in options().items() if option.required and key not in rest}
    return rest | stand_ins


def value_of(config: RunConfig, key: str) -> Any:
    """The value of `section.key`."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
