"""One request of a user who is signed in, as every page gets it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from aiohttp import web

from relay.admin import report as reports
from relay.mail.address import AddressError, normalise_domain
from relay.queue.statistics import CountFilter
from relay.web.guard import PageRefused, SignedInUser
from relay.web.state import Web

if TYPE_CHECKING:
    from relay.web.site import Site


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of a user who is signed in."""

    site: Site
    request: web.Request
    visitor: SignedInUser

    @property
    def state(self) -> Web:
        return self.site.state

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query

    def show(self, template: str, *, status: int = 200, **values: object) -> web.Response:
        """A page, made of a template and its values."""
        return self.site.page(template, self.visitor, status=status, **values)


def latest(now: datetime, hours: int, *, recipient_domain: str = "") -> CountFilter:
    """The last hours, with the current one; of one hour also the hour before it."""
    begin = now - timedelta(hours=max(hours, 2) - 1)
    return reports.period(begin, now + timedelta(microseconds=1), recipient_domain=recipient_domain)


def read_domain(text: str, *, status: int = 400) -> str:
    """A domain, normalised; `PageRefused` where the text is none."""
    try:
        return normalise_domain(text)
    except AddressError as error:
        raise PageRefused(status, f"This is no domain: {error}.") from None
