"""Shape annotations of this package, at no cost where they are not checked.

jaxtyping is a development dependency: without it `import sovit` must still work.
Annotations are strings there and are never evaluated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float
else:
    try:
        from jaxtyping import Float
    except ImportError:

        class Float:
            """Stand-in for jaxtyping's `Float`: `Float[Tensor, "m n"]` is `Tensor`."""

            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                """Return the array type, without its shape."""
                return item[0]


# An int is a float to Python and its type checkers, but not to beartype.
Number = float | int

__all__ = ["Float", "Number", "Tensor"]
