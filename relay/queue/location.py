"""Where a queue is. Without anything that opens one: each command reads the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

DEFAULT_PATH = "var/spool"


def _no_password() -> str | None:
    """The server asks for none, or the URL has it."""
    return None


@dataclass(frozen=True, slots=True)
class QueueLocation:
    """Where a queue is: in the directory `path`, or on the server at `url`.

    For a server: what gives its password, the name of this node, and the length of its lease.
    `password` may raise `SpoolError`; it is called for each connection, since it may change.
    """

    path: str
    url: str | None = field(default=None, repr=False)
    password: Callable[[], str | None] = _no_password
    node: str = ""
    lease: timedelta = timedelta(seconds=30)

    @property
    def is_shared(self) -> bool:
        """Whether several nodes share it."""
        return self.url is not None

    @property
    def key(self) -> str:
        """The key of the configuration that says where it is."""
        return "queue.url" if self.is_shared else "queue.path"
