"""What a response of a name server says: names, aliases, and what is not there.

It uses the types of dnspython and opens nothing.
"""

from __future__ import annotations

import dns.exception
import dns.message
import dns.name
import dns.rdatatype
import dns.resolver


class BadName(Exception):
    """A name that cannot be in the DNS."""


class NotAnAnswer(Exception):
    """A response without an answer to the question."""


def absolute(name: str) -> dns.name.Name:
    """A name with its root, so that no search list applies."""
    try:
        with_root = dns.name.from_text(name, dns.name.root)
    except (dns.exception.DNSException, UnicodeError, ValueError) as exc:
        raise BadName(name) from exc
    if with_root == dns.name.root:
        raise BadName(name)
    return with_root


def alias_target(name: str, answer: dns.resolver.Answer) -> str:
    """The normalised name at the end of the aliases of `name`."""
    canonical = text_of(answer.chaining_result.canonical_name).lower()
    return "" if canonical == name.removesuffix(".").lower() else canonical


def text_of(name: dns.name.Name) -> str:
    return name.to_text(omit_final_dot=True) if len(name) > 1 else ""


def unfinished(answer: dns.resolver.Answer) -> dns.name.Name | None:
    """The name to ask for next if a response ends at an alias; None if it is complete.

    A resolver that found no data at the end of the aliases adds an SOA record (RFC 2308 §2.2).
    """
    chain = answer.chaining_result
    if answer.rrset is not None or not chain.cnames or _has_soa(answer.response):
        return None
    return chain.canonical_name


def refuse_referral(response: dns.message.Message) -> None:
    """Refuse a referral: it does not mean "no such data" (RFC 2308 §2.2), the server is lame."""
    has_ns = any(rrset.rdtype == dns.rdatatype.NS for rrset in response.authority)
    if has_ns and not _has_soa(response):
        raise NotAnAnswer("the name server refers to others instead of answering")


def _has_soa(response: dns.message.Message) -> bool:
    return any(rrset.rdtype == dns.rdatatype.SOA for rrset in response.authority)


def negative_ttl(exc: dns.resolver.NXDOMAIN) -> float:
    responses = exc.kwargs.get("responses", {}).values()
    return min((response.resolve_chaining().minimum_ttl for response in responses), default=0.0)


def failure(exc: dns.resolver.NoNameservers) -> str:
    """The failure of the last server that was asked: a sentence instead of dnspython's list."""
    errors = exc.kwargs.get("errors") or []
    if not errors:
        return "no name server answered"
    server, _, _, what, _ = errors[-1]
    said = what if isinstance(what, str) else type(what).__name__
    return f"{said} from {server.removeprefix('Do53:')}"
