"""Metadata of `Annotated` that describes a configuration key at the field that holds its value.

Each module defines its options as a dataclass. The type of a field gives most facts about the key,
and these marks give the rest. Only `relay.config` reads them: to check a value, to write the JSON
Schema, to mask a secret, and to know which keys a reload takes over.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Annotated, Any


class TextForm(StrEnum):
    """How a text is written. `relay.config.words` reads each form."""

    ADDRESS = "IP address"
    API_KEY = "API key"
    ARGON2 = "argon2 hash"
    DOMAIN = "domain"
    DOMAIN_PATTERN = "domain or *.domain"
    FILE_MODE = "file mode"
    GROUP = "name of a group"
    HEADER_NAME = "name of a header field"
    HTTPS_URL = "URL of an HTTPS server"
    HTTP_ADDRESS = "address and port, or nothing"
    LINE = "one line of text"
    LISTEN_ADDRESS = "address and port, or unix:path"
    MAIL_ADDRESS = "mail address"
    MAIL_HOST = "name or address of a host"
    NAME = "name of letters, digits, dots, hyphens and underscores"
    NAMESERVER = "address of a name server"
    NETWORK = "network"
    PATH = "path"
    PIN = "mail host, or *.domain"
    QUEUE_URL = "URL of a queue"
    RATE = "messages per second, minute or hour"
    ROUTE_PATTERN = "domain, *.domain or *"
    SECRET = "secret"
    SENDER_PATTERN = "mail address, domain or *.domain"
    SELECTOR = "DKIM selector"
    SIZE = "size in octets"
    SOCKET_PATH = "path of a socket"
    SPKI_DIGEST = "base64 of the SHA-256 digest of a public key"


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


@dataclass(frozen=True, slots=True)
class ShortKey:
    """A key that may be written instead of the field's own, with one value: `host` for `hosts`.

    `type`: of its value. `below`: the key of the field's section that gets the value.
    """

    key: str
    type: Any
    below: str = ""

    def __hash__(self) -> int:
        return hash((self.key, self.below))


@dataclass(frozen=True, slots=True)
class NameKey:
    """Where a name or a section may be written: the key that may say the name, too, as in
    `{next_hop: provider}` for `provider`.
    """

    key: str


class Mark(Enum):
    """How the relay treats a value."""

    ONE_OR_MORE = "a list, of which one value alone may be written without brackets"
    SECRET = "never shown"
    RELOAD = "taken over at SIGHUP, with everything below it"


ONE_OR_MORE = Mark.ONE_OR_MORE
SECRET = Mark.SECRET
RELOAD = Mark.RELOAD

Path = Annotated[str, TextForm.PATH]
Port = Annotated[int, Range(1, 65535)]
Size = Annotated[int, TextForm.SIZE]
