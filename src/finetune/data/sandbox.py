"""Chat templates are programs from strangers: they run in Jinja's sandbox, with bounded loops and bounded text."""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Unicode noncharacters: valid in a string, and never part of text that is meant to be exchanged.
GENERATION_OPEN, GENERATION_CLOSE = "\ufdd3", "\ufdd4"

_MAX_LOOP_ROUNDS = 1_000_000  # of all loops of one rendering together
_MAX_CHARACTERS = 20_000_000
_BUDGET = "\ufdd5"  # a name that no template can write

_FILLING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs"})
_WIDE = re.compile(r"[0-9]{4}|\*")

# A template that prints today's date would give other tokens tomorrow, and a resumed run other data.
# Llama 3's templates use this date themselves where they are given no clock.
_DATE = datetime(2024, 7, 26)


class _Budget:
    """Rounds that the loops of one rendering may still make."""

    def __init__(self) -> None:
        self.rounds = _MAX_LOOP_ROUNDS

    def take(self, rounds: int) -> None:
        self.rounds -= rounds
        if self.rounds < 0:
            raise jinja2.TemplateRuntimeError(f"its loops make more than {_MAX_LOOP_ROUNDS:,} rounds")


@jinja2.pass_context
def _bounded(context: Context, items: Iterable[Any]) -> Any:
    sized = items if isinstance(items, list | tuple | dict | str | range) else list(items)
    context[_BUDGET].take(len(sized))
    return sized


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > _MAX_CHARACTERS:
        raise jinja2.TemplateRuntimeError(f"it makes a text of more than {_MAX_CHARACTERS:,} characters")
    return "".join(texts)


class _Bound(NodeTransformer):
    """Puts the counters into the parsed template: around what a loop runs over, and around `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2 looks the method up by this name
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "bounded", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "joined", [], [], None, None, lineno=node.lineno)


class GenerationTag(Extension):
    """`{% generation %}` as in transformers: what the assistant says. It comes out between two marks."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's own nodes, with a mark on each side."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [_mark(GENERATION_OPEN, line), *body, _mark(GENERATION_CLOSE, line)]


def _mark(text: str, line: int) -> nodes.Node:
    return nodes.Output([nodes.TemplateData(text)], lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "+", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bound().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise jinja2.TemplateRuntimeError("`%` fills a text up to a width without a bound")
        if _size_after(operator, left, right) > _MAX_CHARACTERS:
            raise jinja2.TemplateRuntimeError(f"`{operator}` makes a value of more than {_MAX_CHARACTERS:,} parts")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _FILLING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if _WIDE.search(str(getattr(value, "__self__", ""))) and getattr(value, "__name__", "").startswith("format"):
            raise jinja2.TemplateRuntimeError("`format` fills a text up to a width without a bound")
        return super().wrap_str_format(value)


def _size_after(operator: str, left: Any, right: Any) -> int:
    """An upper bound for the length of a text or list, or for the digits of a power."""
    if operator == "**":
        return abs(right) * len(str(left)) if isinstance(left, int) and isinstance(right, int) else 0
    sized = (str, list, tuple)
    if operator == "+":
        return len(left) + len(right) if isinstance(left, sized) and isinstance(right, sized) else 0
    if operator == "*":
        for items, times in ((left, right), (right, left)):
            if isinstance(items, sized) and isinstance(times, int):
                return len(items) * times
    return 0


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(source: str) -> Callable[[dict[str, Any]], str]:
    """A function from a template's variables to its text, with generation marks where it has such blocks.

    Raises jinja2.TemplateError, when compiling or when rendering: syntax, sandbox, bounds, `raise_exception`.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters |= {"tojson": _to_json, "bounded": _bounded, "joined": _joined}
    for unbounded in ("center", "format"):  # they fill a text up to any width
        del environment.filters[unbounded]
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _DATE.strftime}
    environment.globals.pop("lipsum", None)
    template = environment.from_string(source)

    def render(variables: dict[str, Any]) -> str:
        pieces, length = [], 0
        for piece in template.generate({**variables, _BUDGET: _Budget()}):
            length += len(piece)
            if length > _MAX_CHARACTERS:
                raise jinja2.TemplateRuntimeError(f"it prints more than {_MAX_CHARACTERS:,} characters")
            pieces.append(piece)
        return "".join(pieces)

    return render
