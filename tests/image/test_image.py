"""The image, built as the Dockerfile says and run as nobody in particular: `make image-test`.

Needs buildah and debootstrap and root, and the network for packages. The base is made here
(a minimal Debian with its python3), since a registry may not be at hand; RELAY_IMAGE_BASE names
another. RELAY_IMAGE_ARGS adds to buildah's arguments, for mirrors and their certificates.
RELAY_IMAGE_STORAGE names a directory that keeps images between runs. RELAY_IMAGE_ARCH=arm64 is for
another processor than this machine's: its programs run by qemu-user-static, some ten times slower.

chroot isolation: the file system and the user are the image's, the network is this machine's. What
only an engine has is not seen here: HEALTHCHECK on its schedule, networks of its own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import signal
import smtplib
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from tests.rigs.ports import accepts_connections, free_port, wait_until
from tests.rigs.sink import Sink, sink

ROOT = Path(__file__).resolve().parents[2]
MOST_MEGABYTES = 200
MOST_ADDED_MEGABYTES = 52
"""What the Dockerfile adds to the base. Debian's base for arm64 is 24 MB larger than for amd64: in
a program of arm64 each part begins at a multiple of 64 KiB, and there are 500 programs.
"""
ARCH = os.environ.get("RELAY_IMAGE_ARCH", "")
OF_ARCH = [f"--arch={ARCH}"] if ARCH else []
PATIENCE = 10 if ARCH else 1
KEY, PASSWORD = "a-long-random-key", "correct horse"
LEFT_OUT = (
    *("var/cache/apt", "var/lib/apt/lists", "var/log"),
    *("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"),
)
"""What Debian's own slim images are without, too."""

pytestmark = [
    pytest.mark.needs("buildah", "debootstrap", "root"),
    pytest.mark.skipif(os.environ.get("RELAY_IMAGE") != "1", reason="slow: `make image-test`"),
    pytest.mark.timeout(1800 * PATIENCE),
]


class Engine:
    """buildah with a storage of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def command(self, *arguments: str) -> list[str]:
        where = [f"--root={self._directory}/storage", f"--runroot={self._directory}/run"]
        return ["buildah", "--storage-driver=vfs", *where, *arguments]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout.strip()

    def megabytes(self, image: str) -> float:
        [found] = json.loads(self("images", "--json", image))
        return float(found["size"].split()[0]) * {"MB": 1, "GB": 1000}[found["size"].split()[1]]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    kept = os.environ.get("RELAY_IMAGE_STORAGE")
    if kept:
        yield Engine(Path(kept))
        return
    with tempfile.TemporaryDirectory(prefix="relay-image-") as directory:
        yield Engine(Path(directory))


@pytest.fixture(scope="module")
def base(engine: Engine) -> str:
    if os.environ.get("RELAY_IMAGE_BASE"):
        return os.environ["RELAY_IMAGE_BASE"]
    with tempfile.TemporaryDirectory(prefix="relay-base-") as directory:
        packages = "--include=python3,ca-certificates"
        subprocess.run(
            ["debootstrap", *OF_ARCH, "--variant=minbase", packages, "bookworm", directory],
            check=True,
            capture_output=True,
        )
        for leftover in LEFT_OUT:
            subprocess.run(["find", f"{directory}/{leftover}", "-type", "f", "-delete"], check=True)
        container = engine("from", *OF_ARCH, "scratch")
        engine("add", "--quiet", container, directory, "/")
    engine("commit", "--quiet", "--rm", container, "relay-base")
    return "localhost/relay-base"


@pytest.fixture(scope="module")
def image(engine: Engine, base: str) -> str:
    more = shlex.split(os.environ.get("RELAY_IMAGE_ARGS", ""))
    isolated = ["--isolation=chroot", "--network=host", "--format=docker"]
    built = [*isolated, *OF_ARCH, f"--build-arg=BASE={base}", *more]
    engine("build", *built, "--tag=relay", str(ROOT))
    print(f"\nbase {engine.megabytes(base):.0f} MB, image {engine.megabytes('relay'):.0f} MB")
    return "localhost/relay"


@pytest.fixture
def container(engine: Engine, image: str) -> Iterator[str]:
    name = engine("from", *OF_ARCH, image)
    yield name
    engine("rm", name)


def test_the_image_has_no_compiler_no_pip_and_no_root(
    engine: Engine, image: str, container: str
) -> None:
    config = json.loads(engine("inspect", "--type=image", image))["Docker"]["config"]
    assert config["User"] == "2525:2525"
    assert config["Healthcheck"]["Test"] == ["CMD", "relay", "health"]
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert "/var/lib/relay" in config["Volumes"]
    script = (
        "id -u; command -v gcc cc pip pip3 || echo none; ls /opt/relay/bin | grep -c pip || true"
    )
    assert (
        engine("run", "--isolation=chroot", container, "--", "sh", "-c", script) == "2525\nnone\n0"
    )


def test_the_image_is_small(engine: Engine, base: str, image: str) -> None:
    assert engine.megabytes(image) < MOST_MEGABYTES
    assert engine.megabytes(image) - engine.megabytes(base) < MOST_ADDED_MEGABYTES


def test_no_module_of_the_relay_needs_what_the_image_is_without(
    engine: Engine, container: str
) -> None:
    script = (
        "import importlib, pkgutil, relay\n"
        "names = [one.name for one in pkgutil.walk_packages(relay.__path__, 'relay.')]\n"
        "found = [importlib.import_module(name) for name in names if '__main__' not in name]\n"
        "print(len(found))"
    )
    run = ["run", "--isolation=chroot", container, "--", "/opt/relay/bin/python3", "-c", script]
    assert int(engine(*run)) > 100


class Running:
    """The image's relay with settings by environment, as an engine starts it."""

    def __init__(self, engine: Engine, container: str, next_hop: Sink, directory: Path) -> None:
        self.engine = engine
        self.port, self.http_port = free_port(), free_port()
        self.stdout, self.stderr = directory / "stdout", directory / "stderr"
        secrets = directory / "secrets"
        secrets.mkdir()
        secrets.chmod(0o755)
        for name, text in (("api-keys", KEY), ("alice", PasswordHasher().hash(PASSWORD))):
            (secrets / name).write_text(f"{text}\n")
            (secrets / name).chmod(0o644)
        settings = {
            "RELAY__LISTENERS": f'[{{address: "127.0.0.1:{self.port}"}}]',
            "RELAY__ROUTES": json.dumps(next_hop.route),
            "RELAY__DELIVERY__ALLOW_NETWORKS": "[127.0.0.0/8]",
            "RELAY__HOSTNAME": "relay.test.example",
            "RELAY__ADMIN__HTTP": f"127.0.0.1:{self.http_port}",
            "RELAY__ADMIN__API_KEYS_FILE": "/run/secrets/api-keys",
            "RELAY__ADMIN__WEB__USERS": "{alice: {password_file: /run/secrets/alice}}",
        }
        environment = [f"--env={name}={value}" for name, value in settings.items()]
        mounted = f"--volume={secrets}:/run/secrets:ro"
        self.run = ["run", "--isolation=chroot", mounted, *environment, container, "--", "relay"]

    def __call__(self, *arguments: str) -> str:
        return self.engine(*self.run, *arguments)

    def get(self, path: str, key: str = "") -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}")
        if key:
            basic = base64.b64encode(f"api:{key}".encode()).decode()
            request.add_header("Authorization", f"Basic {basic}")
        try:
            with urllib.request.urlopen(request, timeout=30 * PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""


@contextlib.contextmanager
def running(relay: Running) -> Iterator[subprocess.Popen[bytes]]:
    serve = relay.engine.command(*relay.run, "serve", "--own-networks")
    with relay.stderr.open("wb") as stderr:
        process = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=stderr)
        try:
            wait_until(
                lambda: accepts_connections("127.0.0.1", relay.port),
                seconds=60 * PATIENCE,
                what="the container's start",
            )
            yield process
        finally:
            for pid in relays():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=30 * PATIENCE)


def test_a_message_is_delivered_and_told_on_the_output_and_sigterm_drains(
    engine: Engine, container: str, tmp_path: Path
) -> None:
    with sink() as host:
        relay = Running(engine, container, host, tmp_path)
        with running(relay) as process:
            with smtplib.SMTP("127.0.0.1", relay.port, timeout=30 * PATIENCE) as client:
                client.sendmail(
                    "a@client.example", "b@dest.example", "Subject: contained\r\n\r\nhello\r\n"
                )
            wait_until(
                lambda: host.tokens({"contained"}), seconds=30 * PATIENCE, what="the delivery"
            )
            assert relay("health") == "healthy"
            assert relay("queue", "list", "--json") == "[]"
            assert "delivered" in relay("log")
            assert relay("check", "--quiet") == ""
            assert relay.get("/healthz")[0] == 200
            assert relay.get("/relay/v1/queue")[0] == 401
            assert json.loads(relay.get("/relay/v1/queue", KEY)[1])["items"] == []
            assert "Sign in" in relay.get("/login")[1]
            [pid] = relays()
            os.kill(pid, signal.SIGTERM)
            said, _ = process.communicate(timeout=90 * PATIENCE)
            assert process.returncode == 0
            events = [json.loads(line) for line in said.splitlines()]
    assert [event["event"] for event in events] == ["accepted", "delivered"]
    lines = [json.loads(line) for line in relay.stderr.read_text().splitlines() if line[:1] == "{"]
    assert lines[-1]["message"] == "ended"


def relays() -> list[int]:
    """The relay in the container: of the image's user, and run by the image's Python."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_theirs = "\nUid:\t2525\t2525\t" in (process / "status").read_text()
            # With qemu its own name stands before.
            begin = (process / "cmdline").read_bytes().split(b"\0")[:3]
            if is_theirs and any(word.startswith(b"/opt/relay/bin/python") for word in begin):
                found.append(int(process.name))
    return found
