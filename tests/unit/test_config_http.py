"""What the file says of the HTTP interface."""

from __future__ import annotations

import pytest

from relay.config import Config, ConfigError, as_document, read
from relay.config.reload import changes, taken_over

HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaaOBGJ"


def config_of(admin: str) -> Config:
    return read(f"hostname: relay.example.net\nadmin: {admin}\n", {}, source="relay.yaml")


@pytest.mark.parametrize(
    ("admin", "serves"),
    [
        ("{api_keys: [k]}", True),
        (f"{{api_keys: ['{HASH}', other]}}", True),
        ("{}", False),
        ("{http: '', api_keys: [k]}", False),
        ("{http: null, api_keys: [k]}", False),
    ],
)
def test_api_is_served_once_there_is_a_key(admin: str, serves: bool) -> None:
    assert config_of(admin).admin.serves_http is serves


@pytest.mark.parametrize(
    ("admin", "key"),
    [
        ("{api_keys: ['']}", "admin.api_keys.0"),
        ("{api_keys: ['two words']}", "admin.api_keys.0"),
        ("{api_keys: ['$argon2id$broken']}", "admin.api_keys.0"),
        ("{domains: ['*.example.com']}", "admin.domains.0"),
        ("{http: '0.0.0.0:8025'}", "admin.http"),
        ("{certificate: /nowhere.pem}", "admin.certificate"),
        ("{key: /nowhere.pem}", "admin.key"),
        ("{webhook_signing_key: 'a b'}", "admin.webhook_signing_key"),
    ],
)
def test_invalid_option_of_the_api_is_named(admin: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(admin)
    assert [mistake.key for mistake in caught.value.mistakes] == [key]


def test_keys_are_not_shown() -> None:
    config = config_of("{api_keys: [secret-key], webhook_signing_key: secret-too}")
    assert "secret" not in str(as_document(config)) + repr(config)


def test_keys_and_domains_are_taken_over_by_a_reload_and_the_address_is_not() -> None:
    old, new = (
        config_of("{api_keys: [a]}"),
        config_of("{api_keys: [b], domains: [b.example], http: '127.0.0.1:1'}"),
    )
    said = str(changes(old, new))
    assert said == "changed: admin.api_keys, admin.domains; only after a restart: admin.http"
    assert taken_over(old, new).admin.api_keys == ("b",)
    assert taken_over(old, new).admin.http == "127.0.0.1:8025"
