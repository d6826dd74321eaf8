"""A Knot DNS of a test's own: an authoritative server for the zones a test writes."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping

from tests.fakes.waiting import patient
from tests.rigs.ports import accepts_connections, free_port, open_directory, wait_until

_CONFIG = """\
server:
    listen: {address}@{port}
    rundir: {dir}
    user: knot:knot
log:
  - target: {dir}/knot.log
    any: info
database:
    storage: {dir}/db
template:
  - id: default
    storage: {dir}
zone:
"""

_ZONE_HEAD = """\
$ORIGIN {zone}.
$TTL 60
@ SOA ns.{zone}. hostmaster.{zone}. 1 3600 600 86400 60
@ NS ns
ns A 127.0.0.1
"""


@contextlib.contextmanager
def knot(zones: Mapping[str, str], *, address: str = "127.0.0.1") -> Iterator[str]:
    """Serves `zones` (name -> records in master file format); gives "address:port"."""
    port = free_port(address)
    with open_directory("relay-test-knot-") as directory:
        directory.chmod(0o777)  # knotd writes its run-time files here under its own user
        text = _CONFIG.format(address=address, port=port, dir=directory)
        for zone, records in zones.items():
            (directory / f"{zone}.zone").write_text(_ZONE_HEAD.format(zone=zone) + records + "\n")
            text += f"  - domain: {zone}.\n    file: {zone}.zone\n"
        (directory / "knot.conf").write_text(text)
        server = subprocess.Popen(
            ["/usr/sbin/knotd", "-c", f"{directory}/knot.conf"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: accepts_connections(address, port), what="Knot DNS")
            yield f"{address}:{port}"
        finally:
            server.terminate()
            server.wait(timeout=patient(30))
