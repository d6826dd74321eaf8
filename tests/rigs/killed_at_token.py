"""The relay, killed between the answer with a new refresh token and the file it belongs into."""

from __future__ import annotations

import os
import signal

from relay.cli import main
from relay.deliver import tokens


def _killed(path: str, secret: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


tokens.replace_secret = _killed  # type: ignore[attr-defined]

if __name__ == "__main__":
    main()
