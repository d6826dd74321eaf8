"""The relay, which asks once a second whether its resolver validates, and keeps no answer longer.

python -m tests.rigs.doubting_relay serve -c CONFIG
"""

from __future__ import annotations

from relay.cli import main
from relay.route import dns

if __name__ == "__main__":
    dns._TRUST_KEPT = 1.0
    dns._LONGEST = 1.0
    main()
