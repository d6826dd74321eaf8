"""`relay policy import postfix`: a Postfix TLS policy table as rules of ours, in YAML.

What each line means is decided in `relay.policy.postfix_import`; here it is written down, with
everything that differs beside the rule and, once more, on stderr.
"""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import IO, Any

import click

from relay.cli.common import config_file, config_is_named, config_option, fail, load_config
from relay.config import Config
from relay.config.parts import routes_of
from relay.mail.printable import printable
from relay.policy.postfix_files import HIDDEN, PostfixFile, holds_secret, kind_of
from relay.policy.postfix_import import ImportedLine, imported, imported_level
from relay.policy.postfix_remarks import Difference, OurTls, PostfixNextHop
from relay.policy.postfix_senders import ImportedSender, by_pattern, imported_senders
from relay.policy.postfix_table import PostfixLevel
from relay.policy.rules import DestinationRule

_WIDTH = 100
_TYPE = re.compile(r"^(?:hash|btree|lmdb|cdb|dbm|sdbm|texthash|regexp|pcre):(?=.)")
_UNREADABLE_SHOWN = 20
"""Characters shown of a line that is no rule: it may be of a key, by a wrong file name."""

_FOR_ALL_LINES = """\
The relay obeys what a domain publishes under every rule: its MTA-STS policy (policy.mta_sts), and
TLSA records, which alone judge the certificate (policy.dane). Postfix reads TLSA records at the
levels dane and dane-only.
Where TLS is required, the relay uses {min_version} or later, 112 bits or more, and a certificate.
Postfix uses TLSv1 or later, if protocols= says nothing else.
The names of a certificate are those of its subjectAltName; Postfix takes the common name where
there are none. Authorities are those of the system and of tls.ca_file; in Postfix, those of
smtp_tls_CAfile and smtp_tls_CApath.
The import assumes that smtp_tls_verify_cert_match and smtp_tls_secure_cert_match are as by
default."""


_FOR_ALL_SENDERS = """\
Made by `relay policy import postfix` from tables that choose a next hop by sender.
What is to be said by hand: a login (smtp_sasl_password_maps) is `auth`, with username and
password_file; where a recipient's transport (transport_maps) comes first, that is a route."""


_CURES = {
    PostfixFile.TLS_POLICIES: "name it as FILE",
    PostfixFile.LOGINS: "no option reads it: a login is auth of a next hop, its password stands in"
    " password_file (docs/moving-from-postfix.md)",
    PostfixFile.MAIN_CF: "name the tables that it names; its smtp_tls_security_level is --level",
    PostfixFile.TRANSPORTS: "no option reads it: write its lines under routes"
    " (docs/moving-from-postfix.md)",
    PostfixFile.SENDER_TRANSPORTS: "--sender-transports reads it",
    PostfixFile.SENDER_RELAYHOSTS: "--sender-relayhosts reads it",
}
"""What to do with a file that stands where another is wanted."""


class _Source(click.File):
    """The source of a table, also named as main.cf names the table: `hash:/etc/postfix/table`."""

    def convert(
        self,
        value: str | os.PathLike[str] | IO[Any],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> IO[Any]:
        if isinstance(value, str):
            if not value.strip():
                self.fail("is empty: name the source of the table, or - for stdin", param, ctx)
            value = _TYPE.sub("", value)
        return super().convert(value, param, ctx)


_SOURCE = _Source(encoding="utf-8", errors="backslashreplace")


@click.group("import")
@config_option
def import_() -> None:
    """Read the TLS rules of another program, and print them as rules of the relay."""


@import_.command()
@click.argument("file", metavar="[FILE]", type=_SOURCE, required=False)
@click.option(
    "--level",
    type=click.Choice([str(level) for level in PostfixLevel]),
    help="smtp_tls_security_level of main.cf, for domains that FILE does not name: it becomes"
    " policy.default.",
)
@click.option(
    "--sender-relayhosts",
    metavar="FILE",
    type=_SOURCE,
    help="The source of sender_dependent_relayhost_maps.",
)
@click.option(
    "--sender-transports",
    metavar="FILE",
    type=_SOURCE,
    help="The source of sender_dependent_default_transport_maps.",
)
@config_option
@click.pass_context
def postfix(
    ctx: click.Context,
    /,
    file: IO[str] | None,
    level: str | None,
    sender_relayhosts: IO[str] | None,
    sender_transports: IO[str] | None,
) -> None:
    """Print a Postfix TLS policy table (smtp_tls_policy_maps) as YAML to paste, and its tables that
    choose a next hop by sender as next_hops and routes_by_sender.

    FILE is the source of the table, such as /etc/postfix/tls_policy, also as main.cf has it
    (hash:/etc/postfix/tls_policy); it is not the database (.db); - is stdin. The rules go to
    stdout, each below the line it was made from. What differs from Postfix is said beside the rule
    and on stderr, with the number of the line:

    \b
      stricter       the rule protects at least as well, and in some situation better:
                     mail may wait that Postfix sent
      no equivalent  no rule does the same; the line gets the nearest rule, if there is one
      no effect      Postfix ignores it, too, or it is about speed only

    Of two possible rules the command prints the one that protects more. A key such as [host]:587
    is a next hop: its rule is for the domains whose `routes` in the configuration (-c) lead there,
    so write the routes first.

    The exit status is 1 if something has no equivalent, or if a file is another of Postfix (a table
    of logins, main.cf); nothing of such a file is shown. Else it is 0.

    \b
      relay policy import postfix /etc/postfix/tls_policy --level may > policy.yaml
      relay check -c policy.yaml --file-only
    """
    by_sender = (sender_relayhosts, sender_transports)
    if file is None and by_sender == (None, None):
        raise click.UsageError("name the FILE of the TLS policies, or a table of senders")
    is_whole = True
    if file is not None or level is not None:
        is_whole = _import_tls(file, level, _config(ctx))
    if by_sender != (None, None):
        is_whole = _import_senders(*by_sender) and is_whole
    sys.exit(0 if is_whole else 1)


def _import_tls(file: IO[str] | None, level: str | None, config: Config) -> bool:
    """Print the TLS policies; whether each of them has an equivalent."""
    source = file.name if file is not None else "--level"
    text = _text(file, PostfixFile.TLS_POLICIES) if file is not None else ""
    lines = imported(text, _our_tls(config))
    if lines and not any(line.is_readable for line in lines):
        fail(f"{printable(source)}: no line is a rule, such as `partner.example encrypt`")
    if level is not None and not any("" in line.domains for line in lines):
        lines = (imported_level(PostfixLevel(level)), *lines)
    for text in _told(lines, source):
        click.echo(text, err=True)
    for text in _document(lines, source, config):
        click.echo(text)
    return all(line.has_equivalent for line in lines)


def _import_senders(relayhosts: IO[str] | None, transports: IO[str] | None) -> bool:
    """Print the next hops by sender; whether each line has an equivalent."""
    tables = [
        (file.name, imported_senders(_text(file, wanted), has_transports=file is transports))
        for file, wanted in (
            (transports, PostfixFile.SENDER_TRANSPORTS),
            (relayhosts, PostfixFile.SENDER_RELAYHOSTS),
        )
        if file is not None
    ]
    for source, lines in tables:
        for each in lines:
            for remark in each.remarks:
                place = f"{source}:{each.line.number}: {each.shown_key}"
                click.echo(printable(f"{place}: {remark.difference}: {remark.text}"), err=True)
    for text in _routes(tables):
        click.echo(text)
    return all(each.has_equivalent for _, lines in tables for each in lines)


def _routes(tables: Sequence[tuple[str, Sequence[ImportedSender]]]) -> Iterator[str]:
    for paragraph in _FOR_ALL_SENDERS.split("\n"):
        yield from _comment(paragraph, "")
    obeyed = by_pattern(lines for _, lines in tables)
    hops = {each.hop.name: each.hop for each in obeyed if each.hop is not None}
    yield "next_hops:" if hops else "next_hops: {}"
    for name, hop in hops.items():
        yield f"  {_scalar(name)}:"
        yield f"    hosts: [{', '.join(map(json.dumps, hop.hosts))}]"
        yield f"    port: {hop.port}"
        yield from ["    tls: implicit"] if hop.port == 465 else []
    yield "routes_by_sender:" if hops else "routes_by_sender: {}"
    for source, lines in tables:
        for each in lines:
            yield from _comment(f"{source}, line {each.line.number}: {each.shown}", "  ")
            for remark in each.remarks:
                yield from _comment(f"  {remark.difference}: {remark.text}", "  ")
            if each.hop is not None and each in obeyed:
                yield f"  {_scalar(each.pattern)}: {{next_hop: {_scalar(each.hop.name)}}}"


def _text(file: IO[str], wanted: PostfixFile) -> str:
    """The text of a file, which is none of another kind."""
    text = file.read()
    if "\0" in text:
        fail(
            f"{printable(file.name)}: it is not text (it has NUL octets); name the file that the"
            " database was made from"
        )
    kind = kind_of(text, wanted)
    if kind is not None and kind is not wanted:
        # Nothing of the file is quoted: the passwords of a Postfix stand in such files.
        fail(f"{printable(file.name)}: {kind}, and no {wanted.removeprefix('a ')}; {_CURES[kind]}")
    return text


def _config(ctx: click.Context) -> Config:
    """The configuration, for its routes; without one, the defaults."""
    path = config_file(ctx)
    is_there = config_is_named(ctx) or path.exists()
    return load_config(path, only_to_ask=True) if is_there else Config()


def _our_tls(config: Config) -> OurTls:
    return OurTls(
        str(config.tls.min_version),
        str(config.tls.opportunistic_min_version),
        tuple(
            (pattern, PostfixNextHop(host, hop.port))
            for pattern, hop in routes_of(config).by_recipient.items()
            for host in hop.every_host()
        ),
    )


def _told(lines: Iterable[ImportedLine], source: str) -> Iterator[str]:
    """What differs, a remark a line."""
    for each in lines:
        place = f"{source}:{each.line.number}" if each.line.number else "--level"
        for remark in each.remarks:
            key = _as_shown(each, each.line.key)
            yield printable(f"{place}: {key}: {remark.difference}: {remark.text}")


def _document(lines: tuple[ImportedLine, ...], source: str, config: Config) -> Iterator[str]:
    yield from _comment(_summary(lines, source), "")
    yield "#"
    for paragraph in _FOR_ALL_LINES.format(min_version=config.tls.min_version).split("\n"):
        yield from _comment(paragraph, "")
    yield "policy:"
    for each, rule in _ruled(lines):
        if "" in each.domains:
            yield from _explained(each, "  ")
            yield from _rule("default", replace(rule, dane=None, mx=()), "  ")
            if rule.dane is not None:
                yield f"  dane: {rule.dane}"
    named = [each for each in lines if each.domains != ("",)]
    yield "  destinations:" if any(each.rule for each in named) else "  destinations: {}"
    for each in named:
        yield from _explained(each, "    ")
        for domain in filter(None, each.domains):
            if each.rule is not None:
                yield from _rule(domain, each.rule, "    ")


def _ruled(lines: Iterable[ImportedLine]) -> Iterator[tuple[ImportedLine, DestinationRule]]:
    return ((each, each.rule) for each in lines if each.rule is not None)


def _summary(lines: tuple[ImportedLine, ...], source: str) -> str:
    def has(each: ImportedLine, difference: Difference) -> bool:
        return any(one.difference is difference for one in each.remarks)

    from_table = [each for each in lines if each.line.number]
    without = sum(not each.has_equivalent for each in from_table)
    strict = sum(each.has_equivalent and has(each, Difference.STRICTER) for each in from_table)
    return (
        f"Made from {source} by `relay policy import postfix`: {len(from_table)} lines, of which"
        f" {without} have no equivalent and {strict} are stricter here."
    )


def _explained(each: ImportedLine, indent: str) -> Iterator[str]:
    """The line as it was, and what differs, as comments."""
    place = f"line {each.line.number}" if each.line.number else "--level"
    yield from _comment(f"{place}: {_as_shown(each, each.shown)}", indent)
    for remark in each.remarks:
        yield from _comment(f"  {remark.difference}: {remark.text}", indent)


def _as_shown(each: ImportedLine, text: str) -> str:
    """Text of a line, of one that is no rule only the beginning."""
    if not each.is_readable and holds_secret(each.line.key):
        return HIDDEN
    if each.is_readable or len(text) <= _UNREADABLE_SHOWN:
        return text
    return f"{text[:_UNREADABLE_SHOWN]}…"


def _comment(text: str, indent: str) -> Iterator[str]:
    further = f"{indent}# {' ' * (len(text) - len(text.lstrip()) + 2)}"
    yield from textwrap.wrap(
        printable(text),
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=further,
        break_on_hyphens=False,
    )


def _rule(name: str, rule: DestinationRule, indent: str) -> Iterator[str]:
    yield f"{indent}{_scalar(name)}:"
    yield f"{indent}  require_tls: {json.dumps(rule.require_tls)}"
    yield f"{indent}  skip_verification: {json.dumps(rule.skip_verification)}"
    if not rule.allow_override:
        yield f"{indent}  allow_override: false"
    if rule.mx:
        yield f"{indent}  mx: [{', '.join(map(_scalar, rule.mx))}]"
    if rule.dane is not None:
        yield f"{indent}  dane: {rule.dane}"


def _scalar(text: str) -> str:
    """A domain or pattern, quoted where YAML would read it as something else."""
    is_plain = re.fullmatch(r"default|[a-z][a-z0-9-]*(\.[a-z0-9_-]+)+", text)
    return text if is_plain else json.dumps(text)
