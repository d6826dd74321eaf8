"""The decorator of the values that are made for every message.

`record(frozen=True, slots=True)` is `dataclass(frozen=True, slots=True)` with one difference: only
mypy prevents that a field is assigned. Python's own check makes `__init__` call `__setattr__` of
`object` for each field: 1.1 µs for a value of ten fields instead of 0.2, and the relay makes some
forty of them for a message. `replace` is that of `dataclasses`, and for a record takes 0.4 µs
instead of 2.5.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

__all__ = ["record", "replace"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
    from dataclasses import replace
else:
    T = TypeVar("T")

    def record(*, frozen, slots):
        """A dataclass that is equal to others, and hashed, by its fields."""
        assert frozen
        assert slots

        def decorate(cls):
            made = dataclass(slots=True, unsafe_hash="__hash__" not in vars(cls))(cls)
            made._copy = _copier(made)
            return made

        return decorate

    def replace(value, /, **changes):
        """A copy with other values in some fields."""
        if not hasattr(value, "_copy"):
            return dataclasses.replace(value, **changes)
        copy = value._copy()
        for name, changed in changes.items():
            setattr(copy, name, changed)
        if hasattr(copy, "__post_init__"):
            copy.__post_init__()
        return copy

    def _copier(cls):
        """A method that copies all fields, written out as `dataclass` writes `__init__` out."""
        body = "".join(f"    copy.{field.name} = self.{field.name}\n" for field in fields(cls))
        made = {}
        exec(
            f"def _copy(self):\n    copy = new(cls)\n{body}    return copy\n",
            {"new": object.__new__, "cls": cls},
            made,
        )
        return made["_copy"]
