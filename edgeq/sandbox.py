"""Jinja for chat templates, which come from untrusted files: no access to Python, bounded work.

The environment is the one that transformers documents for chat templates. Work is bounded by a
budget of characters and time per rendering. That stops accidents and simple attacks, not every
attack: a server for strangers must also render in a process of its own, under system limits.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import filters, nodes, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

__all__ = ["Environment", "limits"]

_SECONDS = 5.0  # per rendering; a real template takes milliseconds
_CHARACTERS = 1 << 27  # per rendering: all text put out, joined or copied
_SAFE_SINCE = (3, 1, 6)  # the sandbox of earlier versions has known ways out
# Filters and methods of strings that make much out of little and that no known template needs.
_NO_FILTERS = {
    *("batch", "center", "filesizeformat", "format", "groupby", "pprint", "random"),
    *("slice", "sum", "urlize", "wordwrap", "xmlattr"),
}
_NO_METHODS = {
    *("center", "expandtabs", "format_map", "ljust", "maketrans", "rjust", "translate", "zfill"),
}
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*([*]|[0-9]{5})")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\{|[0-9]{5})")


class _Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.characters = _CHARACTERS
        self.deadline = time.monotonic() + _SECONDS

    def charge(self, characters: int) -> None:
        self.characters -= characters
        if self.characters < 0:
            raise SecurityError(f"it makes more than {_CHARACTERS} characters")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {_SECONDS:.0f} seconds")


_budget: ContextVar[_Budget] = ContextVar("budget")


@contextmanager
def limits() -> Iterator[None]:
    """Compiling and rendering happen inside: `with limits(): ...`."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def _charge(*values: Any) -> None:
    """Pay for the text and the items of values, before they are copied."""
    budget, rest = _budget.get(), list(values)
    while rest:
        value = rest.pop()
        if isinstance(value, (str, bytes)):
            budget.charge(len(value))
        elif isinstance(value, (list, tuple, set, dict)):
            budget.charge(len(value) + 1)
            rest += [*value, *value.values()] if isinstance(value, dict) else value


class _Generation(Extension):
    """{% generation %} marks the assistant's text for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Meter(NodeTransformer):
    """Puts a charge into every loop and macro, and replaces `~`, which has no hook of its own."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._metered(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._metered(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._metered(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_text", node.nodes, node.lineno)

    def _metered(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        tick = _call("tick", [nodes.Const(text + 1)], node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node


def _call(method: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    """Call of a method of the environment, which template code itself cannot name."""
    function = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(function, args, [], None, None, lineno=line)


class Environment(ImmutableSandboxedEnvironment):
    """Compiles and runs chat templates; both only inside `limits()`.

    >>> with limits():
    ...     Environment().from_string("{{ messages | tojson }}").render(messages=["<b>"])
    '["<b>"]'
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        """Raises jinja2.TemplateError when the installed jinja2 has a leaky sandbox."""
        if tuple(int(x) for x in jinja2.__version__.split(".")[:3] if x.isdigit()) < _SAFE_SINCE:
            raise TemplateError(f"jinja2 {jinja2.__version__} is not safe: install 3.1.6 or later")
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            finalize=self._pay,
        )
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        for name in _NO_FILTERS:
            del self.filters[name]
        self.filters.update(join=_join, replace=_replace, indent=_indent, string=_string)
        self.filters.update(tojson=_to_json, from_json=json.loads)
        self.globals.update(raise_exception=_raise, strftime_now=_now)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return cast(nodes.Template, _Meter().visit(super()._parse(source, name, filename)))

    def _pay(self, value: Any) -> Any:
        _charge(value)
        return value

    def tick(self, cost: int) -> str:
        """One turn of a loop, or one call of a macro."""
        _budget.get().charge(cost)
        return ""

    def join_text(self, *values: Any) -> str:
        """The operator `~`."""
        _charge(*values)
        return "".join(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Operators that can make much out of little."""
        if operator == "**":
            raise SecurityError("it uses the operator **")
        if operator == "%" and isinstance(left, str):
            _check_widths(left, _WIDE_PERCENT)
        if operator == "*":
            times = next((x for x in (left, right) if isinstance(x, int)), 1)
            for value in (left, right):
                if isinstance(value, (str, bytes, list, tuple)):
                    _budget.get().charge(len(value) * max(times, 0))
        else:
            _charge(*(x for x in (left, right) if not isinstance(x, (list, tuple))))
            _budget.get().charge(sum(len(x) for x in (left, right) if isinstance(x, (list, tuple))))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Methods of strings that can make much out of little."""
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, (str, bytes)):
            args = _check_method(owner, __obj.__name__, args)
        return super().call(__context, __obj, *args, **kwargs)


def _check_method(text: str | bytes, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pay for what a string method makes; arguments, with iterators made lists."""
    if name in _NO_METHODS:
        raise SecurityError(f"it uses the method {name}")
    _charge(text)
    if name == "join" and args:
        args = (list(args[0]), *args[1:])
        _budget.get().charge(len(text) * len(args[0]))
        _charge(args[0])
    elif name == "replace" and len(args) > 1 and isinstance(text, str):
        _budget.get().charge(text.count(str(args[0])) * len(args[1]))
    elif name == "format" and isinstance(text, str):
        _check_widths(text, _WIDE_BRACES)
        _charge(*args)
        _budget.get().charge(text.count("{") * sum(len(x) for x in args if isinstance(x, str)))
    return args


def _check_widths(pattern: str, bad: re.Pattern[str]) -> None:
    """Refuse formats that pad to a large width, or to one taken from data."""
    if bad.search(pattern.replace("{{", "")):
        raise SecurityError(f"it formats with {pattern[:40]!r}")


@pass_eval_context
def _join(context: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    items = list(value)
    _charge(items)
    _budget.get().charge(len(items) * len(d))
    return filters.sync_do_join(context, items, d, attribute)


@pass_eval_context
def _replace(context: Any, s: str, old: str, new: str, count: int | None = None) -> str:
    _budget.get().charge(len(str(s)) + str(s).count(str(old)) * len(str(new)))
    return filters.do_replace(context, s, old, new, count)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    step = width if isinstance(width, int) else len(width)
    _budget.get().charge(len(s) + (len(s.splitlines()) + 1) * max(step, 0))
    return filters.do_indent(s, width, first, blank)


def _string(value: Any) -> str:
    _charge(value)
    return str(value)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: unlike jinja's own, no HTML escapes and no sorted keys."""
    _charge(x)
    if isinstance(indent, int) and indent > 16:
        raise SecurityError(f"it indents by {indent}")
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
