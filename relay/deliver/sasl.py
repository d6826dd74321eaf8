"""The client's side of AUTH: which mechanism, what to say, what to answer. Pure.

    mechanism    what proves who we are          the client says                      source
    OAUTHBEARER  an access token                 n,a=…,^Ahost=…^Aport=…^Aauth=…^A^A   RFC 7628
    XOAUTH2      an access token                 user=…^Aauth=…^A^A                   Google
    PLAIN        a password                      NUL user NUL password                RFC 4616
    LOGIN        a password                      user, then password                  –
    EXTERNAL     the certificate of the client   user, or nothing                     RFC 4422 §A

`choose` takes the strongest mechanism, in this order, that the host offers and that the login has
something for. An `Exchange` says one line after each 334 (RFC 4954 §4). A host that refuses a token
says why in a 334, and its reply comes only after the client has answered that: by an empty line
with XOAUTH2, by ^A with OAUTHBEARER (RFC 7628 §3.2.3).
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

from relay.mail.masked import SecretMask
from relay.mail.reply import Reply
from relay.route.next_hop import AuthMechanism, Credentials

_LONGEST_COMMAND = 512 - len("\r\n")
"""RFC 5321 §4.5.3.1.4. A longer response waits for a 334 (RFC 4954 §4)."""

_CANCEL = b"*"


class Mechanism(StrEnum):
    """A mechanism by its name in EHLO (RFC 4422 §3.1), the strongest first."""

    OAUTHBEARER = "OAUTHBEARER"
    XOAUTH2 = "XOAUTH2"
    PLAIN = "PLAIN"
    LOGIN = "LOGIN"
    EXTERNAL = "EXTERNAL"


def choose(credentials: Credentials, offered: Collection[str]) -> Mechanism | str:
    """The mechanism to use, or why there is none. `offered`: in upper case."""
    wanted = credentials.mechanism
    if wanted is AuthMechanism.AUTO:
        usable = _usable(credentials)
    else:
        usable = [Mechanism(wanted.value.upper())]
    found = next((mechanism for mechanism in usable if mechanism in offered), None)
    if found is not None:
        return found
    if not offered:
        return "AUTH is not offered"
    names = " nor ".join(usable)
    return f"{'neither ' if len(usable) > 1 else ''}AUTH {names} is {_not(usable)}offered"


def _not(usable: Collection[Mechanism]) -> str:
    return "" if len(usable) > 1 else "not "


def _usable(credentials: Credentials) -> list[Mechanism]:
    if credentials.token is not None:
        return [Mechanism.OAUTHBEARER, Mechanism.XOAUTH2]
    if credentials.password is not None:
        return [Mechanism.PLAIN, Mechanism.LOGIN]
    return [Mechanism.EXTERNAL]


@dataclass(slots=True)
class Exchange:
    """One login. `refusal`: why the host refuses a token, in its words, as they came.
    `is_cancelled`: the host asked for more than the mechanism has, and was told so.
    """

    mechanism: Mechanism
    _waiting: list[bytes] = field(repr=False)
    _after_refusal: bytes | None = None
    refusal: str = ""
    is_cancelled: bool = False

    def first(self) -> bytes:
        """The AUTH command, with the first response where that fits (RFC 4954 §4)."""
        command = b"AUTH " + self.mechanism.encode()
        if self.mechanism is Mechanism.LOGIN:
            return command
        whole = command + b" " + (self._waiting[0] or b"=")
        if len(whole) > _LONGEST_COMMAND:
            return command
        del self._waiting[0]
        return whole

    def after(self, challenge: Reply) -> bytes:
        """The answer to a 334."""
        if self._waiting:
            return self._waiting.pop(0)
        if self._after_refusal is None:
            self.is_cancelled = True
            return _CANCEL
        self.refusal = _decoded(challenge.text)
        answer, self._after_refusal = self._after_refusal, None
        return answer


def begin(mechanism: Mechanism, credentials: Credentials, *, host: str, port: int) -> Exchange:
    """A login at a host. AssertionError where the credentials have nothing for the mechanism."""
    user, password, token = credentials.username, credentials.password, credentials.token
    if mechanism is Mechanism.EXTERNAL:
        return Exchange(mechanism, [b64encode(user.encode())])
    if mechanism in (Mechanism.PLAIN, Mechanism.LOGIN):
        assert password is not None
        if mechanism is Mechanism.PLAIN:
            return Exchange(mechanism, [b64encode(_plain(user, password))])
        return Exchange(mechanism, [b64encode(user.encode()), b64encode(password.encode())])
    assert token is not None
    if mechanism is Mechanism.XOAUTH2:
        return Exchange(mechanism, [b64encode(_xoauth2(user, token))], b"")
    response = _oauthbearer(user, token, host, port)
    return Exchange(mechanism, [b64encode(response)], b64encode(b"\1"))


def secrets_of(credentials: Credentials, *, host: str, port: int) -> SecretMask:
    """What a host could repeat of a login and nobody may see."""
    user, password, token = credentials.username, credentials.password, credentials.token
    return _secrets_of(user, password or "", token or "", host, port)


@lru_cache(maxsize=8)  # all connections with one token share its mask, which is large
def _secrets_of(user: str, password: str, token: str, host: str, port: int) -> SecretMask:
    blobs = [_plain(user, password)] if password else []
    if token:
        blobs += _xoauth2(user, token), _oauthbearer(user, token, host, port)
    return SecretMask((password, token), blobs, public=user)


def _plain(user: str, password: str) -> bytes:
    return f"\0{user}\0{password}".encode()


def _xoauth2(user: str, token: str) -> bytes:
    return f"user={user}\1auth=Bearer {token}\1\1".encode()


def _oauthbearer(user: str, token: str, host: str, port: int) -> bytes:
    """RFC 7628 §3.1. In the name, "=" and "," are escaped (RFC 5801 §4)."""
    name = user.replace("=", "=3D").replace(",", "=2C")
    authzid = f"a={name}" if name else ""
    return f"n,{authzid},\1host={host}\1port={port}\1auth=Bearer {token}\1\1".encode()


def _decoded(text: str) -> str:
    try:
        return b64decode(text, validate=True).decode("utf-8", "replace")
    except ValueError:
        return ""
