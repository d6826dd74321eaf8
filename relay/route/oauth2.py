"""Access tokens for the login with a next hop: how one is asked for, what the answer means. Pure.

    grant                what is sent to `token_url`                                 RFC
    client_credentials   client_id and its secret                                    6749 §4.4
    refresh_token        the token of `refresh_token_file`, which `relay login`      6749 §6
                         gets with a code that a person types in (`device_url`)      8628
    service_account      a signed statement (JWT) about who asks, for whom           7523 §2.1

    the answer                                      mail          asked again
    200 and an access token                         goes          before the token expires
    an error code that only a person can cure       waits, 4.7.8  after 1, 5, 15, 15, … minutes
    429, 5yz, no JSON, no answer, redirect          waits, 4.7.0  after 5, 10, 20, 40, 60 seconds
                                                                  or later, if Retry-After says
                                                                  so, but within an hour

A token is renewed when the shorter of five minutes and a tenth of its life is left. Times are those
of the monotonic clock, so that a change of the wall clock neither keeps a token that has expired
nor throws a good one away. Only the statement of a service account carries the wall clock's time.

No text that this module makes contains a secret: `TokenRequest.secrets` says what has to be taken
out of a server's words.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import urlencode, urlsplit

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from relay.mail.jsontext import JsonDocument, JsonFields
from relay.mail.masked import SecretMask
from relay.mail.printable import printable
from relay.route.next_hop import Grant, TokenSource

__all__ = [
    "DEVICE_CODE_GRANT",
    "DeviceCode",
    "Granted",
    "HttpAnswer",
    "NotYet",
    "Pause",
    "ServiceKey",
    "Token",
    "TokenRefused",
    "TokenRequest",
    "TokenSecrets",
    "Unavailable",
    "device_request",
    "device_token_request",
    "pause_after",
    "read_answer",
    "read_device_answer",
    "read_poll_answer",
    "token_request",
]

DEVICE_CODE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_JWT_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"

_DEFAULT_LIFE = timedelta(hours=1)
_LONGEST_LIFE = timedelta(days=30)
_STATEMENT_LIFE = timedelta(hours=1)
"""Google takes no longer one."""
_RENEWED_BEFORE = timedelta(minutes=5)

_REFUSED_WAITS = (60.0, 300.0, 900.0)
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 60.0
_LONGEST_RETRY_AFTER = timedelta(hours=1)
"""A server that names a longer time is asked earlier: it may be back, and all mail waits for it."""

_DEVICE_INTERVAL = timedelta(seconds=5)
"""RFC 8628 §3.2: where the server names none; §3.5: what `slow_down` adds to it."""
_DEVICE_LIFE = timedelta(minutes=15)

_MOST_TEXT = 500
_CLOCK_DIFFERENCE = timedelta(minutes=1)
"""A clock that differs by more is worth a word where a statement was refused."""

_TEMPORARY = frozenset({"temporarily_unavailable", "server_error", "slow_down"})
"""RFC 6749 §4.1.2.1, RFC 8628 §3.5: error codes of a server that could answer later."""


@dataclass(frozen=True, slots=True)
class ServiceKey:
    """The key file of a service account."""

    email: str
    token_url: str
    key: rsa.RSAPrivateKey = field(repr=False)
    key_id: str = ""

    @classmethod
    def parse(cls, text: str) -> ServiceKey:
        """Read the JSON that Google offers for download. ValueError says what is wrong with it."""
        found = _json_object(text)
        if found is None:
            raise ValueError("it is not the JSON file of a service account's key")
        email, pem = found.get("client_email"), found.get("private_key")
        if not isinstance(email, str) or not isinstance(pem, str):
            raise ValueError("it has no client_email or no private_key")
        try:
            key = load_pem_private_key(pem.encode(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("its private_key is not an RSA key in PEM form without a passphrase")
        token_url = found.get("token_uri")
        key_id = found.get("private_key_id")
        return cls(
            email,
            token_url if isinstance(token_url, str) else "",
            key,
            key_id if isinstance(key_id, str) else "",
        )


@dataclass(frozen=True, slots=True)
class TokenSecrets:
    """What the files of a `TokenSource` contain now."""

    client_secret: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    key: ServiceKey | None = None


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A POST to a server. `secrets`: what is to be masked in its answer."""

    url: str
    body: bytes = field(repr=False)
    secrets: SecretMask


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer of a server, with the two header fields that matter."""

    status: int
    body: bytes = field(repr=False)
    retry_after: str = ""
    date: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """An access token. `obtained`: before it was asked for, by the monotonic clock."""

    access: str = field(repr=False)
    obtained: float
    life: timedelta

    def is_due(self, now: float) -> bool:
        """Whether it is time to ask for the next one."""
        margin = min(_RENEWED_BEFORE, self.life / 10)
        return now >= self.obtained + (self.life - margin).total_seconds()

    def is_over(self, now: float) -> bool:
        """Whether it has expired."""
        return now >= self.obtained + self.life.total_seconds()


@dataclass(frozen=True, slots=True)
class Granted:
    """The server granted a token. `refresh_token`: the one to use from now on, "" for the same."""

    access_token: str = field(repr=False)
    life: timedelta
    refresh_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class TokenRefused:
    """Only a person can cure this; the server is not asked again for minutes."""

    error: str
    reason: str


@dataclass(frozen=True, slots=True)
class Unavailable:
    """The server gave no usable answer and may give one soon."""

    reason: str
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """The server is not asked before `until`. `count`: failures of the same kind in a row."""

    failure: TokenRefused | Unavailable
    until: float
    count: int = 1

    @property
    def status(self) -> str:
        """The enhanced status of mail that waits for it."""
        return "4.7.8" if isinstance(self.failure, TokenRefused) else "4.7.0"

    @property
    def ignored_retry_after(self) -> timedelta | None:
        """The Retry-After that is longer than the relay waits; None where it is obeyed."""
        asked = self.failure.retry_after if isinstance(self.failure, Unavailable) else None
        return asked if asked is not None and asked > _LONGEST_RETRY_AFTER else None


def pause_after(before: Pause | None, failure: TokenRefused | Unavailable, *, now: float) -> Pause:
    """How long the server is left alone after a failure. `before`: the pause before it, if any."""
    is_next = before is not None and type(before.failure) is type(failure)
    count = before.count + 1 if before is not None and is_next else 1
    if isinstance(failure, TokenRefused):
        wait = _REFUSED_WAITS[min(count, len(_REFUSED_WAITS)) - 1]
    else:
        wait = min(_FIRST_WAIT * 2.0 ** min(count - 1, 10), _LONGEST_WAIT)
        if failure.retry_after is not None:
            # Also after "Retry-After: 0", each message must not make a request.
            asked = min(failure.retry_after, _LONGEST_RETRY_AFTER)
            wait = max(wait, asked.total_seconds())
    return Pause(failure, now + wait, count)


def token_request(source: TokenSource, secrets: TokenSecrets, *, now: datetime) -> TokenRequest:
    """The request for an access token. ValueError names a key that is missing.

    The client's secret is in the body, where Microsoft and Google document it (RFC 6749 §2.3.1).
    """
    fields: dict[str, str | None] = {"grant_type": source.grant.value}
    url = source.token_url or ""
    match source.grant:
        case Grant.CLIENT_CREDENTIALS:
            fields |= _client(source, secrets)
        case Grant.REFRESH_TOKEN:
            if not secrets.refresh_token:
                raise ValueError("there is no refresh token")
            fields |= {**_client(source, secrets), "refresh_token": secrets.refresh_token}
        case Grant.SERVICE_ACCOUNT:
            if secrets.key is None:
                raise ValueError("key_file is missing")
            url = url or secrets.key.token_url
            if not url.startswith("https://"):
                raise ValueError("the token_uri of key_file does not begin with https://")
            statement = _statement(source, secrets.key, url, now)
            return _post(url, {"grant_type": _JWT_GRANT, "assertion": statement}, (statement,))
    fields["scope"] = source.scope
    return _post(url, fields, (secrets.client_secret, secrets.refresh_token))


def read_answer(
    answer: HttpAnswer, request: TokenRequest, source: TokenSource, *, now: datetime
) -> Granted | TokenRefused | Unavailable:
    """What an answer to a request for a token means. `now`: the wall clock, for Retry-After and for
    a clock that is wrong.
    """
    server = urlsplit(request.url).hostname or request.url
    found = _json_object(answer.body.decode("utf-8", "replace"))
    if answer.status == 200 and found is not None:
        return _granted(found, server)
    error = found.get("error") if found is not None else None
    asked_too_often = answer.status == 429 or answer.status >= 500
    if isinstance(error, str) and not asked_too_often and error not in _TEMPORARY:
        reason = (
            f"{server} refuses a token for oauth2.{source.name}: {_shown_error(found, request)}"
        )
        cure = _cure(error, source, answer, now)
        return TokenRefused(_shown(error, request), f"{reason}; {cure}")
    return Unavailable(
        f"{server} gives no token for oauth2.{source.name}: {_what(answer, found, request)}",
        _retry_after(answer, now),
    )


# --- the device code ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """RFC 8628 §3.2. `complete_uri`: the address with the code in it, "" where there is none."""

    device_code: str = field(repr=False)
    user_code: str
    uri: str
    complete_uri: str
    life: timedelta
    interval: timedelta


@dataclass(frozen=True, slots=True)
class NotYet:
    """Nobody has typed the code in yet. `interval`: seconds to wait before the next request."""

    interval: timedelta


def device_request(source: TokenSource) -> TokenRequest:
    """The request for a code that a person types in (RFC 8628 §3.1)."""
    fields = {"client_id": source.client_id, "scope": source.scope}
    return _post(source.device_url or "", fields, ())


def read_device_answer(
    answer: HttpAnswer, request: TokenRequest
) -> DeviceCode | TokenRefused | Unavailable:
    """The code, or why there is none."""
    server = urlsplit(request.url).hostname or request.url
    found = _json_object(answer.body.decode("utf-8", "replace"))
    if answer.status == 200 and found is not None:
        # Google sends `verification_url`, as a draft of the standard had it.
        uri = found.get("verification_uri", found.get("verification_url"))
        device_code, user_code = found.get("device_code"), found.get("user_code")
        if isinstance(device_code, str) and isinstance(user_code, str) and isinstance(uri, str):
            complete = found.get("verification_uri_complete")
            return DeviceCode(
                device_code,
                printable(user_code),
                printable(uri),
                printable(complete) if isinstance(complete, str) else "",
                _seconds(found.get("expires_in")) or _DEVICE_LIFE,
                _seconds(found.get("interval")) or _DEVICE_INTERVAL,
            )
    if found is not None and isinstance(found.get("error"), str) and answer.status < 500:
        error = _shown_error(found, request)
        return TokenRefused(_shown(found["error"], request), f"{server} gives no code: {error}")
    return Unavailable(f"{server} gives no code: {_what(answer, found, request)}")


def device_token_request(source: TokenSource, secret: str, code: DeviceCode) -> TokenRequest:
    """The request that asks whether the person has agreed (RFC 8628 §3.4)."""
    fields = {
        "grant_type": DEVICE_CODE_GRANT,
        "device_code": code.device_code,
        **_client(source, TokenSecrets(secret)),
    }
    return _post(source.token_url or "", fields, (secret, code.device_code))


def read_poll_answer(
    answer: HttpAnswer, request: TokenRequest, code: DeviceCode, interval: timedelta
) -> Granted | NotYet | TokenRefused:
    """What came of it so far. `interval`: the one used last; it grows by `slow_down`, and doubles
    where there was no usable answer (RFC 8628 §3.5).
    """
    server = urlsplit(request.url).hostname or request.url
    found = _json_object(answer.body.decode("utf-8", "replace")) or {}
    if answer.status == 200 and found:
        granted = _granted(found, server)
        return granted if isinstance(granted, Granted) else TokenRefused("", granted.reason)
    match found.get("error"):
        case "authorization_pending":
            return NotYet(interval)
        case "slow_down":
            return NotYet(interval + _DEVICE_INTERVAL)
        case "expired_token":
            return TokenRefused("expired_token", "the code was not typed in in time; start again")
        case "access_denied":
            return TokenRefused("access_denied", "the person at the page did not agree")
        case str() as error if answer.status < 500 and error not in _TEMPORARY:
            return TokenRefused(
                _shown(error, request), f"{server} refuses: {_shown_error(found, request)}"
            )
    return NotYet(min(interval * 2, timedelta(minutes=1)))


# --- pieces ---------------------------------------------------------------------------------------


def _client(source: TokenSource, secrets: TokenSecrets) -> dict[str, str | None]:
    return {"client_id": source.client_id, "client_secret": secrets.client_secret or None}


def _post(url: str, fields: Mapping[str, str | None], secrets: tuple[str, ...]) -> TokenRequest:
    body = urlencode({name: value for name, value in fields.items() if value}).encode()
    return TokenRequest(url, body, SecretMask(secrets))


def _statement(source: TokenSource, key: ServiceKey, url: str, now: datetime) -> str:
    """A JWT (RFC 7523 §3) signed with RS256 (RFC 7518 §3.3)."""
    issued = int(now.timestamp())
    header = {"alg": "RS256", "typ": "JWT"} | ({"kid": key.key_id} if key.key_id else {})
    claims = {
        "iss": key.email,
        "sub": source.subject or key.email,
        "aud": url,
        "iat": issued,
        "exp": issued + int(_STATEMENT_LIFE.total_seconds()),
    }
    if source.scope:
        claims["scope"] = source.scope
    signed = b".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
    signature = key.key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
    return (signed + b"." + _base64url(signature)).decode()


def _base64url(octets: bytes) -> bytes:
    return urlsafe_b64encode(octets).rstrip(b"=")


def _granted(found: JsonFields, server: str) -> Granted | Unavailable:
    """RFC 6749 §5.1."""
    access = found.get("access_token")
    if not isinstance(access, str) or not _is_visible(access):
        return Unavailable(f"{server} answers without an access_token that could be sent")
    kind = found.get("token_type", "bearer")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        return Unavailable(f"{server} grants a token that is not a Bearer token")
    refresh = found.get("refresh_token")
    life = min(_seconds(found.get("expires_in")) or _DEFAULT_LIFE, _LONGEST_LIFE)
    is_usable = isinstance(refresh, str) and _is_visible(refresh)
    return Granted(access, life, refresh if isinstance(refresh, str) and is_usable else "")


def _is_visible(token: str) -> bool:
    """RFC 6749 appendix A.12 without the space, which would end a Bearer token."""
    return bool(token) and all("!" <= character <= "~" for character in token)


def _seconds(value: object) -> timedelta | None:
    """Seconds, also as a text; None where it is no positive number."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e11:
        return None
    return timedelta(seconds=value)


def _json_object(text: str) -> JsonDocument | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _retry_after(answer: HttpAnswer, now: datetime) -> timedelta | None:
    """RFC 9110 §10.2.3: seconds, or a date, which is compared with the server's own clock."""
    value = answer.retry_after.strip()
    if value.isascii() and value.isdigit() and len(value) < 12:
        return timedelta(seconds=int(value))
    until = _http_date(value)
    if until is None:
        return None
    return max(until - (_http_date(answer.date) or now), timedelta(0))


def _http_date(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text) if text else None
    except (ValueError, OverflowError):
        return None
    return found if found is not None and found.tzinfo is not None else None


def _cure(error: str, source: TokenSource, answer: HttpAnswer, now: datetime) -> str:
    """What a person can do about an error code."""
    name = source.name
    if source.grant is Grant.SERVICE_ACCOUNT:
        theirs = _http_date(answer.date)
        if theirs is not None and abs(theirs - now) > _CLOCK_DIFFERENCE:
            seconds = round((now - theirs).total_seconds())
            return f"this machine's clock differs from the server's by {seconds} s: correct it"
        return f"check key_file, subject and scope of oauth2.{name}"
    if error == "invalid_grant" and source.grant is Grant.REFRESH_TOKEN:
        return f"run `relay login {name}` to get a new refresh token"
    if error in ("invalid_client", "unauthorized_client"):
        return f"check client_id and client_secret_file of oauth2.{name}"
    return f"check oauth2.{name}"


def _what(answer: HttpAnswer, found: JsonFields | None, request: TokenRequest) -> str:
    """What is wrong with an answer that is no usable one."""
    if 300 <= answer.status < 400:
        return f"it answers with a redirect ({answer.status}), which is not followed"
    if found is None:
        return f"it answers with status {answer.status} and no JSON"
    if isinstance(found.get("error"), str):
        return f"status {answer.status}, {_shown_error(found, request)}"
    return f"it answers with status {answer.status}"


def _shown_error(found: JsonFields | None, request: TokenRequest) -> str:
    """`invalid_client (the server's words)`, without secrets."""
    assert found is not None
    error, words = str(found.get("error", "")), found.get("error_description")
    if not isinstance(words, str) or not words:
        return _shown(error, request)
    return f"{_shown(error, request)} ({_shown(words, request)})"


def _shown(text: str, request: TokenRequest) -> str:
    masked = request.secrets.masked(text)
    return printable(" ".join(masked.split()))[:_MOST_TEXT]
