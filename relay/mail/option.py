"""What is said of a key of the configuration at the field that it becomes: metadata of `Annotated`.

Each module defines its options as a dataclass; the type of a field says most of a key, and these
marks the rest. `relay.config` alone reads them: to check a value, to write the JSON Schema, to mask
a secret, to know what a reload takes over.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Annotated

__all__ = ["RELOAD", "SECRET", "Form", "Mark", "NotEmpty", "Path", "Port", "Range", "Size"]


class Form(StrEnum):
    """How a text is written. `relay.config.words` reads each form."""

    API_KEY = "API key"
    ARGON2 = "argon2 hash"
    DOMAIN = "domain"
    DOMAIN_PATTERN = "domain or *.domain"
    FILE_MODE = "file mode"
    GROUP = "name of a group"
    HEADER_NAME = "name of a header field"
    HTTP_ADDRESS = "address and port, or nothing"
    LISTEN_ADDRESS = "address and port, or unix:path"
    MAIL_HOST = "name or address of a host"
    NAMESERVER = "address of a name server"
    NETWORK = "network"
    PATH = "path"
    QUEUE_URL = "URL of a queue"
    ROUTE_PATTERN = "domain, *.domain or *"
    SECRET = "secret"
    SELECTOR = "DKIM selector"
    SIZE = "size in octets"
    SOCKET_PATH = "path of a socket"


@dataclass(frozen=True, slots=True)
class Range:
    """The least and the greatest number that a key may have."""

    least: int = 1
    greatest: int = 999_999_999_999


@dataclass(frozen=True, slots=True)
class NotEmpty:
    """A list that must have a value; what an empty one would mean, and the cure."""

    problem: str
    cure: str


class Mark(Enum):
    """What is done with a value."""

    SECRET = "never shown"
    RELOAD = "taken over at SIGHUP, with everything below it"


SECRET = Mark.SECRET
RELOAD = Mark.RELOAD

Path = Annotated[str, Form.PATH]
Port = Annotated[int, Range(1, 65535)]
Size = Annotated[int, Form.SIZE]
