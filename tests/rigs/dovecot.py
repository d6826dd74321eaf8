"""A Dovecot of a test's own that takes mail for submission: STARTTLS, and logins by access token
(XOAUTH2, OAUTHBEARER), which it asks a token server about, or by password.

It hands what it takes to the MTA at `relay_port`.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from relay.sandbox.certificates import Certificate
from tests.fakes.waiting import patient
from tests.rigs.ports import accepts_connections, open_directory, wait_until

_CONFIG = """\
protocols = submission
base_dir = {dir}/run
state_dir = {dir}/state
log_path = {dir}/log
auth_verbose = yes
hostname = {name}
ssl = required
ssl_cert = <{dir}/certificate.pem
ssl_key = <{dir}/key.pem
auth_mechanisms = {mechanisms}
auth_failure_delay = 0
mail_location = maildir:{dir}/home/mail
first_valid_uid = 1
passdb {{
  driver = oauth2
  mechanisms = xoauth2 oauthbearer
  args = {dir}/oauth2.conf
}}
passdb {{
  driver = passwd-file
  mechanisms = plain login
  args = scheme=plain username_format=%u {dir}/users
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home={dir}/home
}}
service submission-login {{
  chroot =
  inet_listener submission {{
    address = {address}
    port = {port}
  }}
}}
service anvil {{
  chroot =
}}
service stats {{
  chroot =
}}
submission_relay_host = 127.0.0.1
submission_relay_port = {relay_port}
submission_relay_trusted = no
"""

_OAUTH2 = """\
introspection_mode = post
introspection_url = {url}
username_attribute = username
active_attribute = active
active_value = true
"""


@dataclass(frozen=True)
class Dovecot:
    """A running instance."""

    directory: Path

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    def logins(self, *words: str) -> list[str]:
        """Lines of its log about logins that it took, with all of `words`."""
        lines = [line for line in self.log.splitlines() if "Login: user=" in line]
        return [line for line in lines if all(word in line for word in words)]


@contextlib.contextmanager
def submission(
    *,
    name: str,
    certificate: Certificate,
    address: str,
    port: int,
    relay_port: int,
    introspection_url: str,
    mechanisms: str = "xoauth2 oauthbearer plain login",
    user: str = "relay@test.example",
    password: str = "",
) -> Iterator[Dovecot]:
    """A Dovecot at `address`:`port`; stopped at the end."""
    with open_directory("relay-test-dovecot-") as directory:
        for sub in ("run", "state", "home"):
            (directory / sub).mkdir()
        (directory / "home").chmod(0o777)
        (directory / "certificate.pem").write_bytes(certificate.chain_pem)
        (directory / "key.pem").write_bytes(certificate.key_pem)
        (directory / "users").write_text(f"{user}:{password}\n")
        (directory / "users").chmod(0o644)
        (directory / "oauth2.conf").write_text(_OAUTH2.format(url=introspection_url))
        config = directory / "dovecot.conf"
        config.write_text(
            _CONFIG.format(
                dir=directory,
                name=name,
                mechanisms=mechanisms,
                address=address,
                port=port,
                relay_port=relay_port,
            )
        )
        with (directory / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                ["/usr/sbin/dovecot", "-F", "-c", str(config)], stdout=stderr, stderr=stderr
            )
        try:
            wait_until(lambda: accepts_connections(address, port), what="Dovecot")
            yield Dovecot(directory)
        finally:
            process.terminate()
            process.wait(timeout=patient(30))
