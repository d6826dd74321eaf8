"""The settings of sender domains, which are in force from the next message on."""

from __future__ import annotations

import logging

from aiohttp import web

from relay.api.forms import read_form
from relay.api.mailgun_domains import as_connection, as_domain, as_updated, read_settings
from relay.api.state import Api, answer, sender_domain
from relay.policy.rules import effective
from relay.queue.api_state import DomainSettings

log = logging.getLogger(__name__)


async def get_connection(api: Api, request: web.Request) -> web.Response:
    """The settings in effect for mail from a domain."""
    return answer(as_connection(effective(api.rules(), sender_domain(api, request))))


async def set_connection(api: Api, request: web.Request) -> web.Response:
    """Set one or both settings."""
    domain = sender_domain(api, request)
    await _set(api, domain, read_settings(await read_form(request), needed=True))
    return answer(as_updated(effective(api.rules(), domain)))


async def get_domain(api: Api, request: web.Request) -> web.Response:
    """One domain."""
    return _one(api, sender_domain(api, request))


async def set_domain(api: Api, request: web.Request) -> web.Response:
    """Set one or both settings, at Mailgun's newer path."""
    domain = sender_domain(api, request)
    await _set(api, domain, read_settings(await read_form(request), needed=False))
    return _one(api, domain, message="Domain has been updated")


async def list_domains(api: Api, request: web.Request) -> web.Response:
    """The domains that may send, or that have a rule in the configuration or a setting."""
    rules = api.rules()
    known = {*api.options().domains, *api.settings.domains}
    known |= {name for name in rules.domains if not name.startswith("*.")}
    items = [as_domain(name, effective(rules, name)) for name in sorted(known)]
    return answer({"total_count": len(items), "items": items})


async def _set(api: Api, domain: str, settings: DomainSettings) -> None:
    if settings != DomainSettings():
        await api.settings.set(domain, settings)
        log.info(
            "%s: set over HTTP: require_tls %s, skip_verification %s",
            domain,
            settings.require_tls,
            settings.skip_verification,
        )


def _one(api: Api, domain: str, *, message: str = "") -> web.Response:
    values = {"domain": as_domain(domain, effective(api.rules(), domain))}
    extra = {"message": message} if message else {}
    return answer({**extra, **values, "receiving_dns_records": [], "sending_dns_records": []})
