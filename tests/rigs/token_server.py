"""An OAuth 2.0 token server of the tests' own, over TLS, with the grants that the relay asks for.

It knows the tokens it gave (`introspect`), lets them expire by its own clock, replaces refresh
tokens and refuses those that were used, and can fail in each way that a real one does: put a
`Failure` into `failures`, and the next requests get it. `requests` has what it was asked.

    /token        RFC 6749 §3.2
    /device       RFC 8628 §3.1; `agree` is what the person does at the page
    /introspect   RFC 7662, for a Dovecot, in clear on a port of its own
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from relay.sandbox.certificates import Authority, Kind, server_context

CLIENT_ID = "relay-app"
CLIENT_SECRET = "c1ient-5ecret~Q8~with.marks"


@dataclass(frozen=True)
class Failure:
    """An answer in the place of the true one. `seconds`: before it comes."""

    status: int = 500
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class _Given:
    expires: float
    user: str


class TokenServer:
    """`lives`: seconds that an access token counts; `says`: the expires_in it is given with, None
    for the truth. `rotates`: each refresh token counts once. `clock_is_ahead`: seconds.
    """

    def __init__(
        self,
        authority: Authority,
        *,
        name: str = "login.test.example",
        address: str = "127.0.0.1",
        kind: Kind = Kind.GOOD,
        user: str = "relay@test.example",
    ) -> None:
        self.name = name
        self.address = address
        self.user = user
        self.lives = 3600.0
        self.says: int | None = None
        self.rotates = True
        self.clock_is_ahead = 0.0
        self.failures: list[Failure] = []
        self.requests: list[dict[str, str]] = []
        self.given: dict[str, _Given] = {}
        self.refresh_tokens: set[str] = {"refresh-token-number-0-of-the-tests"}
        self.key: rsa.RSAPrivateKey | None = None
        self.port = self.plain_port = 0
        self.answered = asyncio.Event()
        self._numbers = itertools.count(1)
        self._agreed = False
        self._context = server_context(authority.leaf(name, kind))
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"https://{self.name}:{self.port}/token"

    @property
    def device_url(self) -> str:
        return f"https://{self.name}:{self.port}/device"

    @property
    def introspection_url(self) -> str:
        return f"http://{self.address}:{self.plain_port}/introspect"

    @property
    def secrets(self) -> list[str]:
        """Everything that nobody may see in a log."""
        return [CLIENT_SECRET, *self.given, *self.refresh_tokens]

    def agree(self) -> None:
        """A person types the code in and agrees."""
        self._agreed = True

    def expire_all(self) -> None:
        """No access token counts any more, whatever was said."""
        for one in self.given.values():
            one.expires = 0.0

    def revoke_all(self) -> None:
        """The account was locked, or the consent withdrawn."""
        self.expire_all()
        self.refresh_tokens.clear()

    def is_live(self, token: str) -> bool:
        found = self.given.get(token)
        return found is not None and found.expires > time.monotonic()

    async def __aenter__(self) -> TokenServer:
        app = web.Application()
        app.router.add_post("/token", self._token)
        app.router.add_post("/device", self._device)
        app.router.add_post("/introspect", self._introspect)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        secure = web.TCPSite(self._runner, self.address, self.port, ssl_context=self._context)
        plain = web.TCPSite(self._runner, self.address, 0)
        await secure.start()
        await plain.start()
        self.port, self.plain_port = (each[1] for each in self._runner.addresses)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    # --- answers ----------------------------------------------------------------------------------

    async def _token(self, request: web.Request) -> web.Response:
        asked = {name: str(value) for name, value in (await request.post()).items()}
        self.requests.append(asked)
        if self.failures:
            failure = self.failures.pop(0)
            await asyncio.sleep(failure.seconds)
            return web.Response(
                status=failure.status, body=failure.body, headers=dict(failure.headers)
            )
        answer = self._judged(asked)
        self.answered.set()
        return answer

    def _judged(self, asked: dict[str, str]) -> web.Response:
        match asked.get("grant_type"):
            case "client_credentials":
                if (asked.get("client_id"), asked.get("client_secret")) != (
                    CLIENT_ID,
                    CLIENT_SECRET,
                ):
                    return _error("invalid_client", f"not {asked.get('client_secret')}")
                return self._grant()
            case "refresh_token":
                token = asked.get("refresh_token", "")
                if token not in self.refresh_tokens:
                    return _error("invalid_grant", f"{token} was revoked")
                if self.rotates:
                    self.refresh_tokens.discard(token)
                return self._grant(refreshes=True)
            case "urn:ietf:params:oauth:grant-type:jwt-bearer":
                return self._service_account(asked.get("assertion", ""))
            case "urn:ietf:params:oauth:grant-type:device_code":
                if not self._agreed:
                    return _error("authorization_pending")
                return self._grant(refreshes=True)
        return _error("unsupported_grant_type")

    def _grant(self, *, refreshes: bool = False) -> web.Response:
        number = next(self._numbers)
        token = f"access-token-number-{number}-{'x' * 900}"
        self.given[token] = _Given(time.monotonic() + self.lives, self.user)
        said: dict[str, Any] = {
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": round(self.lives) if self.says is None else self.says,
        }
        if refreshes and self.rotates:
            said["refresh_token"] = f"refresh-token-number-{number}-of-the-tests"
            self.refresh_tokens.add(said["refresh_token"])
        return web.json_response(said)

    def _service_account(self, assertion: str) -> web.Response:
        """RFC 7523 §3: who signed it, for whom, and when."""
        assert self.key is not None
        signed, _, signature = assertion.rpartition(".")
        self.key.public_key().verify(
            _unpadded(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256()
        )
        claims = json.loads(_unpadded(signed.split(".")[1]))
        now = time.time() + self.clock_is_ahead
        if not claims["iat"] - 60 <= now < claims["exp"] or claims["aud"] != self.url:
            return _error("invalid_grant", "Invalid JWT: reasonable timeframe")
        self.user = claims["sub"]
        return self._grant()

    async def _device(self, request: web.Request) -> web.Response:
        self.requests.append({name: str(value) for name, value in (await request.post()).items()})
        return web.json_response(
            {
                "device_code": "device-code-of-the-tests",
                "user_code": "WDJB-MJHT",
                "verification_uri": f"https://{self.name}/activate",
                "expires_in": 60,
                "interval": 1,
            }
        )

    async def _introspect(self, request: web.Request) -> web.Response:
        token = str((await request.post()).get("token", ""))
        if not self.is_live(token):
            return web.json_response({"active": False})
        return web.json_response({"active": True, "username": self.given[token].user})


def service_key(server: TokenServer) -> str:
    """The file of a service account's key, which the server knows from now on."""
    server.key = rsa.generate_private_key(65537, 2048)
    pem = server.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return json.dumps(
        {
            "type": "service_account",
            "client_email": "relay@project.example",
            "private_key": pem,
            "private_key_id": "key-of-the-tests",
            "token_uri": server.url,
        }
    )


def _unpadded(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _error(error: str, description: str = "") -> web.Response:
    return web.json_response({"error": error, "error_description": description}, status=400)
