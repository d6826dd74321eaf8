"""The rules in force, and what they mean for a message."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import web

from relay.mail.address import AddressError, domain_of, typed_address
from relay.mail.jsontext import JsonFields
from relay.policy.fields import Wishes
from relay.web.pages.visit import Visit
from relay.web.state import Web


async def policy(visit: Visit) -> web.StreamResponse:
    """The rules in force, and what they mean for the message of the form."""
    state = visit.state
    asked = {name: visit.query.get(name, "").strip() for name in _EXPLAIN_FIELDS}
    explained, trouble = None, ""
    if asked["to"]:
        try:
            explained = await _explain(state, asked)
        except AddressError as error:
            trouble = f"The address cannot be read: {error}."
        except TimeoutError:
            trouble = "The name servers did not answer in time."
    return visit.show(
        "policy.html",
        rules=state.rules(),
        locations=state.locations(),
        last_reload=state.last_reload(),
        asked=asked,
        explained=explained,
        trouble=trouble,
    )


_QUESTION_SECONDS = 20

_EXPLAIN_FIELDS = ("from", "to", "require", "skip", "requiretls", "no")

_TRUTHS = {"yes": True, "no": False}


async def _explain(state: Web, asked: Mapping[str, str]) -> JsonFields:
    recipient = typed_address(asked["to"])
    if not domain_of(recipient):
        raise AddressError("it has no domain")
    wishes = Wishes(_TRUTHS.get(asked["require"]), _TRUTHS.get(asked["skip"]))
    async with asyncio.timeout(_QUESTION_SECONDS):
        return await state.operator.running().explain(
            typed_address(asked["from"]),
            recipient,
            wishes,
            requiretls=asked["requiretls"] == "yes",
            tls_required_no=asked["no"] == "yes",
        )
