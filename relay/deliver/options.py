"""The configuration of delivery, as frozen values.

The defaults of the waits are those of RFC 5321 §4.5.3.2, which sets the shortest waits of a
client. It has none for connecting and for the TLS handshake. These are short, because a host may
have several addresses and a message several hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated

from relay.mail.option import Path, Port, TextForm
from relay.report.tls_report import Submitter
from relay.route.security import OnTlsUnmet, OnUnverified, SecurityOptions, TlsVersion


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long each wait may last. `data_block` begins anew after each piece of content.

    `command` holds for each reply of a group on its own, however the replies come. `policy_fetch`
    is for an MTA-STS policy, from its first look-up to its last octet (RFC 8461 §3.3).
    """

    connect: timedelta = timedelta(seconds=30)
    greeting: timedelta = timedelta(minutes=5)
    command: timedelta = timedelta(minutes=5)
    data_block: timedelta = timedelta(minutes=3)
    final_reply: timedelta = timedelta(minutes=10)
    tls_handshake: timedelta = timedelta(seconds=30)
    policy_fetch: timedelta = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """TLS towards the next hop. `ca_file`: trusted roots in addition to the system's, None for
    none.

    `min_version` is for TLS that is required or verified, `opportunistic_min_version` for
    TLS whose certificate is not looked at, where old TLS beats none.
    """

    ca_file: Path | None = None
    min_version: TlsVersion = TlsVersion.TLS_1_2
    opportunistic_min_version: TlsVersion = TlsVersion.TLS_1_0


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """How mail is delivered. `concurrency` limits all connections together."""

    port: Port = 25
    concurrency: int = 200
    concurrency_per_destination: int = 20
    allow_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    timeouts: Timeouts = Timeouts()
    on_tls_unmet: OnTlsUnmet = OnTlsUnmet.DEFER
    on_unverified: OnUnverified = OnUnverified.PLAINTEXT


@dataclass(frozen=True, slots=True)
class TlsReportOptions:
    """Reports to recipients' domains about TLS with their hosts (RFC 8460). `send`: whether any are
    sent, and anything is counted for them.

    `from_` None: postmaster at our host name; its domain needs a key under `dkim`. `organization`
    None: our host name. `contact` None: `from_`.
    """

    send: bool = False
    from_: Annotated[str, TextForm.MAIL_ADDRESS] | None = None
    organization: Annotated[str, TextForm.LINE] | None = None
    contact: Annotated[str, TextForm.MAIL_ADDRESS] | None = None

    def submitter(self, hostname: str) -> Submitter:
        """Who reports, as these keys and the host name say."""
        sender = self.from_ or f"postmaster@{hostname}"
        return Submitter(self.organization or hostname, self.contact or sender, sender)


def security_options(delivery: DeliveryOptions, tls: TlsOptions) -> SecurityOptions:
    """The options of both that the table of TLS rules uses."""
    return SecurityOptions(
        on_tls_unmet=delivery.on_tls_unmet,
        on_unverified=delivery.on_unverified,
        min_version=tls.min_version,
        opportunistic_min_version=tls.opportunistic_min_version,
    )
