"""Shorten dotted names of fields for tables and plots."""

from __future__ import annotations

from collections.abc import Iterable


def short_tail(name: str, *, among: Iterable[str], taken: Iterable[str] = ()) -> str:
    """Give the last part of a dotted name, or as many as tell it from the others.

    Args:
        among: All names, this one or not.
        taken: Short names that stand for something else.
    """
    others, parts = [other for other in among if other != name], name.split(".")
    for num_parts in range(1, len(parts)):
        tail = ".".join(parts[-num_parts:])
        is_shared = any(f".{other}".endswith(f".{tail}") for other in others)
        if not is_shared and tail not in taken:
            return tail
    return name
