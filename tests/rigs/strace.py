"""strace on a relay that runs: faults at its N-th system call, and the order of its calls.

Attached and not in front, so that a count begins when the relay has started.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.fakes.waiting import patient
from tests.rigs.ports import wait_until


@contextlib.contextmanager
def strace(
    pid: int, *, calls: str, inject: str = "", only: Path | None = None, output: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Attached to a process and all its threads; `inject` as in strace(1): `error=EIO:when=2`.

    A count of `when` is of each thread and each call apart. `only`: calls on this file.
    """
    command = ["strace", "-f", "-y", "-s", "5000", "-o", str(output or "/dev/null"), "-p", str(pid)]
    command += ["-e", f"trace={calls}", "-e", "signal=none"]
    if inject:
        command += ["-e", f"inject={calls}:{inject}"]
    if only is not None:
        command += ["-P", str(only)]
    with tempfile.NamedTemporaryFile() as said:
        tracer = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            words = Path(said.name)
            wait_until(
                lambda: tracer.poll() is not None or b"attached" in words.read_bytes(),
                what="strace",
            )
            # It may be over already: the first call after attaching can be the last.
            assert b"attached" in words.read_bytes(), words.read_text()
            yield tracer
        finally:
            if tracer.poll() is None:
                tracer.terminate()
            tracer.wait(timeout=patient(30))


_LINE = re.compile(r"^(\d+) +(.*)$")
_QUEUED = re.compile(
    r"^(?:write|sendto|sendmsg|writev)\(\d+<socket.*?\b250 2\.0\.0 .*? ([0-9A-Za-z]{8,24})\\r\\n"
)


@dataclass(frozen=True)
class Order:
    """What a trace of writing, syncing and answering showed. `syncs`: those of the queue's WAL."""

    answered: tuple[str, ...]
    syncs: int
    too_early: tuple[str, ...]


def order_of_replies(trace: Path) -> Order:
    """Whether each 250 went out after a sync that began when its message was written, and
    succeeded.

    The trace is of `pwrite64,fdatasync,write,…` with all their octets.
    """
    begun: dict[str, int] = {}  # by thread: where its sync in progress began
    unfinished: dict[str, str] = {}
    syncs: list[tuple[int, int]] = []
    writes: list[tuple[int, str]] = []
    replies: dict[str, int] = {}
    with trace.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            match = _LINE.match(line)
            if match is None:
                continue
            thread, call = match.groups()
            if call.endswith("<unfinished ...>"):
                unfinished[thread] = call.removesuffix("<unfinished ...>")
                if call.startswith("fdatasync"):
                    begun[thread] = number
                    continue
                call = unfinished[thread]  # what it says, it has said by now
            elif call.startswith("<..."):
                call = unfinished.pop(thread, "") + call.partition("resumed>")[2]
                if not call.startswith("fdatasync"):
                    continue
            if (
                call.startswith("fdatasync")
                and "queue.db-wal" in call
                and call.rstrip().endswith("= 0")
            ):
                syncs.append((begun.pop(thread, number), number))
            elif call.startswith("pwrite64") and "queue.db-wal" in call:
                writes.append((number, call))
            elif found := _QUEUED.match(call):
                replies[found[1]] = number
    early = []
    for queue_id, at in replies.items():
        written = next((number for number, call in writes if queue_id in call), None)
        if written is None or not any(written < first and last < at for first, last in syncs):
            early.append(queue_id)
    return Order(tuple(replies), len(syncs), tuple(early))
