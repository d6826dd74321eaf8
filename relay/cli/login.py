"""`relay login`: gets a refresh token with a code that a person types in (RFC 8628)."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NoReturn

import click

from relay.cli.common import config_file, config_option, fail, load_config, printable

if TYPE_CHECKING:
    from relay.config import Config
    from relay.deliver.tokens import TokenClient
    from relay.route.next_hop import TokenSource
    from relay.route.oauth2 import DeviceCode, Granted, HttpAnswer, Refused, TokenRequest

__all__ = ["login"]

_LOCK_SECONDS = 30.0


@click.command()
@click.argument("name", metavar="NAME")
@config_option
@click.pass_context
def login(ctx: click.Context, /, name: str) -> None:
    """Log in for oauth2.NAME: print an address and a code, and wait until somebody typed it in.

    Open the address in a browser on any machine, log in as the mailbox that the relay sends from,
    and type in the code. The refresh token that the server then gives is written to
    refresh_token_file; only the owner of its directory, which is the relay's user, may read it. A
    relay that runs asks for access tokens with it at once, also for mail that waits. Reload the
    relay if a host has refused the login meanwhile, so that it does not rest any longer.

    The grant of oauth2.NAME has to be refresh_token, with a device_url. The scope has to allow a
    refresh token; Microsoft wants offline_access in it.
    """
    config = load_config(config_file(ctx))
    source = _source(config, name)
    asyncio.run(_login(config, source))


def _source(config: Config, name: str) -> TokenSource:
    from relay.route.next_hop import Grant

    source = config.oauth2.get(name)
    if source is None:
        names = ", ".join(map(printable, config.oauth2)) or "nothing"
        fail(f"oauth2 has no {printable(name)}; it has {names}")
    if source.grant is not Grant.REFRESH_TOKEN:
        fail(f"oauth2.{name}: nobody logs in for {source.grant}; grant has to be refresh_token")
    for key in ("device_url", "token_url", "client_id", "refresh_token_file"):
        if getattr(source, key) is None:
            fail(f"oauth2.{name}: {key} is missing")
    return source


async def _login(config: Config, source: TokenSource) -> None:
    from relay.cli.token_server import asking
    from relay.route.secret_files import SecretFileError, locked, read_line, replace_secret, reserve

    path = source.refresh_token_file
    assert path is not None
    try:
        reserve(path)  # before somebody types a code in for nothing
        secret = read_line(source.client_secret_file) if source.client_secret_file else ""
        async with asking(config) as asked:
            token = await _refresh_token(asked.client, source, secret)
        async with locked(path, seconds=_LOCK_SECONDS):
            replace_secret(path, token)
    except SecretFileError as error:
        fail(f"oauth2.{source.name}: {error}")
    except TimeoutError:
        fail(f"oauth2.{source.name}: a relay holds the lock of {path}; try again")
    click.echo(f"done: the refresh token is in {path}")


async def _refresh_token(client: TokenClient, source: TokenSource, secret: str) -> str:
    """The token, once somebody has agreed."""
    from relay.route.oauth2 import Granted

    code = await _code(client, source)
    click.echo(f"Open {code.uri} and type in the code {code.user_code}")
    if code.complete_uri:
        click.echo(f"or open {code.complete_uri}")
    found = await _result(client, source, secret, code)
    if not isinstance(found, Granted):
        _fail(source, found.reason)
    if not found.refresh_token:
        _fail(source, "the server gave no refresh token; does the scope have offline_access?")
    return found.refresh_token


async def _result(
    client: TokenClient, source: TokenSource, secret: str, code: DeviceCode
) -> Granted | Refused:
    """Ask the server until it has an answer, or the code has expired (RFC 8628 §3.5)."""
    from relay.route.oauth2 import NotYet, Refused, device_token_request, read_poll_answer

    request = device_token_request(source, secret, code)
    ends = time.monotonic() + code.life.total_seconds()
    interval = code.interval
    while time.monotonic() < ends:
        await asyncio.sleep(interval.total_seconds())
        found = read_poll_answer(await _post(client, request), request, code, interval)
        if not isinstance(found, NotYet):
            return found
        interval = found.interval
    return Refused("expired_token", "the code was not typed in in time; start again")


async def _code(client: TokenClient, source: TokenSource) -> DeviceCode:
    from relay.route.oauth2 import DeviceCode, device_request, read_device_answer

    request = device_request(source)
    found = read_device_answer(await _post(client, request), request)
    if not isinstance(found, DeviceCode):
        _fail(source, found.reason)
    return found


async def _post(client: TokenClient, request: TokenRequest) -> HttpAnswer:
    """The answer; one that says nothing where there is none."""
    from relay.deliver.https import NoAnswer
    from relay.route.oauth2 import HttpAnswer

    found = await client.post(request)
    if isinstance(found, NoAnswer):
        click.echo(f"no answer: {printable(request.secrets.masked(found.reason))}", err=True)
        return HttpAnswer(503, b"")
    return found


def _fail(source: TokenSource, words: str) -> NoReturn:
    fail(f"oauth2.{source.name}: {printable(words)}")
