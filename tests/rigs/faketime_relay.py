"""The relay with a wall clock that is wrong for the whole process, its libraries in C included.

    LD_PRELOAD=libfaketime.so.1 FAKETIME=+1d python -m tests.rigs.faketime_relay serve -c CONFIG

With FAKETIME_DONT_FAKE_MONOTONIC=1 the library leaves the clocks alone that nobody sets. It still
breaks clock_nanosleep(2), which time.sleep calls: that waits on another call here.
"""

from __future__ import annotations

import threading
import time

from relay.cli import main


def _sleep(seconds: float) -> None:
    threading.Event().wait(seconds)


if __name__ == "__main__":
    time.sleep = _sleep  # type: ignore[assignment]
    main()
