"""What holds at each host of a route for one message, looked up as the attempt turns to the host.

of    what the recipient's domain asks of a host (`floors`)
at    what the host has to prove: for the domain, for the settings of the message, and for what
      the host has shown before (`memory`); or why the relay does not connect to it
"""

from __future__ import annotations

from relay.deliver.floors import DomainFloor, Floors
from relay.deliver.memory import NO_PAST, AtHost
from relay.deliver.no_session import not_known, not_used
from relay.deliver.tally import Tally
from relay.mail.record import record
from relay.queue.entry import Entry
from relay.route.floor import HostFloor
from relay.route.mta_sts import StsMode
from relay.route.next_hop import Host, Hosts
from relay.route.security import Requirement, SecurityOptions, at_host, under


@record(frozen=True, slots=True)
class Conditions:
    """What holds at one host for one message: what the recipient's domain asks of the host
    (`floor`), what the host has shown before (`past`), and what it needs to prove for both and for
    the settings of the message (`needed`).
    """

    host: Host
    floor: HostFloor
    past: AtHost
    needed: Requirement


class Asked:
    """What is asked of the hosts of a route in one attempt. Hosts of MX records are asked for the
    same, each host of a next hop for what it publishes itself. `anew`: what the domain publishes is
    looked up although an answer is at hand.
    """

    def __init__(
        self,
        entry: Entry,
        route: Hosts,
        floors: Floors,
        options: SecurityOptions,
        *,
        anew: bool = False,
    ) -> None:
        self.route = route
        self._entry = entry
        self._floors = floors
        self._options = options
        self._anew = anew
        self._found: dict[str | None, DomainFloor] = {}
        """By `Naming.route_host`, in which the namings of a route differ."""

    def again(self) -> Asked:
        """The same, with everything looked up anew."""
        return Asked(self._entry, self.route, self._floors, self._options, anew=True)

    async def of(self, host: Host) -> DomainFloor:
        """What is asked of one host. Raises as `Floors.of_domain` does."""
        naming = self.route.naming_of(host)
        found = self._found.get(naming.route_host)
        if found is None:
            message, waiving = self._entry.message, None
            if message.tls_required_no and not self._entry.settings.require_tls.value:
                waiving = message.reverse_path
            found = self._found[naming.route_host] = await self._floors.of_domain(
                self._entry.domain, naming, waiving=waiving, anew=self._anew
            )
        return found

    async def at(self, host: Host, needed: Requirement, tally: Tally) -> Conditions | None:
        """What holds at one host for a message whose settings require `needed`; None where the
        relay does not connect to it, which is noted.
        """
        domain_floor = await self.of(host)
        host_floor = await self._floors.at(host, domain_floor)
        if host_floor.not_used:
            tally.sessions.refused(host, host_floor)
            tally.go_on_for(tally.pending, host, not_used(host_floor, host))
            return None
        if needed.requiretls and not domain_floor.has_secure_name(host):
            tally.go_on_for(tally.pending, host, not_known(host_floor, host))
            return None
        needed = under(at_host(needed, host, self._options), host_floor.floor, self._options)
        if domain_floor.past is None:
            return Conditions(host, host_floor, NO_PAST, needed)
        past = domain_floor.past.at(host.name, verify=needed.verify)
        return Conditions(host, host_floor, past, past.over(needed))

    @property
    def policies(self) -> list[tuple[StsMode | None, str, tuple[str, ...]]]:
        """What two sets of MTA-STS policies are compared by."""
        return [(found.sts.mode, found.sts.id, found.sts.mx) for found in self._found.values()]
