"""The relay with a supervisor that is quicker to lose its patience with a silent worker.

    python -m tests.rigs.hasty_relay TIMES serve -c CONFIG

What takes a minute takes a TIMES-th of it: workers say that they are well more often, too.
"""

from __future__ import annotations

import sys

from relay.cli import main
from relay.workers import supervisor, worker

if __name__ == "__main__":
    _times = float(sys.argv.pop(1))
    worker.BEAT_SECONDS /= _times
    supervisor._UNWELL_SECONDS /= _times
    supervisor._ENDING_SECONDS /= _times
    supervisor._LOOK_SECONDS /= _times
    supervisor._AWAY_SECONDS /= _times
    main()
