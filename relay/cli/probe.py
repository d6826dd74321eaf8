"""`relay probe`: connect to the mail hosts of a domain, and look."""

from __future__ import annotations

import click

from relay.cli.common import config_option

__all__ = ["probe"]


@click.command()
@click.argument("domain")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, for programs.")
@config_option
def probe(domain: str, as_json: bool) -> None:
    """Connect to each mail host of DOMAIN: is TLS offered, which, and whose certificate?"""
    raise click.ClickException("not yet")
