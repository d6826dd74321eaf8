"""The relay, which looks for MTA-STS policies at another port than 443.

python -m tests.rigs.policy_relay PORT serve -c CONFIG
"""

from __future__ import annotations

import sys

from relay.cli import main
from relay.deliver import https

if __name__ == "__main__":
    https.HTTPS_PORT = int(sys.argv.pop(1))
    main()
