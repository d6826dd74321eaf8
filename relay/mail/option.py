"""Metadata of `Annotated` that describes a configuration key at the field that holds its value.

Each module defines its options as a dataclass. The type of a field gives most facts about the key,
and these marks give the rest. Only `relay.config` reads them: to check a value, to write the JSON
Schema, to mask a secret, and to know which keys a reload takes over.
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
    LINE = "one line of text"
    LISTEN_ADDRESS = "address and port, or unix:path"
    MAIL_ADDRESS = "mail address"
    MAIL_HOST = "name or address of a host"
    NAMESERVER = "address of a name server"
    NETWORK = "network"
    PATH = "path"
    PIN = "mail host, or *.domain"
    QUEUE_URL = "URL of a queue"
    ROUTE_PATTERN = "domain, *.domain or *"
    SECRET = "secret"
    SELECTOR = "DKIM selector"
    SIZE = "size in octets"
    SOCKET_PATH = "path of a socket"


@dataclass(frozen=True, slots=True)
class Range:
    """The smallest and the largest number that a key may have."""

    least: int = 1
    greatest: int = 999_999_999_999


@dataclass(frozen=True, slots=True)
class NotEmpty:
    """A list that must have a value, with the message that says what an empty one would mean."""

    problem: str
    cure: str


class Mark(Enum):
    """How the relay treats a value."""

    SECRET = "never shown"
    RELOAD = "taken over at SIGHUP, with everything below it"


SECRET = Mark.SECRET
RELOAD = Mark.RELOAD

Path = Annotated[str, Form.PATH]
Port = Annotated[int, Range(1, 65535)]
Size = Annotated[int, Form.SIZE]
