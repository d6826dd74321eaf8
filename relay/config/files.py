"""The files that keys of the configuration name: can they be read, and are they what is wanted?"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from relay.config.remark import Remark
from relay.route.secret_files import SecretFileError, place_of, read_line, shown_path

_READABLE = "correct the path, or let the relay's user read it"
_PASTED = "write the secret into a file, and the whole path of that file here"


def consider_secret(key: str, path: str) -> Iterator[Remark]:
    """A file whose first line is a secret."""
    try:
        place = place_of(path)
    except SecretFileError as error:
        yield not_by_systemd(key, error)
        return
    try:
        read_line(path)
    except SecretFileError as error:
        yield Remark(key, str(error), _READABLE if shown_path(path) == path else _PASTED)
        return
    yield from consider_openness(key, place)


def not_by_systemd(key: str, error: SecretFileError) -> Remark:
    """A file that systemd gives to the service only, looked for by a command."""
    cure = "start the relay by systemd with LoadCredential=, or name a file"
    return Remark(key, str(error), cure, is_fatal=False)


def consider_openness(key: str, place: Path) -> Iterator[Remark]:
    """A file that can be read, and that others should not read."""
    if place.stat().st_mode & stat.S_IROTH:
        problem = f"{place}: every user of this machine may read it"
        yield Remark(key, problem, f"`chmod o= {place}`", is_fatal=False)


def consider_certificate(certificate: str, private_key: str | None, key: str) -> Iterator[Remark]:
    """A certificate and its private key, below a section's key."""
    for name, path in (("certificate", certificate), ("key", private_key)):
        trouble = _unreadable(path) if path is not None else None
        if trouble:
            yield Remark(f"{key}.{name}", f"{path}: {trouble}", _READABLE)
            return
    trouble = _bad_certificate(certificate, private_key)
    if trouble:
        cure = "give a PEM certificate (chain behind it) and its own unencrypted private key"
        yield Remark(f"{key}.certificate", trouble, cure)


def _bad_certificate(certificate: str, key: str | None) -> str | None:
    import ssl

    def no_passphrase() -> str:
        raise ValueError("the private key is encrypted")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            certificate, key, password=no_passphrase
        )
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        if reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            stranger = f"{key or certificate} is another certificate's key"
            return f"{certificate} cannot be used: {stranger}"
        return f"{certificate} cannot be used: {str(reason).lower().replace('_', ' ')}"
    return None


def _unreadable(path: str) -> str | None:
    try:
        with open(path, "rb"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def bad_roots(path: str) -> str | None:
    """Why a file has no roots to trust; None where it has."""
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        return "no certificates in it"
    except OSError as error:
        return error.strerror or str(error)
    return None
