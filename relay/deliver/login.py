"""Logs in at a next hop, once a session is in verified TLS. †

A token that was at hand may have expired or been revoked, which only the host knows: where it
answers 535, another token is fetched, and AUTH is said once more. A password, or a token that was
fetched for this attempt, is not tried again: the login rests (`relay.route.credentials`).

    reply to AUTH            what follows
    2yz                      the message goes
    535, token was at hand   another token; AUTH again, over a new connection if this one is gone
    5yz                      the mail waits, 4.7.8 for 535; the login rests
    4yz, no reply            the mail waits; the next host is tried
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from relay.deliver.connection import Connection
from relay.deliver.diagnosis import Answer, Stage, shown
from relay.deliver.dialogue import SessionBroken
from relay.mail.reply import Reply
from relay.route.credentials import CredentialsError
from relay.route.next_hop import Credentials, Host, NextHop


class Logins(Protocol):
    """`relay.route.credentials.RouteCredentials`, as far as a session needs it."""

    def rest(self, hop: NextHop, credentials: Credentials, host: str) -> str: ...

    def turn(
        self, hop: NextHop, credentials: Credentials, host: str
    ) -> AbstractAsyncContextManager[None]: ...

    async def anew(self, hop: NextHop, refused: Credentials) -> Credentials: ...

    def accepted(self, hop: NextHop, credentials: Credentials, host: str) -> None: ...

    def refused(self, hop: NextHop, credentials: Credentials, host: str, words: str) -> None: ...


def why_not_now(host: Host, logins: Logins | None) -> Answer | None:
    """Why the host is not connected to: its login rests."""
    if logins is None or host.hop is None or host.credentials is None:
        return None
    words = logins.rest(host.hop, host.credentials, host.name)
    return Answer(Stage.AUTH, None, words, ours=True, status="4.7.8") if words else None


async def log_in(connection: Connection, logins: Logins | None) -> Credentials | None:
    """Log in if the next hop wants it. Returns the credentials for a new connection where this one
    ended before they could be tried, None where the session may go on. Raises `SessionBroken`.
    """
    host = connection.host
    if host.credentials is None:
        return None
    if logins is None or host.hop is None:
        _judge(connection, await connection.authenticate(host.credentials))
        return None
    try:
        async with logins.turn(host.hop, host.credentials, host.name):
            return await _in_turn(connection, host.hop, host.credentials, logins)
    except CredentialsError as error:
        connection.quit()
        answer = Answer(Stage.AUTH, None, str(error), ours=True, status=error.status)
        raise SessionBroken(answer) from error


async def _in_turn(
    connection: Connection, hop: NextHop, credentials: Credentials, logins: Logins
) -> Credentials | None:
    host = connection.host
    reply = await connection.authenticate(credentials)
    if reply.code == 535 and credentials.token is not None and not credentials.is_fresh:
        credentials = await logins.anew(hop, credentials)
        try:
            reply = await connection.authenticate(credentials)
        except SessionBroken as broken:
            if broken.answer.reply is None:  # a host that hangs up after 535
                return credentials
            raise
    if 500 <= reply.code < 600:
        words = f"{host.name} [{host.address}] refuses the login: {reply.code} {shown(reply)}"
        logins.refused(hop, credentials, host.name, words)
    elif 200 <= reply.code < 300:
        logins.accepted(hop, credentials, host.name)
    _judge(connection, reply)
    return None


def _judge(connection: Connection, reply: Reply) -> None:
    if not 200 <= reply.code < 300:
        connection.quit()
        raise SessionBroken(Answer(Stage.AUTH, reply))
