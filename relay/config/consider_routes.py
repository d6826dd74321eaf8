"""What is wrong together in `routes`, `routes_by_sender`, `next_hops` and `oauth2`.

Looks into the files that these keys name. Where mail could never go as the keys say, the mistake is
fatal. A warning is for what works, and not as its author may think.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from urllib.parse import urlsplit

from relay.config.files import (
    bad_roots,
    consider_certificate,
    consider_openness,
    consider_secret,
    not_by_systemd,
)
from relay.config.remark import Remark
from relay.config.sections import Config
from relay.receive.spec import ListenerAuth
from relay.route.addresses import Address, parse_address, parse_address_literal
from relay.route.family import why_unusable
from relay.route.mx import hop_host_names
from relay.route.next_hop import NO_CHAIN, Auth, AuthMechanism, Grant, NextHop, TlsMode, TokenSource
from relay.route.secret_files import SecretFileError, place_of, read_text, shown_path


def consider_routes(config: Config) -> Iterator[Remark]:
    yield from _consider_names(config)
    yield from _consider_senders(config)
    yield from _consider_users(config)
    for key, hop in _next_hops(config):
        yield from _consider_hosts(f"{key}.hosts", hop)
        yield from _consider_login(key, hop)
        yield from _consider_proofs(key, hop)
        yield from _consider_connection(key, hop)
        yield from _consider_limits(config, key, hop)
    for name, source in config.oauth2.items():
        yield from _consider_source(f"oauth2.{name}", source)


def _next_hops(config: Config) -> Iterator[tuple[str, NextHop]]:
    """Each next hop, with the key that it stands under."""
    for name, hop in config.next_hops.items():
        yield f"next_hops.{name}", hop
    for section, routes in _routes(config):
        for pattern, to in routes.items():
            if isinstance(to, NextHop):
                yield f"{section}.{pattern}", to


def _routes(config: Config) -> Iterator[tuple[str, Mapping[str, str | NextHop]]]:
    yield "routes", config.routes
    yield "routes_by_sender", config.routes_by_sender


# --- names ----------------------------------------------------------------------------------------


def _consider_names(config: Config) -> Iterator[Remark]:
    """A name leads to what it names, and everything is named somewhere."""
    hops = dict(_named_next_hops(config))
    sources = {
        f"{key}.auth.oauth2": hop.auth.oauth2
        for key, hop in _next_hops(config)
        if hop.auth is not None and hop.auth.oauth2 is not None
    }
    for section, known, named in (
        ("next_hops", config.next_hops, hops),
        ("oauth2", config.oauth2, sources),
    ):
        for key, name in named.items():
            if name not in known:
                yield _unknown(key, name, known, section)
        for name in known:
            if name not in named.values():
                problem, cure = "nothing leads to it", "name it where it is meant, or remove it"
                yield Remark(f"{section}.{name}", problem, cure, is_fatal=False)
    keys: dict[str, str] = {}
    for key, hop in _next_hops(config):
        if hop.name in keys:
            problem = f"{keys[hop.name]} is a next hop of this name, too"
            yield Remark(key, problem, "put one of them under next_hops, by another name")
        keys.setdefault(hop.name, key)


def _named_next_hops(config: Config) -> Iterator[tuple[str, str]]:
    """Each key that names a next hop, and the name."""
    for section, routes in _routes(config):
        for pattern, to in routes.items():
            if isinstance(to, str):
                yield f"{section}.{pattern}", to
    for user in config.access.users.values():
        if user.next_hop is not None:
            yield f"access.users.{user.name}.next_hop", user.next_hop
    for i, listener in enumerate(config.listeners):
        if listener.next_hop is not None:
            yield f"listeners.{i}.next_hop", listener.next_hop


def _unknown(key: str, name: str, known: Collection[str], section: str) -> Remark:
    there = f"write one of {', '.join(known)}, or add" if known else "add"
    cure = f"{there} {section}.{name}"
    if "." in name and key.startswith("routes"):
        cure += f"; a host is written as {{host: {name}}}"
    return Remark(key, f"{section} has no {name}", cure)


def _consider_senders(config: Config) -> Iterator[Remark]:
    """A route of the recipient's comes before one of the sender's, as the order of the rules says:
    that is no mistake. Senders' routes that no client's mail can take are one.
    """
    has_others = config.admin.serves_http or any(
        listener.next_hop is None for listener in config.listeners
    )
    if config.routes_by_sender and not has_others:
        problem = "no client's mail takes them: every listener has a next_hop, which comes first"
        cure = "remove next_hop from a listener, or remove routes_by_sender"
        yield Remark("routes_by_sender", problem, cure, is_fatal=False)


def _consider_users(config: Config) -> Iterator[Remark]:
    """A user's next hop is for mail of a client that has logged in as this user."""
    if any(listener.auth is not ListenerAuth.NONE for listener in config.listeners):
        return
    for user in config.access.users.values():
        if user.next_hop is not None:
            problem = "no effect: no listener lets users log in"
            cure = "write auth: optional or required, and tls, at a listener"
            yield Remark(f"access.users.{user.name}.next_hop", problem, cure, is_fatal=False)


def _consider_hosts(key: str, hop: NextHop) -> Iterator[Remark]:
    """Each host is there once, and its name is a whole one."""
    counted = Counter(hop_host_names(hop))
    for name, times in counted.items():
        if times > 1:
            problem = f"{name} is there {times} times, and counts once, where it stands first"
            yield Remark(key, problem, "remove the others", is_fatal=False)
        if "." not in name and _address_of(name) is None and name != "localhost":
            problem = f"{name} has no dot, and names are looked up as they are written"
            cure = f"write the whole name, as in {name}.example.net"
            yield Remark(key, problem, cure, is_fatal=False)


# --- logins ---------------------------------------------------------------------------------------

_BY_TOKEN = {AuthMechanism.XOAUTH2, AuthMechanism.OAUTHBEARER}
_BY_PASSWORD = {AuthMechanism.PLAIN, AuthMechanism.LOGIN}


def _consider_login(at: str, hop: NextHop) -> Iterator[Remark]:
    auth, key = hop.auth, f"{at}.auth"
    if auth is None:
        return
    yield from _consider_mechanism(key, auth, has_certificate=hop.certificate is not None)
    if auth.password_file is not None:
        yield from consider_secret(f"{key}.password_file", auth.password_file)
    if hop.verify_name is None and not hop.pin_sha256 and any(map(_address_of, hop.every_host())):
        problem = "no certificate can be for an address, so the login would wait for ever"
        cure = "name the host, or the name in its certificate under verify_name"
        yield Remark(f"{at}.hosts", problem, cure, is_fatal=False)


def _consider_mechanism(key: str, auth: Auth, *, has_certificate: bool) -> Iterator[Remark]:
    """The mechanism has what it says, and all that is given is said."""
    mechanism, has_password = auth.mechanism, auth.password_file is not None
    if mechanism in _BY_TOKEN and auth.oauth2 is None:
        cure = "name the source of its tokens under auth.oauth2"
        yield Remark(f"{key}.mechanism", f"{mechanism} without oauth2", cure)
    elif mechanism in _BY_PASSWORD and not has_password:
        yield Remark(f"{key}.mechanism", f"{mechanism} without password_file", "add it")
    elif mechanism is AuthMechanism.EXTERNAL and not has_certificate:
        problem = "external without a certificate that says who the relay is"
        yield Remark(f"{key}.mechanism", problem, "add certificate: to the next hop")
    elif mechanism is AuthMechanism.AUTO and not (has_password or auth.oauth2 or has_certificate):
        problem = "username and password_file belong together"
        yield Remark(key, problem, "give both, or oauth2, or neither")
    if auth.username is None and (has_password or auth.oauth2 is not None):
        problem = "username and password_file belong together" if has_password else "no username"
        yield Remark(key, problem, "add username: with the name of the account")
    yield from _consider_unused(key, auth)


def _consider_unused(key: str, auth: Auth) -> Iterator[Remark]:
    """A login has one proof, and what would never be said is a mistake about which one."""
    mechanism, has_password = auth.mechanism, auth.password_file is not None
    if mechanism is AuthMechanism.EXTERNAL:
        for name in ("password_file", "oauth2"):
            if getattr(auth, name) is not None:
                problem = "no effect with mechanism external: the certificate says who the relay is"
                yield Remark(f"{key}.{name}", problem, "remove it, or write another mechanism")
    elif has_password and auth.oauth2 is not None:
        if mechanism in _BY_PASSWORD:
            problem = f"no effect with mechanism {mechanism}, which sends the password"
            cure = "remove it; or write mechanism: xoauth2 and remove password_file"
            yield Remark(f"{key}.oauth2", problem, cure)
        else:
            problem = "no effect beside oauth2, whose token is sent"
            cure = "remove it; or remove oauth2, if the host is to get the password"
            yield Remark(f"{key}.password_file", problem, cure)


def _consider_source(key: str, source: TokenSource) -> Iterator[Remark]:
    """Each grant has keys of its own."""
    for name in _NEEDS[source.grant]:
        if getattr(source, name) is None:
            problem = f"is missing: the grant {source.grant} needs it"
            yield Remark(f"{key}.{name}", problem, f"add {name}: with its value")
    useless = [
        name
        for grant, names in _USES.items()
        for name in names
        if grant is not source.grant
        and name not in _USES[source.grant]
        and getattr(source, name) is not None
    ]
    for name in dict.fromkeys(useless):
        problem = f"no effect with the grant {source.grant}"
        yield Remark(f"{key}.{name}", problem, "remove it", is_fatal=False)
    if source.client_secret_file is not None:
        yield from consider_secret(f"{key}.client_secret_file", source.client_secret_file)
    if source.key_file is not None:
        yield from consider_secret(f"{key}.key_file", source.key_file)
        yield from _consider_service_key(f"{key}.key_file", source.key_file)
    if _is_in(urlsplit(source.device_url or "").hostname or "", "googleapis.com"):
        problem, cure = "Google gives no scope for Gmail by device code", "see docs/routes.md"
        yield Remark(f"{key}.device_url", problem, cure, is_fatal=False)
    if source.refresh_token_file is not None and source.grant is Grant.REFRESH_TOKEN:
        yield from _consider_refresh_token(source.name, source.refresh_token_file)


_NEEDS = {
    Grant.CLIENT_CREDENTIALS: ("token_url", "client_id", "client_secret_file"),
    Grant.SERVICE_ACCOUNT: ("key_file", "scope"),
    Grant.REFRESH_TOKEN: ("token_url", "client_id", "refresh_token_file"),
}
_USES = {
    Grant.CLIENT_CREDENTIALS: ("token_url", "client_id", "client_secret_file", "scope"),
    Grant.SERVICE_ACCOUNT: ("token_url", "key_file", "subject", "scope"),
    Grant.REFRESH_TOKEN: (
        "token_url",
        "client_id",
        "client_secret_file",
        "scope",
        "refresh_token_file",
        "device_url",
    ),
}


def _consider_service_key(key: str, path: str) -> Iterator[Remark]:
    from relay.route.service_account import ServiceKey  # and with it cryptography: 30 ms

    try:
        ServiceKey.parse(read_text(path))
    except ValueError as error:
        yield Remark(key, f"{path}: {error}", "download a key of the service account as JSON")
    except SecretFileError:
        return  # which is said already


def _consider_refresh_token(name: str, path: str) -> Iterator[Remark]:
    """`relay login` writes the file, so the configuration is right before there is one."""
    key = f"oauth2.{name}.refresh_token_file"
    try:
        is_there = place_of(path).exists()
    except (OSError, SecretFileError):
        is_there = True
    if is_there:
        yield from consider_secret(key, path)
    else:
        problem = f"{shown_path(path)}: there is no token yet, and mail waits for it"
        yield Remark(key, problem, f"`relay login {name}`", is_fatal=False)


# --- what proves who is who -----------------------------------------------------------------------


def _consider_proofs(key: str, hop: NextHop) -> Iterator[Remark]:
    if hop.certificate is not None:
        yield from _consider_certificate(key, hop.certificate, hop.key)
    elif hop.key is not None:
        yield Remark(f"{key}.key", "a key without a certificate", "name its certificate, too")
    if hop.ca_file == NO_CHAIN:
        if not hop.pin_sha256:
            problem = "no chain and no pin: nothing would prove who the host is"
            yield Remark(f"{key}.ca_file", problem, "add pin_sha256, or name a file of roots")
        if hop.verify_name is not None:
            problem = "no effect with ca_file: none, where the pins prove who the host is"
            yield Remark(f"{key}.verify_name", problem, "remove it", is_fatal=False)
    elif hop.ca_file is not None and (trouble := bad_roots(hop.ca_file)):
        cure = "give a file of PEM certificates, or none where pins are enough"
        yield Remark(f"{key}.ca_file", f"{hop.ca_file}: {trouble}", cure)
    if len(set(hop.pin_sha256)) == 1:
        problem = "one pin alone: mail waits from the day on which the host has another key"
        cure = "add the pin of the key that it will have next"
        yield Remark(f"{key}.pin_sha256", problem, cure, is_fatal=False)


def _consider_certificate(key: str, certificate: str, private_key: str | None) -> Iterator[Remark]:
    try:
        place = place_of(certificate)
        key_place = place_of(private_key) if private_key is not None else None
    except SecretFileError as error:
        yield not_by_systemd(f"{key}.certificate", error)
        return
    found = list(
        consider_certificate(str(place), str(key_place) if key_place is not None else None, key)
    )
    yield from found
    if not found:
        in_file = "certificate" if key_place is None else "key"
        yield from consider_openness(f"{key}.{in_file}", key_place or place)


# --- connections ----------------------------------------------------------------------------------


def _consider_connection(key: str, hop: NextHop) -> Iterator[Remark]:
    if hop.port == 465 and hop.tls is TlsMode.STARTTLS:
        problem, cure = "port 465 speaks TLS from the first octet", "write tls: implicit"
        yield Remark(f"{key}.port", problem, cure, is_fatal=False)
    if hop.port in (25, 587) and hop.tls is TlsMode.IMPLICIT:
        problem, cure = f"port {hop.port} speaks STARTTLS", "write tls: starttls, or port: 465"
        yield Remark(f"{key}.tls", problem, cure, is_fatal=False)
    yield from _consider_families(key, hop)


def _consider_families(key: str, hop: NextHop) -> Iterator[Remark]:
    """The address to connect from and those to connect to are of the same family."""
    source = parse_address(hop.source_address) if hop.source_address is not None else None
    if source is not None and why_unusable(hop, source):
        problem = f"{hop.source_address} is no address of ip_family: {hop.ip_family}"
        yield Remark(f"{key}.source_address", problem, "change one of the two")
        return
    said = "source_address" if source is not None else "ip_family"
    for host in hop.every_host():
        address = _address_of(host)
        if address is not None and why_unusable(hop, address):
            problem = f"{host} cannot be reached with {said}: {getattr(hop, said)}"
            yield Remark(f"{key}.hosts", problem, "change one of the two")


def _address_of(host: str) -> Address | None:
    return parse_address_literal(host) or parse_address(host)


# --- limits ---------------------------------------------------------------------------------------

_PROVIDERS = ("office365.com", "gmail.com", "amazonaws.com")
"""They turn away, or block, who sends faster or over more connections than they allow."""


def _consider_limits(config: Config, key: str, hop: NextHop) -> Iterator[Remark]:
    provider = next((p for host in hop.every_host() for p in _PROVIDERS if _is_in(host, p)), None)
    if provider is not None:
        missing = [name for name in ("rate", "max_connections") if getattr(hop, name) is None]
        if missing:
            problem = f"{' and '.join(missing)} missing, and {provider} limits both"
            cure = "write what the provider allows your account (docs/routes.md)"
            yield Remark(key, problem, cure, is_fatal=False)
    name = min(
        ("concurrency", "concurrency_per_destination"),
        key=lambda name: int(getattr(config.delivery, name)),
    )
    most = getattr(config.delivery, name)
    if hop.max_connections is not None and hop.max_connections > most:
        problem = f"more than delivery.{name} ({most}), of all workers together, which holds"
        cure = f"lower it, or raise delivery.{name}"
        yield Remark(f"{key}.max_connections", problem, cure, is_fatal=False)


def _is_in(host: str, domain: str) -> bool:
    return host == domain or host.endswith(f".{domain}")
