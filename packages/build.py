"""The .deb and the .rpm of the relay, in build/packages: `make packages`.

    /opt/relay               a virtual environment on the distribution's Python
      bin/relay              the command; /usr/bin/relay leads to it
      lib/python3            libraries that are the same for every Python
      lib/python3.N          those compiled for one; the Python that runs takes its own
    /usr/lib/systemd/system  the units, as everything else of systemd/ in its place
    /etc/relay/relay.yaml    the configuration

One package serves every Python in PYTHONS, so an upgrade of the distribution leaves a relay that
runs. Libraries are those of requirements.lock, by their hashes. Only the two that nobody publishes
compiled for all (SOURCES) are built here, of Python alone.

ARCH=arm64 makes packages for another processor: nothing is compiled. PYTHONS="3.11 3.13" makes them
for fewer Pythons, for a test. DEBFULLNAME and DEBEMAIL are who makes them for others.
"""

from __future__ import annotations

import email.policy
import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from relay import __version__
from relay.cli.manual import man_page, man_page_of_file

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/packages"
LAYOUT = BUILD / "root"
COMMON = LAYOUT / "common"

NAME = "relay-smarthost"
PYTHONS = tuple(os.environ.get("PYTHONS", "3.11 3.12 3.13 3.14").split())
SOURCES = ("dkimpy",)
"""Libraries that are published as source only. They are of Python alone."""

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
GLIBC = (5, 12, 17, 24, 26, 27, 28, 31, 34)
"""The C libraries that wheels may ask for, 2.N: no newer one than Debian 12 and RHEL 9 have."""


def main() -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    arch = os.environ.get("ARCH") or "".join(
        name for name, machine in MACHINES.items() if machine == platform.machine()
    )
    version = os.environ.get("VERSION") or __version__
    os.environ.setdefault("SOURCE_DATE_EPOCH", _last_change())
    _lay_out_libraries(MACHINES[arch])
    _lay_out_program()
    _lay_out_system()
    _lay_out_documentation(version)
    nfpm = (str(Path(sys.executable).parent / "nfpm"), "package", "--config", "packages/nfpm.yaml")
    for packager in ("deb", "rpm"):
        _run(
            [*nfpm, "--packager", packager, "--target", str(BUILD)],
            ARCH=arch,
            VERSION=version,
            MAINTAINER=_maintainer(),
            ROOT=str(LAYOUT.relative_to(ROOT)),
        )


def _run(command: list[str], **environment: str) -> None:
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)


def _pip(*arguments: str) -> None:
    _run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments])


def _last_change() -> str:
    """The time of the last commit: the same commit makes the same package."""
    found = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or str(int(time.time()))


# --- /opt/relay -----------------------------------------------------------------------------------


def _lay_out_libraries(machine: str) -> None:
    """A wheel that all Pythons take goes to lib/python3, any other to the Python it is for."""
    built = BUILD / "wheels/built"
    _pip("wheel", "--no-deps", "--require-hashes", "-r", _locked(SOURCES), "-w", str(built))
    _pip("wheel", "--no-deps", "-w", str(built), ".")
    of = {python: _download(python, machine) for python in PYTHONS}
    for_all = set.intersection(*map(set, of.values()))
    for wheel in (*built.iterdir(), *(of[PYTHONS[0]][name] for name in sorted(for_all))):
        _unpack(wheel, "lib/python3")
    for python, wheels in of.items():
        for name in sorted(wheels.keys() - for_all):
            _unpack(wheels[name], f"lib/python{python}")
        (COMMON / f"opt/relay/lib/python{python}/site-packages/for-all-pythons.pth").write_text(
            "/opt/relay/lib/python3/site-packages\n"
        )


def _locked(names: tuple[str, ...], *, all_others: bool = False) -> str:
    """The part of requirements.lock about some libraries, or about all others, as a file."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    wanted = [one for one in entries if (one.partition("==")[0] in names) != all_others]
    path = BUILD / ("others.lock" if all_others else "some.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(wanted) + "\n")
    return str(path)


def _download(python: str, machine: str) -> dict[str, Path]:
    """The wheels that a Python of ours takes, by their file names."""
    into = BUILD / "wheels" / python
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in reversed(GLIBC)]
    _pip(
        *("download", "--no-deps", "--only-binary=:all:", "--dest", str(into)),
        *(f"--python-version={python}", "--implementation=cp", "--abi=abi3"),
        *(f"--abi=cp{python.replace('.', '')}", "--abi=none"),
        *(*platforms, f"--platform=manylinux2014_{machine}", "--platform=any"),
        *("--require-hashes", "-r", _locked(SOURCES, all_others=True)),
    )
    return {path.name: path for path in into.iterdir()}


def _unpack(wheel: Path, lib: str) -> None:
    """A wheel is a zip of what goes to site-packages; what else it has (scripts) is not needed."""
    into = COMMON / "opt/relay" / lib / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if ".data/" not in entry.filename and not entry.is_dir():
                archive.extract(entry, into)
    for compiled in into.rglob("*.so*"):
        compiled.chmod(0o644)


def _lay_out_program() -> None:
    venv = COMMON / "opt/relay"
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (venv / "bin").mkdir()
    (venv / "bin/python3").symlink_to("/usr/bin/python3")
    # -I: the caller's PYTHONPATH and home have no say in what root runs.
    (venv / "bin/relay").write_text(
        "#!/opt/relay/bin/python3 -I\nfrom relay.cli import main\n\nmain()\n"
    )
    (venv / "bin/relay").chmod(0o755)
    (COMMON / "usr/bin").mkdir(parents=True)
    (COMMON / "usr/bin/relay").symlink_to("/opt/relay/bin/relay")


# --- the rest of the system -----------------------------------------------------------------------


def _lay_out_system() -> None:
    for source, place in (
        ("relay.service", "usr/lib/systemd/system/relay.service"),
        ("relay.socket", "usr/lib/systemd/system/relay.socket"),
        ("relay.sysusers", "usr/lib/sysusers.d/relay.conf"),
        ("relay.tmpfiles", "usr/lib/tmpfiles.d/relay.conf"),
    ):
        _write(COMMON / place, (ROOT / "systemd" / source).read_bytes())
    bash, zsh, fish = (_completion(shell) for shell in ("bash", "zsh", "fish"))
    _write(COMMON / "usr/share/bash-completion/completions/relay", bash)
    _write(LAYOUT / "deb/usr/share/zsh/vendor-completions/_relay", zsh)
    _write(LAYOUT / "rpm/usr/share/zsh/site-functions/_relay", zsh)
    _write(COMMON / "usr/share/fish/vendor_completions.d/relay.fish", fish)
    overrides = (ROOT / "packages/deb/lintian-overrides").read_bytes()
    _write(LAYOUT / "deb/usr/share/lintian/overrides" / NAME, overrides)


def _completion(shell: str) -> bytes:
    command = [sys.executable, "-m", "relay", "completion", shell]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    path.chmod(0o644)


def _lay_out_documentation(version: str) -> None:
    reference = (ROOT / "conf/relay.yaml").read_text(encoding="utf-8")
    _write(COMMON / "usr/share/man/man1/relay.1.gz", man_page().encode())
    _write(COMMON / "usr/share/man/man5/relay.yaml.5.gz", man_page_of_file(reference).encode())
    doc = COMMON / "usr/share/doc" / NAME
    for name in ("README.md", "conf/relay.yaml", *_pages()):
        where = "examples/relay.yaml" if name == "conf/relay.yaml" else name
        _write(doc / where, (ROOT / name).read_bytes())
    _write(doc / "copyright", _copyright().encode())
    _write(LAYOUT / "deb/usr/share/doc" / NAME / "changelog.gz", _changelog(version).encode())
    _write(
        LAYOUT / "rpm/usr/share/doc" / NAME / "CHANGELOG.md", (ROOT / "CHANGELOG.md").read_bytes()
    )


def _pages() -> Iterator[str]:
    """What people read of docs/; how the site is made of it is not for them."""
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.is_file() and not path.is_relative_to(ROOT / "docs/site"):
            yield str(path.relative_to(ROOT))


def _changelog(version: str) -> str:
    """Debian's form of it; what changed is in CHANGELOG.md."""
    at = time.strftime(
        "%a, %d %b %Y %H:%M:%S +0000", time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))
    )
    return (
        f"{NAME} ({version}) stable; urgency=medium\n\n"
        f"  * Release {version}; the project's CHANGELOG.md says what changed.\n\n"
        f" -- {_maintainer()}  {at}\n"
    )


def _maintainer() -> str:
    """Who makes the package for others, by the variables that Debian's tools read.

    Without them it is nobody's but the project's, which has no address (RFC 2606: `.invalid`).
    """
    with (ROOT / "pyproject.toml").open("rb") as file:
        [authors] = tomllib.load(file)["project"]["authors"]
    name = os.environ.get("DEBFULLNAME") or authors["name"]
    address = os.environ.get("DEBEMAIL") or f"no-address@{NAME}.invalid"
    return f"{name} <{address}>"


def _copyright() -> str:
    """Whose the program is, and under which licence each library is that is shipped with it."""
    head = (ROOT / "packages/copyright").read_text()
    return head + "".join(f"\n{_licence(path)}" for path in _metadata())


def _metadata() -> list[Path]:
    found = {
        path.parent.name: path
        for path in (COMMON / "opt/relay/lib").glob("*/site-packages/*.dist-info/METADATA")
        if not path.parent.name.startswith("relay_smarthost-")
    }
    return [found[name] for name in sorted(found, key=str.lower)]


def _licence(path: Path) -> str:
    said = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
    classifiers = [
        c.rpartition(" :: ")[2] for c in said.get_all("Classifier", []) if "License" in c
    ]
    short = said["License-Expression"] or said["License"] or ", ".join(classifiers)
    where = f"/opt/relay/lib/python*/site-packages/{path.parent.name}"
    author = said["Author"] or said["Author-email"] or f"the authors of {said['Name']}"
    return (
        f"Files: {where.replace('python*', '*')}/*\n"
        f"Copyright: {' '.join(author.split())}\n"
        f"License: {' '.join(short.split())[:60]}\n"
        f" {said['Name']} {said['Version']}. The text of the licence is in {where}.\n"
    )


if __name__ == "__main__":
    main()
