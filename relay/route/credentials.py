"""The login for a next hop that the operator named, as it is now.

Each attempt asks for the login and waits for it, because a login may need a file that has changed,
or the answer of another service. Only this module caches passwords, and it looks at the time stamp
of the file each time.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from relay.route.next_hop import Credentials, NextHop

__all__ = ["CredentialsError", "RouteCredentials"]

_LONGEST_PASSWORD = 1024

_Stamp = tuple[int, int, int]


class CredentialsError(Exception):
    """The login is not available now; the text says why, without a secret."""


class RouteCredentials:
    """The logins of all routes."""

    def __init__(self) -> None:
        self._passwords: dict[str, tuple[_Stamp, str]] = {}

    async def of(self, hop: NextHop) -> Credentials | None:
        """The login of a next hop, None where it has none. Raises `CredentialsError`."""
        auth = hop.auth
        if auth is None or auth.username is None:
            return None
        try:
            if auth.password_file is None:
                raise ValueError("no password_file is configured")
            password = await self._password(auth.password_file)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise CredentialsError(
                f"the password for the next hop {hop.name} cannot be read from"
                f" {auth.password_file}: {reason}"
            ) from error
        return Credentials(auth.username, password)

    async def _password(self, path: str) -> str:
        """The first line of the file, read in a thread when the file has changed."""
        status = os.stat(path)
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        kept = self._passwords.get(path)
        if kept is None or kept[0] != stamp:
            kept = self._passwords[path] = stamp, await asyncio.to_thread(_first_line, path)
        return kept[1]


def _first_line(path: str) -> str:
    with Path(path).open(encoding="utf-8") as file:
        password = file.read(_LONGEST_PASSWORD).partition("\n")[0].rstrip("\r")
    if not password:
        raise ValueError("its first line is empty")
    return password
