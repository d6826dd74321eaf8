"""The scenarios as data: the same mail goes through both sides.

A run sends `messages`; it lasts from the first connect until the next hop has the last copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["SCENARIOS", "Beside", "Client", "Scenario"]


class Client(StrEnum):
    """The program that sends: the cheapest one, which waits for each reply, and is the next hop,
    too; Postfix's smtp-source; or `benchmarks.client`, which can do more.
    """

    LOCKSTEP = "benchmarks.lockstep"
    SOURCE = "smtp-source"
    OWN = "benchmarks.client"


class Beside(StrEnum):
    """What the relay is compared with."""

    POSTFIX = "Postfix"
    """As it is installed, and with the settings of its tuning guide: the faster one counts."""
    FULL_QUEUE = "100,000 queued"
    NO_SYNC = "without syncs"
    LIBRARIES = "bare libraries"
    NO_POLICY = "MTA-STS ignored"


@dataclass(frozen=True, slots=True)
class Scenario:
    """`target`: the wanted ratio to Postfix. `cheap`: part of the smoke test
    (`--smoke`). `quick`: part of the run of a few minutes (`quick`).

    `sessions`: how many at a time, each for one message or `standing`. `reply_delay`: seconds that
    the next hop takes for each reply. `concurrency`: connections to a next hop, on both sides.
    `rate`: messages a second, sent evenly instead of as fast as possible. `domains`: the number of
    destinations, of which `dead` do not answer.
    """

    name: str
    title: str
    messages: int
    size: int = 4096
    sessions: int = 20
    standing: bool = True
    recipients: int = 1
    client: Client = Client.SOURCE
    tls_in: bool = False
    tls_out: bool = False
    reply_delay: float = 0.0
    concurrency: int = 100
    rate: float = 0.0
    domains: int = 1
    dead: int = 0
    beside: Beside = Beside.POSTFIX
    target: float | None = None
    cheap: bool = False
    quick: bool = False

    @property
    def needs_own_hop(self) -> bool:
        """Whether the next hop needs a feature that smtp-sink lacks."""
        return self.tls_out or self.rate > 0 or self.reply_delay > 0

    @property
    def copies(self) -> int:
        """How many recipients the next hop must have got before a run ends."""
        return self.messages * self.recipients * (self.domains - self.dead) // self.domains


_MIB = 1024 * 1024

SCENARIOS = (
    Scenario(
        "standing",
        "4 KiB over 20 standing sessions",
        6000,
        client=Client.LOCKSTEP,
        target=3,
        cheap=True,
        quick=True,
    ),
    Scenario(
        "single",
        "4 KiB, one message a connection",
        3000,
        standing=False,
        client=Client.LOCKSTEP,
        target=2,
        quick=True,
    ),
    Scenario(
        "series",
        "4 KiB, one sender in series",
        1500,
        sessions=1,
        client=Client.LOCKSTEP,
        target=1,
        quick=True,
    ),
    Scenario("100k", "100 KiB over 20 sessions", 1500, size=100 * 1024, target=1),
    Scenario("10m", "10 MiB, 40 at once", 40, size=10 * _MIB, sessions=40, target=1),
    Scenario(
        "tls-out", "4 KiB, verified TLS to the next hop", 3000, tls_out=True, target=3, cheap=True
    ),
    Scenario(
        "tls-in", "4 KiB, STARTTLS in, 10 messages a session", 3000, client=Client.OWN, tls_in=True
    ),
    Scenario(
        "slow", "next hop takes 200 ms a reply", 3000, reply_delay=0.2, concurrency=1000, target=1
    ),
    Scenario(
        "50-domains",
        "50 destinations, 5 of them dead",
        3000,
        sessions=50,
        domains=50,
        dead=5,
        target=1,
    ),
    Scenario("recipients", "4 KiB to 100 recipients", 200, recipients=100, target=1),
    Scenario("latency", "4 KiB, 150 messages a second offered", 1500, client=Client.OWN, rate=150),
    Scenario("queued", "4 KiB, empty queue and 100,000 queued", 5000, beside=Beside.FULL_QUEUE),
    Scenario("no-sync", "4 KiB, with and without syncs", 5000, beside=Beside.NO_SYNC),
    Scenario(
        "mta-sts",
        "4 KiB, verified TLS, under an MTA-STS policy and without",
        3000,
        tls_out=True,
        beside=Beside.NO_POLICY,
    ),
    Scenario("libraries", "4 KiB, relay and bare libraries", 5000, beside=Beside.LIBRARIES),
)
