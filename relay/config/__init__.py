"""The configuration: one YAML file and the environment, read into the dataclasses the other modules
define.

Each module defines what it wants to be told as a frozen dataclass beside the code that
reads it; this one alone knows YAML. It reads a file four times over:

    compose    YAML into a tree in which every key and value knows its line; duplicate keys found
    conform    the tree against the dataclasses: unknown keys, wrong types, durations, domains
    defaults   defaults that would contradict a key of the file give way
    consider   keys that contradict each other: AUTH without users, TLS without a certificate

(and a fifth time for `relay check`: `trial`, what only a start would find, and `unit`, what systemd
keeps from the service)

and says all that is wrong at once (`ConfigError`), each mistake with file, line, key and cure.
A key `queue: {path: …}` can be given by the environment as `RELAY__QUEUE__PATH`, which wins
over the file; its value is read as YAML, and a mistake in it names the variable.

A key is the name of its field, without the `_bytes` of a size; what more there is to know of it is
said at the field (relay.mail.option), and `shape` reads all of that once for check, schema and
reload.
"""

from __future__ import annotations

import dataclasses
import errno
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from relay.config.conform import Conformer, build, nearest
from relay.config.consider import consider
from relay.config.defaults import adapted
from relay.config.document import as_document
from relay.config.mistakes import ConfigError, Location, Mistake
from relay.config.remark import Remark
from relay.config.sections import Config
from relay.config.shape import known_keys, section_of
from relay.config.tree import ENVIRONMENT_PREFIX, Composer, Leaf, Map, overlay
from relay.mail.address import AddressError, normalise_domain

__all__ = [
    "Config",
    "ConfigError",
    "Mistake",
    "as_document",
    "consider",
    "default_path",
    "load",
    "locations",
    "read",
    "text_of",
]

MACHINE_FILE = Path("/etc/relay/relay.yaml")
MAX_FILE_BYTES = 4 * 1024 * 1024


def default_path(environ: Mapping[str, str]) -> Path:
    """The file that is read where no `-c` names one; it need not exist."""
    if environ.get("RELAY_CONFIG"):
        return Path(environ["RELAY_CONFIG"])
    return MACHINE_FILE if _is_there(MACHINE_FILE) else Path("conf/relay.yaml")


def _is_there(path: Path) -> bool:
    """Whether there is a file, or one that this user may not know of: reading it will say so."""
    try:
        path.stat()
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)
    return True


Look = Callable[[Config], Iterable[Remark]]


def load(path: Path, environ: Mapping[str, str], *, look: Look | None = consider) -> Config:
    """Read the file and the environment; ConfigError with every mistake in them.

    `look` finds what is wrong in a configuration whose keys are right one by one. None is for a
    command that asks a running relay: it may read none of the relay's files, and has no use for
    the host's name, which may be long in coming.
    """
    return read(text_of(path), environ, source=str(path), look=look)


def text_of(path: Path) -> str:
    """The text of a file; ConfigError where there is none to be had, or too much."""
    try:
        with path.open("rb") as file:
            octets = file.read(MAX_FILE_BYTES + 1)
    except PermissionError:
        cure = "let the relay's user read it (`chgrp relay`, `chmod g+r`), or name another with -c"
        raise ConfigError([Mistake(Location(str(path)), "", "permission denied", cure)]) from None
    except OSError as error:
        cure = "name another file with -c or in RELAY_CONFIG"
        raise ConfigError(
            [Mistake(Location(str(path)), "", error.strerror or str(error), cure)]
        ) from None
    if len(octets) > MAX_FILE_BYTES:
        raise ConfigError(
            [Mistake(Location(str(path)), "", "longer than 4 MiB", "is this the right file?")]
        )
    try:
        return octets.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        location = Location(str(path), octets.count(b"\n", 0, error.start) + 1)
        raise ConfigError(
            [Mistake(location, "", "not UTF-8", "save the file as UTF-8 text")]
        ) from None


def read(
    text: str, environ: Mapping[str, str], *, source: str, look: Look | None = consider
) -> Config:
    """`load` for a text at hand."""
    mistakes: list[Mistake] = []
    tree = Composer(source, mistakes).compose(text)
    if isinstance(tree, Leaf) and tree.kind == "null":
        tree = Map(tree.location, {}, {})
    if tree is not None and not isinstance(tree, Map):
        mistakes.append(
            Mistake(
                tree.location, "", "not a list of keys", "begin with a key, as in `hostname: …`"
            )
        )
    if not isinstance(tree, Map):
        raise ConfigError(mistakes)
    overlay(tree, environ, mistakes)
    mistakes.extend(_misspelt(environ))
    conformer = Conformer(mistakes)
    values = conformer.conform(tree, section_of(Config), "")
    config = build(values, conformer)
    if config is None or mistakes:
        raise ConfigError(mistakes)
    config = adapted(config, conformer.locations.__contains__)
    return config if look is None else _considered(config, conformer, look)


def locations(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Where each key of a right configuration stands: file and line, or the variable."""
    tree = Composer(str(path), []).compose(text_of(path))
    if not isinstance(tree, Map):
        return {}
    overlay(tree, environ, [])
    conformer = Conformer([])
    conformer.conform(tree, section_of(Config), "")
    return {key: str(location) for key, location in conformer.locations.items()}


def _misspelt(environ: Mapping[str, str]) -> Iterator[Mistake]:
    """Variables that are meant for a key and are not read. Others that begin with RELAY_ are not
    ours: Kubernetes makes RELAY_PORT for a service of the name relay.
    """
    ours = [n for n in environ if n.startswith("RELAY_") and not n.startswith(ENVIRONMENT_PREFIX)]
    if not ours:
        return
    variables = {
        key.replace(".", "_").upper(): ENVIRONMENT_PREFIX + key.replace(".", "__").upper()
        for key, _ in known_keys(section_of(Config))
    }
    for variable in ours:
        name = variable.removeprefix("RELAY_")
        meant = variables.get(name.replace("__", "_").upper())
        if meant is None and "__" in name:
            meant = ENVIRONMENT_PREFIX + name
        if meant is not None:
            cure = f"write {meant}, with two underscores"
            yield Mistake(Location(variable), "", "a variable that is not read", cure)


def _considered(config: Config, conformer: Conformer, look: Look) -> Config:
    if not config.hostname:
        config = dataclasses.replace(config, hostname=_own_name())
    remarks = list(look(config))
    fatal = [_mistake(remark, conformer) for remark in remarks if remark.is_fatal]
    if fatal:
        raise ConfigError(fatal)
    warnings = [_mistake(remark, conformer) for remark in remarks]
    if "." not in config.hostname:
        problem = f"{config.hostname} is no full domain name, and other hosts judge us by it"
        cure = "write one, such as relay.example.net"
        warnings.append(
            Mistake(nearest(conformer.locations, "hostname"), "hostname", problem, cure)
        )
    object.__setattr__(config, "warnings", tuple(map(str, warnings)))
    return config


def _mistake(remark: Remark, conformer: Conformer) -> Mistake:
    """A remark with its line, under the key that the file has."""
    key = conformer.written.get(remark.key, remark.key)
    return Mistake(nearest(conformer.locations, key), key, remark.problem, remark.cure)


def _own_name() -> str:
    """This machine's full name, as good as the system knows it (RFC 5321 §4.1.1.1)."""
    for name in (socket.getfqdn(), socket.gethostname()):
        try:
            domain = normalise_domain(name)
        except AddressError:
            continue
        if domain and domain != "localhost" and not domain.startswith("localhost."):
            return domain
    return "localhost"
