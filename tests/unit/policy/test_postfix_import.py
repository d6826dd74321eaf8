"""What a line of a Postfix TLS policy table means in rules of ours."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.deliver.tls import TlsContexts
from relay.policy.postfix_import import ImportedLine, imported, imported_level
from relay.policy.postfix_remarks import NEVER_USED, Difference, OurTls, PostfixNextHop
from relay.policy.postfix_table import PostfixLevel
from relay.policy.rules import DestinationRule, PolicyRules, floor_rules, resolve
from relay.policy.settings import FloorUse
from relay.route.security import TlsVersion

TABLE = Path(__file__).parents[2] / "fixtures" / "smtp_tls_policy"
STRICTER, NO_EQUIVALENT, NO_EFFECT = Difference

ANY_TLS = DestinationRule(require_tls=False, skip_verification=True)
TLS = DestinationRule(require_tls=True, skip_verification=True, allow_override=False)
VERIFIED = DestinationRule(require_tls=True, skip_verification=False, allow_override=False)
DANE = DestinationRule(
    require_tls=False, skip_verification=True, allow_override=False, dane=FloorUse.ENFORCE
)


def one(line: str, tls: OurTls | None = None) -> ImportedLine:
    [found] = imported(line, tls or OurTls())
    return found


def differences(each: ImportedLine) -> set[Difference]:
    return {remark.difference for remark in each.remarks}


def pinned(*mx: str) -> DestinationRule:
    return DestinationRule(require_tls=True, skip_verification=False, allow_override=False, mx=mx)


@pytest.mark.parametrize(
    ("value", "rule", "told"),
    [
        ("may", ANY_TLS, set()),
        ("none", ANY_TLS, {STRICTER}),
        ("encrypt", TLS, set()),
        ("dane", DANE, set()),
        ("verify", VERIFIED, set()),
        ("verify match=hostname", VERIFIED, set()),
        ("secure match=hostname", VERIFIED, set()),
        ("fingerprint match=aa:bb", VERIFIED, {NO_EQUIVALENT}),
        ("nonsense", VERIFIED, {NO_EQUIVALENT}),
        ("verify tafile=/a.pem", VERIFIED, {NO_EQUIVALENT}),
        ("secure", pinned("d.example", "*.d.example"), {STRICTER}),
        ("secure match=nexthop", pinned("d.example"), {STRICTER}),
        ("verify match=mx.d.example", pinned("mx.d.example"), {STRICTER}),
        (
            "secure match=.farm.example:MX.d.example",
            pinned("*.farm.example", "mx.d.example"), {STRICTER},
        ),
        ("secure match=hostname:nexthop", VERIFIED, {STRICTER}),
        ("secure match=*.farm.example", pinned("*.farm.example"), {STRICTER, NO_EQUIVALENT}),
        ("secure match=-", VERIFIED, {STRICTER, NO_EQUIVALENT}),
        ("secure match=localhost", VERIFIED, {STRICTER, NO_EQUIVALENT}),
        ("secure match=.com", VERIFIED, {STRICTER, NO_EQUIVALENT}),
        ("secure match=[192.0.2.1]", VERIFIED, {STRICTER, NO_EQUIVALENT}),
        ("encrypt protocols=>=TLSv1.2", TLS, set()),
        ("encrypt protocols=!SSLv2:!SSLv3", TLS, {STRICTER}),
        ("encrypt protocols=>=TLSv1.3", TLS, {NO_EQUIVALENT}),
        ("encrypt protocols=TLSv1.2", TLS, {STRICTER}),
        ("encrypt protocols=>=TLSv1.3:<=TLSv1.2", TLS, {NO_EQUIVALENT}),
        ("may protocols=>=TLSv1.2", ANY_TLS, {STRICTER}),
        ("may protocols=!SSLv2:!SSLv3", ANY_TLS, set()),
        ("dane protocols=>=TLSv1.3", DANE, {STRICTER, NO_EQUIVALENT}),
        ("encrypt ciphers=high exclude=aNULL,RC4", VERIFIED, {NO_EQUIVALENT}),  # a comma ends it
        ("encrypt ciphers=high exclude=aNULL:RC4", TLS, set()),
        ("encrypt ciphers=medium", TLS, {STRICTER}),
        ("may ciphers=high", ANY_TLS, {STRICTER}),
        ("encrypt exclude=AES128", TLS, {NO_EQUIVALENT}),
        ("may exclude=AES128", ANY_TLS, {STRICTER}),
        ("dane exclude=AES128", DANE, {NO_EQUIVALENT}),
        ("encrypt servername=hostname", TLS, set()),
        ("encrypt servername=x.example", TLS, {NO_EQUIVALENT}),
        ("encrypt connection_reuse=no", TLS, {NO_EFFECT}),
        ("encrypt enable_rpk=yes", TLS, {STRICTER}),
        ("encrypt enable_rpk=no", TLS, set()),
        ("encrypt policy_type=sts", TLS, {NO_EFFECT}),
    ],
)  # fmt: skip
def test_a_value_becomes_a_rule_and_what_differs_is_told(
    value: str, rule: DestinationRule, told: set[Difference]
) -> None:
    found = one(f"d.example {value}")
    assert (found.rule, found.domains, differences(found)) == (rule, ("d.example",), told)


def test_dane_as_a_must_is_the_strictest_rule_and_has_no_equivalent() -> None:
    found = one("d.example dane-only")
    assert found.rule is not None
    assert (found.rule.require_tls, found.rule.skip_verification) == (True, False)
    assert found.rule.dane is FloorUse.ENFORCE
    assert not found.has_equivalent


def test_a_version_that_our_configuration_asks_for_anyway_is_the_same() -> None:
    tls = OurTls(min_version="TLSv1.3", opportunistic_min_version="TLSv1.2")
    assert one("d.example encrypt protocols=>=TLSv1.3", tls).remarks == ()
    assert one("d.example may protocols=>=TLSv1.2", tls).remarks == ()


@pytest.mark.parametrize(
    ("key", "domains"),
    [
        ("Example.COM", ("example.com",)),
        (".example.com", ("*.example.com",)),
        ("bücher.example", ("xn--bcher-kva.example",)),
        ("*", ()),
        ("bob@example.com", ()),
        ("example.com.", ()),
        ("*.example.com", ()),
        ("unix:/var/run/lmtp", ()),
        ("192.0.2.1", ()),
    ],
)
def test_a_key_that_postfix_never_looks_for_has_no_rule(key: str, domains: tuple[str, ...]) -> None:
    found = one(f"{key} encrypt")
    assert found.domains == domains
    assert (found.rule is None) is (domains == ())
    assert differences(found) == (set() if domains else {NO_EFFECT})


def test_a_pattern_cannot_have_the_names_of_each_of_its_domains() -> None:
    found = one(".example.com secure")
    assert found.rule == pinned("*.example.com")
    assert differences(found) == {STRICTER, NO_EQUIVALENT}
    assert one(".example.com verify").remarks == ()


ROUTES = OurTls(
    routes=(
        ("a.example", PostfixNextHop("gw.example", 587)),
        ("*.a.example", PostfixNextHop("gw.example", 587)),
        ("b.example", PostfixNextHop("192.0.2.25")),
        ("c.example", PostfixNextHop("2001:db8::25")),
    )
)


@pytest.mark.parametrize(
    ("key", "domains"),
    [
        ("[gw.example]:587", ("a.example", "*.a.example")),
        ("[GW.example]:submission", ("a.example", "*.a.example")),
        ("[192.0.2.25]", ("b.example",)),
        ("[192.0.2.25]:smtp", ("b.example",)),
        ("[ipv6:2001:db8:0::25]:25", ("c.example",)),
        ("[2001:db8::25]", ("c.example",)),
    ],
)
def test_a_next_hop_is_for_the_domains_whose_route_leads_there(
    key: str, domains: tuple[str, ...]
) -> None:
    found = one(f"{key} encrypt", ROUTES)
    assert (found.rule, found.domains, found.remarks) == (TLS, domains, ())


@pytest.mark.parametrize("key", ["[gw.example]", "[gw.example]:25", "[gw.example]:nonsense"])
def test_a_next_hop_that_no_route_leads_to_has_no_equivalent(key: str) -> None:
    found = one(f"{key} encrypt", ROUTES)
    assert (found.rule, differences(found)) == (None, {NO_EQUIVALENT})


@pytest.mark.parametrize("key", [r"/\.example\.com$/", "!/^mx/i"])
def test_a_regular_expression_has_no_equivalent(key: str) -> None:
    assert differences(one(f"{key} encrypt")) == {NO_EQUIVALENT}


def test_a_next_hop_by_mx_records_has_no_equivalent() -> None:
    assert differences(one("example.com:587 encrypt", ROUTES)) == {NO_EQUIVALENT}


@pytest.mark.parametrize(
    ("match", "told"),
    [
        ("hostname", set()),
        ("nexthop", set()),
        ("gw.example", set()),
        ("other.example", {STRICTER}),
        ("nexthop:dot-nexthop", {STRICTER}),
    ],
)
def test_route_names_the_host_of_a_next_hop(match: str, told: set[Difference]) -> None:
    found = one(f"[gw.example]:587 secure match={match}", ROUTES)
    assert (found.rule, differences(found)) == (VERIFIED, told)


def test_a_domain_that_a_route_leads_elsewhere_is_not_looked_for() -> None:
    text = "a.example may\nsub.a.example encrypt\nb.example encrypt\n[gw.example]:587 encrypt\n"
    lines = {each.line.key: each for each in imported(text, ROUTES)}
    assert lines["a.example"].rule is lines["sub.a.example"].rule is None
    assert lines["b.example"].rule == TLS  # no line for its next hop: what protects is kept
    assert differences(lines["b.example"]) == {STRICTER}
    assert lines["[gw.example]:587"].domains == ("a.example", "*.a.example")


def test_a_rule_without_protection_is_not_kept_beside_a_route() -> None:
    assert one("b.example may", ROUTES).rule is None


def test_the_next_hop_of_all_mail_is_the_default() -> None:
    tls = OurTls(routes=(("*", PostfixNextHop("smart.example", 587)),))
    found = one("[smart.example]:587 secure match=nexthop", tls)
    assert (found.rule, found.domains) == (VERIFIED, ("",))


def test_first_of_two_lines_with_one_key_counts() -> None:
    first, second = imported("D.example encrypt\nd.example none\n", OurTls())
    assert (first.rule, second.rule) == (TLS, None)
    assert differences(second) == {NO_EFFECT}
    assert "line 1" in second.remarks[0].text


def test_two_spellings_of_one_next_hop_are_one_rule() -> None:
    first, second = imported("[192.0.2.25] encrypt\n[192.0.2.25]:25 verify\n", ROUTES)
    assert (first.rule, second.rule) == (TLS, None)
    assert differences(second) == {NO_EQUIVALENT}


def test_a_rule_that_inherits_the_hosts_of_a_pattern_says_so() -> None:
    text = ".a.example secure match=.a.example\nsub.a.example encrypt\na.example encrypt\n"
    by_key = {each.line.key: each for each in imported(text, OurTls())}
    assert differences(by_key["sub.a.example"]) == {STRICTER}
    assert by_key["a.example"].remarks == ()


@pytest.mark.parametrize("level", list(PostfixLevel))
def test_the_level_for_all_is_the_rule_of_the_level(level: PostfixLevel) -> None:
    found = imported_level(level)
    [line] = imported(f"d.example {level}", OurTls())
    assert found.rule is not None
    assert line.rule is not None
    assert (found.rule.require_tls, found.rule.dane) == (line.rule.require_tls, line.rule.dane)
    assert found.domains == ("",)


def rules_of(text: str) -> PolicyRules:
    lines = imported(text, OurTls())
    return PolicyRules(
        destinations={d: each.rule for each in lines if each.rule for d in each.domains}
    )


def test_nothing_of_a_wider_rule_shows_through() -> None:
    rules = rules_of(".a.example dane\nsub.a.example verify\n.sub.a.example may\n")
    for domain, expected in (("sub.a.example", (True, False)), ("x.sub.a.example", (False, True))):
        settings = resolve(rules, reverse_path="a@b.example", recipient_domain=domain)
        assert (settings.require_tls.value, settings.skip_verification.value) == expected


KEYS = st.sampled_from(
    ["a.example", ".a.example", "b.a.example", "[gw.example]:587", "x", "*", "[192.0.2.25]"]
)
VALUES = st.sampled_from(
    ["may", "none", "encrypt", "secure", "verify match=nexthop:.x.example", "dane", "", "x y"]
)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=8), st.sampled_from([OurTls(), ROUTES]))
def test_every_line_is_there_once_and_every_domain_has_one_rule(
    pairs: list[tuple[str, str]], tls: OurTls
) -> None:
    lines = imported("".join(f"{key} {value}\n" for key, value in pairs), tls)
    assert [each.line.number for each in lines] == list(range(1, len(pairs) + 1))
    domains = [domain for each in lines if each.rule for domain in each.domains]
    assert len(domains) == len(set(domains))
    assert all(each.rule is not None or each.remarks for each in lines)


def test_the_hosts_of_the_old_table_are_those_that_its_lines_name() -> None:
    rules = rules_of(TABLE.read_text("utf-8"))
    assert floor_rules(rules, "bank.example").pins == ("bank.example", "*.bank.example")
    assert floor_rules(rules, "court.example").pins is None
    assert floor_rules(rules, "hosting.example").dane is FloorUse.ENFORCE


def test_ciphers_said_never_to_be_used_are_not_offered_where_tls_is_required() -> None:
    offered = {
        cipher["name"] for cipher in TlsContexts().verifying(TlsVersion.TLS_1_2).get_ciphers()
    }
    others = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in NEVER_USED:
        try:
            others.set_ciphers(f"{name}:@SECLEVEL=0")
        except ssl.SSLError:
            continue  # OpenSSL has none of that name
        named = {cipher["name"] for cipher in others.get_ciphers()}
        assert {each for each in named & offered if not each.startswith("TLS_")} == set(), name


def test_every_cipher_that_is_offered_where_tls_is_required_is_of_grade_high() -> None:
    offered = {
        cipher["name"] for cipher in TlsContexts().verifying(TlsVersion.TLS_1_2).get_ciphers()
    }
    high = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    high.set_ciphers("HIGH:@SECLEVEL=0")
    assert offered <= {cipher["name"] for cipher in high.get_ciphers()}
