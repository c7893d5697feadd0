"""Override a run's fields by their dotted names, as MLflow shows them."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pipelines.config.run import Run
from pipelines.config.serialization import flat_params

_POOLING = "pooling"


def change_fields(run: Run, fields: Mapping[str, object]) -> Run:
    """Return the run with other values for some fields.

    Args:
        fields: Values by dotted names, such as `optim.lr`; the pooling's stand without
            `model.` in front, as in MLflow: `pooling.power`.

    Raises ValueError for a field that the run does not have, for a value of another
    type, and where the run refuses a value.
    """
    return _changed(run, {_path(name): value for name, value in fields.items()})


def _path(name: str) -> tuple[str, ...]:
    path = tuple(name.split("."))
    return ("model", *path) if path[0] == _POOLING else path


def _changed(
    owner: Any, fields: Mapping[tuple[str, ...], object], *, shown: str = ""
) -> Any:
    """Replace all fields of one dataclass at once: they are checked together."""
    if isinstance(owner, dict):  # further arguments of a model: anything goes
        return owner | {".".join(path): value for path, value in fields.items()}
    hints = typing.get_type_hints(type(owner))
    changes: dict[str, Any] = {}
    for name in dict.fromkeys(path[0] for path in fields):
        whole = f"{shown}{name}"
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=3) or sorted(hints)
            raise ValueError(
                f"expected a field of the run, got {whole!r}; near it are "
                f"{', '.join(shown + one for one in near)}"
            )
        below = {path[1:]: fields[path] for path in fields if path[0] == name}
        if () in below:
            changes[name] = _checked(below[()], hint=hints[name], name=whole)
        else:
            changes[name] = _below(getattr(owner, name), below, shown=whole)
    return dataclasses.replace(owner, **changes)


def _below(owner: Any, fields: Mapping[tuple[str, ...], object], *, shown: str) -> Any:
    if not (dataclasses.is_dataclass(owner) or isinstance(owner, dict)):
        wanted = ", ".join(f"{shown}.{'.'.join(path)}" for path in fields)
        raise ValueError(
            f"expected a run whose {shown} can hold {wanted}, got {shown} = {owner!r}; "
            f"take another recipe, or give this one a {shown}"
        )
    return _changed(owner, fields, shown=f"{shown}.")


def _checked(value: object, *, hint: object, name: str) -> object:
    if not fits(value, hint):
        shown = getattr(hint, "__name__", None) or str(hint)
        raise ValueError(f"{name}: expected {shown}, got {value!r}")
    return value


def fits(value: object, hint: Any) -> bool:
    """Check whether a value is of a field's annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _items_fit(value, arguments)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def wrong_fields(owner: Any, *, prefix: str = "") -> list[str]:
    """Describe the fields of a dataclass, nested ones too, whose values are mistyped.

    Python checks no annotations, and a wrong value would fail much later.
    """
    found: list[str] = []
    hints = typing.get_type_hints(type(owner))
    for field in dataclasses.fields(owner):
        if not hasattr(owner, field.name):
            continue
        value, hint = getattr(owner, field.name), hints[field.name]
        name = f"{prefix}{field.name}"
        if not fits(value, hint):
            shown = getattr(hint, "__name__", None) if not typing.get_args(hint) else ""
            found.append(f"{name}: expected {shown or hint}, got {value!r}; mend it")
        elif dataclasses.is_dataclass(value):
            found += wrong_fields(value, prefix=f"{name}.")
    return found


def _items_fit(value: tuple[object, ...], hints: tuple[Any, ...]) -> bool:
    if len(hints) == 2 and hints[1] is Ellipsis:
        return all(fits(item, hints[0]) for item in value)
    return len(value) == len(hints) and all(map(fits, value, hints))


def differing(before: Run, now: Run) -> dict[str, Any]:
    """Return the fields of `now`, by dotted names, that differ from `before`."""
    was = flat_params(before)
    return {
        name: value
        for name, value in flat_params(now).items()
        if name not in was or was[name] != value
    }


def short_tail(name: str, *, among: Iterable[str], taken: Iterable[str] = ()) -> str:
    """Return the last parts of a dotted name, as few as tell it from the others.

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
