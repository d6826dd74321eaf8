"""`relay policy suggest`: rules that the mail of before would have met, as YAML to paste."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import click

from relay.cli.common import age, age_text, answers, config_file, config_option, load_config
from relay.mail.jsontext import JsonDocument
from relay.mail.printable import printable

if TYPE_CHECKING:
    from relay.policy.rules import DestinationRule

    Rules = Mapping[str, DestinationRule]

_DAY = timedelta(days=1)
_NAMED = 10
"""Domains named of those without a suggestion."""
_REASONS = {
    "too-few": "fewer than --messages {messages}, or less than --age {age} from first to last",
    "in-clear": "mail in clear",
    "alarm": "an alarm under way (relay memory list --alarm)",
    "has-rule": "a rule with require_tls already",
}


@click.command()
@click.option(
    "--messages",
    type=click.IntRange(1, 1_000_000_000),
    default=10,
    show_default=True,
    help="The least number of messages to go by.",
)
@click.option(
    "--age",
    "least_age",
    callback=age,
    default="7d",
    show_default=True,
    metavar="TIME",
    help="The least time to go by, from the first message to the last.",
)
@click.option("--json", "as_json", is_flag=True, help="As one JSON array, for programs.")
@config_option
@click.pass_context
def suggest(ctx: click.Context, /, messages: int, least_age: timedelta, as_json: bool) -> None:
    """Suggest rules for recipient domains, as YAML to paste.

    Goes by what the relay remembers (relay memory list): a domain all of whose mail went over
    verified TLS can have require_tls: true, and no message seen would have been stopped. Where it
    all went in TLS, but not all verified, the rule has skip_verification: true as well. What went
    before the last exception does not count. A message may ask for less than a rule, and gets
    it; with `allow_override: false` in the rule none does. On stderr stands for which domains there
    is no suggestion, and why. Also works while no relay is running.
    """
    config = load_config(config_file(ctx))
    request = {"verb": "memory-suggest", "messages": messages, "seconds": least_age.total_seconds()}
    found = [line["item"] for line in answers(config, request) if "item" in line]
    rules = config.policy.destinations
    suggestions = [one for one in found if "rule" in one and not _has_rule(one["domain"], rules)]
    if as_json:
        click.echo(json.dumps(suggestions, indent=2))
    elif suggestions:
        click.echo("\n".join(_yaml(suggestions, rules)))
    without: dict[str, list[str]] = {}
    for one in found:
        if one not in suggestions:
            without.setdefault(one.get("reason", "has-rule"), []).append(one["domain"])
    for reason, domains in sorted(without.items()):
        why = _REASONS[reason].format(messages=messages, age=age_text(least_age))
        click.echo(f"no suggestion for {_named(domains)}: {why}", err=True)
    if not found:
        click.echo("nothing is remembered yet: no mail was delivered by MX records", err=True)


def _named(domains: list[str]) -> str:
    """`3 domains (a.example, b.example, c.example)`, or the first of many."""
    names = ", ".join(map(printable, domains[:_NAMED]))
    more = ", …" if len(domains) > _NAMED else ""
    return f"{len(domains)} domain{'' if len(domains) == 1 else 's'} ({names}{more})"


def _has_rule(domain: str, rules: Rules) -> bool:
    """Whether the rules of the file require TLS of a domain already."""
    from relay.policy.rules import PolicyRules, resolve

    only = PolicyRules(destinations=rules)
    return resolve(only, reverse_path="", recipient_domain=domain).require_tls.value


def _yaml(suggestions: Iterable[JsonDocument], rules: Rules) -> Iterator[str]:
    yield "# A message may ask for less than a rule, and gets it. With allow_override: false in the"
    yield "# rule no message gets less; mail that asked for it before may wait then."
    yield "policy:"
    yield "  destinations:"
    for one in suggestions:
        yield f"    # {_why(one)}"
        rule = rules.get(one["domain"])
        if rule is not None:
            yield f"    # {one['domain']} has a rule: the keys of both are here, in its place"
        said = ", ".join(f"{key}: {_word(value)}" for key, value in _joined(one["rule"], rule))
        yield f"    {_key(one['domain'])}: {{{said}}}"


def _why(one: JsonDocument) -> str:
    """`412 messages in 30d, all verified, by mx1.partner.example`."""
    first, last = (datetime.fromisoformat(one[key]) for key in ("first", "last"))
    how = "all in TLS, not all verified" if "skip_verification" in one["rule"] else "all verified"
    hosts = ", ".join(map(printable, one["hosts"][:3])) + (", …" if len(one["hosts"]) > 3 else "")
    count = one["messages"]
    plural = "" if count == 1 else "s"
    return f"{count} message{plural} in {age_text(last - first)}, {how}, by {hosts}"


def _joined(
    suggested: dict[str, bool], rule: DestinationRule | None
) -> Iterator[tuple[str, object]]:
    """The keys of a suggestion, and those of the rule that it takes the place of."""
    import dataclasses

    yield from suggested.items()
    for field in dataclasses.fields(rule) if rule is not None else ():
        value = getattr(rule, field.name)
        if field.name not in suggested and value != field.default:
            yield field.name, value


def _word(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _key(domain: str) -> str:
    """A domain as a key of YAML: quoted where it begins with what YAML has a meaning for, or might
    be read as a number.
    """
    return domain if domain[0].isalpha() and "." in domain else json.dumps(domain)
