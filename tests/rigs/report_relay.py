"""The relay with a wall clock that a test sets and web servers at another port than 443.

It looks several times a second which reports on TLS are due.

    python -m tests.rigs.report_relay FILE PORT serve -c CONFIG

FILE has the seconds that its clock is ahead.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from relay.cli import main
from relay.daemon import assemble
from relay.deliver import https, tls_reports
from relay.queue.sqlite import store

if __name__ == "__main__":
    _file, https.HTTPS_PORT = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    tls_reports._LOOK_SECONDS = 0.3

    def _now() -> datetime:
        return datetime.now(UTC) + timedelta(seconds=float(_file.read_text()))

    assemble.now = store.machine_time = _now
    main()
