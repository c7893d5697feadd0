"""Write Python expressions as `ruff format` lays them out, 88 columns wide."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sovit import Pooling

INDENT = 4
_LINE_LENGTH = 88


@dataclass(frozen=True, kw_only=True)
class Group:
    """Brackets with their items: a call, a tuple or a dict."""

    opening: str
    items: list[tuple[str, Node]]
    """Prefix of an item, such as `lr=`, and the item."""
    closing: str = ")"


Node = str | Group
Imports = set[tuple[str, str]]
"""Modules, each with what is taken from it."""


def literal(value: Any, *, imports: Imports) -> Node:
    """Write a field's value, and collect the imports it needs."""
    if dataclasses.is_dataclass(value):
        return _built(value, imports=imports)
    if isinstance(value, dict):
        items = dict_items(value, imports=imports)
        return Group(opening="{", items=items, closing="}")
    if isinstance(value, tuple):
        return Group(
            opening="(", items=[("", literal(one, imports=imports)) for one in value]
        )
    if isinstance(value, str):
        return string(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


def dict_items(
    content: Mapping[str, Any], *, imports: Imports
) -> list[tuple[str, Node]]:
    """Write the items of a dict."""
    return [
        (f"{string(key)}: ", literal(value, imports=imports))
        for key, value in content.items()
    ]


def _built(owner: Any, *, imports: Imports) -> Group:
    """Write a dataclass with the fields that are not at their defaults."""
    kind = type(owner)
    module = "sovit" if kind is Pooling else "pipelines.config"
    imports.add((module, kind.__name__))
    items: list[tuple[str, Node]] = []
    for one in dataclasses.fields(owner):
        value, default = getattr(owner, one.name), one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        if default is dataclasses.MISSING or default != value:
            items.append((f"{one.name}=", literal(value, imports=imports)))
    return Group(opening=f"{kind.__name__}(", items=items)


def string(value: str) -> str:
    """Quote a string as ruff does: double quotes unless that needs more escapes.

    The result is ASCII.
    """
    quoted = ascii(value)
    body = quoted[1:-1]
    if quoted[0] == "'":
        body = body.replace("\\'", "'")
    mark = "'" if value.count('"') > value.count("'") else '"'
    return mark + body.replace(mark, "\\" + mark) + mark


def multi_line(text: str) -> str:
    """Write a text and a comma, one source line per line of it. ASCII alone."""
    lines = []
    for line in text.split("\n"):
        # What ruff would find fault with at a line's end is no blank any more.
        kept = line.rstrip(" ")
        escaped = kept.encode("unicode_escape").decode()
        lines.append(escaped + "\\x20" * (len(line) - len(kept)))
    body = "\n".join(lines).replace('"""', '\\"\\"\\"')
    if body.endswith('"'):
        body = body[:-1] + '\\"'
    return f'"""\\\n{body}""",' + next(filter(None, map(_pragma, lines)), "")


def import_lines(imports: Imports) -> list[str]:
    """Write the imports in ruff's order."""
    return [
        f"from {module} import "
        + ", ".join(sorted(name for of, name in imports if of == module))
        for module in sorted({module for module, _ in imports})
    ]


def docstring(*paragraphs: str, indent: int = 0) -> list[str]:
    """Lay out a docstring; an indented paragraph is left as it is."""
    lines: list[str] = []
    left = " " * indent
    for words in paragraphs:
        # A path may hold what ends a docstring, or begins an escape.
        words = ascii(words)[1:-1].replace('"', "'")
        if words.startswith(" "):
            lines += ["", left + words]
            continue
        lines += [
            "",
            *textwrap.wrap(
                words if lines else '"""' + words,
                width=_LINE_LENGTH,
                initial_indent=left,
                subsequent_indent=left,
                break_long_words=False,
                break_on_hyphens=False,
            ),
        ]
    return [*lines[1:], left + '"""']


def laid_out(node: Node, *, indent: int, used: int) -> str:
    """Write a node on one line if it fits, else with one item per line.

    Args:
        indent: Indent of the line that the node begins in.
        used: Columns already taken in that line, including a comma after the node.
    """
    flat = _flat(node)
    if isinstance(node, str) or not node.items or used + len(flat) <= _LINE_LENGTH:
        return flat
    lines = [node.opening]
    for before, item in node.items:
        left = " " * (indent + INDENT) + before
        text = laid_out(item, indent=indent + INDENT, used=len(left) + 1)
        lines.append(f"{left}{text},{_pragma(left + text)}")
    return "\n".join([*lines, " " * indent + node.closing])


def _flat(node: Node) -> str:
    if isinstance(node, str):
        return node
    inner = ", ".join(before + _flat(item) for before, item in node.items)
    comma = "," if node.opening == "(" and len(node.items) == 1 else ""
    return node.opening + inner + comma + node.closing


def _pragma(line: str) -> str:
    """Return the noqa of a line that is too long; a single word needs none."""
    is_long = "\n" not in line and len(line) + 1 > _LINE_LENGTH
    return "  # noqa: E501" if is_long and len(line.split()) > 1 else ""
