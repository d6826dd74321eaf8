"""The checks of every request to the page, before a page is made.

    host      the Host field has a name of this relay. Otherwise 421: a page of another site can
              make its own name lead to this address (DNS rebinding)
    clear     plain HTTP is for clients on this machine, unless `admin.web.insecure`
    user      the cookie of a session, or the name that a proxy sends; else the login form
    role      only an operator may use verbs
    token     a form has the token of its session; `relay.api` has checked which site it is from

Wrong passwords count together with those at the listeners (`relay.submit.secrets`). The answer to
a login is the same, whether the name or the password is wrong.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from aiohttp import web

from relay.mail.ip import canonical, unmapped
from relay.submit.secrets import SecretChecker, SecretVerdict, log_refused
from relay.web.options import Role, WebUser
from relay.web.sessions import PageSession, Sessions
from relay.web.state import Web

log = logging.getLogger("relay.page")

_LONGEST_NAME = 100
_LONGEST_PASSWORD = 1024


class PageRefused(Exception):
    """There is no page: the status, and a sentence for the person who asked."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class SignedInUser(NamedTuple):
    """A user who is signed in. `session` None: a proxy named the user."""

    user: WebUser
    session: PageSession | None
    form_token: str

    @property
    def is_operator(self) -> bool:
        """Whether the visitor may change the queue."""
        return self.user.role is Role.OPERATOR


@dataclass
class Guard:
    """Checks requests."""

    state: Web

    def __post_init__(self) -> None:
        self.sessions = Sessions()
        self._secrets = SecretChecker(self.state.failures, clock=self.state.clock)
        self._secret = secrets.token_bytes(32)

    def close(self) -> None:
        """End the threads."""
        self._secrets.close()

    # --- each request -------------------------------------------------------------------------

    def check_way(self, request: web.Request) -> None:
        """Check host and TLS. `PageRefused` where the page must not be shown."""
        if _host_of(request.headers.get("Host", "")) not in self._hosts:
            raise PageRefused(
                421,
                "This relay is not known under the name in the address. "
                "Name it under admin.web.hosts if it is one of its own.",
            )
        if is_readable_on_the_way(request) and not self.state.options().insecure:
            raise PageRefused(
                403,
                "The page is shown over HTTPS only, except on the machine itself: "
                "give the relay an admin.certificate.",
            )

    @property
    def _hosts(self) -> frozenset[str]:
        named = (_without_brackets(name.lower()) for name in self.state.options().hosts)
        return self._own_hosts | frozenset(named)

    @cached_property
    def _own_hosts(self) -> frozenset[str]:
        return frozenset({"localhost", "127.0.0.1", "::1", self.state.hostname.lower()})

    def visitor(self, request: web.Request) -> SignedInUser | None:
        """The user of a request; None where nobody is signed in."""
        options = self.state.options()
        if (name := self._named_by_proxy(request)) is not None:
            user = options.users.get(name)
            return None if user is None else SignedInUser(user, None, self._token_of(name))
        token = request.cookies.get(cookie_name(request), "")
        session = self.sessions.find(token, self.state.clock()) if token else None
        if session is None:
            return None
        user = options.users.get(session.user)
        if user is None or (user.password or "") != session.password:
            self.sessions.end(token)
            return None
        return SignedInUser(user, session, session.form_token)

    def _named_by_proxy(self, request: web.Request) -> str | None:
        options = self.state.options()
        if options.proxy_header is None or options.proxy_header not in request.headers:
            return None
        try:
            address = unmapped(ipaddress.ip_address(request.remote or ""))
        except ValueError:
            return None
        is_proxy = any(address in network for network in options.proxy_networks)
        return request.headers[options.proxy_header] if is_proxy else None

    def _token_of(self, name: str) -> str:
        return hmac.new(self._secret, name.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def check_form(self, visitor: SignedInUser, form: Mapping[str, str]) -> None:
        """Check a form that changes something: token of the session, and role."""
        sent = form.get("token", "").encode("utf-8", "replace")
        if not hmac.compare_digest(visitor.form_token.encode(), sent):
            raise PageRefused(403, "This form is out of date: open the page again.")
        if not visitor.is_operator:
            raise PageRefused(403, f"{visitor.user.name} may look and not change: ask an operator.")

    # --- login --------------------------------------------------------------------------------

    async def sign_in(self, request: web.Request, name: str, password: str) -> str | None:
        """The token of a new session; None where name or password is wrong, or has to wait."""
        if len(name) > _LONGEST_NAME or len(password) > _LONGEST_PASSWORD:
            return None
        client = canonical(request.remote or "")
        user = self.state.options().users.get(name)
        known = user.password if user is not None else None
        octets = password.encode("utf-8", "surrogatepass")
        verdict = await self._secrets.judge_user(octets, known, client=client, name=name)
        if user is None or verdict is not SecretVerdict.RIGHT:
            log_refused(log, verdict, client=client, service="page", user=name)
            return None
        log.info("page: %s signed in from %s", name, client)
        return self.sessions.begin(user, self.state.clock())


def is_tls(request: web.Request) -> bool:
    """Whether the request came to the relay over TLS."""
    transport = request.transport
    return transport is not None and transport.get_extra_info("ssl_object") is not None


def is_readable_on_the_way(request: web.Request) -> bool:
    """Whether others can read the traffic between the browser and the relay."""
    return not is_tls(request) and not _is_loopback(request)


def cookie_name(request: web.Request) -> str:
    """The name of the cookie. A browser accepts `__Host-` only over TLS, for this host alone."""
    return "__Host-relay" if is_tls(request) else "relay"


def _is_loopback(request: web.Request) -> bool:
    try:
        return unmapped(ipaddress.ip_address(request.remote or "")).is_loopback
    except ValueError:
        return False


def _host_of(field: str) -> str:
    """The name in a Host field, without port and brackets."""
    name = field.lower()
    if name.startswith("["):
        return _without_brackets(name.partition("]")[0] + "]")
    return name.partition(":")[0]


def _without_brackets(name: str) -> str:
    return name.removeprefix("[").removesuffix("]")
