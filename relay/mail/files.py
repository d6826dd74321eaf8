"""Writes octets to a file to the end, and makes the names of files last."""

from __future__ import annotations

import os
from pathlib import Path


def write_all(fd: int, octets: bytes) -> None:
    """Write all of it, however many calls that takes."""
    left = memoryview(octets)
    while left:
        left = left[os.write(fd, left) :]


def sync_directory(directory: Path) -> None:
    """Make the names of the files in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
