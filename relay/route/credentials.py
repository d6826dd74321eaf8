"""The login of a next hop of the operator's, as it is now.

Asked for by each attempt, and waited for: what a login takes may be a file that has changed, or
somebody else's answer. Passwords are in nobody's cache but this one, which looks at the file's
stamp each time.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from relay.route.next_hop import Credentials, StaticRoute

__all__ = ["CredentialsError", "RouteCredentials"]

_LONGEST_PASSWORD = 1024

_Stamp = tuple[int, int, int]


class CredentialsError(Exception):
    """The login cannot be had for now; the text says why, without any secret."""


class RouteCredentials:
    """The logins of all routes."""

    def __init__(self) -> None:
        self._passwords: dict[str, tuple[_Stamp, str]] = {}

    async def of(self, route: StaticRoute) -> Credentials | None:
        """The login of a route, None where it has none. Raises `CredentialsError`."""
        if route.username is None:
            return None
        try:
            if route.password_file is None:
                raise ValueError("no password_file is configured")
            password = await self._password(route.password_file)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise CredentialsError(
                f"the password for {route.host} cannot be read from {route.password_file}: {reason}"
            ) from error
        return Credentials(route.username, password)

    async def _password(self, path: str) -> str:
        """The first line of the file, read when it has changed, where a slow disk stops nobody else."""
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
