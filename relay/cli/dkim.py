"""`relay dkim-key`: make a key for signatures, and say what to publish."""

from __future__ import annotations

from pathlib import Path

import click

from relay.cli.common import fail


@click.command("dkim-key")
@click.argument("domain", metavar="DOMAIN")
@click.option(
    "--selector", default="relay1", show_default=True, help="The name the DNS knows the key by."
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(["rsa", "ed25519"]),
    default="rsa",
    show_default=True,
    help="rsa (2048 bits) is understood everywhere; ed25519 not yet.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the private key goes [default: DOMAIN.SELECTOR.pem]. Never written over.",
)
def dkim_key(domain: str, selector: str, kind: str, out: Path | None) -> None:
    """Make a key that signs mail of DOMAIN (DKIM), and print the record that publishes it.

    The record is to be in the DNS before the key is used. Then name the key in the
    configuration, and reload:

    \b
      dkim:
        domains:
          example.com: {selector: relay1, key_file: /etc/relay/dkim/example.com.pem}
    """
    from relay.config import words
    from relay.sign.keys import KeyFileError, dns_record, new_key

    try:
        name, selector = words.domain(domain), words.selector(selector)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    path = out or Path(f"{name}.{selector}.pem")
    try:
        key = new_key(path, kind=kind)
    except KeyFileError as error:
        fail(f"{path}: {error}")
    click.echo(dns_record(key, domain=name, selector=selector))
    click.echo(
        f"The private key is in {path}; the relay's user has to be able to read it.", err=True
    )
