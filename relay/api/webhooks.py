"""Lists and changes the webhooks of a domain."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from aiohttp import web

from relay.api.forms import read_form
from relay.api.mailgun_form import ApiError, Form
from relay.api.state import Api, answer, sender_domain
from relay.report import webhook

_MOST_URLS = 3


async def list_all(api: Api, request: web.Request) -> web.Response:
    """All webhooks of a domain, by name."""
    domain = sender_domain(api, request)
    return answer(
        {
            "webhooks": {
                name: {"urls": list(urls)} for name, urls in (await _of(api, domain)).items()
            }
        }
    )


async def get(api: Api, request: web.Request) -> web.Response:
    """One webhook."""
    domain, name = sender_domain(api, request), _name(request.match_info["name"])
    return _one(await _known(api, domain, name))


async def create(api: Api, request: web.Request) -> web.Response:
    """Make a webhook. One that exists is not overwritten."""
    domain, form = sender_domain(api, request), await read_form(request)
    name = _name(form.first("id") or "")
    urls = await _urls(api, form)
    known = await _of(api, domain)
    if name in known:
        raise ApiError(400, f"Webhook already exists: {name}; PUT changes it")
    return await _set(api, domain, name, urls, "Webhook has been created")


async def update(api: Api, request: web.Request) -> web.Response:
    """Give a webhook other URLs."""
    domain, name = sender_domain(api, request), _name(request.match_info["name"])
    urls = await _urls(api, await read_form(request))
    await _known(api, domain, name)
    return await _set(api, domain, name, urls, "Webhook has been updated")


async def remove(api: Api, request: web.Request) -> web.Response:
    """Remove a webhook."""
    domain, name = sender_domain(api, request), _name(request.match_info["name"])
    urls = await _known(api, domain, name)
    await api.state.set_webhook(domain, name, ())
    await _tell(api)
    return _one(urls, message="Webhook has been deleted")


async def _of(api: Api, domain: str) -> dict[str, tuple[str, ...]]:
    return {one.name: one.urls for one in await api.state.webhooks() if one.domain == domain}


async def _known(api: Api, domain: str, name: str) -> tuple[str, ...]:
    known = await _of(api, domain)
    if name not in known:
        raise ApiError(404, f"Webhook not found: {name}")
    return known[name]


async def _set(
    api: Api, domain: str, name: str, urls: tuple[str, ...], message: str
) -> web.Response:
    if api.options().webhook_signing_key is None:
        raise ApiError(400, "admin.webhook_signing_key is not set: calls could not be signed")
    await api.state.set_webhook(domain, name, urls)
    await _tell(api)
    return _one(urls, message=message)


async def _tell(api: Api) -> None:
    """Tell this worker and the others that webhooks have changed."""
    api.webhooks_changed()
    await api.settings.tell()


def _one(urls: tuple[str, ...], *, message: str = "") -> web.Response:
    extra = {"message": message} if message else {}
    return answer({**extra, "webhook": {"urls": list(urls)}})


def _name(text: str) -> str:
    if text not in webhook.KINDS:
        raise ApiError(
            400, f"id parameter is not a webhook's, known are: {', '.join(webhook.KINDS)}"
        )
    return text


async def _urls(api: Api, form: Form) -> tuple[str, ...]:
    urls = tuple(dict.fromkeys(form.all("url")))
    if not urls:
        raise ApiError(400, "url parameter is missing")
    if len(urls) > _MOST_URLS:
        raise ApiError(400, f"url parameter: too many urls, max is {_MOST_URLS}")
    for url in urls:
        if not _is_url(url):
            raise ApiError(400, "url parameter is not an absolute http or https address")
        if objection := await api.webhook_objection(url):
            raise ApiError(400, f"url parameter: {objection}")
    return urls


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    is_plain = len(text) <= 2048 and re.fullmatch(r"[!-~]+", text) is not None
    return is_plain and parts.scheme in ("http", "https") and bool(parts.hostname)
