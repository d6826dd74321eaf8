"""Tables of a Postfix that choose a next hop by sender lead mail to the same host once imported."""

from __future__ import annotations

import smtplib

import pytest

from relay.policy.postfix_senders import by_pattern, imported_senders
from relay.route.choice import Routes, choose
from relay.route.next_hop import NextHop
from tests.fakes.waiting import patient
from tests.rigs.ports import free_port, open_directory, wait_until
from tests.rigs.postfix import postfix
from tests.rigs.sink import Sink, sink

RELAYHOSTS = """\
@a.example {relayhost}
@b.example {relayhost}
bot@b.example {transport}
@c.example {relayhost}
@d.example {relayhost}
"""
TRANSPORTS = """\
@a.example smtp:{transport}
@c.example smtp:
@d.example DUNNO
@e.example relay:{transport}
"""
SENDERS = (
    "x@a.example",
    "x@b.example",
    "Bot@B.example",
    "x@c.example",
    "x@d.example",
    "x@e.example",
    "x@sub.e.example",
    "x@f.example",
)


@pytest.mark.needs("root", "postfix")
def test_mail_of_each_sender_goes_where_postfix_sent_it() -> None:
    with (
        open_directory("relay-test-senders-", "/tmp") as directory,
        sink("127.0.0.60") as by_relayhost,
        sink("127.0.0.61") as by_transport,
        sink("127.0.0.62") as by_default,
    ):
        hosts = {"relayhost": by_relayhost, "transport": by_transport, "default": by_default}
        next_hops = {name: f"[{host.address}]:{host.port}" for name, host in hosts.items()}
        tables = {}
        for name, text in (("relayhosts", RELAYHOSTS), ("transports", TRANSPORTS)):
            tables[name] = text.format(**next_hops)
            (directory / name).write_text(tables[name])
            (directory / name).chmod(0o644)
        settings = {
            "sender_dependent_relayhost_maps": f"texthash:{directory}/relayhosts",
            "sender_dependent_default_transport_maps": f"texthash:{directory}/transports",
            "relayhost": next_hops["default"],
        }
        port = free_port()
        with postfix(settings, port=port, name="senders"):
            for sender in SENDERS:
                with smtplib.SMTP("127.0.0.1", port, timeout=patient(30)) as client:
                    client.sendmail(sender, "r@dest.example", f"Subject: {sender}\r\n\r\nx\r\n")
            wait_until(lambda: len(_came_out(hosts)) == len(SENDERS), what="all mail")
        assert _came_out(hosts) == _chosen(tables, hosts)


def _came_out(hosts: dict[str, Sink]) -> dict[str, str]:
    """Each sender, with the host that got its mail."""
    return {sender: name for name, host in hosts.items() for sender in host.tokens(set(SENDERS))}


def _chosen(tables: dict[str, str], hosts: dict[str, Sink]) -> dict[str, str]:
    """The same by the rules that the import makes."""
    lines = by_pattern(
        imported_senders(tables[name], has_transports=name == "transports")
        for name in ("transports", "relayhosts")
    )
    names = {host.port: name for name, host in hosts.items()}
    by_sender = {
        each.pattern: NextHop(names[each.hop.port], ((each.hop.hosts[0],),))
        for each in lines
        if each.hop is not None
    }
    routes = Routes({"*": NextHop("default", (("d",),))}, by_sender)
    return {sender: choose(routes, "dest.example", sender).next_hop for sender in SENDERS}
