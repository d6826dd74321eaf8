"""Whatever clients throw at the listener: it stays up, small and closed, and serves the others.

While each load is on, a client hands in a message once a second. What the relay uses is read
from /proc. RELAY_LONG=1 plays the loads at full length (`make torture`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import selectors
import smtplib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fakes.waiting import patient
from tests.rigs.ports import wait_until
from tests.rigs.relay import Relay, relay_process

pytestmark = [pytest.mark.torture, pytest.mark.timeout(600)]

LONG = os.environ.get("RELAY_LONG") == "1"
MIB = 1024 * 1024
BLOCK = 256 * 1024
SLOWEST_SECONDS = 15.0
"""For a probe. Two cores shared with the attackers need two to five at worst, busy ones ten."""


@dataclass
class Watch:
    """A client that hands in a message each second, and what the relay uses meanwhile."""

    relay: Relay
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    peak_rss: int = 0

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        self.idle_rss, self.idle_files = self.rss(), self.files()
        stop = threading.Event()
        threads = [
            threading.Thread(target=work, args=(stop,)) for work in (self._probe, self._sample)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def rss(self) -> int:
        return _status(self.relay.pid, "VmRSS") * 1024

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.relay.pid}/fd"))

    @property
    def growth_mib(self) -> float:
        return (self.peak_rss - self.idle_rss) / MIB

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(0.05):
            self.peak_rss = max(self.peak_rss, self.rss())

    def _probe(self, stop: threading.Event) -> None:
        while True:
            began = time.monotonic()
            try:
                with smtplib.SMTP(
                    "127.0.0.1",
                    self.relay.port,
                    timeout=patient(30),
                    source_address=("127.0.0.9", 0),
                ) as client:
                    client.sendmail(
                        "probe@client.example", ["b@dest.example"], b"Subject: probe\r\n\r\nx\r\n"
                    )
            except (OSError, smtplib.SMTPException) as error:
                self.failures.append(repr(error))
            self.latencies.append(time.monotonic() - began)
            if stop.wait(max(0.0, 1.0 - self.latencies[-1])):
                return

    def told(self, load: str) -> None:
        """The numbers, for whoever runs this with -s."""
        latencies = sorted(self.latencies)
        print(
            f"\n{load}: RSS {self.idle_rss / MIB:.0f} MiB, growth {self.growth_mib:.1f} MiB; "
            f"{len(latencies)} probes, "
            f"median {latencies[len(latencies) // 2]:.3f} s, worst {latencies[-1]:.3f} s"
        )


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(name)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 6000:
        pytest.skip(f"the system allows {hard} open files, and this needs 6000")
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(6000, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), hard)
    )
    with relay_process(tmp_path, start=False, limits={"connections": 2500}) as relay:
        yield relay


def connect(relay: Relay, source: int = 1) -> socket.socket:
    """From 127.0.8.`source`; the greeting heard."""
    client = socket.create_connection(
        ("127.0.0.1", relay.port), timeout=60, source_address=(f"127.0.8.{source}", 0)
    )
    assert client.recv(1000).startswith(b"220")
    return client


def begin_content(client: socket.socket) -> None:
    client.sendall(
        b"EHLO load\r\nMAIL FROM:<a@client.example>\r\nRCPT TO:<b@dest.example>\r\nDATA\r\n"
    )
    heard = b""
    while b"\r\n354" not in heard:
        heard += client.recv(4000)


def flood(relay: Relay, clients: int, octets: int, block: bytes, front: bytes = b"") -> list[bytes]:
    """Each client sends so many octets of content; what each heard at the end."""

    def one(number: int) -> bytes:
        with connect(relay, number + 1) as client:
            begin_content(client)
            with contextlib.suppress(ConnectionError):
                client.sendall(front)
                for _ in range(octets // len(block)):
                    client.sendall(block)
                client.sendall(b"\r\n.\r\nQUIT\r\n")
            heard = b""
            with contextlib.suppress(ConnectionError):
                while piece := client.recv(4000):
                    heard += piece
            return heard

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, range(clients)))


FLOODS: dict[str, tuple[int, int, bytes, bytes]] = {
    "no line end": (20, 200_000_000 if LONG else 20_000_000, b"x" * BLOCK, b""),
    "no line end in a body": (
        20,
        200_000_000 if LONG else 20_000_000,
        b"x" * BLOCK,
        b"Subject: x\r\n\r\n",
    ),
    "empty lines": (20, 8 * MIB if LONG else 2 * MIB, b"\r\n" * (BLOCK // 2), b""),
    "a header without end": (200, 2 * MIB if LONG else MIB, b"X: y\r\n" * (BLOCK // 6), b""),
}


@pytest.mark.parametrize("name", FLOODS)
def test_relay_stays_small_and_responsive_under_a_flood_of_content(relay: Relay, name: str) -> None:
    if not LONG:
        relay.config["limits"]["message_size"] = "5MiB"
    relay.start()
    watch = Watch(relay)
    with watch.on():
        time.sleep(1)
        heard = flood(relay, *FLOODS[name])
    watch.told(f"{FLOODS[name][0]} clients, {name}")
    assert not watch.failures
    assert max(watch.latencies) < patient(SLOWEST_SECONDS)
    assert watch.growth_mib < 128
    if name.startswith("no line end"):
        # The header section is too large, or all of it is; whoever goes on is cut off.
        assert all(reply == b"" or b"552 5.3.4" in reply for reply in heard)
        assert any(reply for reply in heard)
    wait_until(lambda: watch.files() <= watch.idle_files + 2, what="the files of those who left")


# --- clients that hold on -------------------------------------------------------------------------


def _idle(client: socket.socket) -> Iterator[bytes]:
    return itertools.repeat(b"")


def _slow_command(client: socket.socket) -> Iterator[bytes]:
    return itertools.cycle([b"E", b"H", b"L", b"O", b" ", *[b"x"] * 50])


def _slow_content(client: socket.socket) -> Iterator[bytes]:
    begin_content(client)
    return itertools.repeat(b"x")


def _never_reads(client: socket.socket) -> Iterator[bytes]:
    # The replies to these are more than the sockets hold.
    return itertools.repeat(b"EHLO x\r\n" * 500)


def _busy_with_nothing(client: socket.socket) -> Iterator[bytes]:
    return itertools.repeat(b"NOOP\r\n" * 6)


KINDS: tuple[Callable[[socket.socket], Iterator[bytes]], ...] = (
    _idle,
    _slow_command,
    _slow_content,
    _never_reads,
    _busy_with_nothing,
)


def hold_on(relay: Relay, count: int, seconds: float) -> list[str]:
    """Connections of all kinds, each saying its next word every second; the kinds of those left."""
    selector = selectors.DefaultSelector()
    words: dict[socket.socket, Iterator[bytes]] = {}
    kinds: dict[socket.socket, str] = {}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        client = connect(relay, number % 200 + 1)
        if kind is _never_reads:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        words[client], kinds[client] = kind(client), kind.__name__
        client.setblocking(False)
        if kind is not _never_reads:
            selector.register(client, selectors.EVENT_READ)
    ends = time.monotonic() + seconds
    try:
        while words and time.monotonic() < ends:
            turn = time.monotonic() + 1
            for client in list(words):
                try:
                    client.send(next(words[client]))
                except BlockingIOError:
                    pass
                except OSError:
                    _let_go(client, words, selector)
            while time.monotonic() < turn:
                for key, _ in selector.select(max(0.0, turn - time.monotonic())):
                    _hear(key.fileobj, words, selector)  # type: ignore[arg-type]
        return [kinds[client] for client in words]
    finally:
        for client in list(words):
            _let_go(client, words, selector)
        selector.close()


def _hear(
    client: socket.socket,
    words: dict[socket.socket, Iterator[bytes]],
    selector: selectors.BaseSelector,
) -> None:
    try:
        ended = not client.recv(65536)
    except BlockingIOError:
        return
    except OSError:
        ended = True
    if ended:
        _let_go(client, words, selector)


def _let_go(
    client: socket.socket,
    words: dict[socket.socket, Iterator[bytes]],
    selector: selectors.BaseSelector,
) -> None:
    with contextlib.suppress(KeyError):
        selector.unregister(client)
    words.pop(client, None)
    client.close()


def test_clients_that_hold_on_to_their_connections_are_ended_and_the_others_served(
    relay: Relay,
) -> None:
    count = 2000 if LONG else 500
    relay.config["limits"] |= {"idle": "4s", "transaction": "10s"}
    relay.start()
    watch = Watch(relay)
    with watch.on():
        left = hold_on(relay, count, 60)
    watch.told(f"{count} connections that hold on")
    assert left == []
    assert not watch.failures
    assert max(watch.latencies) < patient(SLOWEST_SECONDS)
    assert watch.growth_mib < 128
    wait_until(
        lambda: watch.files() <= watch.idle_files + 2, what="the files of those who were ended"
    )


# --- more connections than there is room for ------------------------------------------------------


def test_a_burst_of_connections_is_turned_away_fast_and_leaves_nothing(relay: Relay) -> None:
    count = 9000 if LONG else 3000
    relay.config["limits"] |= {"connections": 100, "connections_per_client": 50}
    relay.start()
    watch = Watch(relay)
    replies: list[bytes] = []
    waits: list[float] = []

    def knock(number: int) -> None:
        began = time.monotonic()
        try:
            with socket.create_connection(
                ("127.0.0.1", relay.port), timeout=30, source_address=("127.0.8.1", 0)
            ) as client:
                replies.append(client.recv(100)[:3])
        except OSError as error:
            replies.append(repr(error).encode())
        waits.append(time.monotonic() - began)

    stay = [connect(relay) for _ in range(50)]
    with watch.on(), ThreadPoolExecutor(64) as pool:
        began = time.monotonic()
        list(pool.map(knock, range(count)))
        took = time.monotonic() - began
    for client in stay:
        client.close()
    waits.sort()
    print(
        f"\n{count / took:.0f} connections/s; "
        f"reply after {waits[len(waits) // 2]:.4f} s, worst {waits[-1]:.3f} s"
    )
    watch.told("a burst of connections")
    assert set(replies) == {b"421"}
    assert not watch.failures
    assert waits[int(len(waits) * 0.99)] < 2.0
    assert watch.growth_mib < 32
    wait_until(
        lambda: watch.files() <= watch.idle_files - 50 + 2, what="the files of those who knocked"
    )
