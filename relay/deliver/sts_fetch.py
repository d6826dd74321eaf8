"""Fetches an MTA-STS policy from the web server of its domain (RFC 8461 §3.3). †

Only 200 with text/plain counts. What is asked of the server, and how many are asked at a time, is
the matter of `relay.deliver.https`.
"""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
from yarl import URL

from relay.deliver.https import HttpsClient, NoAnswer
from relay.route.mta_sts import (
    MAX_POLICY_BYTES,
    InvalidPolicy,
    Policy,
    PolicyError,
    parse_policy,
    policy_host,
)

AT_ONCE = 20
_PATH = "/.well-known/mta-sts.txt"
_HEADERS = {"Accept": "text/plain", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Fetched:
    """A policy, and the text it was read from."""

    policy: Policy
    body: bytes


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """Why there is none. `reason`: a sentence for a person."""

    error: PolicyError
    reason: str


class PolicyFetcher:
    """Fetches policies over HTTPS."""

    def __init__(self, https: HttpsClient) -> None:
        self._https = https

    async def fetch(self, domain: str) -> Fetched | FetchFailed:
        """The policy of a domain as its server has it now. Raises nothing that a server could
        cause.
        """
        host = policy_host(domain)
        url = URL.build(scheme="https", host=host, path=_PATH)
        found = await self._https.ask(url, _read, headers=_HEADERS)
        if isinstance(found, NoAnswer):
            error = PolicyError.CERTIFICATE if found.is_untrusted else PolicyError.FETCH
            return FetchFailed(error, found.reason)
        return found


async def _read(answer: aiohttp.ClientResponse) -> Fetched | FetchFailed:
    host = answer.url.host
    if answer.status != 200:
        return FetchFailed(PolicyError.FETCH, f"{host} answers with status {answer.status}")
    try:
        return await _read_policy(answer)
    except InvalidPolicy as exc:
        return FetchFailed(PolicyError.INVALID, f"{host}: {exc}")


async def _read_policy(answer: aiohttp.ClientResponse) -> Fetched:
    if answer.content_type != "text/plain":
        raise InvalidPolicy(f"the policy is {answer.content_type}, not text/plain")
    body = b""
    async for piece in answer.content.iter_any():
        body += piece
        if len(body) > MAX_POLICY_BYTES:
            break  # `parse_policy` says what is wrong with it
    return Fetched(parse_policy(body), body)
