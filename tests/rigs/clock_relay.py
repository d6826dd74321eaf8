"""The relay with a wall clock that a test can set while it runs.

    python -m tests.rigs.clock_relay FILE serve -c CONFIG

FILE has the seconds that its clock is ahead. (faketime(1) does the same to every program, but also
to the waits of its threads, which a clock that is set does not touch in reality.)
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from relay.cli import main
from relay.daemon import assemble
from relay.queue.sqlite import store

if __name__ == "__main__":
    _file = Path(sys.argv.pop(1))

    def _now() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=float(_file.read_text()))

    assemble.now = store.machine_time = _now
    main()
