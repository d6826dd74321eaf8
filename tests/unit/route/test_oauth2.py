from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.masked import SecretMask
from relay.route.next_hop import Grant, TokenSource
from relay.route.oauth2 import (
    DEVICE_CODE_GRANT,
    DeviceCode,
    HttpAnswer,
    NotYet,
    TokenRequest,
    TokenSecrets,
    device_request,
    device_token_request,
    read_answer,
    read_device_answer,
    read_poll_answer,
    token_request,
)
from relay.route.service_account import ServiceKey
from relay.route.token import Granted, Pause, Token, TokenRefused, Unavailable, pause_after

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
URL = "https://login.example/oauth2/token"
CLIENT = TokenSource(
    "m365", Grant.CLIENT_CREDENTIALS, URL, client_id="app-1", scope="https://mail.example/.default"
)
OWN = TokenSource("own", Grant.REFRESH_TOKEN, URL, client_id="app-1", device_url=URL)
SERVICE = TokenSource(
    "google", Grant.SERVICE_ACCOUNT, subject="relay@example.com", scope="https://mail.example/"
)
REQUEST = TokenRequest(URL, b"", SecretMask(["client-secret-1"]))


def fields(request: TokenRequest) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(request.body.decode()).items()}


def answer(status: Any = 200, retry_after: Any = "", date: Any = "", **said: Any) -> HttpAnswer:
    return HttpAnswer(status, json.dumps(said).encode(), retry_after, date)


def read(one: HttpAnswer, source: TokenSource = CLIENT) -> Granted | TokenRefused | Unavailable:
    return read_answer(one, REQUEST, source, now=NOW)


# --- requests -------------------------------------------------------------------------------------


def test_client_credentials_are_sent_in_the_body() -> None:
    request = token_request(CLIENT, TokenSecrets(client_secret="s&c=r+t"), now=NOW)
    assert request.url == URL
    assert fields(request) == {
        "grant_type": "client_credentials",
        "client_id": "app-1",
        "client_secret": "s&c=r+t",
        "scope": "https://mail.example/.default",
    }


def test_refresh_token_of_a_public_client_is_sent_without_a_secret() -> None:
    request = token_request(OWN, TokenSecrets(refresh_token="refresh-1"), now=NOW)
    assert fields(request) == {
        "grant_type": "refresh_token",
        "client_id": "app-1",
        "refresh_token": "refresh-1",
    }


def test_refresh_without_a_token_is_not_asked() -> None:
    with pytest.raises(ValueError, match="no refresh token"):
        token_request(OWN, TokenSecrets(), now=NOW)


@lru_cache
def private_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def key_file(**other: str) -> str:
    pem = private_key().private_bytes(
        Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
    )
    found = {
        "type": "service_account",
        "client_email": "relay@project.example",
        "private_key": pem.decode(),
        "private_key_id": "key-7",
        "token_uri": "https://google.example/token",
    }
    return json.dumps(found | other)


def part(text: str) -> Any:
    return json.loads(urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def test_service_account_signs_who_asks_for_whom() -> None:
    key = ServiceKey.parse(key_file())
    request = token_request(SERVICE, TokenSecrets(key=key), now=NOW)
    assert request.url == "https://google.example/token"
    assert fields(request)["grant_type"] == "urn:ietf:params:oauth:grant-type:jwt-bearer"
    header, claims, signature = fields(request)["assertion"].split(".")
    assert part(header) == {"alg": "RS256", "typ": "JWT", "kid": "key-7"}
    assert part(claims) == {
        "iss": "relay@project.example",
        "sub": "relay@example.com",
        "aud": "https://google.example/token",
        "scope": "https://mail.example/",
        "iat": 1795867200,
        "exp": 1795867200 + 3600,
    }
    private_key().public_key().verify(
        urlsafe_b64decode(signature + "=" * (-len(signature) % 4)),
        f"{header}.{claims}".encode(),
        padding.PKCS1v15(),
        hashes.SHA256(),
    )


def test_statement_is_not_sent_in_clear() -> None:
    key = ServiceKey.parse(key_file(token_uri="http://google.example/token"))
    with pytest.raises(ValueError, match="does not begin with https://"):
        token_request(SERVICE, TokenSecrets(key=key), now=NOW)


def test_token_url_of_the_configuration_comes_before_that_of_the_key_file() -> None:
    source = TokenSource("google", Grant.SERVICE_ACCOUNT, URL)
    request = token_request(source, TokenSecrets(key=ServiceKey.parse(key_file())), now=NOW)
    assert request.url == URL
    assert part(fields(request)["assertion"].split(".")[1])["aud"] == URL


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not the JSON file"),
        ("[]", "not the JSON file"),
        ('{"client_email": "a@b"}', "no client_email or no private_key"),
        (key_file(private_key="-----BEGIN"), "not an RSA key"),
    ],
)
def test_key_file_that_is_none_is_named(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        ServiceKey.parse(text)


def test_no_value_shows_a_secret() -> None:
    key = ServiceKey.parse(key_file())
    secrets = TokenSecrets("client-secret-1", "refresh-1", key)
    request = token_request(CLIENT, secrets, now=NOW)
    granted = Granted("access-1", timedelta(hours=1), "refresh-2")
    shown = repr((secrets, request, granted, Token("access-1", 0.0, timedelta(1)), answer(a="x1")))
    assert not {"client-secret-1", "refresh-1", "refresh-2", "access-1", "x1", "PRIVATE"} & set(
        shown.replace("'", " ").split()
    )
    assert "secret-1" not in shown
    assert "access-1" not in shown


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expires_in", "life"),
    [
        (3599, timedelta(seconds=3599)),
        ("3599", timedelta(seconds=3599)),
        (None, timedelta(hours=1)),
        ("soon", timedelta(hours=1)),
        (0, timedelta(hours=1)),
        (-5, timedelta(hours=1)),
        (True, timedelta(hours=1)),
        (1e300, timedelta(hours=1)),
        (10**9, timedelta(days=30)),
    ],
)
def test_token_lives_as_long_as_the_server_says_and_an_hour_where_it_does_not(
    expires_in: object, life: timedelta
) -> None:
    found = read(answer(access_token="t", token_type="Bearer", expires_in=expires_in))
    assert found == Granted("t", life)


def test_rotated_refresh_token_is_returned() -> None:
    found = read(answer(access_token="t", refresh_token="refresh-2"), OWN)
    assert found == Granted("t", timedelta(hours=1), "refresh-2")


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"access_token": ""},
        {"access_token": 7},
        {"access_token": "a\x01b"},
        {"access_token": "a b"},
        {"access_token": "ü"},
        {"access_token": "t", "token_type": "mac"},
        {"access_token": "t", "token_type": 1},
    ],
)
def test_token_that_cannot_be_sent_is_no_token(said: dict[str, Any]) -> None:
    assert isinstance(read(answer(**said)), Unavailable)


@pytest.mark.parametrize("status", [400, 401, 403])
@pytest.mark.parametrize(
    "error", ["invalid_grant", "invalid_client", "unauthorized_client", "invalid_scope"]
)
def test_error_code_that_a_person_has_to_cure_is_a_refusal(status: int, error: str) -> None:
    found = read(answer(status, error=error, error_description="AADSTS7000215: no"))
    assert isinstance(found, TokenRefused)
    assert found.error == error
    assert found.reason.startswith(
        f"login.example refuses a token for oauth2.m365: {error} (AADSTS7000215: no); check "
    )


@pytest.mark.parametrize(
    "one",
    [
        answer(429, error="invalid_client"),
        answer(500, error="invalid_grant"),
        answer(503),
        answer(400, error="temporarily_unavailable"),
        answer(400),
        answer(404),
        HttpAnswer(200, b"<html>"),
        HttpAnswer(401, b""),
        HttpAnswer(200, b"[1]"),
        HttpAnswer(200, b"\xff\xfe"),
        HttpAnswer(200, b"[" * 100_000),
        HttpAnswer(302, b""),
    ],
)
def test_answer_that_may_be_better_soon_is_no_refusal(one: HttpAnswer) -> None:
    assert isinstance(read(one), Unavailable)


def test_redirect_is_named_and_not_followed() -> None:
    found = read(HttpAnswer(302, b""))
    assert "redirect (302), which is not followed" in str(found)


def test_revoked_refresh_token_names_the_command_that_cures_it() -> None:
    found = read(answer(400, error="invalid_grant"), OWN)
    assert isinstance(found, TokenRefused)
    assert found.reason.endswith("invalid_grant; run `relay login own` to get a new refresh token")


def test_wrong_clock_is_named_where_a_statement_is_refused() -> None:
    date = "Sat, 28 Nov 2026 11:00:00 GMT"
    found = read(answer(400, error="invalid_grant", date=date), SERVICE)
    assert isinstance(found, TokenRefused)
    assert "clock differs from the server's by 3600 s: correct it" in found.reason


def test_clock_that_is_right_is_not_named() -> None:
    date = "Sat, 28 Nov 2026 12:00:10 GMT"
    found = read(answer(400, error="invalid_grant", date=date), SERVICE)
    assert isinstance(found, TokenRefused)
    assert "clock" not in found.reason


def test_secret_that_the_server_repeats_is_masked() -> None:
    found = read(answer(400, error="invalid_client", error_description="got client-secret-1"))
    assert isinstance(found, TokenRefused)
    assert "client-secret-1" not in found.reason
    assert "(got ***)" in found.reason


def test_words_of_the_server_are_made_safe_and_cut() -> None:
    found = read(answer(400, error="invalid_grant", error_description="\x1b[2J\n" + "x" * 9000))
    assert isinstance(found, TokenRefused)
    assert found.reason.isprintable()
    assert len(found.reason) < 800


@given(
    status=st.integers(100, 599),
    body=st.one_of(
        st.binary(max_size=200),
        st.dictionaries(
            st.sampled_from(
                ["access_token", "token_type", "expires_in", "refresh_token", "error", "user_code"]
            ),
            st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.lists(st.text())),
        ).map(lambda said: json.dumps(said).encode()),
    ),
    retry_after=st.one_of(st.text(max_size=40), st.just("Sat, 28 Nov 2026 12:02:00 +99999999999")),
    date=st.text(max_size=40),
)
def test_no_answer_of_a_server_breaks_the_reader(
    status: int, body: bytes, retry_after: str, date: str
) -> None:
    one = HttpAnswer(status, body, retry_after, date)
    for source in (CLIENT, OWN, SERVICE):
        found = read(one, source)
        if isinstance(found, Granted):
            assert timedelta(0) < found.life <= timedelta(days=30)
        else:
            assert found.reason.isprintable()
            pause_after(None, found, now=0.0)
    read_device_answer(one, REQUEST)
    poll(one)


# --- when to ask again ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("life", "renewed_after"),
    [
        (timedelta(hours=1), 3300.0),
        (timedelta(minutes=10), 540.0),
        (timedelta(minutes=50), 2700.0),
        (timedelta(seconds=10), 9.0),
    ],
)
def test_token_is_renewed_when_five_minutes_or_a_tenth_is_left(
    life: timedelta, renewed_after: float
) -> None:
    token = Token("t", 100.0, life)
    assert not token.is_due(100.0 + renewed_after - 0.1)
    assert token.is_due(100.0 + renewed_after)
    assert not token.is_over(100.0 + renewed_after)
    assert token.is_over(100.0 + life.total_seconds())


def waits(failures: list[TokenRefused | Unavailable]) -> list[float]:
    pause: Pause | None = None
    found = []
    for failure in failures:
        pause = pause_after(pause, failure, now=50.0)
        found.append(pause.until - 50.0)
    return found


REFUSED = TokenRefused("invalid_grant", "no")
DOWN = Unavailable("down")


def test_server_that_refuses_is_left_alone_for_minutes() -> None:
    assert waits([REFUSED] * 5) == [60.0, 300.0, 900.0, 900.0, 900.0]


def test_server_in_trouble_is_left_alone_for_seconds() -> None:
    assert waits([DOWN] * 6) == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def test_failure_of_another_kind_begins_anew() -> None:
    assert waits([DOWN, DOWN, REFUSED, DOWN]) == [5.0, 10.0, 60.0, 5.0]


def test_status_says_whether_a_person_is_needed() -> None:
    assert pause_after(None, REFUSED, now=0.0).status == "4.7.8"
    assert pause_after(None, DOWN, now=0.0).status == "4.7.0"


@pytest.mark.parametrize(
    ("retry_after", "date", "wait"),
    [
        ("120", "", 120.0),
        (" 7 ", "", 7.0),
        ("Sat, 28 Nov 2026 12:02:00 GMT", "", 120.0),
        ("Sat, 28 Nov 2026 12:02:00 GMT", "Sat, 28 Nov 2026 12:01:30 GMT", 30.0),
        ("3600", "", 3600.0),
        ("3601", "", 3600.0),
        ("99999999999", "", 3600.0),
        ("Sun, 28 Nov 2027 12:00:00 GMT", "", 3600.0),
    ],
)
def test_retry_after_is_obeyed(retry_after: str, date: str, wait: float) -> None:
    found = read(answer(429, retry_after=retry_after, date=date))
    assert isinstance(found, Unavailable)
    assert pause_after(None, found, now=0.0).until == wait


@pytest.mark.parametrize("retry_after", ["0", "4", "Sat, 28 Nov 2026 11:00:00 GMT"])
def test_retry_after_makes_no_pause_shorter(retry_after: str) -> None:
    found = read(answer(429, retry_after=retry_after))
    assert isinstance(found, Unavailable)
    assert waits([found] * 6) == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


@pytest.mark.parametrize("retry_after", ["", "soon", "-5", "1.5", "Sat, 99 Nov 2026 12:02:00 GMT"])
def test_retry_after_that_says_nothing_is_as_none(retry_after: str) -> None:
    assert read(answer(503, retry_after=retry_after)) == read(answer(503))


# --- the device code ------------------------------------------------------------------------------

CODE = DeviceCode(
    "device-1", "ABCD-EFGH", "https://login.example/device", "", timedelta(1), timedelta(seconds=5)
)


def poll(one: HttpAnswer, interval: float = 5.0) -> Granted | NotYet | TokenRefused:
    request = device_token_request(OWN, "", CODE)
    return read_poll_answer(one, request, CODE, timedelta(seconds=interval))


def test_code_is_asked_for_with_client_and_scope() -> None:
    source = TokenSource("own", Grant.REFRESH_TOKEN, URL, client_id="app-1", scope="a b")
    assert fields(device_request(source)) == {"client_id": "app-1", "scope": "a b"}


@pytest.mark.parametrize("key", ["verification_uri", "verification_url"])
def test_code_and_address_are_read(key: str) -> None:
    one = answer(
        device_code="device-1",
        user_code="ABCD-EFGH",
        expires_in=900,
        **{key: "https://login.example/device"},
    )
    assert read_device_answer(one, REQUEST) == DeviceCode(
        "device-1",
        "ABCD-EFGH",
        "https://login.example/device",
        "",
        timedelta(minutes=15),
        timedelta(seconds=5),
    )


def test_server_that_gives_no_code_says_why() -> None:
    found = read_device_answer(answer(400, error="invalid_client"), REQUEST)
    assert found == TokenRefused("invalid_client", "login.example gives no code: invalid_client")
    assert isinstance(read_device_answer(answer(500), REQUEST), Unavailable)
    assert isinstance(read_device_answer(answer(200, user_code="A"), REQUEST), Unavailable)


def test_poll_names_grant_code_and_client() -> None:
    assert fields(device_token_request(OWN, "s", CODE)) == {
        "grant_type": DEVICE_CODE_GRANT,
        "device_code": "device-1",
        "client_id": "app-1",
        "client_secret": "s",
    }


def test_poll_waits_longer_when_it_is_told_to() -> None:
    assert poll(answer(400, error="authorization_pending")) == NotYet(timedelta(seconds=5))
    assert poll(answer(400, error="slow_down")) == NotYet(timedelta(seconds=10))
    assert poll(HttpAnswer(502, b"")) == NotYet(timedelta(seconds=10))
    assert poll(HttpAnswer(502, b""), 50.0) == NotYet(timedelta(minutes=1))


@pytest.mark.parametrize("error", ["expired_token", "access_denied", "invalid_client"])
def test_poll_ends_with_a_refusal(error: str) -> None:
    found = poll(answer(400, error=error))
    assert isinstance(found, TokenRefused)
    assert found.error == error


def test_poll_ends_with_the_refresh_token() -> None:
    found = poll(answer(access_token="t", refresh_token="refresh-1", expires_in=60))
    assert found == Granted("t", timedelta(minutes=1), "refresh-1")
