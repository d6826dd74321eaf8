"""What a reload takes over, and what waits for a restart."""

from __future__ import annotations

import pytest

from relay.config import Config, read
from relay.config.reload import changes

OLD = "hostname: a.example\npolicy: {domains: {x.example: {require_tls: true}}}\nqueue: {path: a}\n"
HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$RdescudvJCsgt3ub+b4dWRWJTmaaOBGJ"


def config_of(text: str) -> Config:
    return read(text, {}, source="relay.yaml")


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (OLD, "no key changed"),
        (OLD.replace("true", "false"), "changed: policy.domains.x.example.require_tls"),
        (
            OLD.replace("x.example", "y.example"),
            "changed: policy.domains.x.example, policy.domains.y.example",
        ),
        (OLD.replace("path: a", "path: b"), "no key changed; only after a restart: queue.path"),
        (
            f"{OLD}access: {{networks: [10.0.0.0/8], users: {{u: {{password: '{HASH}'}}}}}}\n"
            "workers: 1\n",
            "changed: access.networks, access.users.u",
        ),
        (
            f"{OLD}routes: {{'*': {{host: b.example}}}}\ndelivery: {{port: 26}}",
            "restart: delivery.port",
        ),
    ],
)
def test_a_reload_tells_which_keys_changed(new: str, said: str) -> None:
    assert said in str(changes(config_of(OLD), config_of(new)))


def test_a_changed_password_is_noticed_and_not_told() -> None:
    text = OLD + "access: {users: {u: {password: '%s'}}}"
    other = HASH.replace("c29t", "d29t")
    told = str(changes(config_of(text % HASH), config_of(text % other)))
    assert told == "changed: access.users.u.password"
