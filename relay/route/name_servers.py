"""The name servers that are asked: those of the configuration, or those of resolv.conf. †

`/etc/resolv.conf` is read again when it has changed; the old one stays in force while a new one is
unusable. Without `nameservers` and without a usable file the program does not start.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

import dns.asyncresolver
import dns.exception
import dns.flags
import dns.inet
import dns.nameserver
import dns.resolver

from relay.route.answers import TrustAd

log = logging.getLogger(__name__)

_EDNS_OCTETS = 1232
_TIME_FOR_ONE_SERVER = 2.5
"""Seconds until the resolver asks the next server, or the same one again."""
_RESOLV_CONF_LOOKS = 5.0
"""Seconds between two checks whether the file has changed."""

_BRACKETED = re.compile(r"\[([0-9A-Fa-f:.]+)\](?::([0-9]+))?")


class ResolverError(Exception):
    """There is no name server to ask, or the configured one is invalid."""


@dataclass(frozen=True, slots=True)
class ResolverOptions:
    """`resolver`: the name servers to ask, and how long to wait for one answer in all.

    `nameservers`: `address`, `address:port` or `[IPv6 address]:port`; none: `resolv_conf`.
    """

    nameservers: tuple[str, ...] = ()
    timeout: timedelta = timedelta(seconds=10)
    concurrency: int = 100
    trust_ad: TrustAd = TrustAd.AUTO
    resolv_conf: str = "/etc/resolv.conf"


def not_on_this_machine(resolver: dns.asyncresolver.Resolver) -> str:
    """Why these name servers are not trusted: another machine on the way could change answers."""
    for server in resolver.nameservers:
        address = (
            server.answer_nameserver() if isinstance(server, dns.nameserver.Nameserver) else server
        )
        if not ip_address(address).is_loopback:
            return f"the name server {address} is not on this machine"
    return ""


class NameServers:
    """The name servers to ask: the configured ones, or those of the current resolv.conf."""

    def __init__(self, options: ResolverOptions, clock: Callable[[], float]) -> None:
        self._options = options
        self._clock = clock
        self._next_look = clock() + _RESOLV_CONF_LOOKS
        self._seen = self._stamp()
        self._resolver = self._configured() if options.nameservers else self._from_file()

    def resolver(self) -> dns.asyncresolver.Resolver:
        """A resolver that asks the current servers."""
        if not self._options.nameservers and self._clock() >= self._next_look:
            self._next_look = self._clock() + _RESOLV_CONF_LOOKS
            self._look_again()
        return self._resolver

    def _look_again(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._resolver = self._from_file()
            log.info("%s has changed and was read again", self._options.resolv_conf)
        except ResolverError as exc:
            log.warning("%s; the name servers read before stay in use", exc)

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._options.resolv_conf)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _configured(self) -> dns.asyncresolver.Resolver:
        resolver = dns.asyncresolver.Resolver(configure=False)
        servers = [parse_nameserver(text) for text in self._options.nameservers]
        resolver.nameservers = [dns.nameserver.Do53Nameserver(*server) for server in servers]
        return self._tuned(resolver)

    def _from_file(self) -> dns.asyncresolver.Resolver:
        path = self._options.resolv_conf
        try:
            return self._tuned(dns.asyncresolver.Resolver(path))
        except dns.resolver.NoResolverConfiguration:
            raise ResolverError(
                f"{path} names no name server and resolver.nameservers is empty"
            ) from None
        except (ValueError, OSError, dns.exception.DNSException) as exc:
            raise ResolverError(f"{path} cannot be used: {exc}") from exc

    def _tuned(self, resolver: dns.asyncresolver.Resolver) -> dns.asyncresolver.Resolver:
        seconds = self._options.timeout.total_seconds()
        resolver.lifetime = seconds
        resolver.timeout = min(_TIME_FOR_ONE_SERVER, seconds)
        resolver.use_edns(0, 0, _EDNS_OCTETS)
        resolver.set_flags(int(dns.flags.RD | dns.flags.AD))
        resolver.cache = None
        return resolver


def parse_nameserver(text: str) -> tuple[str, int]:
    """Address and port of a name server in the configuration's form; `ResolverError` if invalid."""
    address, port = text, "53"
    if (bracketed := _BRACKETED.fullmatch(text)) is not None:
        address, port = bracketed[1], bracketed[2] or "53"
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
    if not dns.inet.is_address(address) or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ResolverError(f"{text!r} is not the address of a name server")
    return address, int(port)
