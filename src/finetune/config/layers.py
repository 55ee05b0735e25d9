"""The layers a configuration is made of: profile, file, environment, `--set`, named flags.

Each reader returns what it found and what was wrong with it; nothing is raised here, so that `load.py` can
report the problems of all layers at once.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from finetune.config.options import options, sections, suggest, suggest_section
from finetune.config.sources import FLAG_NAMES, Layer, Source
from finetune.config.yaml_lines import KeyPath, YamlProblem, read_yaml


@dataclass(frozen=True, slots=True)
class Given:
    """A value, where it came from, and the lines of what is inside it."""

    value: Any
    source: Source
    lines: Mapping[KeyPath, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Problem:
    """One line of a ConfigError, with its place for sorting."""

    source: Source
    text: str

    @property
    def order(self) -> tuple[int, int]:
        return (self.source.layer, self.source.line or 0)


@dataclass(slots=True)
class LayerValues:
    """What one layer gives: values by key, and problems."""

    values: dict[str, Given] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self, source: Source, text: str) -> None:
        self.problems.append(Problem(source, text))


def profile_names() -> tuple[str, ...]:
    """The profiles that the package carries."""
    files = (resources.files("finetune.config") / "profiles").iterdir()
    return tuple(sorted(file.name.removesuffix(".yml") for file in files if file.name.endswith(".yml")))


def read_profile(name: str | None) -> LayerValues:
    """A named set of values for a kind of task; below everything that the person gives."""
    layer = LayerValues()
    if name is None:
        return layer
    source = Source(Layer.PROFILE, name)
    if name not in profile_names():
        near = difflib.get_close_matches(name, profile_names(), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(profile_names())}."
        layer.refuse(source, f"profile {name}: there is no such profile. {hint}")
        return layer
    text = (resources.files("finetune.config") / "profiles" / f"{name}.yml").read_text(encoding="utf-8")
    return _read_document(text, source)


def read_file(path: Path | None) -> LayerValues:
    """A YAML file."""
    layer = LayerValues()
    if path is None:
        return layer
    source = Source(Layer.FILE, str(path))
    if path.exists() and not (path.is_file() or path.is_dir()):  # its end may never come
        layer.refuse(source, f"{path}: this is no file but a device or a pipe. Give the path of a YAML file.")
        return layer
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], n=1)
        hint = f"Did you mean {path.with_name(near[0])}?" if near else "Give the path of a YAML file."
        layer.refuse(source, f"{path}: there is no such file. {hint}")
    except UnicodeDecodeError as error:
        layer.refuse(source, f"byte {error.start}: the file is not UTF-8 text. Save it as UTF-8.")
    except OSError as error:
        layer.refuse(source, f"{path}: cannot be read ({error.strerror}).")
    else:
        return _read_document(text, source)
    return layer


def _read_document(text: str, source: Source) -> LayerValues:
    layer = LayerValues()
    try:
        document = read_yaml(text)
    except YamlProblem as error:
        at = Source(source.layer, source.name, error.line)
        layer.refuse(at, f"line {error.line}: {error}." if error.line else f"not YAML: {error}.")
        return layer
    for line, message in document.problems:
        layer.refuse(Source(source.layer, source.name, line), f"line {line}: {message}.")
    top = {} if document.value is None else document.value
    if not isinstance(top, dict):
        layer.refuse(source, f"the file holds {kind_of(top)}. It must hold sections: {', '.join(sections())}.")
        return layer
    for section, body in top.items():
        _read_section(layer, section, body, source, document.lines)
    return layer


def _read_section(layer: LayerValues, section: str, body: Any, source: Source, lines: Mapping[KeyPath, int]) -> None:
    at = Source(source.layer, source.name, lines[(section,)])
    if section not in sections():
        near = suggest(None, section) or suggest_section(section)
        layer.refuse(at, f"{section} ({at.place}): unknown section. {_did_you_mean(near, sections())}")
    elif isinstance(body, dict):
        for name, value in body.items():
            key_at = Source(source.layer, source.name, lines[(section, name)])
            _add(layer, f"{section}.{name}", value, key_at, lines)
    elif body is not None:
        layer.refuse(
            at, f"{section} = {short(body)} ({at.place}): must hold options, one a line below it, not {kind_of(body)}."
        )


def _add(layer: LayerValues, key: str, value: Any, source: Source, lines: Mapping[KeyPath, int]) -> None:
    if key in options():
        layer.values[key] = Given(value, source, lines)
        return
    section, _, name = key.partition(".")
    known = (option.name for option in options().values() if option.section == section)
    layer.refuse(source, f"{key} ({source.place}): unknown key. {_did_you_mean(suggest(section, name), known)}")


def _did_you_mean(near: str | None, known: Iterable[str]) -> str:
    return f"Did you mean {near}?" if near else f"Known here: {', '.join(known)}."


def read_environment(environ: Mapping[str, str]) -> LayerValues:
    """Variables named FT_SECTION__KEY; other names are none of ours."""
    layer = LayerValues()
    for variable in sorted(environ):
        if not variable.startswith("FT_") or "__" not in variable:
            continue
        section, _, name = variable.removeprefix("FT_").lower().partition("__")
        source = Source(Layer.ENVIRONMENT, variable)
        if section in sections():
            _add_text(layer, f"{section}.{name}", environ[variable], source)
        else:
            near = suggest_section(section)
            layer.refuse(source, f"{section} ({source}): unknown section. {_did_you_mean(near, sections())}")
    return layer


def read_overrides(overrides: Sequence[str]) -> LayerValues:
    """`section.key=value`, as typed after `--set`; the last of two for the same key wins."""
    layer = LayerValues()
    source = Source(Layer.SET)
    for override in overrides:
        key, equals, text = override.partition("=")
        section = key.strip().partition(".")[0]
        if not equals or "." not in key:
            layer.refuse(
                source, f"--set {override}: must look like section.key=value, for example training.learning_rate=1e-4."
            )
        elif section in sections():
            _add_text(layer, key.strip(), text.strip(), source)
        else:
            near = suggest_section(section)
            layer.refuse(source, f"{key.strip()} ({source}): unknown section. {_did_you_mean(near, sections())}")
    return layer


def _add_text(layer: LayerValues, key: str, text: str, source: Source) -> None:
    """A value typed in a shell is read as YAML, so that 1e-4, null, true and [a, b] mean what they mean in a file.

    Where text is wanted (a path, a name), `run: 3 # new` is that text: nobody quotes twice in a shell.
    """
    if (
        key in options()
        and options()[key].accepts_text
        and text
        and text not in ("null", "~")
        and text[0] not in "'\"["
    ):
        _add(layer, key, text, source, {})
        return
    try:
        value = read_yaml(text).value
    except YamlProblem as error:
        layer.refuse(source, f"{key} = {short(text)} ({source}): not a YAML value: {error}.")
        return
    _add(layer, key, value, source, {})


def read_flags(flags: Mapping[str, Any]) -> LayerValues:
    """Values of named options by key; None means that the option was not given."""
    layer = LayerValues()
    for key, value in flags.items():
        if value is not None:
            name = FLAG_NAMES.get(key, "--" + key.partition(".")[2].replace("_", "-"))
            plain = str(value) if isinstance(value, Path) else value
            _add(layer, key, plain, Source(Layer.FLAG, name), {})
    return layer


def kind_of(value: Any) -> str:
    """What a value is, in a word that a person uses."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return "nothing" if value is None else kinds.get(type(value), type(value).__name__)


def short(value: Any) -> str:
    """A value as it looks in YAML, at most 60 characters."""
    words = {True: "true", False: "false", None: "null"}
    if isinstance(value, bool) or value is None:
        return words[value]
    text = value if isinstance(value, str) and value.strip() == value and value else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
