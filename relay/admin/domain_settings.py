"""The settings made over HTTP, which override the rules of the configuration.

They are read from the store once and kept in memory, because every message asks for the rules. A
new setting is in the store before it is in force, and in force from the next message on. `over`
gives sessions and deliveries the rules with these settings.

With several workers, the first has the store with the settings. It writes them for the others
(`SharedSettings`), and each worker checks with every message whether there is a new edition. So a
setting is in force for all workers at once. Webhooks are shared in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from relay.mail.jsontext import JsonObject
from relay.policy.rules import PolicyRules, TlsRule, with_overlay
from relay.queue.api_state import ApiState, DomainSettings, Webhook


class SharedSettings(Protocol):
    """Memory that one process writes and others read."""

    @property
    def edition(self) -> int: ...

    def tell(self, octets: bytes) -> None: ...

    def read(self) -> tuple[int, bytes] | None: ...


class _Over:
    """Rules with settings above them, made once for each pair of both."""

    def __init__(self) -> None:
        self._settings: Mapping[str, DomainSettings] = {}
        self._below: PolicyRules | None = None
        self._over = PolicyRules()

    def over(self, rules: PolicyRules) -> PolicyRules:
        """The rules of the configuration, with the settings above them."""
        if rules is not self._below:
            self._over, self._below = with_overlay(rules, overlay_of(self._settings)), rules
        return self._over

    def _take(self, settings: Mapping[str, DomainSettings]) -> None:
        self._settings = settings
        self._below = None


class SettingsInForce(_Over):
    """The settings of the worker that has the store. Call `load` first."""

    def __init__(self, api_state: ApiState, shared: SharedSettings | None = None) -> None:
        super().__init__()
        self._api_state = api_state
        self._shared = shared

    async def load(self) -> None:
        """Read the settings from the store."""
        self._take(await self._api_state.domain_settings())
        await self.tell()

    async def set(self, domain: str, settings: DomainSettings) -> None:
        """Set the settings that are not None, for mail from this domain (normalised)."""
        kept = await self._api_state.set_domain_settings(domain, settings)
        self._take({**self._settings, domain: kept})
        await self.tell()

    async def tell(self) -> None:
        """Tell the other workers the settings and the webhooks."""
        if self._shared is not None:
            self._shared.tell(_written(self._settings, await self._api_state.webhooks()))

    @property
    def domains(self) -> list[str]:
        """The domains that have a setting."""
        return sorted(self._settings)


class SettingsElsewhere(_Over):
    """The settings in a worker without the store, as the first worker writes them."""

    def __init__(self, shared: SharedSettings) -> None:
        super().__init__()
        self._shared = shared
        self._edition = 0
        self._webhooks: list[Webhook] | None = None

    def over(self, rules: PolicyRules) -> PolicyRules:
        """The rules of the configuration, with the settings above them."""
        self.look()
        return super().over(rules)

    def look(self) -> None:
        """Take over a new edition, if there is one."""
        if self._shared.edition == self._edition:
            return
        told = self._shared.read()
        if told is not None:
            self._edition, octets = told
            settings, self._webhooks = _read(octets)
            self._take(settings)

    def webhooks(self) -> list[Webhook] | None:
        """The webhooks; None before the first edition."""
        self.look()
        return self._webhooks


def overlay_of(settings: Mapping[str, DomainSettings]) -> dict[str, TlsRule]:
    """The settings as rules."""
    return {name: TlsRule(one.require_tls, one.skip_verification) for name, one in settings.items()}


def _written(settings: Mapping[str, DomainSettings], webhooks: list[Webhook]) -> bytes:
    told: JsonObject = {
        "settings": [
            [name, one.require_tls, one.skip_verification] for name, one in settings.items()
        ],
        "webhooks": [[one.domain, one.name, one.urls] for one in webhooks],
    }
    return json.dumps(told).encode("ascii")


def _read(octets: bytes) -> tuple[dict[str, DomainSettings], list[Webhook]]:
    told = json.loads(octets)
    settings = {name: DomainSettings(require, skip) for name, require, skip in told["settings"]}
    return settings, [Webhook(domain, name, tuple(urls)) for domain, name, urls in told["webhooks"]]
