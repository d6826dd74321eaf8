"""The installations under examples/: what they hand to the relay is a configuration, and what they
hand to Kubernetes are its resources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import argon2
import kubernetes_validate
import pytest
import yaml

from relay.config import Config, read
from relay.queue.server_address import parse_url
from relay.route.next_hop import NextHop

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = list(yaml.safe_load_all((ROOT / "examples/kubernetes/relay.yaml").read_text()))
COMPOSE = yaml.safe_load((ROOT / "examples/compose.yaml").read_text())
NODES = yaml.safe_load((ROOT / "examples/compose-nodes.yaml").read_text())
CONTAINER = (ROOT / "conf/container.yaml").read_text()
PAGE_PASSWORD = ROOT / "examples/page-password.txt"
CATCHER = NextHop("*", (("catcher.example.net",),), port=1025)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    (tmp_path / "api-keys").write_text("a-key\n")
    return str(tmp_path / "api-keys")


@pytest.mark.parametrize("resource", KUBERNETES, ids=lambda resource: resource["kind"])
def test_a_resource_is_one_that_kubernetes_takes(resource: dict[str, Any]) -> None:
    newest = kubernetes_validate.latest_version()
    kubernetes_validate.validate(resource, newest, strict=True)  # raises where it is not


def test_the_configuration_for_kubernetes_is_one(keys: str) -> None:
    [text] = [one["data"]["relay.yaml"] for one in KUBERNETES if one["kind"] == "ConfigMap"]
    mounted = re.sub(r"/run/secrets/relay/api-keys", keys, text)
    assert mounted != text
    assert_serves_neighbours(read(mounted, {}, source="relay.yaml"))


def with_secrets(service: dict[str, Any], keys: str) -> dict[str, str]:
    """The environment of a service; the secrets it names are files of this machine."""
    environment = dict(service["environment"])
    assert environment["RELAY__ADMIN__API_KEYS_FILE"] == "/run/secrets/api-keys"
    environment["RELAY__ADMIN__API_KEYS_FILE"] = keys
    for name, text in environment.items():
        environment[name] = text.replace("/run/secrets/page-password", str(PAGE_PASSWORD))
    return environment


def assert_page_opens(config: Config, text: str) -> None:
    """To the user and the password that stand above the installation."""
    [password] = re.findall(r"user `operator`,\n# password `([^`]+)`", text)
    user = config.admin.web.users["operator"]
    assert user.role == "operator"
    assert user.password is not None
    assert argon2.PasswordHasher().verify(user.password, password)
    assert config.admin.web.insecure


def test_the_environment_of_compose_is_a_configuration(keys: str) -> None:
    environment = with_secrets(COMPOSE["services"]["relay"], keys)
    config = read(CONTAINER, environment, source="relay.yaml")
    assert_serves_neighbours(config)
    assert_page_opens(config, (ROOT / "examples/compose.yaml").read_text())
    assert config.routes["*"] == CATCHER


RELAYS = [name for name in NODES["services"] if name.startswith("relay-")]


@pytest.mark.parametrize("name", RELAYS)
def test_environment_of_each_node_is_a_configuration(name: str, keys: str) -> None:
    environment = with_secrets(NODES["services"][name], keys)
    password = "password_file: /run/secrets/postgres"
    assert password in environment["RELAY__QUEUE"]
    environment["RELAY__QUEUE"] = environment["RELAY__QUEUE"].replace(
        password, f"password_file: {keys}"
    )
    config = read(CONTAINER, environment, source="relay.yaml")
    assert_serves_neighbours(config)
    assert_page_opens(config, (ROOT / "examples/compose-nodes.yaml").read_text())
    assert config.listeners[0].proxy_protocol
    assert config.routes["*"] == CATCHER
    location = config.queue.location
    assert location.is_shared
    assert location.node == name.replace("relay", "mx")
    assert location.url is not None
    assert [host for host, _ in parse_url(location.url).hosts] == ["primary", "standby"]


def test_only_the_balancer_reaches_the_nodes_and_it_knows_each() -> None:
    """Whoever reaches an address with the PROXY protocol may say that it is any client."""
    text = NODES["configs"]["haproxy"]["content"]
    assert re.findall(r"server mx-\d (\S+):2525", text) == RELAYS
    assert "send-proxy-v2" in text
    assert {name for name, one in NODES["services"].items() if "clients" in one["networks"]} == {
        "application",
        "balancer",
    }


def test_services_of_the_nodes_refer_to_nothing_that_is_missing() -> None:
    for name, service in NODES["services"].items():
        assert set(service.get("depends_on", ())) <= set(NODES["services"]), name
        assert {one["source"] for one in service.get("configs", ())} <= set(NODES["configs"]), name
        assert set(service.get("secrets", ())) <= set(NODES["secrets"]), name
        assert {one.partition(":")[0] for one in service.get("volumes", ())} <= set(
            NODES["volumes"]
        ), name
    for secret in NODES["secrets"].values():
        assert (ROOT / "examples" / secret["file"]).read_text().strip()


@pytest.mark.needs("haproxy")
def test_haproxy_takes_the_configuration_of_the_balancer(tmp_path: Path) -> None:
    (tmp_path / "haproxy.cfg").write_text(NODES["configs"]["haproxy"]["content"])
    program = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program is not None
    done = subprocess.run(
        [program, "-c", "-f", str(tmp_path / "haproxy.cfg")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["replication", "follow"])
def test_script_of_a_server_is_one(script: str) -> None:
    text = NODES["configs"][script]["content"].replace("$$", "$")
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def assert_serves_neighbours(config: Config) -> None:
    assert config.listeners[0].address == "0.0.0.0:2525"
    assert config.admin.http == "0.0.0.0:8025"
    assert config.admin.api_keys == ("a-key",)
    assert (config.log.delivery, config.log.format) == ("/dev/stdout", "json")


def test_uvx_finds_the_command_by_the_name_of_the_distribution() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"][project["name"]] == project["scripts"]["relay"]


def test_every_library_of_the_program_is_locked_with_its_hashes() -> None:
    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    locked = (ROOT / "requirements.lock").read_text().lower()
    for one in wanted:
        [name] = re.findall(r"^[A-Za-z0-9-]+", one)
        found = re.search(rf"^{name.lower()}==[^\\]*\\\n    --hash=sha256:", locked, re.MULTILINE)
        assert found, f"{name}: `make lock`"
