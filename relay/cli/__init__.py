"""The command line: `relay serve | check | health | queue … | log | report | explain | …`.

Exit codes: 0 done; 1 the answer is bad (a broken configuration, an unknown queue id, no
relay to ask); 2 usage. Output for programs goes to stdout, messages about the command itself
go to stderr.

Each command imports its modules only when it runs, so that `relay --version` is fast.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import click

from relay import __version__
from relay.cli.common import LazyGroup, config_file, config_option

_COMMANDS = {
    "check": "relay.cli.check:check",
    "completion": "relay.cli.completion:completion",
    "dkim-key": "relay.cli.dkim:dkim_key",
    "explain": "relay.cli.explain:explain",
    "health": "relay.cli.health:health",
    "log": "relay.cli.log:log",
    "login": "relay.cli.login:login",
    "memory": "relay.cli.memory:memory",
    "mta-sts": "relay.cli.mta_sts:mta_sts",
    "policy": "relay.cli.policy:policy",
    "probe": "relay.cli.probe:probe",
    "queue": "relay.cli.queue:queue",
    "report": "relay.cli.report:report",
    "route": "relay.cli.route:route",
    "tls-report": "relay.cli.tls_report:tls_report",
}


_LIBRARIES = ("aiosmtpd", "aiosmtplib", "dnspython", "cryptography", "uvloop")


def _print_version(ctx: click.Context) -> None:
    import platform
    import sqlite3
    import ssl
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} missing"

    click.echo(f"relay {__version__}")
    sqlite = f"SQLite {sqlite3.sqlite_version}"
    click.echo(f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, {sqlite}")
    click.echo(", ".join(map(of, _LIBRARIES)))
    ctx.exit()


@click.group(
    cls=LazyGroup, lazy=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _, wanted: _print_version(ctx) if wanted else None,
    help="The version of this program and of the libraries it stands on.",
)
@config_option
def relay() -> None:
    """An SMTP smarthost that controls, enforces and explains TLS to the next hop.

    Local clients hand it mail over SMTP. It takes each message durably, decides from its
    configuration and from the message's own header fields how secure the next hop has to
    be, delivers to the recipient's MX under exactly that rule, and writes down what
    happened at every attempt.

    \b
    A first look:
      relay serve -c conf/relay.yaml      run a relay
      relay queue list                    what is still to be delivered
      relay log --follow                  what becomes of it, as it happens
      relay report --recipient-domain example.net --since 90d
      relay explain --from a@example.com --to b@example.net
      relay demo                          all outcomes, in a closed sandbox

    \b
    Files:
      The configuration is the file named by -c, else by $RELAY_CONFIG, else
      /etc/relay/relay.yaml if it is there, else conf/relay.yaml. Any key of it
      can be set in the environment: RELAY__QUEUE__PATH=/srv/spool.

    \b
    Exit status:
      0  done
      1  the answer is bad: a broken configuration, an unknown queue id, no relay to ask
      2  the command was not understood
    """


@relay.command()
@click.option(
    "--own-networks",
    is_flag=True,
    help="Relay for the networks around this machine, if access.networks is not set (containers).",
)
@config_option
@click.pass_context
def serve(ctx: click.Context, /, own_networks: bool) -> None:
    """Run the relay in the foreground.

    It takes mail at the addresses under `listeners`, keeps it under `queue.path`, delivers
    it, and writes the delivery log; its own log goes to stderr.

    \b
    Signals:
      SIGHUP          read policy, routes, users and certificates again and reopen the
                      delivery log; a broken file keeps what is in force, and says so
      SIGTERM SIGINT  drain: take no more mail, finish the deliveries under way, end;
                      a second one ends at once (nothing is lost either way)

    Under systemd it says READY, RELOADING, STOPPING and answers the watchdog (Type=notify).
    """
    from relay.cli.networks import with_own_networks
    from relay.daemon import serve as run

    path = config_file(ctx)
    sys.exit(run(path, with_own_networks(os.environ, path) if own_networks else os.environ))


@relay.command()
def password() -> None:
    """Make the argon2 hash of a password, for access.users in the configuration.

    At a terminal it asks twice, without showing what is typed; otherwise the password is
    the first line of stdin.

    \b
      access:
        users:
          app1: {password: "$argon2id$…"}
    """
    from argon2 import PasswordHasher

    if sys.stdin.isatty():
        secret = click.prompt(
            "Password", hide_input=True, confirmation_prompt="The same again", err=True
        )
    else:
        secret = sys.stdin.readline().rstrip("\r\n")
    if not secret:
        raise click.ClickException("an empty password protects nothing")
    click.echo(PasswordHasher().hash(secret))


@relay.command()
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A list for programs, with each line of the delivery log.",
)
@click.option(
    "--run",
    "to_try",
    is_flag=True,
    help="Run a relay to try out instead: mail for *.example and example.com, .net, .org ends in "
    "a host built in, and the page shows it.",
)
@config_option
@click.pass_context
def demo(ctx: click.Context, /, as_json: bool, to_try: bool) -> None:
    """Play all outcomes in a closed sandbox: own DNS, own mail hosts, nothing leaves this machine.

    Hosts with a good certificate, a wrong one, an expired one and no TLS, and hosts under DANE,
    MTA-STS and a pin, meet messages with each of the four settings, and the delivery log tells
    what became of each. A list at the end says what each host is. The exit status is 1 where
    something went otherwise than the rules say.
    """
    if to_try:
        from relay.sandbox.demo_relay import main as run_relay

        sys.exit(run_relay(config_file(ctx), os.environ))
    from relay.sandbox.demo import main as run_demo

    sys.exit(run_demo(as_json=as_json))


def main() -> None:
    """The entry point."""
    # What is imported never becomes garbage: to look for some costs a short command a tenth of its
    # time. A relay that serves sets its own threshold once it has started.
    gc.set_threshold(150_000, 20, 20)
    # pydantic looks for plugins in every distribution that is installed: a seventh of the time of
    # `relay queue list` where there are many, and code of strangers in the relay.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # SIGPIPE stays ignored, as Python sets it: a peer that closes a connection must not end a
    # relay. A pipe that closes (`relay log | head`) still ends a command quietly: click does that.
    relay(prog_name=Path(sys.argv[0]).name if sys.argv[0].endswith("relay") else "relay")
