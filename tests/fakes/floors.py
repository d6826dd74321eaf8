"""What recipients' domains publish, without a DNS and a policy host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from relay.deliver.floors import Floors
from relay.policy.rules import PolicyRules
from relay.policy.settings import FloorUse
from relay.route.answers import NoSuchName, TlsaLookup
from relay.route.floor import NO_STS, StsFloor


@dataclass
class Published:
    """What the DNS and the policy host of dest.example say."""

    tlsa: dict[str, TlsaLookup] = field(default_factory=dict)
    sts: list[StsFloor | Exception] = field(default_factory=lambda: [NO_STS])
    asked: list[str] = field(default_factory=list)
    validates_: bool = True

    async def tlsa_of(self, name: str) -> TlsaLookup:
        self.asked.append(name)
        return self.tlsa.get(name, NoSuchName())

    async def validates(self) -> bool:
        return self.validates_

    async def floor(self, domain: str, use: FloorUse, *, anew: bool = False) -> StsFloor:
        self.asked.append(f"sts {domain}{' anew' if anew else ''}")
        found = self.sts.pop(0) if len(self.sts) > 1 else self.sts[0]
        if isinstance(found, Exception):
            raise found
        return NO_STS if use is FloorUse.IGNORE else found


class Resolver:
    """Answers with what is published."""

    def __init__(self, published: Published) -> None:
        self.tlsa = published.tlsa_of
        self.validates = published.validates


def floors_of(published: Published, rules: PolicyRules | None = None) -> Floors:
    resolver: Any = Resolver(published)
    policies: Any = published
    return Floors(resolver, policies, lambda: rules or PolicyRules())
