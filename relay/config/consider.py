"""What is legal key by key and wrong together: AUTH without users, TLS without a certificate, an
open relay.

Looks into the files that the configuration names, and at the groups of this machine.
"""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from relay.config.consider_routes import consider_routes
from relay.config.files import bad_roots, consider_certificate, consider_secret
from relay.config.quantities import format_duration
from relay.config.remark import Remark
from relay.config.sections import AdminSection, Config
from relay.config.words import host_and_port
from relay.mail.address import domain_of
from relay.mail.ip import unmapped
from relay.policy.rules import is_locked
from relay.policy.settings import MemoryAction
from relay.queue.location import DEFAULT_PATH
from relay.receive.spec import ListenerAuth, ListenerSpec, ListenerTls
from relay.route.security import TlsVersion

_SHORTEST_LEASE, _LONGEST_LEASE = timedelta(seconds=5), timedelta(minutes=10)

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def consider(config: Config) -> Iterator[Remark]:
    yield from _consider_listeners(config)
    yield from _consider_access(config)
    yield from _consider_pins(config)
    yield from _consider_memory(config)
    yield from _consider_delivery(config)
    yield from consider_routes(config)
    yield from _consider_queue(config)
    yield from _consider_dkim(config)
    yield from _consider_tls_reports(config)
    yield from _consider_workers(config)
    yield from _consider_http(config.admin)
    yield from _consider_group("admin.socket_group", config.admin.socket_group)


def _consider_workers(config: Config) -> Iterator[Remark]:
    delivery = config.delivery
    if config.workers > delivery.concurrency:
        problem = "more workers than there may be connections"
        yield Remark("workers", problem, "have fewer, or raise delivery.concurrency")
    # Of several nodes some may have no part of a destination, and leave its mail to the others.
    elif config.workers > delivery.concurrency_per_destination and config.queue.url is None:
        problem = "more workers than a destination may have connections"
        yield Remark(
            "workers", problem, "have fewer, or raise delivery.concurrency_per_destination"
        )


def _consider_http(admin: AdminSection) -> Iterator[Remark]:
    if not admin.http:
        return
    if not _is_local(admin.http):
        if not admin.serves_http:
            cure = "name keys under admin.api_keys, or listen on 127.0.0.1"
            yield Remark("admin.http", "an HTTP API open to the network without a key", cure)
        elif admin.certificate is None:
            cure = (
                "name an admin.certificate, or listen on 127.0.0.1 behind a proxy that speaks TLS"
            )
            yield Remark("admin.http", "keys cross the network in clear", cure, is_fatal=False)
        if admin.web.users and admin.certificate is None and not admin.web.insecure:
            problem = "the page is shown over HTTPS only, and there is no admin.certificate"
            cure = "name one; clients on this machine see the page all the same"
            yield Remark("admin.web.users", problem, cure, is_fatal=False)
    if admin.web.proxy_header is not None and not admin.web.proxy_networks:
        problem = "nobody is believed: admin.web.proxy_networks is empty"
        yield Remark("admin.web.proxy_header", problem, "name the proxy's address there")
    for name, user in admin.web.users.items():
        if user.password is None and admin.web.proxy_header is None:
            cure = "give it a password (`relay password` makes the hash)"
            yield Remark(f"admin.web.users.{name}", "a user who cannot sign in", cure)
    if admin.certificate is not None:
        yield from consider_certificate(admin.certificate, admin.key, "admin")
    elif admin.key is not None:
        yield Remark("admin.key", "a key without a certificate", "name its admin.certificate")


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    return unmapped(ipaddress.ip_address(host_and_port(address)[0])).is_loopback


def _consider_listeners(config: Config) -> Iterator[Remark]:
    seen: dict[str, int] = {}
    if not config.listeners:
        yield Remark(
            "listeners", "no listener: nobody can hand us mail", "name one", is_fatal=False
        )
    for i, listener in enumerate(config.listeners):
        key = f"listeners.{i}"
        if listener.address in seen and not listener.address.endswith(":0"):
            problem = f"{listener.address} is taken by listener {seen[listener.address]} already"
            yield Remark(f"{key}.address", problem, "choose another port, or remove one of the two")
        seen[listener.address] = i
        yield from _consider_address(config, listener.address, f"{key}.address")
        yield from _consider_certificate(listener, key)
        yield from _consider_group(f"{key}.socket_group", listener.socket_group)
        if listener.auth is not ListenerAuth.NONE and not config.access.users:
            cure = (
                "name users under access.users (`relay password` makes the hash),"
                " or write auth: none"
            )
            yield Remark(
                f"{key}.auth", f"auth: {listener.auth} without a user who could log in", cure
            )
        in_clear = listener.tls is ListenerTls.NONE and not listener.address.startswith("unix:")
        if listener.auth is not ListenerAuth.NONE and in_clear and not listener.auth_without_tls:
            cure = (
                "write tls: starttls with a certificate (or auth_without_tls: true,"
                " if that is meant)"
            )
            yield Remark(
                f"{key}.auth",
                "passwords would come in clear, so AUTH would never be offered",
                cure,
                is_fatal=not _is_local(listener.address),
            )


def _consider_address(config: Config, address: str, key: str) -> Iterator[Remark]:
    if config.admin.serves_http and address == config.admin.http:
        cure = "choose another port for one of the two"
        yield Remark(key, f"{address} is taken by admin.http already", cure)
    host, _, port = address.rpartition(":")
    if host == "[::]" and not any(x.address == f"0.0.0.0:{port}" for x in config.listeners):
        problem = f"{address} takes clients over IPv6 only"
        yield Remark(key, problem, f"add a listener on 0.0.0.0:{port} for IPv4", is_fatal=False)


def _consider_group(key: str, name: str | None) -> Iterator[Remark]:
    """Only a member, or root, can give a file to a group."""
    if name is None:
        return
    try:
        number = grp.getgrnam(name).gr_gid
    except KeyError:
        yield Remark(key, f"no group {name} on this machine", f"make it: `groupadd {name}`")
        return
    if os.geteuid() != 0 and number not in (os.getegid(), *os.getgroups()):
        user = pwd.getpwuid(os.geteuid()).pw_name
        cure = f"`usermod --append --groups {name} {user}`, and restart the relay"
        yield Remark(key, f"the user {user} is not in the group {name}", cure)


def _consider_certificate(listener: ListenerSpec, key: str) -> Iterator[Remark]:
    if listener.tls is ListenerTls.NONE:
        if listener.certificate or listener.key:
            cure = "write tls: starttls or implicit, or remove the certificate"
            yield Remark(
                f"{key}.certificate",
                "a certificate, but tls: none never shows it",
                cure,
                is_fatal=False,
            )
        return
    if listener.certificate is None:
        cure = "add certificate: (a PEM file, chain included) and key:, or write tls: none"
        yield Remark(f"{key}.tls", f"tls: {listener.tls} without a certificate", cure)
        return
    yield from consider_certificate(listener.certificate, listener.key, key)


def _consider_access(config: Config) -> Iterator[Remark]:
    """What clients from anywhere could do: a listener on loopback has such clients behind a
    balancer.
    """
    reachable = [
        x.address
        for x in config.listeners
        if (x.proxy_protocol or not _is_local(x.address)) and x.auth is not ListenerAuth.REQUIRED
    ]
    if not reachable:
        return
    networks = config.access.networks
    for public in _PUBLIC:
        share = _share(networks, public)
        if share >= _OPEN_RELAY:
            yield _open_relay(networks, public, share, reachable[0])
    for i, network in enumerate(networks):
        if network.is_global and network.prefixlen < (16 if network.version == 4 else 32):
            problem = f"{network} is a large part of the public Internet, and all of it may relay"
            yield Remark(f"access.networks.{i}", problem, "name your own networks", is_fatal=False)


def _open_relay(
    networks: Sequence[IPNetwork], public: IPNetwork, share: float, listener: str
) -> Remark:
    alone = [i for i, one in enumerate(networks) if _share([one], public) >= _OPEN_RELAY]
    subject = f"{networks[alone[0]]} lets" if alone else "these networks together let"
    whom = "the whole world" if share == 1 else f"{share:.0%} of the public Internet"
    return Remark(
        f"access.networks.{alone[0]}" if alone else "access.networks",
        f"{subject} {whom} relay through {listener}: an open relay",
        "name your own networks, or write auth: required at the listener",
    )


_PUBLIC: Sequence[IPNetwork] = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("2000::/3"))
"""Where public addresses are; of IPv6 what is given out (RFC 4291 §2.4)."""

_OPEN_RELAY = 1 / 16
"""The part of all public addresses that nobody's own networks are; the largest owners have less."""


def _share(networks: Sequence[IPNetwork], public: IPNetwork) -> float:
    """What part of the public addresses is in one of these networks."""
    counted, reached = 0, int(public.network_address)
    for first, last in sorted(
        (int(one.network_address), int(one.broadcast_address))
        for one in networks
        if one.version == public.version
    ):
        last = min(last, int(public.broadcast_address))
        counted += max(last - max(first, reached) + 1, 0)
        reached = max(reached, last + 1)
    return counted / public.num_addresses


def _consider_delivery(config: Config) -> Iterator[Remark]:
    versions = list(TlsVersion)
    if versions.index(config.tls.opportunistic_min_version) > versions.index(
        config.tls.min_version
    ):
        cure = f"lower it to {config.tls.min_version} or older"
        yield Remark("tls.opportunistic_min_version", "stricter than tls.min_version", cure)
    if config.tls.ca_file is not None:
        trouble = bad_roots(config.tls.ca_file)
        if trouble:
            yield Remark(
                "tls.ca_file", f"{config.tls.ca_file}: {trouble}", "give a file of PEM certificates"
            )
    if config.delivery.concurrency_per_destination > config.delivery.concurrency:
        problem = f"more than delivery.concurrency ({config.delivery.concurrency}), which holds"
        yield Remark("delivery.concurrency_per_destination", problem, "lower it", is_fatal=False)


def _consider_pins(config: Config) -> Iterator[Remark]:
    """Pinned hosts protect only with verified TLS that no message may waive, and only where the
    DNS names the hosts.
    """
    for domain, rule in config.policy.destinations.items():
        if not rule.mx:
            continue
        key = f"policy.destinations.{domain}.mx"
        if rule.require_tls is not True or rule.skip_verification is True:
            problem = "hosts are pinned, and TLS with them is not held to be verified"
            cure = "add require_tls: true, without skip_verification: true"
            yield Remark(key, problem, cure, is_fatal=False)
        elif not is_locked(config.policy, "", domain):
            problem = (
                "hosts are pinned, and a message may ask for TLS that is not verified, or none"
            )
            yield Remark(key, problem, "add allow_override: false", is_fatal=False)
        for route in config.routes:
            if route in ("*", domain) or (route[:2] == "*." and domain.endswith(route[1:])):
                problem = (
                    f"no effect where mail goes by routes.{route}, which names the host itself"
                )
                yield Remark(key, problem, "remove one of the two", is_fatal=False)


_SHORTEST_MEMORY = timedelta(days=7)


def _consider_memory(config: Config) -> Iterator[Remark]:
    """Mail that waits for a host to show as much as before has to be able to go in the end."""
    memory, lifetime = config.downgrade_memory, config.queue.lifetime
    rules = config.policy.destinations.values()
    actions = {memory.action, *(rule.downgrade_memory for rule in rules)}
    if memory.keep < _SHORTEST_MEMORY and actions & {MemoryAction.LOG, MemoryAction.DEFER}:
        problem = "shorter than 7d, so a host that gets mail once a week is forgotten between"
        cure = "write a longer duration, as in 90d"
        yield Remark("downgrade_memory.keep", problem, cure, is_fatal=False)
    if MemoryAction.DEFER not in actions:
        return
    key, cure = "downgrade_memory.defer_for", "write a shorter duration"
    if memory.defer_for >= lifetime:
        problem = (
            f"not shorter than queue.lifetime ({format_duration(lifetime)}), so mail that waits "
            "is returned and never goes with less"
        )
        yield Remark(key, problem, cure, is_fatal=False)
    if memory.defer_for >= memory.keep:
        problem = (
            f"not shorter than downgrade_memory.keep ({format_duration(memory.keep)}), so what "
            "mail is held to is forgotten before"
        )
        yield Remark(key, problem, cure, is_fatal=False)


def _consider_queue(config: Config) -> Iterator[Remark]:
    queue = config.queue
    if queue.warn_after is not None and queue.warn_after >= queue.lifetime:
        lifetime = format_duration(queue.lifetime)
        problem = f"not before queue.lifetime ({lifetime}), so no notice would ever go out"
        yield Remark("queue.warn_after", problem, "write a shorter duration, or never")
    yield from _consider_server(config)


def _consider_server(config: Config) -> Iterator[Remark]:
    """The queue on a server that several nodes share."""
    queue = config.queue
    if queue.url is None:
        for key, value in (("node", queue.node), ("password_file", queue.password_file)):
            if value is not None:
                cure = "name the server as queue.url, or remove the key"
                yield Remark(f"queue.{key}", "the queue is in a directory of this machine", cure)
        return
    if queue.path != DEFAULT_PATH:
        cure = "remove queue.path; what a directory holds is not taken over"
        yield Remark("queue.path", "the queue is at queue.url", cure)
    if not _SHORTEST_LEASE <= queue.lease <= _LONGEST_LEASE:
        problem = f"{format_duration(queue.lease)} is no length for a lease"
        yield Remark("queue.lease", problem, "write a duration from 5s to 10m")
    if queue.password_file is not None:
        yield from consider_secret("queue.password_file", queue.password_file)


def _consider_dkim(config: Config) -> Iterator[Remark]:
    if not config.dkim.domains:
        return
    from relay.sign.keys import KeyFileError, load_key

    for name, domain in config.dkim.domains.items():
        try:
            load_key(Path(domain.key_file))
        except KeyFileError as error:
            cure = "correct the path, or make a key with `relay dkim-key`"
            yield Remark(f"dkim.domains.{name}.key_file", f"{domain.key_file}: {error}", cure)


def _consider_tls_reports(config: Config) -> Iterator[Remark]:
    """A report that is not signed counts for nothing (RFC 8460 §3)."""
    options = config.tls_reports
    if not options.send:
        return
    submitter = options.submitter(config.hostname)
    domain = domain_of(submitter.sender)
    if domain not in config.dkim.domains:
        problem = (
            f"reports come from {submitter.sender}, and {domain} has no key under dkim.domains"
        )
        cure = "make one with `relay dkim-key`, or name another address under tls_reports.from"
        yield Remark("tls_reports.send", problem, cure)
    if options.organization is None or options.contact is None:
        names = [key for key in ("organization", "contact") if getattr(options, key) is None]
        given = {"organization": submitter.organization, "contact": submitter.contact}
        problem = " and ".join(f"{key}: {given[key]}" for key in names)
        problem = f"who reads a report is told the default, {problem}"
        keys = " and ".join(f"tls_reports.{key}" for key in names)
        yield Remark("tls_reports.send", problem, f"write {keys}", is_fatal=False)
