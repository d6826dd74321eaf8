"""`relay route`: the next hops of the configuration, and which mail takes which."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import click

from relay.cli.common import LazyGroup, config_file, config_option, fail, load_config, not_empty
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable

if TYPE_CHECKING:
    from relay.config import Config
    from relay.route.next_hop import NextHop

_COMMANDS = {"test": "relay.cli.route_trial:test"}


@click.group(cls=LazyGroup, lazy=_COMMANDS)
@config_option
def route() -> None:
    """Look at the next hops of the configuration, which mail goes to instead of the MX hosts."""


class _Way(NamedTuple):
    """A rule that leads to a next hop: `recipient`, `user`, `listener` or `sender`, and whose."""

    rule: str
    pattern: str
    hop: NextHop


@route.command("list")
@click.option("--json", "as_json", is_flag=True, help="As one JSON array, for programs.")
@config_option
@click.pass_context
def list_(ctx: click.Context, /, as_json: bool) -> None:
    """Say where each rule of the configuration leads, in the order in which they are asked.

    The first rule that applies to a message decides: a recipient's domain, the user who logged in
    or the listener, the sender, and at last the recipient "*". `relay explain` says it for one
    message.
    """
    config = load_config(config_file(ctx))
    ways = list(_ways(config))
    if as_json:
        found = [{"rule": w.rule, "pattern": w.pattern, "next-hop": w.hop.name} for w in ways]
        click.echo(json.dumps(found, indent=2))
        return
    lines = [(way.rule, way.pattern, f"{way.hop.name}: {_hosts_text(way.hop)}") for way in ways]
    lines.append(("otherwise", "", "MX hosts of the recipient's domain"))
    width = max(len(printable(pattern)) for _, pattern, _ in lines)
    for rule, pattern, leads_to in lines:
        click.echo(f"{rule:<9}  {printable(pattern):<{width}}  {printable(leads_to)}".rstrip())


@route.command()
@click.argument("name", metavar="NAME", callback=not_empty)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, for programs.")
@config_option
@click.pass_context
def show(ctx: click.Context, /, name: str, as_json: bool) -> None:
    """Show the keys of one next hop, and what leads to it.

    NAME is a name from next_hops; for a next hop that stands in a route itself, the pattern it
    stands under. Secrets stand in files, and are not read.
    """
    import yaml

    from relay.config.document import next_hop_as_document

    config = load_config(config_file(ctx))
    keys = next_hop_as_document(named_next_hop(config, name))
    ways = [way for way in _ways(config) if way.hop.name == name]
    if as_json:
        taken = [{"rule": way.rule, "pattern": way.pattern} for way in ways]
        answer: JsonDocument = {"name": name, "keys": keys, "taken-by": taken}
        click.echo(json.dumps(answer, indent=2))
        return
    click.echo(yaml.safe_dump({name: keys}, sort_keys=False, allow_unicode=True), nl=False)
    for way in ways:
        click.echo(f"# {way.rule} {printable(way.pattern)}")
    if not ways:
        click.echo("# nothing leads to it")


def named_next_hop(config: Config, name: str) -> NextHop:
    """The next hop of this name; fails where there is none."""
    from relay.config.parts import routes_of

    hops = routes_of(config).every_next_hop()
    if name not in hops:
        there = f"there is {', '.join(map(printable, hops))}" if hops else "there is none"
        fail(f"no next hop is called {printable(name)}: {there}")
    return hops[name]


def _ways(config: Config) -> Iterator[_Way]:
    """Each rule with its next hop, in the order in which they are asked."""
    from relay.config.parts import routes_of

    routes = routes_of(config)
    for pattern in sorted(routes.by_recipient, key=_exactness):
        if pattern != "*":
            yield _Way("recipient", pattern, routes.by_recipient[pattern])
    for user in config.access.users.values():
        if user.next_hop is not None:
            yield _Way("user", user.name, routes.next_hops[user.next_hop])
    for listener in config.listeners:
        if listener.next_hop is not None:
            yield _Way("listener", listener.address, routes.next_hops[listener.next_hop])
    for pattern in sorted(routes.by_sender, key=_exactness):
        yield _Way("sender", pattern, routes.by_sender[pattern])
    if "*" in routes.by_recipient:
        yield _Way("recipient", "*", routes.by_recipient["*"])


def _exactness(pattern: str) -> tuple[int, int, str]:
    """Addresses, domains, and then the longer "*." first."""
    kind = 0 if "@" in pattern else 2 if pattern.startswith("*.") else 1
    return kind, -pattern.count("."), pattern


def _hosts_text(hop: NextHop) -> str:
    """`a, b; then c, port 587, login as relay@example.com`."""
    words = ["; then ".join(", ".join(equals) for equals in hop.hosts), f"port {hop.port}"]
    if hop.auth is not None:
        words.append(f"login as {hop.auth.username}" if hop.auth.username else "login")
    return ", ".join(words)
