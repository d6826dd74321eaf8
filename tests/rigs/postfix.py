"""A Postfix of a test's own: own configuration, queue, log and port, on loopback.

Two roles: the client, whose only peculiarity is its `relayhost` line, and the MX,
which takes mail for some domains into maildirs, with or without STARTTLS.
"""

from __future__ import annotations

import contextlib
import pwd
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.rigs.ports import accepts_connections, open_directory, wait_until

_MASTER = """\
{listen} inet n - n - 100 smtpd
pickup    unix  n - n 60 1 pickup
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
tlsmgr    unix  - - n 1000? 1 tlsmgr
tlsproxy  unix  - - n - 0 tlsproxy
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
verify    unix  - - n - 1 verify
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n - - proxymap
smtp      unix  - - n - - smtp
relay     unix  - - n - - smtp
showq     unix  n - n - - showq
error     unix  - - n - - error
retry     unix  - - n - - error
discard   unix  - - n - - discard
local     unix  - n n - - local
virtual   unix  - n n - - virtual
anvil     unix  - - n - 1 anvil
scache    unix  - - n - 1 scache
postlog   unix-dgram n - n - 1 postlogd
"""


_WITH_RESOLV_CONF = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'


@dataclass(frozen=True)
class Postfix:
    """A running instance. `log` is its own mail log, `mailboxes` where an MX puts what it took."""

    address: str
    port: int
    directory: Path

    @property
    def log(self) -> Path:
        return self.directory / "log" / "maillog"

    @property
    def mailboxes(self) -> Path:
        return self.directory / "mail"

    def delivered(self) -> list[bytes]:
        """The content of each message in the maildirs, line ends as CRLF again."""
        return [
            path.read_bytes().replace(b"\n", b"\r\n")
            for path in sorted(self.mailboxes.glob("*/new/*"))
            if path.is_file()
        ]

    def log_lines(self, *words: str) -> list[str]:
        """Lines of the mail log with all of `words`."""
        if not self.log.exists():
            return []
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [line for line in lines if all(word in line for word in words)]


@contextlib.contextmanager
def postfix(
    settings: Mapping[str, str],
    *,
    port: int,
    address: str = "127.0.0.1",
    name: str = "pf",
    parent: str = "/tmp",
    resolv_conf: Path | None = None,
) -> Iterator[Postfix]:
    """A Postfix that listens on `address`:`port`, with `settings` on top of its own defaults.

    `resolv_conf`: what it sees as /etc/resolv.conf, in a mount namespace of its own.
    """
    owner = pwd.getpwnam("postfix")
    with open_directory(f"relay-test-{name}-", parent) as directory:
        for sub in ("etc", "queue", "data", "log", "mail"):
            (directory / sub).mkdir()
        for sub in ("data", "mail"):
            shutil.chown(directory / sub, owner.pw_uid, owner.pw_gid)
        main = {
            "compatibility_level": "3.6",
            "queue_directory": f"{directory}/queue",
            "data_directory": f"{directory}/data",
            "maillog_file": f"{directory}/log/maillog",
            "maillog_file_prefixes": parent,
            "inet_interfaces": "all",  # the listener in master.cf names its one address
            "inet_protocols": "ipv4",
            "mydestination": "",
            "local_recipient_maps": "",
            "alias_maps": "",
            "alias_database": "",
            "mynetworks": "127.0.0.0/8",
            "message_size_limit": "60000000",
            **settings,
        }
        main = {
            key: value.format(dir=directory, uid=owner.pw_uid, gid=owner.pw_gid)
            for key, value in main.items()
        }
        (directory / "etc/main.cf").write_text(
            "".join(f"{key} = {value}\n" for key, value in main.items())
        )
        (directory / "etc/master.cf").write_text(_MASTER.format(listen=f"{address}:{port}"))
        run = ["/usr/sbin/postfix", "-c", f"{directory}/etc"]
        apart = ["unshare", "--mount", "sh", "-c", _WITH_RESOLV_CONF, str(resolv_conf)]
        start = [*apart, *run, "start"] if resolv_conf else [*run, "start"]
        subprocess.run(start, check=True, capture_output=True, timeout=60)
        try:
            wait_until(lambda: accepts_connections(address, port), what=f"Postfix on port {port}")
            yield Postfix(address, port, directory)
        finally:
            subprocess.run([*run, "stop"], check=False, capture_output=True, timeout=60)


@contextlib.contextmanager
def smarthost_client(*, port: int, relay_port: int) -> Iterator[Postfix]:
    """A Postfix as an administrator sets it up: `relayhost`, and nothing else changed."""
    with postfix({"relayhost": f"[127.0.0.1]:{relay_port}"}, port=port, name="client") as running:
        yield running


@contextlib.contextmanager
def mx_host(
    *,
    hostname: str,
    domains: str,
    address: str,
    port: int,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Iterator[Postfix]:
    """A Postfix smtpd that is MX for `domains`; STARTTLS where it has a certificate."""
    settings = {
        "myhostname": hostname,
        "virtual_mailbox_domains": domains,
        "virtual_mailbox_base": "{dir}/mail",
        "virtual_mailbox_maps": "static:all/",
        "virtual_uid_maps": "static:{uid}",
        "virtual_gid_maps": "static:{gid}",
        "virtual_mailbox_limit": "0",
        "virtual_minimum_uid": "1",
        "smtpd_tls_security_level": "may" if certificate else "none",
        "smtpd_tls_loglevel": "1",
        "smtpd_tls_received_header": "yes",
        "smtpd_relay_restrictions": "reject_unauth_destination",
        "smtpd_client_connection_count_limit": "0",
    }
    if certificate and key:
        settings |= {"smtpd_tls_cert_file": str(certificate), "smtpd_tls_key_file": str(key)}
    with postfix(settings, port=port, address=address, name=hostname.split(".")[0]) as running:
        yield running
