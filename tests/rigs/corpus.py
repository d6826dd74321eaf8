"""Mail that others wrote: what the source packages of mail software bring along for their own
tests.

The packages are fetched by pip when a test first asks, and kept beside the temporary files of this
machine. Nothing of them is in this tree.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.waiting import patient

_SOURCES = {
    "dkimpy==1.1.8": "*/dkim/tests/data/*.m*",
    "django-mailbox==4.10.1": "*/django_mailbox/tests/messages/*.eml",
    "flufl.bounce==6.0.0": "*/tests/data/*.txt",
    "HyperKitty==1.3.12": "*/hyperkitty/tests/testdata/*",
    "mail-parser==4.8.0": "*/tests/mails/mail_*",
}
_OF_PYTHON = "test.test_email"
_SMALLEST, _LARGEST = 40, 4 * 1024 * 1024
_LINE_END = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class Letter:
    """A file of the corpus: `raw` as it is stored, `sent` with CRLF as an SMTP client sends it."""

    name: str
    raw: bytes

    @property
    def sent(self) -> bytes:
        content = _LINE_END.sub(b"\r\n", self.raw)
        return content if content.endswith(b"\r\n") else content + b"\r\n"


@functools.cache
def corpus() -> tuple[Letter, ...]:
    """All of it. Where a package cannot be had the test is skipped, or fails under
    RELAY_REQUIRE_TOOLS=1.
    """
    # At the same time: pip makes a build environment for each, though only the archive is wanted.
    with ThreadPoolExecutor() as threads:
        archives = dict(zip(_SOURCES, threads.map(_fetched, _SOURCES), strict=True))
    found = [letter for source in _SOURCES for letter in _of_package(source, archives[source])]
    return tuple(found + list(_of_python()))


def _of_package(source: str, path: Path) -> Iterator[Letter]:
    with tarfile.open(path) as archive:
        for member in sorted(archive, key=lambda one: one.name):
            file = archive.extractfile(member) if member.isfile() else None
            if file is None or not fnmatch.fnmatch(member.name, _SOURCES[source]):
                continue
            if _SMALLEST <= member.size <= _LARGEST:
                yield Letter(member.name, file.read())


def _fetched(source: str) -> Path:
    """The source package, fetched once a machine."""
    kept = Path(tempfile.gettempdir()) / f"relay-corpus-{os.geteuid()}" / source
    if not kept.is_dir():
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
            command = ("download", "--no-deps", "--no-binary", ":all:", "--dest", directory, source)
            _pip(source, *command)
            Path(directory).chmod(0o700)
            kept.mkdir()
            for file in Path(directory).iterdir():
                file.rename(kept / file.name)
    return next(kept.glob("*.tar.gz"))


def _pip(source: str, *arguments: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "1",
    ]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=patient(300), check=False
    )
    if done.returncode and os.environ.get("RELAY_REQUIRE_TOOLS") != "1":
        pytest.skip(f"{source} could not be fetched: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr


def _of_python() -> Iterator[Letter]:
    """What Python's own tests of its email package have, where they are installed."""
    try:
        spec = importlib.util.find_spec(_OF_PYTHON)
    except ModuleNotFoundError:
        return
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(directory, "data").glob("msg_*.txt")):
            yield Letter(f"python/{file.name}", file.read_bytes())
