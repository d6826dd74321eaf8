"""The page's routes, its templates and static files, and the headers of every answer.

Templates escape all values. Before that, a character that is not printable is replaced by its
number, so that no text of a stranger can turn a line around, or hide in it. Nothing comes from
another host, and no page contains a script or a style: the policy in `_HEADERS` allows neither.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from importlib.resources import files
from math import floor
from typing import TypeVar
from urllib.parse import quote, urlencode

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from multidict import MultiDict

from relay.admin.operations import tlsa_text
from relay.mail.duration import duration_text
from relay.mail.printable import printable
from relay.queue.queue_id import arrival_of
from relay.queue.store import SpoolError
from relay.web.guard import (
    Guard,
    PageRefused,
    SignedInUser,
    cookie_name,
    is_readable_on_the_way,
    is_tls,
)
from relay.web.jobs import Jobs
from relay.web.live import Live
from relay.web.pages import (
    destination,
    health,
    log,
    message,
    overview,
    policy,
    queue,
    report,
    search,
)
from relay.web.pages.visit import Visit
from relay.web.queries import CountedQueue, Forecasts
from relay.web.rows import EventRow
from relay.web.state import Web

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Other hosts get no Referer. The relay does: without it a browser sends forms with
    # `Origin: null` (Fetch §3.2), which `relay.api.origin` refuses.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_STATIC = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
_FORM_SECONDS = 10.0
_FORM_TYPE = "application/x-www-form-urlencoded"
_SESSION_SECONDS = 12 * 3600

Page = Callable[[Visit], Awaitable[web.StreamResponse]]
R = TypeVar("R", bound=web.StreamResponse)

_LOOK: Mapping[str, Page] = {
    "/": overview.overview,
    "/log": log.log,
    "/log/live": log.live,
    "/log/export": log.export,
    "/message/{id}": message.show_message,
    "/queue": queue.queue,
    "/job/{name}": queue.show_job,
    "/destination/{domain}": destination.destination,
    "/policy": policy.policy,
    "/report": report.report,
    "/report.csv": report.report_file,
    "/report.json": report.report_file,
    "/health": health.health,
    "/search": search.search,
    "/help": search.show_help,
}
_ACT: Mapping[str, Page] = {
    "/queue/confirm": queue.confirm,
    "/queue/change": queue.change,
    "/destination/{domain}/probe": destination.probe,
}


class Site:
    """The page of one relay."""

    def __init__(self, state: Web) -> None:
        self.state = state
        self.guard = Guard(state)
        self.counted = CountedQueue(state)
        self.forecasts = Forecasts(state)
        self.jobs = Jobs(state)
        self._env = _environment()
        self._row = self._env.get_template("_row.html")
        self.live = Live(state.view, self._render_row)

    def _render_row(self, row: EventRow) -> str:
        return self._row.render(row=row)

    async def close(self, _: web.Application) -> None:
        """End all tasks and threads of the page."""
        self.guard.close()
        await self.live.close()
        await self.forecasts.close()

    def page(
        self, template: str, visitor: SignedInUser | None, *, status: int = 200, **values: object
    ) -> web.Response:
        """A page, made of a template and its values."""
        text = self._env.get_template(template).render(
            hostname=self.state.hostname, note=self.state.note(), visitor=visitor, **values
        )
        return self.secured(web.Response(text=text, status=status, content_type="text/html"))

    def secured(self, response: R) -> R:
        """The response, with the headers that every answer has."""
        response.headers.update(_HEADERS)
        return response

    def refusal(self, visitor: SignedInUser | None, error: PageRefused) -> web.Response:
        """A page with the sentence of a refusal."""
        return self.page("error.html", visitor, status=error.status, sentence=str(error))

    async def form(self, request: web.Request) -> MultiDict[str]:
        """The fields of a form."""
        if request.content_type != _FORM_TYPE or "Content-Encoding" in request.headers:
            raise PageRefused(415, "A form was expected.")
        async with asyncio.timeout(_FORM_SECONDS):
            found = await request.post()
        return MultiDict((name, value) for name, value in found.items() if isinstance(value, str))


def install(app: web.Application, *, state: Web, known: web.RequestKey[bool]) -> Site:
    """Add the page to a server. `known`: marks the request of a user who is signed in, whose answer
    is not delayed.
    """
    site = Site(state)
    for path, page in _LOOK.items():
        app.router.add_get(path, partial(_serve, site, page, known))
    for path, page in _ACT.items():
        app.router.add_post(path, partial(_serve, site, page, known))
    app.router.add_get("/login", partial(_open, site, _login_form))
    app.router.add_post("/login", partial(_open, site, _login))
    app.router.add_post("/logout", partial(_open, site, _logout))
    app.router.add_get("/static/{name}", partial(_open, site, _static))
    app.on_cleanup.append(site.close)
    return site


async def _serve(
    site: Site, page: Page, known: web.RequestKey[bool], request: web.Request
) -> web.StreamResponse:
    """A page for a user who is signed in; for others the login form."""

    async def for_visitor() -> web.StreamResponse:
        visitor = site.guard.visitor(request)
        if visitor is None:
            return site.secured(_to_login(request))
        request[known] = True
        try:
            return await page(Visit(site, request, visitor))
        except web.HTTPSeeOther as elsewhere:
            return site.secured(
                web.Response(status=303, headers={"Location": str(elsewhere.location)})
            )
        except PageRefused as error:
            return site.refusal(visitor, error)
        except TimeoutError:
            return site.refusal(visitor, PageRefused(504, "The answer took too long to come."))
        except SpoolError as error:
            return site.refusal(visitor, PageRefused(503, f"The queue does not answer: {error}."))

    return await _guarded(site, request, for_visitor)


def _to_login(request: web.Request) -> web.Response:
    if request.method != "GET" or request.path == "/log/live":
        return web.Response(status=401, text="Sign in first.")
    here = request.rel_url.raw_path_qs
    query = urlencode({"next": here}) if here != "/" else ""
    return web.Response(status=303, headers={"Location": f"/login?{query}".removesuffix("?")})


Answerer = Callable[[Site, web.Request], Awaitable[web.StreamResponse]]


async def _open(site: Site, answer: Answerer, request: web.Request) -> web.StreamResponse:
    """An answer for which nobody has to be signed in."""
    return await _guarded(site, request, partial(answer, site, request))


async def _guarded(
    site: Site, request: web.Request, answer: Callable[[], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        site.guard.check_way(request)
        return await answer()
    except PageRefused as error:
        return site.refusal(None, error)
    except web.HTTPRequestEntityTooLarge:
        return site.refusal(None, PageRefused(413, "The form is too large."))
    except TimeoutError:
        return site.refusal(None, PageRefused(408, "The form took too long to come."))


async def _login_form(site: Site, request: web.Request) -> web.StreamResponse:
    return _login_page(site, request, _local(request.query.get("next", "")))


def _login_page(
    site: Site, request: web.Request, following: str, *, status: int = 200
) -> web.Response:
    return site.page(
        "login.html",
        None,
        status=status,
        next=following,
        wrong=status != 200,
        is_readable=is_readable_on_the_way(request),
    )


async def _login(site: Site, request: web.Request) -> web.StreamResponse:
    form = await site.form(request)
    following = _local(form.get("next", ""))
    token = await site.guard.sign_in(request, form.get("name", ""), form.get("password", ""))
    if token is None:
        return _login_page(site, request, following, status=401)
    response = site.secured(web.Response(status=303, headers={"Location": following or "/"}))
    response.set_cookie(
        cookie_name(request),
        token,
        max_age=_SESSION_SECONDS,
        secure=is_tls(request),
        httponly=True,
        samesite="Strict",
    )
    return response


def _local(path: str) -> str:
    """A path on this site; "" for a URL of another site."""
    is_here = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if is_here and len(path) < 2000 else ""


async def _logout(site: Site, request: web.Request) -> web.StreamResponse:
    visitor = site.guard.visitor(request)
    form = await site.form(request)
    if visitor is not None and visitor.session is not None:
        if not visitor.session.accepts(form.get("token", "")):
            raise PageRefused(403, "This form is out of date: open the page again.")
        site.guard.sessions.end(request.cookies[cookie_name(request)])
    response = site.secured(web.Response(status=303, headers={"Location": "/login"}))
    response.del_cookie(
        cookie_name(request), secure=is_tls(request), httponly=True, samesite="Strict"
    )
    return response


async def _static(site: Site, request: web.Request) -> web.StreamResponse:
    name = request.match_info["name"]
    if name not in _STATIC:
        raise PageRefused(404, "There is no such file.")
    response = web.Response(body=_file(name), content_type=_STATIC[name], charset="utf-8")
    return site.secured(response)


@cache
def _file(name: str) -> bytes:
    return files("relay.web").joinpath("static", name).read_bytes()


# --- templates ----------------------------------------------------------------------------------


def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("relay.web"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {
        "age": _age,
        "when": _when,
        "number": lambda value: f"{value:,}",
        "size": _size,
        "utc": lambda at: f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        "percent": lambda value: f"{value:.1%}",
        "path": lambda text: quote(str(text), safe=""),
        "moment": lambda at: datetime.fromtimestamp(at / 1_000_000, UTC),
        "arrival": arrival_of,
        "isotime": datetime.fromisoformat,
        "tlsa": tlsa_text,
        "query": lambda values: urlencode({k: v for k, v in values.items() if v}),
    }
    return env


def _shown(value: object) -> object:
    """A value for a page. In a text, characters that are not printable are escaped."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, keep="\n\t")
    return value


def _when(at: datetime) -> Markup:
    """A time in UTC; the script shows it in the zone of the browser."""
    at = at.astimezone(UTC)
    text = f"{at:%Y-%m-%d %H:%M:%S} UTC"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        f"{at:%Y-%m-%dT%H:%M:%SZ}", text, text
    )


def _age(span: timedelta | float) -> str:
    seconds = span.total_seconds() if isinstance(span, timedelta) else span
    return duration_text(seconds, whole=floor)


def _size(octets: int) -> str:
    for unit, count in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if octets >= count:
            return f"{octets / count:.1f} {unit}"
    return f"{octets} octets"
