"""Keeps the newest values under their keys, so that no stranger can fill the memory. Pure."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def keep_newest(known: dict[K, V], key: K, value: V, *, most: int) -> None:
    """Put a value behind all others, and forget the oldest where there are more than `most`."""
    known.pop(key, None)
    known[key] = value
    if len(known) > most:
        del known[next(iter(known))]
