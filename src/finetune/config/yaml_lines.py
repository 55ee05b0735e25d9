"""YAML to plain values, with the line of every key.

Built on the node tree of ruamel.yaml (YAML 1.2, where `1e-4` is a number and `no` is text), because the
ordinary loaders drop the positions, or stop at the first thing that is wrong.
"""

import datetime
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

KeyPath: TypeAlias = tuple[str | int, ...]

# A configuration is small. Beyond these, aliases are being used to blow up memory.
MAX_DEPTH = 12
MAX_VALUES = 20_000


class YamlProblem(Exception):  # noqa: N818 - it is reported inside a ConfigError
    """Text that is not YAML; `line` counts from 1, None where the parser does not know."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(slots=True)
class YamlDocument:
    """The value of a document, the line of each path in it, and what was wrong without hiding the rest."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)


def read_yaml(text: str) -> YamlDocument:
    """Parse one document. Raises YamlProblem where the text is not YAML at all."""
    yaml = YAML(typ="safe", pure=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReusedAnchorWarning)  # YAML 1.2 allows it
            node = yaml.compose(text)
    except KeyError as error:  # ruamel.yaml looks its rules up by version
        raise YamlProblem("the %YAML line names a version that there is not. Delete it") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(_explain(error), mark.line + 1 if mark else None) from error
    except (YAMLError, ValueError) as error:
        raise YamlProblem(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlProblem("values are nested too deeply") from error
    document = YamlDocument()
    if node is not None:
        document.value = _Reader(document, yaml.constructor.construct_object).read(node, ())
    return document


def _explain(error: MarkedYAMLError) -> str:
    what = error.problem or "cannot be read"
    if "\\t" in what or "'\t'" in what:
        return "a tab where YAML needs spaces. Indent with spaces"
    if "mapping values are not allowed" in what:
        return "a second `:` or a wrong indentation. Put quotes around text that contains `: `"
    where = f" {error.context}" if error.context else ""
    return f"{what}{where}"


@dataclass(slots=True)
class _Reader:
    document: YamlDocument
    construct: Callable[[Node], Any]
    count: int = 0

    def read(self, node: Node, path: KeyPath) -> Any:
        self.count += 1
        line = node.start_mark.line + 1
        if len(path) > MAX_DEPTH or self.count > MAX_VALUES:
            raise YamlProblem("more values, or deeper ones, than a configuration has", line)
        self.document.lines.setdefault(path, line)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: MappingNode, path: KeyPath) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self.document.problems.append((line, "a key must be a word, not a list or a mapping"))
                continue
            key = str(key_node.value)
            if key in found:
                first = self.document.lines[(*path, key)]
                self.document.problems.append((line, f"{key}: given twice (first in line {first}). Keep one"))
                continue
            self.document.lines[(*path, key)] = line
            found[key] = self.read(value_node, (*path, key))
        return found

    def _scalar(self, node: Node) -> Any:
        try:
            value = self.construct(node)
        except (YAMLError, ValueError):
            line = node.start_mark.line + 1
            self.document.problems.append(
                (line, f"{node.value}: the tag {node.tag} is not accepted. Write a plain value")
            )
            return None
        # A date is only text that looks like one: no option takes dates.
        return node.value if isinstance(value, datetime.date | bytes | set) else value
