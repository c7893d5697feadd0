"""Check a dataclass's fields when it is built, with errors in the user's spelling."""

from __future__ import annotations


def check_fields(owner: object, section: str, **rules: tuple[bool, str]) -> None:
    """Raise ValueError for the first field whose rule does not hold.

    Args:
        section: Prefix of the field's name on the command line: `data.`.
        rules: For a field, whether it holds and what was expected.
    """
    for name, (holds, expected) in rules.items():
        if not holds:
            got = getattr(owner, name)
            field_name = f"{section}{name}"
            option = field_name.replace("_", "-")
            raise ValueError(
                f"{field_name}: expected {expected}, got {got!r}; set --{option}"
            )
