"""A limit on the memory of processes, by a control group of a test's own (cgroups(7)).

Version 2 where its root hands on the memory controller, else version 1. A container may have
neither.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.rigs.ports import wait_until

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """What a process that `enter` stands before, and all its children, may have together."""

    directory: Path
    is_v2: bool

    @property
    def enter(self) -> Sequence[str]:
        """What to put before a command."""
        return ("sh", "-c", f'echo $$ > {self.directory}/cgroup.procs && exec "$@"', "sh")

    def limit(self, size_bytes: int) -> None:
        """No more than this; page cache counts, and is let go of first."""
        self._file("memory.max", "memory.limit_in_bytes").write_text(str(size_bytes))

    @property
    def used_bytes(self) -> int:
        return int(self._file("memory.current", "memory.usage_in_bytes").read_text())

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel has killed for it."""
        told = self._file("memory.events", "memory.oom_control").read_text()
        return int(re.findall(r"^oom_kill (\d+)$", told, re.MULTILINE)[0])

    def _file(self, v2: str, v1: str) -> Path:
        return self.directory / (v2 if self.is_v2 else v1)


@contextlib.contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """A new group; OSError where none can be made. Its processes have to end first."""
    is_v2 = (_ROOT / "cgroup.controllers").exists()
    if is_v2:
        # Where it has them already, this changes nothing.
        (_ROOT / "cgroup.subtree_control").write_text("+memory")
    parent = _ROOT if is_v2 else _own_group()
    group = MemoryGroup(parent / f"relay-test-{os.getpid()}", is_v2)
    group.directory.mkdir()
    try:
        group.limit(1 << 40)
        yield group
    finally:
        wait_until(lambda: _is_removed(group.directory), seconds=10, what="the end of the group")


def _own_group() -> Path:
    told = Path("/proc/self/cgroup").read_text()
    own = re.search(r"^\d+:(?:\S+,)?memory(?:,\S+)?:/(.*)$", told, re.MULTILINE)
    return _ROOT / "memory" / (own[1] if own else "")


def _is_removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.rmdir()
    return not directory.exists()
