"""`relay login`: what it says where there is no code."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from relay.cli import relay
from relay.sandbox.certificates import Authority
from tests.rigs.ports import free_port
from tests.rigs.token_server import Failure, TokenServer


async def said(directory: Path, url: str, **sections: object) -> str:
    """The error of a login that asks `url` for a code."""
    source = {
        "grant": "refresh_token",
        "token_url": url,
        "device_url": url,
        "client_id": "an-app",
        "refresh_token_file": str(directory / "own.token"),
    }
    config = {"hostname": "relay.example.net", "oauth2": {"own": source}, **sections}
    (directory / "relay.yaml").write_text(yaml.safe_dump(config))
    command = ["login", "own", "-c", str(directory / "relay.yaml")]

    def call() -> Result:
        return CliRunner().invoke(relay, command, prog_name="relay")

    result = await asyncio.to_thread(call)
    gc.collect()  # a connection that was not closed is of this test
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr.partition("oauth2.own: the server")[2] or result.stderr


OPEN = {"allow_networks": ["127.0.0.0/8"]}


async def test_login_where_the_server_is_in_a_network_not_allowed_names_the_key(tmp_path):
    told = await said(tmp_path, "https://127.0.0.1:9/device")
    assert told.count("\n") == 1
    assert "127.0.0.1 is loopback" in told
    assert told.endswith("add 127.0.0.1 to delivery.allow_networks\n")


async def test_login_where_nothing_listens_says_only_that(tmp_path):
    url = f"https://127.0.0.1:{free_port('127.0.0.1')}/device"
    told = await said(tmp_path, url, delivery=OPEN)
    assert told.startswith(" is not reached: ")
    assert "Connect call failed" in told
    assert told.endswith("the firewall of this machine\n")
    assert "503" not in told


async def test_login_where_the_authority_is_unknown_names_the_key(tmp_path):
    async with TokenServer(Authority(), name="localhost") as server:
        told = await said(tmp_path, server.device_url, delivery=OPEN)
    assert "certificate" in told.lower()
    assert told.endswith("name that in tls.ca_file\n")
    assert "503" not in told


@pytest.mark.parametrize("error", ["invalid_scope", "invalid_client"])
async def test_login_with_a_scope_that_is_refused_says_what_google_gives(tmp_path, error):
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.ca_pem)
    async with TokenServer(authority, name="localhost") as server:
        server.failures.append(Failure(400, f'{{"error": "{error}"}}'.encode()))
        tls = {"ca_file": str(tmp_path / "ca.pem")}
        told = await said(tmp_path, server.url, delivery=OPEN, tls=tls)
    assert f"localhost gives no code: {error}" in told
    assert ("service_account" in told) is (error == "invalid_scope")
