"""Where the PostgreSQL server is: `queue.url`, as libpq writes it. Pure.

    postgresql://relay@db1,db2:5433/relay?sslmode=verify-full
    postgresql:///relay?host=/run/postgresql

Several hosts are tried in order. The password may be in the URL; no text that this module makes
shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlencode

_SCHEMES = ("postgresql", "postgres")
_PORT = 5432
_CONNECT_SECONDS = 3.0

_TLS_OPTIONS = frozenset(
    {
        "sslmode",
        "sslrootcert",
        "sslcert",
        "sslkey",
        "sslpassword",
        "sslcrl",
        "ssl_min_protocol_version",
        "ssl_max_protocol_version",
    }
)
_TLS_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_OPTIONS = _TLS_OPTIONS | {
    "host",
    "port",
    "user",
    "password",
    "dbname",
    "target_session_attrs",
    "connect_timeout",
    "prepared_statements",
}
_FLAGS = {"0": False, "1": True, "off": False, "on": True, "false": False, "true": True}


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """`hosts`: each a name, an address or the directory of a socket, with its port. `tls`: libpq's
    options about TLS. `prepared_statements`: false behind a pooler that does not know them.
    """

    hosts: tuple[tuple[str, int], ...]
    database: str
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Mapping[str, str] = field(default_factory=dict)
    connect_seconds: float = _CONNECT_SECONDS
    prepared_statements: bool = True

    def __str__(self) -> str:
        """What may be shown: no password, no options."""
        user = f"{self.user}@" if self.user else ""
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"postgresql://{user}{hosts}/{self.database}"

    def tls_url(self) -> str:
        """A URL with nothing but the options about TLS: a library reads certificates from it."""
        return f"postgresql:///?{urlencode(self.tls)}" if self.tls else "postgresql:///"


def parse_url(text: str) -> ServerAddress:
    """Raises ValueError with a sentence that shows nothing of the password."""
    scheme, found, rest = text.partition("://")
    if not found or scheme not in _SCHEMES:
        raise ValueError("write postgresql://USER@HOST/DATABASE")
    # The reader of URLs would take a list of hosts for one with a wrong port.
    authority, _, path = rest.partition("/")
    user_info, _, host_list = authority.rpartition("@")
    path, _, query = path.partition("?") if "/" in rest else ("", "", "")
    if "?" in host_list:
        host_list, _, query = host_list.partition("?")
    options = _options(query)
    name, _, password = user_info.partition(":")
    hosts = _hosts(host_list or options.get("host", ""), options.get("port", ""))
    database = unquote(path) or options.get("dbname") or unquote(name) or options.get("user") or ""
    if not database:
        raise ValueError("it names no database: write postgresql://USER@HOST/DATABASE")
    return ServerAddress(
        hosts,
        database,
        user=unquote(name) or options.get("user") or None,
        password=unquote(password) or options.get("password") or None,
        tls={key: value for key, value in options.items() if key in _TLS_OPTIONS},
        connect_seconds=_seconds(options.get("connect_timeout")),
        prepared_statements=_flag(options.get("prepared_statements", "1")),
    )


def _options(query: str) -> dict[str, str]:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            known = ", ".join(sorted(_OPTIONS - {"user", "password", "dbname", "host", "port"}))
            raise ValueError(f"there is no option {name[:40]!r}; there are {known}")
    mode = options.get("sslmode")
    if mode is not None and mode not in _TLS_MODES:
        raise ValueError(f"sslmode is one of {', '.join(_TLS_MODES)}")
    wanted = options.get("target_session_attrs", "read-write")
    if wanted not in ("any", "read-write", "primary"):
        # The relay writes: whatever is wanted, it looks for the server that takes writes.
        raise ValueError("target_session_attrs is read-write: the queue is written to")
    return options


def _hosts(hosts: str, ports: str) -> tuple[tuple[str, int], ...]:
    if not hosts:
        hosts = "/run/postgresql"
    default = [_port(one) for one in ports.split(",")] if ports else [_PORT]
    found = []
    for number, one in enumerate(hosts.split(",")):
        host, port = _host_and_port(one)
        found.append((host, port or default[min(number, len(default) - 1)]))
    return tuple(found)


def _host_and_port(text: str) -> tuple[str, int | None]:
    text = unquote(text)
    if text.startswith("/"):
        return text, None
    if text.startswith("["):
        host, _, port = text[1:].partition("]")
        return host, _port(port[1:]) if port else None
    host, _, port = text.partition(":")
    if not host:
        raise ValueError("a host has no name")
    return host, _port(port) if port else None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ValueError("a port is a number from 1 to 65535; write %3A for a colon in a password")
    return int(text)


def _seconds(text: str | None) -> float:
    if text is None:
        return _CONNECT_SECONDS
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError("connect_timeout is a number of seconds")
    return float(text)


def _flag(text: str) -> bool:
    if text not in _FLAGS:
        raise ValueError("prepared_statements is 0 or 1")
    return _FLAGS[text]
