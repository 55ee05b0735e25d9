"""Chat templates are programs from strangers: they run in Jinja's sandbox, with bounded loops and bounded text.

Everything that makes a text or a list out of others is paid for before it is made (`template_budget`); filters and
methods that nobody needs and that could not be paid for are not there.
"""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from finetune.data.template_budget import (
    TooCostlyError,
    as_text,
    budget_for,
    charge,
    one_call,
    size_after,
    take,
    take_rounds,
    weight,
)

# Unicode noncharacters: valid in a string, and never part of text that is meant to be exchanged.
GENERATION_OPEN, GENERATION_CLOSE = "\ufdd3", "\ufdd4"

# What a template that would harm is stopped with; everything else is a row that it cannot render.
REFUSED = (TooCostlyError, SecurityError)

_MAX_SOURCE = 1_000_000  # characters; the longest that are published have some ten thousand

# Methods of texts that fill up to a width, or lead to bytes, which have the same ones.
_KEPT_AWAY = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "translate", "maketrans", "encode"})
_WIDE = re.compile(r"[0-9]{4}|\*|\{[^}]*\{")
_GONE = (
    *("batch", "center", "filesizeformat", "forceescape", "format", "groupby", "pprint", "random", "slice"),
    *("striptags", "sum", "urlize", "wordwrap", "xmlattr"),
)
_TEXT_FILTERS = ("capitalize", "e", "escape", "lower", "safe", "string", "title", "trim", "upper", "urlencode")

# A template that would print today's date would give other tokens tomorrow, and a resumed run other data.
# Llama 3's templates use this date themselves where they are given no clock.
_DATE = datetime(2024, 7, 26)


def _bounded(items: Iterable[Any]) -> Any:
    sized = items if isinstance(items, list | tuple | dict | str | range) else list(items)
    take_rounds(len(sized))
    return sized


def _joined(parts: list[Any]) -> str:
    return str(charge("".join(as_text(part) for part in parts)))


class _Bound(NodeTransformer):
    """Puts the counters into the parsed template: around what a loop runs over, around `~`, slices and text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2 looks the method up by this name
        self.generic_visit(node)
        node.iter = _through("bounded", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("charged", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _through("charged", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("charged", node) if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through("charged", node) if node.ctx == "load" else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return nodes.Const(node.data, lineno=node.lineno)  # which `finalize` counts


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


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
            raise TooCostlyError("`%` fills a text up to a width without a bound")
        take(size_after(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        with one_call():
            return charge(__self._checked_call(__context, __obj, args, kwargs))

    def _checked_call(self, context: Context, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, owner = getattr(function, "__name__", ""), _text_of_method(function)
        if owner is not None and name == "join" and len(args) == 1:
            return _join(args[0], owner)
        if owner is not None and name == "replace" and len(args) in {2, 3}:
            return _replace(owner, *args)
        if owner is not None and name.startswith("format"):
            take(len(owner) + owner.count("{") * weight([args, kwargs]))
        return super().call(context, function, *args, **kwargs)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        # Numbers have a method that makes bytes of any length.
        if (isinstance(obj, str) and attr in _KEPT_AWAY) or isinstance(obj, int | float | bytes):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        name = getattr(value, "__name__", "")
        if name.startswith("format") and _WIDE.search(str(getattr(value, "__self__", ""))):
            raise TooCostlyError("`format` fills a text up to a width without a bound")
        return super().wrap_str_format(value)


def _text_of_method(method: Any) -> str | None:
    """The text that a method belongs to; `format` comes wrapped."""
    owner = getattr(getattr(method, "__wrapped__", method), "__self__", None)
    return owner if isinstance(owner, str) else None


def _join(items: Iterable[Any], between: str = "") -> str:
    texts = [as_text(item) for item in items]
    take(len(texts) * len(between))
    return between.join(texts)


@jinja2.pass_environment
def _join_filter(environment: jinja2.Environment, value: Any, d: str = "", attribute: Any = None) -> str:
    return _join(value if attribute is None else map(make_attrgetter(environment, attribute), value), as_text(d))


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = as_text(value), as_text(old), as_text(new)
    take(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = as_text(value)
    one_line = len(width) if isinstance(width, str) else int(width)
    take(len(text) + (text.count("\n") + 1) * one_line)
    return str(FILTERS["indent"](text, width, first, blank))


@jinja2.pass_environment
def _sort(environment: jinja2.Environment, value: Any, *args: Any, **options: Any) -> Any:
    return charge(FILTERS["sort"](environment, value, *args, **options))


def _list(value: Any) -> Any:
    return charge(list(value))


def _text_filter(name: str) -> Callable[..., Any]:
    function = FILTERS[name]
    return lambda value, *args, **options: charge(function(as_text(value), *args, **options))


def strftime_now(form: str) -> str:
    """The date that templates show: always the same, so that prompts are."""
    if len(form) > 100 or _WIDE.search(form):
        raise TooCostlyError("it asks for a date of unbounded length")
    return _DATE.strftime(form)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    width = len(indent) if isinstance(indent, str) else int(indent or 0)
    take(weight(value) * (1 + max(0, width)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
        optimized=False,  # nothing is computed while a template is compiled, where there is no budget
        finalize=as_text,
        extensions=[GenerationTag, loopcontrols],
    )
    for name in _GONE:
        del environment.filters[name]
    environment.filters |= {name: _text_filter(name) for name in _TEXT_FILTERS}
    environment.filters |= {"list": _list, "sort": _sort, "tojson": _to_json, "join": _join_filter}
    environment.filters |= {"replace": _replace, "indent": _indent}
    environment.filters |= {"bounded": _bounded, "joined": _joined, "charged": charge}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": strftime_now}
    environment.globals.pop("lipsum", None)
    return environment


def compile_template(source: str) -> Callable[[dict[str, Any]], str]:
    """A function from a template's variables to its text, with generation marks where it has such blocks.

    Raises jinja2.TemplateError when compiling. Rendering raises one of `REFUSED` for what would harm, and for the
    rest whatever the template's own program trips over.
    """
    if len(source) > _MAX_SOURCE:
        raise TooCostlyError(f"it has {len(source):,} characters; {_MAX_SOURCE:,} are allowed")
    try:
        template = _environment().from_string(source)
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise TooCostlyError("it is nested too deeply, or holds what cannot be compiled") from error

    def render(variables: dict[str, Any]) -> str:
        with budget_for(variables):
            return str(charge("".join(template.generate(variables))))

    return render
