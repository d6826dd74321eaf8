"""A container with --own-networks relays for its neighbours, and for nobody behind a gateway."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from relay.cli import networks


def around(
    monkeypatch: pytest.MonkeyPatch, interfaces: list[str], gateways: list[str]
) -> list[networks.Network]:
    found = [ipaddress.ip_interface(one) for one in interfaces]
    monkeypatch.setattr(networks, "_ipv4", lambda: [one for one in found if one.version == 4])
    monkeypatch.setattr(networks, "_ipv6", lambda: [one for one in found if one.version == 6])
    monkeypatch.setattr(
        networks, "_gateways", lambda: [ipaddress.ip_address(one) for one in gateways]
    )
    return networks.own_networks()


def holds(found: list[networks.Network], address: str) -> bool:
    return any(ipaddress.ip_address(address) in network for network in found)


def test_neighbours_may_relay_and_a_gateway_and_the_world_may_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = around(
        monkeypatch,
        ["127.0.0.1/8", "172.17.0.2/16", "fd00::2/64", "fe80::1/64"],
        ["172.17.0.1", "fd00::1"],
    )
    for neighbour in ("172.17.0.3", "172.17.255.253", "fd00::3"):
        assert holds(found, neighbour)
    for stranger in (
        "172.17.0.1",
        "172.17.0.2",
        "fd00::1",
        "fd00::2",
        "172.18.0.1",
        "8.8.8.8",
        "fe80::9",
    ):
        assert not holds(found, stranger)


@pytest.mark.parametrize(
    ("interfaces", "gateways", "strangers", "neighbours"),
    [
        pytest.param(
            ["172.17.0.2/16", "172.18.0.5/16"],
            ["172.17.0.1"],
            ["172.18.0.1", "172.18.255.254", "172.18.0.5", "172.18.0.0"],
            ["172.18.0.2", "172.18.0.4", "172.17.0.9"],
            id="the gateway of a second bridge has no route",
        ),
        pytest.param(
            ["10.89.0.3/24"],
            [],
            ["10.89.0.1", "10.89.0.254", "10.89.0.3"],
            ["10.89.0.2", "10.89.0.100"],
            id="an internal network has no route at all",
        ),
        pytest.param(
            ["fd00:1::5/64"],
            [],
            ["fd00:1::", "fd00:1::1", "fd00:1::ffff:ffff:ffff:ffff", "fd00:1::5"],
            ["fd00:1::2", "fd00:1::6"],
            id="an internal network of IPv6",
        ),
        pytest.param(
            ["10.1.2.9/24"],
            ["10.1.2.77"],
            ["10.1.2.77"],
            ["10.1.2.76"],
            id="a gateway in the middle",
        ),
        pytest.param(
            ["11.1.0.2/24", "2a00::2/64", "100.64.0.2/10"],
            [],
            ["11.1.0.3", "2a00::3", "100.64.0.3"],
            [],
            id="neighbours in a public network are strangers",
        ),
        pytest.param(
            ["10.9.9.1/31", "10.8.8.8/32"],
            [],
            ["10.9.9.0", "10.9.9.1", "10.8.8.8"],
            [],
            id="two ends",
        ),
    ],
)
def test_no_gateway_of_any_network_may_relay(
    monkeypatch: pytest.MonkeyPatch,
    interfaces: list[str],
    gateways: list[str],
    strangers: list[str],
    neighbours: list[str],
) -> None:
    found = around(monkeypatch, interfaces, gateways)
    assert [one for one in strangers if holds(found, one)] == []
    assert [one for one in neighbours if not holds(found, one)] == []


def test_networks_that_were_configured_stay(tmp_path: Path) -> None:
    config = tmp_path / "relay.yaml"
    config.write_text("access: {networks: [10.0.0.0/8]}")
    assert networks.with_own_networks({}, config) == {}
    config.write_text("access:\nqueue: {path: spool}")
    said = {"RELAY__ACCESS__NETWORKS": "[10.0.0.0/8]"}
    assert networks.with_own_networks(said, config) == said
    for text in ("access:\n", "", "[", "[" * 2000, "access: no"):
        config.write_text(text)
        assert "127.0.0.0/8" in networks.with_own_networks({}, config)["RELAY__ACCESS__NETWORKS"]


def test_this_machine_knows_its_networks() -> None:
    for network in networks.own_networks():
        assert not network.is_loopback
