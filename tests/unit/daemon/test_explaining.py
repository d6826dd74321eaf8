"""What `relay explain` says of a message, its domain and its hosts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from relay.cli.explain import _print
from relay.daemon.explaining import explain
from relay.policy.fields import Wishes
from relay.policy.rules import DestinationRule, PolicyRules
from relay.policy.settings import FloorUse
from relay.route.floor import StsFloor
from relay.route.mta_sts import StsMode
from relay.route.next_hop import Host, Hosts, NextHop, RouteChoice, RouteRule
from relay.route.security import SecurityOptions
from tests.fakes.floors import Published, floors_of

NAME = "mx.dest.example"
LOCKED = DestinationRule(allow_override=False)
TESTED = StsFloor(
    "dest.example", StsMode.TESTING, "1", ("mx.else.example",), published=StsMode.ENFORCE
)

HOP = NextHop("provider", (("smtp.provider.example",),))


async def told(
    rule: DestinationRule | None = None,
    *,
    wishes: Wishes | None = None,
    published: Published | None = None,
    choice: RouteChoice | None = None,
    **speaks: bool,
) -> dict[str, Any]:
    rules = PolicyRules(destinations={"dest.example": rule} if rule else {})

    async def route(domain: str, /, reverse_path: str = "", next_hop: str = "") -> Hosts:
        hosts = (Host(NAME, "192.0.2.7", 25, 10, tlsa_bases=(NAME,)),)
        return Hosts(hosts, choice=choice or RouteChoice())

    return await explain(
        reverse_path="a@from.example",
        recipient="b@dest.example",
        wishes=wishes or Wishes(),
        rules=rules,
        route=route,
        options=SecurityOptions(),
        floors=floors_of(published or Published(), rules),
        patience=timedelta(seconds=1),
        lifetime=timedelta(days=5),
        **speaks,
    )


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (DestinationRule(require_tls=True), "a message may weaken this: yes"),
        (LOCKED, "a message may weaken this: no  (a rule has allow_override: false)"),
        (DestinationRule(mx=(NAME,)), f"allowed by the configuration: yes (mx: {NAME})"),
        (DestinationRule(mta_sts=FloorUse.IGNORE), "MTA-STS: not looked up, by the configuration"),
        (None, "MTA-STS: no policy"),
    ],
)
async def test_explain_says_what_the_rule_of_the_domain_does(rule, said, capsys):
    _print(await told(rule))
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("choice", "line", "rule"),
    [
        (RouteChoice(), "next hop:          MX  from: no route applies", "mx"),
        (
            RouteChoice(RouteRule.RECIPIENT, "*.example", HOP),
            'next hop:          provider  from: routes: "*.example"',
            "recipient",
        ),
        (
            RouteChoice(RouteRule.ALL, "*", HOP),
            'next hop:          provider  from: routes: "*"',
            "all",
        ),
        (
            RouteChoice(RouteRule.SENDER, "a@from.example", HOP),
            'next hop:          provider  from: routes_by_sender: "a@from.example"',
            "sender",
        ),
        (
            RouteChoice(RouteRule.CLIENT, hop=HOP),
            "next hop:          provider  from: next_hop of the user or the listener",
            "client",
        ),
    ],
)
async def test_explain_says_which_next_hop_and_by_which_rule(choice, line, rule, capsys):
    answer = await told(choice=choice)
    _print(answer)
    assert line in capsys.readouterr().out
    assert answer["route"]["rule"] == rule
    assert answer["route"]["next-hop"] == (choice.hop.name if choice.hop else None)


async def test_explain_says_what_tls_required_no_turned_off(capsys):
    answer = await told(published=Published(sts=[TESTED]), tls_required_no=True)
    _print(answer)
    out = capsys.readouterr().out
    assert answer["waived"] == "tls-required-no"
    assert "MTA-STS: not looked up: the message says TLS-Required: No" in out
    assert "TLSA records: not looked up: the message says TLS-Required: No" in out
    assert "tls-required-no:   yes  from: message" in out


@pytest.mark.parametrize(
    ("rule", "asked", "why"),
    [
        (LOCKED, {}, "a rule has allow_override: false"),
        (None, {"wishes": Wishes(require_tls=True)}, "the message says X-Require-TLS: yes"),
        (None, {"requiretls": True}, "the message has REQUIRETLS"),
    ],
)
async def test_explain_says_why_tls_required_no_is_refused(rule, asked, why, capsys):
    answer = await told(rule, tls_required_no=True, **asked)
    _print(answer)
    out = capsys.readouterr().out
    assert answer["tls-required-no-refused"] == why
    assert f"tls-required-no:   no  refused: {why}" in out
    assert "tls-required-no:   yes" not in out


async def test_explain_says_that_a_policy_in_testing_mode_does_not_name_the_host(capsys):
    rule = DestinationRule(mta_sts=FloorUse.TESTING)
    answer = await told(rule, published=Published(sts=[TESTED]))
    _print(answer)
    out = capsys.readouterr().out
    assert answer["mta-sts"]["published-mode"] == "enforce"
    assert "MTA-STS: testing (the domain says enforce), mx.else.example" in out
    assert (
        "the MTA-STS policy does not name this host: with enforce, no mail would go here"
        " (the domain says enforce, the configuration testing)"
    ) in out


@pytest.mark.parametrize(
    ("rule", "speaks", "said"),
    [
        (DestinationRule(mx=("mx.else.example",)), {}, "result: deferred 4.7.5, bounced after 5d"),
        (None, {"requiretls": True}, "result: bounced 5.7.10, at once"),
        (None, {}, None),
    ],
)
async def test_explain_says_what_becomes_of_a_message_that_no_host_may_get(
    rule, speaks, said, capsys
):
    answer = await told(rule, **speaks)
    _print(answer)
    last = capsys.readouterr().out.splitlines()[-1]
    assert (answer["result"] is None) == (said is None)
    assert last == said or said is None
