"""The settings made over HTTP, as they are in force: above the file's rules, from the next message on.

Read from the store once and kept at hand, since every message asks for the rules. What is set
through here is durable before it is in force. `over` is what sessions and deliveries are given.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay.policy.rules import PolicyRules, TlsRule, with_overlay
from relay.queue.desk import Desk, DomainSettings

__all__ = ["SettingsInForce"]


class SettingsInForce:
    """`load` before anything else."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._settings: Mapping[str, DomainSettings] = {}
        self._below: PolicyRules | None = None
        self._over = PolicyRules()

    async def load(self) -> None:
        """Read what the store has."""
        self._take(await self._desk.domain_settings())

    async def set(self, domain: str, settings: DomainSettings) -> None:
        """Set what is not None, for mail from this domain (normalised)."""
        kept = await self._desk.set_domain_settings(domain, settings)
        self._take({**self._settings, domain: kept})

    @property
    def domains(self) -> list[str]:
        """The domains for which something was set."""
        return sorted(self._settings)

    def over(self, rules: PolicyRules) -> PolicyRules:
        """These rules of the file's, with the settings above them."""
        if rules is not self._below:
            self._over, self._below = with_overlay(rules, overlay_of(self._settings)), rules
        return self._over

    def _take(self, settings: Mapping[str, DomainSettings]) -> None:
        self._settings = settings
        self._below = None


def overlay_of(settings: Mapping[str, DomainSettings]) -> dict[str, TlsRule]:
    """The settings as rules."""
    return {name: TlsRule(one.require_tls, one.skip_verification) for name, one in settings.items()}
