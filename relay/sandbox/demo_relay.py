"""`relay demo --run`: a relay to try out, whose mail stays on this machine.

It is the relay of the configuration with these changes: mail for `*.example`, example.com,
example.net and example.org goes to a built-in host (`relay.sandbox.catcher`), over verified TLS;
the web page has a user for this run, and says on every page that this is a demonstration. So the
first message is delivered without a network, and also where port 25 is blocked.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path

import click
import yaml
from argon2 import PasswordHasher

from relay.config import Config, ConfigError, as_document, load
from relay.daemon import Demonstration, serve
from relay.sandbox.catcher import Catcher

CAUGHT = ("*.example", "example.com", "example.net", "example.org")

_NOTE = (
    "This is the demonstration: mail for *.example and example.com, .net and .org"
    " ends in a built-in host and does not leave this machine."
)
_USER = "demo"


def main(path: Path, environ: Mapping[str, str]) -> int:
    """Run until a signal ends it; the exit code."""
    try:
        config = load(path, environ)
    except ConfigError:
        return serve(path, environ)  # says what is wrong
    directory = Path(config.queue.path).parent / "demo"
    password = secrets.token_urlsafe(9)
    with Catcher(directory) as catcher:
        hashed = PasswordHasher().hash(password)
        over = overlay(config, environ, catcher.port, catcher.ca_file, hashed)
        line = (
            f"relay: demonstration, page http://{config.admin.http or '127.0.0.1:8025'}/"
            f" (sign in: {_USER} / {password}); end with Ctrl-C"
        )
        demo = Demonstration(caught=catcher.find, announce=lambda: click.echo(line))
        return serve(path, {**environ, **over}, demo=demo)


def overlay(
    config: Config, environ: Mapping[str, str], port: int, ca_file: Path, password: str
) -> dict[str, str]:
    """The changes to the configuration, as environment variables."""
    document = as_document(config, with_secrets=True)
    routes = document["routes"] | {name: {"host": "localhost", "port": port} for name in CAUGHT}
    users = document["admin"]["web"]["users"] | {_USER: {"password": password, "role": "operator"}}
    fixed = {
        "RELAY__ROUTES": _as_text(routes),
        "RELAY__TLS__CA_FILE": str(ca_file),
        "RELAY__ADMIN__HTTP": config.admin.http or "127.0.0.1:8025",
        "RELAY__ADMIN__WEB__USERS": _as_text(users),
        "RELAY__ADMIN__WEB__NOTE": _as_text(_NOTE),
        "RELAY__WORKERS": "1",
    }
    defaults = {"RELAY__LOG__LEVEL": "warning", "RELAY__RESOLVER__TRUST_AD": "never"}
    if "." not in config.hostname:
        defaults["RELAY__HOSTNAME"] = "relay.example"
    return {name: text for name, text in defaults.items() if name not in environ} | fixed


def _as_text(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
