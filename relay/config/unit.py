"""What the systemd unit keeps from the service: directories that it may not write in, and homes.

`relay check` sees the whole file system, and the service sees what its unit lets it see. This
module compares the paths of a configuration with the settings of the unit, as
`systemctl show` prints them (systemd.exec(5)).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath

from relay.config.document import as_document
from relay.config.remark import Remark
from relay.config.sections import Config
from relay.receive.spec import UnixAddress, parse_address

UNIT = "relay.service"
UNIT_SETTINGS = (
    *("LoadState", "ProtectHome", "ProtectSystem", "ReadWritePaths"),
    *("StateDirectory", "LogsDirectory", "RuntimeDirectory", "CacheDirectory"),
)
_ABOVE = {"State": "/var/lib", "Logs": "/var/log", "Runtime": "/run", "Cache": "/var/cache"}
_HOMES = ("/home", "/root", "/run/user")
_ALWAYS_WRITABLE = ("/dev", "/proc", "/sys", "/tmp", "/var/tmp")


def read_settings(shown: str) -> dict[str, str]:
    """The output of `systemctl show`; nothing where there is no such unit."""
    settings = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    return settings if settings.get("LoadState") == "loaded" else {}


def beyond_unit(config: Config, settings: Mapping[str, str]) -> Iterator[Remark]:
    """Paths of the configuration that the service cannot use, although its user may."""
    if settings.get("ProtectHome") in ("yes", "tmpfs"):
        for key, path in _paths(as_document(config)):
            if _is_below(path, _HOMES):
                problem = f"{path}: {UNIT} sees nothing of it (ProtectHome=)"
                yield Remark(key, problem, "name a place outside of home directories")
    if settings.get("ProtectSystem") == "strict":
        writable = (*_writable(settings), *_ALWAYS_WRITABLE, *_HOMES)
        for key, path in _written(config):
            if not _is_below(path, writable):
                problem = f"{path}: {UNIT} may not write there (ProtectSystem=strict)"
                cure = f"`systemctl edit {UNIT}`, and write [Service] and ReadWritePaths={path}"
                yield Remark(key, problem, cure)


def _paths(value: object, key: str = "") -> Iterator[tuple[str, PurePath]]:
    """Each absolute path of a document, with its key."""
    if isinstance(value, str) and value.startswith("/"):
        yield key, PurePath(value)
    named = value.items() if isinstance(value, dict) else ()
    numbered = enumerate(value) if isinstance(value, list) else ()
    for name, inner in (*named, *numbered):
        yield from _paths(inner, f"{key}.{name}" if key else str(name))


def _written(config: Config) -> Iterator[tuple[str, PurePath]]:
    """The directories that the service writes in, if they are absolute."""
    places = {
        "log.delivery": PurePath(config.log.delivery).parent,
        "admin.socket": PurePath(config.admin.socket).parent,
    }
    if not config.queue.location.is_shared:
        places["queue.path"] = PurePath(config.queue.path)
    for i, listener in enumerate(config.listeners):
        address = parse_address(listener.address)
        if isinstance(address, UnixAddress):
            places[f"listeners.{i}.address"] = PurePath(address.path).parent
    return ((key, path) for key, path in places.items() if path.is_absolute())


def _writable(settings: Mapping[str, str]) -> Iterator[str]:
    yield from (path.lstrip("-+") for path in settings.get("ReadWritePaths", "").split())
    for kind, above in _ABOVE.items():
        for name in settings.get(f"{kind}Directory", "").split():
            yield f"{above}/{name.partition(':')[0]}"


def _is_below(path: PurePath, places: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(place) for place in places)
