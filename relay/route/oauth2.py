"""Access tokens for the login with a next hop: how one is asked for, what the answer means. Pure.

    grant                what is sent to `token_url`                                 RFC
    client_credentials   client_id and its secret                                    6749 §4.4
    refresh_token        the token of `refresh_token_file`, which `relay login`      6749 §6
                         gets with a code that a person types in (`device_url`)      8628
    service_account      a signed statement (JWT) about who asks, for whom           7523 §2.1

Only the statement of a service account carries the wall clock's time. When the server is asked
again after an answer, `relay.route.token` says.

No text that this module makes contains a secret: `TokenRequest.secrets` says what has to be taken
out of a server's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import urlencode, urlsplit

from relay.mail.jsontext import JsonDocument, JsonFields, object_of
from relay.mail.masked import SecretMask
from relay.mail.printable import printable
from relay.route.next_hop import Grant, TokenSource
from relay.route.service_account import ServiceKey
from relay.route.token import Granted, TokenRefused, Unavailable

DEVICE_CODE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_JWT_GRANT = "urn:ietf:params:oauth:grant-type:jwt-bearer"

_DEFAULT_LIFE = timedelta(hours=1)
_LONGEST_LIFE = timedelta(days=30)

_DEVICE_INTERVAL = timedelta(seconds=5)
"""RFC 8628 §3.2: where the server names none; §3.5: what `slow_down` adds to it."""
_DEVICE_LIFE = timedelta(minutes=15)

_MOST_TEXT = 500
_CLOCK_DIFFERENCE = timedelta(minutes=1)
"""A clock that differs by more is worth a word where a statement was refused."""

_TEMPORARY = frozenset({"temporarily_unavailable", "server_error", "slow_down"})
"""RFC 6749 §4.1.2.1, RFC 8628 §3.5: error codes of a server that could answer later."""


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

    @property
    def server(self) -> str:
        """The name of the server, for a sentence."""
        return urlsplit(self.url).hostname or self.url


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """An answer of a server, with the two header fields that matter."""

    status: int
    body: bytes = field(repr=False)
    retry_after: str = ""
    date: str = ""

    @property
    def document(self) -> JsonDocument | None:
        """The JSON object that it is; None where it is none."""
        return object_of(self.body.decode("utf-8", "replace"))


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
            statement = secrets.key.statement(
                url, subject=source.subject, scope=source.scope, now=now
            )
            return _post(url, {"grant_type": _JWT_GRANT, "assertion": statement}, (statement,))
    fields["scope"] = source.scope
    return _post(url, fields, (secrets.client_secret, secrets.refresh_token))


def read_answer(
    answer: HttpAnswer, request: TokenRequest, source: TokenSource, *, now: datetime
) -> Granted | TokenRefused | Unavailable:
    """What an answer to a request for a token means. `now`: the wall clock, for Retry-After and for
    a clock that is wrong.
    """
    server, found = request.server, answer.document
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
    server, found = request.server, answer.document
    if answer.status == 200 and found is not None:
        # Google sends `verification_url`, as a draft of the standard had it.
        uri = found.get("verification_uri", found.get("verification_url"))
        device_code, user_code = found.get("device_code"), found.get("user_code")
        if isinstance(device_code, str) and isinstance(user_code, str) and isinstance(uri, str):
            return DeviceCode(
                device_code,
                printable(user_code),
                printable(uri),
                printable(_text(found, "verification_uri_complete")),
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
    server, found = request.server, answer.document or {}
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


def _granted(found: JsonFields, server: str) -> Granted | Unavailable:
    """RFC 6749 §5.1."""
    access, refresh = _text(found, "access_token"), _text(found, "refresh_token")
    if not _is_visible(access):
        return Unavailable(f"{server} answers without an access_token that could be sent")
    kind = found.get("token_type", "bearer")
    if not isinstance(kind, str) or kind.lower() != "bearer":
        return Unavailable(f"{server} grants a token that is not a Bearer token")
    life = min(_seconds(found.get("expires_in")) or _DEFAULT_LIFE, _LONGEST_LIFE)
    return Granted(access, life, refresh if _is_visible(refresh) else "")


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


def _text(found: JsonFields, name: str) -> str:
    value = found.get(name)
    return value if isinstance(value, str) else ""


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
    error, words = str(found.get("error", "")), _text(found, "error_description")
    if not words:
        return _shown(error, request)
    return f"{_shown(error, request)} ({_shown(words, request)})"


def _shown(text: str, request: TokenRequest) -> str:
    masked = request.secrets.masked(text)
    return printable(" ".join(masked.split()))[:_MOST_TEXT]
