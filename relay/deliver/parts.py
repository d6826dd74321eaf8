"""How much of the limits at each destination this node may use. Pure.

`concurrency_per_destination` and the limits of the operator's next hops hold for all nodes that
share a queue: `part` says what this node has of each now (`relay.queue.division`). A node has all
of it where it shares its queue with none.

Where a node has no part it neither claims mail nor hands it over: that is the others'. Where the
mail of a domain leads, its sender may decide. So a node claims for a domain if it has a part of
any of the destinations in question, and leaves to the others what leads to none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from relay.queue.division import all_of_it
from relay.route.next_hop import NextHop

Part = Callable[[int, str], int]
"""What this node has of a limit at a destination, by the destination's name."""


class NodeParts:
    """`most`: `concurrency_per_destination`. `may_lead_to`: the next hops that mail for a domain
    may lead to, None for its MX hosts.
    """

    def __init__(
        self,
        most: int,
        part: Part = all_of_it,
        may_lead_to: Callable[[str], Collection[NextHop | None]] = lambda domain: (None,),
    ) -> None:
        self._most = most
        self._part = part
        self._may_lead_to = may_lead_to

    def of_domain(self, domain: str) -> int:
        """How many attempts a recipient domain may have."""
        return self._part(self._most, domain)

    def of_hop(self, hop: NextHop) -> int:
        """How many attempts a next hop may have; 0 where this node has no part of one of its
        limits.
        """
        rate, connections, name = hop.rate, hop.max_connections, hop.destination
        if rate is not None and not self._part(rate.messages, name):
            return 0
        most = self._part(self._most, name)
        return most if connections is None else min(most, self._part(connections, name))

    def of_address(self, destination: str) -> int:
        """How many connections an address may have, or a next hop. At least one: the domains that
        lead to an address are divided, and some may be this node's that has no part of the address.
        """
        if self._part is all_of_it:
            return self._most
        return max(self._part(self._most, destination), 1)

    def to_claim(self, domain: str) -> int:
        """How many entries of a domain are claimed at once; 0: its mail is left to the others."""
        if self._part is all_of_it:
            return self._most
        if self._part(1, domain) == 1 and self._part(self._most, domain) == self._most:
            return self._most
        may_lead_to = self._may_lead_to(domain)
        return max(
            self.of_domain(domain) if hop is None else self.of_hop(hop) for hop in may_lead_to
        )
