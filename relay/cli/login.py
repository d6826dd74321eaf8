"""`relay login`: gets a refresh token with a code that a person types in (RFC 8628)."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NoReturn

import click

from relay.cli.common import config_file, config_option, fail, load_config, not_empty
from relay.mail.printable import printable

if TYPE_CHECKING:
    from relay.config import Config
    from relay.deliver.https import NoAnswer
    from relay.deliver.tokens import TokenClient
    from relay.route.next_hop import TokenSource
    from relay.route.oauth2 import DeviceCode, TokenRequest
    from relay.route.token import Granted, TokenRefused

_LOCK_SECONDS = 30.0
_SCOPE_CURE = (
    "check scope; Google gives none for Gmail by device code: use the grant service_account, a"
    " refresh token made elsewhere, or an app password (docs/routes.md)"
)


@click.command()
@click.argument("name", metavar="NAME", callback=not_empty)
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
    refresh token; Microsoft wants offline_access in it. Google gives no scope for Gmail by device
    code: docs/routes.md says what to use instead.
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
    from relay.route.token import Granted

    code = await _code(client, source)
    click.echo(f"Open {code.uri} and type in the code {code.user_code}")
    if code.complete_uri:
        click.echo(f"or open {code.complete_uri}")
    found = await _result(client, source, secret, code)
    if not isinstance(found, Granted):
        _refused(source, found)
    if not found.refresh_token:
        _fail(source, "the server gave no refresh token; does the scope have offline_access?")
    return found.refresh_token


async def _result(
    client: TokenClient, source: TokenSource, secret: str, code: DeviceCode
) -> Granted | TokenRefused:
    """Ask the server until it has an answer, or the code has expired (RFC 8628 §3.5)."""
    from relay.deliver.https import NoAnswer
    from relay.route.oauth2 import HttpAnswer, NotYet, device_token_request, read_poll_answer
    from relay.route.token import TokenRefused

    request = device_token_request(source, secret, code)
    ends = time.monotonic() + code.life.total_seconds()
    interval = code.interval
    while time.monotonic() < ends:
        await asyncio.sleep(interval.total_seconds())
        answer = await client.post(request)
        if isinstance(answer, NoAnswer):
            click.echo(f"no answer: {_no_answer(answer, request)}", err=True)
            answer = HttpAnswer(503, b"")  # it says nothing, so the server is asked again
        found = read_poll_answer(answer, request, code, interval)
        if not isinstance(found, NotYet):
            return found
        interval = found.interval
    return TokenRefused("expired_token", "the code was not typed in in time; start again")


async def _code(client: TokenClient, source: TokenSource) -> DeviceCode:
    from relay.deliver.https import NoAnswer
    from relay.route.oauth2 import DeviceCode, device_request, read_device_answer
    from relay.route.token import TokenRefused

    request = device_request(source)
    answer = await client.post(request)
    if isinstance(answer, NoAnswer):
        _fail(source, f"the server is not reached: {_no_answer(answer, request)}")
    found = read_device_answer(answer, request)
    if isinstance(found, TokenRefused):
        _refused(source, found)
    if not isinstance(found, DeviceCode):
        _fail(source, found.reason)
    return found


def _no_answer(found: NoAnswer, request: TokenRequest) -> str:
    """Why there is no answer, without secrets, and what a person can do about it."""
    return f"{printable(request.secrets.masked(found.reason))}; {_cure(found)}"


def _cure(found: NoAnswer) -> str:
    from relay.route.addresses import parse_address

    if found.is_untrusted:
        return "if an authority of your own made its certificate, name that in tls.ca_file"
    # `login.example: 10.1.2.3 is private (RFC 1918)`: an address that the relay does not use.
    _, _, told = found.reason.partition(": ")
    address, _, rejected = told.partition(" is ")
    if rejected and parse_address(address) is not None:
        return f"if the server is yours, add {address} to delivery.allow_networks"
    return "check device_url and token_url, the DNS and the firewall of this machine"


def _refused(source: TokenSource, found: TokenRefused) -> NoReturn:
    if found.error != "invalid_scope":
        _fail(source, found.reason)
    _fail(source, f"{found.reason}; {_SCOPE_CURE}")


def _fail(source: TokenSource, words: str) -> NoReturn:
    fail(f"oauth2.{source.name}: {printable(words)}")
