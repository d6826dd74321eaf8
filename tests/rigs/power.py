"""A power cut without a special file system: a run is recorded, and replayed as the disk may have
kept it.

`History.run` has strace write down, with all octets, what a process does below a directory, and
what it says on its standard output. `History.cuts` goes through that again, on a disk that is a
model:

    a file         its octets and its size count as kept once fdatasync or fsync of it has returned,
                   for what was done before that call began
    a name         made, removed or renamed: once fsync of its directory has returned
    all else       may be there or not: each 4 KiB page or each 512-octet sector (torn) of a file as
                   it was at some moment since it was last durable, each size and each name
                   likewise; or everything in order up to some moment, with the last write torn
    a failed sync  made some of it durable and forgot the rest. No later sync repairs that: the
                   pages count as clean, as in Linux

At a cut, `Cut.lay` makes a directory as it may be found afterwards. What a process left that was
merely killed stays in the model's page cache, for the next one that is recorded.

Not in the model: the index of SQLite's log (-shm: mapped memory, made anew after a cut) and the
ballast (zeros that nobody reads).
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tests.fakes.waiting import patient

SECTOR = 512
PAGE = 4096

_LEFT_OUT = re.compile(r".*-shm|ballast")
_CALLS = (
    "openat,close,write,pwrite64,truncate,ftruncate,fallocate,fdatasync,fsync,"
    "unlink,unlinkat,rmdir,rename,link,linkat,mkdir,"
    # On what is ours, these are not understood: see `_Player`.
    "open,creat,writev,pwritev,renameat,renameat2,mkdirat,sendfile,copy_file_range"
)

T = TypeVar("T")
Horizon = Callable[["_File", int], int]
"""Up to which moment the disk wrote a sector (the size: -1) of a file without a sync."""


# What was done.


@dataclass(frozen=True, slots=True)
class _Step:
    """A call begins, ends, or both at once; `result` is None before its end, -1 where it failed."""

    thread: str
    name: str
    arguments: tuple[str, ...]
    begins: bool
    result: int | None


_LINE = re.compile(r"^(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)$")
_END = re.compile(r"^([^)]*)\) += (-?\d+|\?)")


def _steps(trace: Path) -> Iterator[_Step]:
    unfinished: dict[str, str] = {}
    with trace.open() as lines:
        for line in lines:
            found = _LINE.match(line)
            if found is None:
                continue
            thread, resumed, name, rest = found.groups()
            begins = resumed is None
            name = name or resumed
            if not begins:
                rest = unfinished.pop(thread) + rest
            if rest.endswith("<unfinished ...>"):
                unfinished[thread] = rest.removesuffix("<unfinished ...>")
                yield _Step(thread, name, _arguments(unfinished[thread]), begins, None)
                continue
            ended = _END.match(rest)
            assert ended, f"not understood: {line[:200]}"
            if ended[2] != "?":  # "?": killed in the middle of it, see `_catch_up`
                yield _Step(thread, name, _arguments(ended[1]), begins, int(ended[2]))


def _arguments(text: str) -> tuple[str, ...]:
    return tuple(text.strip().rstrip(",").split(", "))


def _octets(argument: str) -> bytes:
    """A string of strace's, each octet written as \\xhh; of several (writev), all of them."""
    assert "..." not in argument, "the recording cuts strings short"
    return b"".join(
        bytes.fromhex(one.replace("\\x", "")) for one in re.findall(r'"([^"]*)"', argument)
    )


# The disk.


class _File:
    """What it holds now, what of that is kept, and each change since, by sector."""

    def __init__(self, label: str, octets: bytes = b"") -> None:
        self.label = label
        self.now = bytearray(octets)
        self._kept = bytearray(octets)
        self._kept_size = len(octets)
        self._sectors: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
        self._sizes: list[tuple[int, int]] = []
        self._shrunk: list[tuple[int, int]] = []  # when, and the first sector it concerned
        self._forgotten: set[int] = set()  # pages whose last sync failed

    def write(self, at: int, offset: int, octets: bytes) -> None:
        end = offset + len(octets)
        if end > len(self.now):
            self.resize(at, end)
        self.now[offset:end] = octets
        first, last = offset // SECTOR, (end - 1) // SECTOR
        touched = set(range(first, last + 1))
        for page in self._forgotten.intersection(range(offset // PAGE, (end - 1) // PAGE + 1)):
            # The page is dirty again, with all that is in it.
            self._forgotten.discard(page)
            touched.update(range(page * PAGE // SECTOR, (page + 1) * PAGE // SECTOR))
        self._changed(at, touched)

    def resize(self, at: int, size: int) -> None:
        before = len(self.now)
        self._sizes.append((at, size))
        if size >= before:
            self.now.extend(bytes(size - before))
        else:
            del self.now[size:]
            self._shrunk.append((at, size // SECTOR))
            self._changed(at, range(size // SECTOR, -(-before // SECTOR)))

    def _changed(self, at: int, sectors: set[int] | range) -> None:
        for sector in sectors:
            octets = bytes(self.now[sector * SECTOR : (sector + 1) * SECTOR])
            self._sectors[sector].append((at, octets.ljust(SECTOR, b"\0")))

    def keep(self, before: int) -> None:
        """A sync has returned that began at `before`."""
        self._kept_size = _latest(self._sizes, before - 1, self._kept_size)
        for sector, versions in list(self._sectors.items()):
            self._put(self._kept, sector, _latest(versions, before - 1, b""))
            self._sectors[sector] = versions = [one for one in versions if one[0] >= before]
            if not versions:
                del self._sectors[sector]
        self._sizes = [one for one in self._sizes if one[0] >= before]
        self._shrunk = [one for one in self._shrunk if one[0] >= before]

    def forget(self, before: int, chance: random.Random) -> None:
        """A sync has failed: what was to be written was written in part, and will not be tried
        again.
        """
        for sector, versions in list(self._sectors.items()):
            if chance.random() < 0.5:
                self._put(self._kept, sector, _latest(versions, before - 1, b""))
            self._forgotten.add(sector * SECTOR // PAGE)
        self._kept_size = _latest(self._sizes, before - 1, self._kept_size)
        self._sectors.clear()
        self._sizes.clear()
        self._shrunk.clear()

    def found(self, horizon: Horizon) -> bytes:
        """What a cut leaves of it."""
        resized = horizon(self, -1)
        size = _latest(self._sizes, resized, self._kept_size)
        octets = bytearray(self._kept)
        for sector, versions in self._sectors.items():
            until = horizon(self, sector)
            for at, first in self._shrunk:
                # What lay behind an end never comes back where the file grows again: its blocks are
                # others.
                if sector >= first:
                    until = max(until, at) if at <= resized else min(until, at - 1)
            self._put(octets, sector, _latest(versions, until, b""))
        return bytes(octets[:size]).ljust(size, b"\0")

    @staticmethod
    def _put(octets: bytearray, sector: int, version: bytes) -> None:
        if version:
            start = sector * SECTOR
            if len(octets) < start + SECTOR:
                octets.extend(bytes(start + SECTOR - len(octets)))
            octets[start : start + SECTOR] = version


def _latest(versions: Sequence[tuple[int, T]], until: int, kept: T) -> T:
    found = bisect_right(versions, until, key=lambda one: one[0])
    return versions[found - 1][1] if found else kept


class _Directory:
    """The names now, the durable names, and each change since; a rename changes two names."""

    def __init__(self, label: str, names: Mapping[str, _Node] = {}) -> None:
        self.label = label
        self.now = dict(names)
        self._kept = dict(names)
        self._changes: list[tuple[int, dict[str, _Node | None]]] = []

    def change(self, at: int, change: dict[str, _Node | None]) -> None:
        _apply(self.now, change)
        self._changes.append((at, change))

    def keep(self, before: int) -> None:
        for at, change in self._changes:
            if at < before:
                _apply(self._kept, change)
        self._changes = [one for one in self._changes if one[0] >= before]

    def found(self, wanted: Callable[[int], bool]) -> dict[str, _Node]:
        """What a cut leaves: of each name, the changes up to some moment."""
        names = dict(self._kept)
        over: set[str] = set()
        for at, change in self._changes:
            if over.isdisjoint(change) and wanted(at):
                _apply(names, change)
            else:
                over.update(change)
        return names


_Node = _File | _Directory


def _apply(names: dict[str, _Node], change: Mapping[str, _Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


def _read(directory: Path, label: str = "") -> _Directory:
    """A directory as it is, all of it kept."""
    names: dict[str, _Node] = {}
    for path in directory.iterdir():
        inner = f"{label}/{path.name}"
        if not _LEFT_OUT.fullmatch(path.name):
            names[path.name] = (
                _read(path, inner) if path.is_dir() else _File(inner, path.read_bytes())
            )
    return _Directory(label, names)


@dataclass(slots=True)
class _Luck:
    """How a disk was treating what nobody had asked it to keep. Drawn anew for each cut."""

    chance: random.Random
    now: int
    unit: int = field(init=False)
    octets: float = field(init=False)
    names: float = field(init=False)
    in_order: bool = field(init=False)
    until: int = field(init=False)
    _drawn: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unit = self.chance.choice((SECTOR, PAGE))
        self.octets, self.names = self.chance.choices((0.0, 0.2, 0.5, 0.8, 0.97, 1.0), k=2)
        self.in_order = self.chance.random() < 0.25
        self.until = max(0, self.now - int(self.chance.expovariate(1 / 8)))

    def horizon(self, file: _File, sector: int) -> int:
        if self.in_order:
            return self.until - (sector >= 0 and self.chance.random() < 0.5)
        unit = -1 if sector < 0 else sector * SECTOR // self.unit
        key = id(file), unit
        if key not in self._drawn:
            lucky = self.chance.random() < self.octets
            some_time_ago = self.now - int(self.chance.expovariate(1 / 200))
            self._drawn[key] = self.now if lucky else self.chance.choice((-1, some_time_ago))
        return self._drawn[key]

    def wanted(self, at: int) -> bool:
        return at <= self.until if self.in_order else self.chance.random() < self.names


# Playing it again.


class _Player:
    """Does to the model what one process did, a step at a time.

    `said`: what it said, and when; `changed`, `synced`: when it did that to the disk.
    """

    def __init__(
        self, base: Path, root: _Directory, deaf: str | None, chance: random.Random
    ) -> None:
        self.base = base
        self._root = root
        self._deaf = deaf
        self._chance = chance
        self._fds: dict[int, tuple[_Node, bool]] = {}
        self._begun: dict[str, int] = {}
        self.said: list[tuple[int, str]] = []
        self.changed: list[int] = []
        self.synced: list[tuple[int, str]] = []

    def step(self, at: int, step: _Step) -> None:
        """The next one."""
        if step.begins:
            self._begun[step.thread] = at
            if step.name == "close":  # its number is free before it has returned
                self._fds.pop(int(step.arguments[0]), None)
            elif (
                step.name == "write" and step.arguments[0] == "1"
            ):  # it may be heard before it has returned
                self.said.append((at, _octets(step.arguments[1]).decode()))
        if step.name == "close" or step.result is None:
            return
        if step.name in ("fsync", "fdatasync"):
            self._sync(at, step)
        elif step.result >= 0:
            getattr(self, f"_{step.name}", self._unknown)(at, step)

    def _unknown(self, at: int, step: _Step) -> None:
        words = "".join(step.arguments)
        known = self._file(step) if step.arguments[0].isdigit() else None
        assert known is None, f"not understood: {step}"
        assert str(self.base).encode().hex() not in words.replace("\\x", ""), (
            f"not understood: {step}"
        )

    def _file(self, step: _Step) -> _File | None:
        node, _ = self._fds.get(int(step.arguments[0]), (None, False))
        return node if isinstance(node, _File) else None

    def _place(self, directory: str, path: str) -> tuple[_Directory, str] | None:
        """Where a path leads: the directory that has, or may have, its last name."""
        name = Path(os.fsdecode(_octets(path)))
        if name.is_absolute():
            if not name.is_relative_to(self.base) or name == self.base:
                return None
            parts, node = name.relative_to(self.base).parts, self._root
        else:
            known = None if directory == "AT_FDCWD" else self._fds.get(int(directory), (None,))[0]
            if not isinstance(known, _Directory):
                return None
            parts, node = name.parts, known
        for part in parts[:-1]:
            inner = node.now[part]
            assert isinstance(inner, _Directory)
            node = inner
        return None if _LEFT_OUT.fullmatch(parts[-1]) else (node, parts[-1])

    def _name(self, at: int, place: tuple[_Directory, str] | None, node: _Node | None) -> None:
        if place:
            place[0].change(at, {place[1]: node})
            self.changed.append(at)

    def _openat(self, at: int, step: _Step) -> None:
        assert step.result is not None
        directory, path, flags = step.arguments[:3]
        self._fds.pop(step.result, None)
        if os.fsdecode(_octets(path)) == str(self.base):
            self._fds[step.result] = self._root, False
        elif place := self._place(directory, path):
            parent, name = place
            if name not in parent.now:
                assert "O_CREAT" in flags
                self._name(at, place, _File(f"{parent.label}/{name}"))
            assert "O_TRUNC" not in flags
            self._fds[step.result] = parent.now[name], "O_APPEND" in flags

    def _write(self, at: int, step: _Step) -> None:
        if file := self._file(step):
            appends = self._fds[int(step.arguments[0])][1]
            assert appends, "a file that is written from a position of its own is not understood"
            self._written(at, file, len(file.now), step)

    def _pwrite64(self, at: int, step: _Step) -> None:
        if file := self._file(step):
            self._written(at, file, int(step.arguments[3]), step)

    def _written(self, at: int, file: _File, offset: int, step: _Step) -> None:
        file.write(at, offset, _octets(step.arguments[1])[: step.result])
        self.changed.append(at)

    def _ftruncate(self, at: int, step: _Step) -> None:
        if file := self._file(step):
            file.resize(at, int(step.arguments[1]))
            self.changed.append(at)

    def _truncate(self, at: int, step: _Step) -> None:
        if place := self._place("AT_FDCWD", step.arguments[0]):
            file = place[0].now[place[1]]
            assert isinstance(file, _File)
            file.resize(at, int(step.arguments[1]))
            self.changed.append(at)

    def _fallocate(self, at: int, step: _Step) -> None:
        if file := self._file(step):
            file.resize(at, max(len(file.now), int(step.arguments[2]) + int(step.arguments[3])))
            self.changed.append(at)

    def _sync(self, at: int, step: _Step) -> None:
        node, _ = self._fds.get(int(step.arguments[0]), (None, False))
        if node is None:
            return
        begun = self._begun[step.thread]
        if step.result != 0:
            if isinstance(node, _File):
                node.forget(begun, self._chance)
        elif self._deaf is None or not re.fullmatch(self._deaf, node.label):
            node.keep(begun)
        self.synced.append((at, node.label))

    def _unlink(self, at: int, step: _Step) -> None:
        self._name(at, self._place("AT_FDCWD", step.arguments[0]), None)

    _rmdir = _unlink

    def _unlinkat(self, at: int, step: _Step) -> None:
        self._name(at, self._place(*step.arguments[:2]), None)

    def _rename(self, at: int, step: _Step) -> None:
        old, new = (self._place("AT_FDCWD", one) for one in step.arguments[:2])
        if old and new:
            assert old[0] is new[0], "a rename from one directory to another is not understood"
            old[0].change(at, {old[1]: None, new[1]: old[0].now[old[1]]})
            self.changed.append(at)

    def _link(self, at: int, step: _Step) -> None:
        if old := self._place("AT_FDCWD", step.arguments[0]):
            self._name(at, self._place("AT_FDCWD", step.arguments[1]), old[0].now[old[1]])

    def _linkat(self, at: int, step: _Step) -> None:
        if old := self._place(*step.arguments[:2]):
            self._name(at, self._place(*step.arguments[2:4]), old[0].now[old[1]])

    def _mkdir(self, at: int, step: _Step) -> None:
        if place := self._place("AT_FDCWD", step.arguments[0]):
            self._name(at, place, _Directory(f"{place[0].label}/{place[1]}"))


@dataclass(frozen=True, slots=True)
class Cut:
    """The power is cut: `said` is what had been said by then; `moment` and `seed` make it again."""

    moment: int
    seed: int
    said: str
    _root: _Directory

    def lay(self, target: Path) -> None:
        """Make the directory as it may be found."""
        luck = _Luck(random.Random(f"{self.moment} {self.seed}"), self.moment)

        def lay(directory: _Directory, path: Path) -> None:
            path.mkdir()
            for name, node in directory.found(luck.wanted).items():
                if isinstance(node, _File):
                    (path / name).write_bytes(node.found(luck.horizon))
                else:
                    lay(node, path / name)

        lay(self._root, target)


class History:
    """What becomes of a directory, from how it is now: all that is there counts as kept."""

    def __init__(self, base: Path) -> None:
        self.base = base.resolve()
        self._first = _read(self.base)
        self._runs: list[tuple[list[_Step], _Directory | None]] = []
        self._said: list[tuple[int, str]] = []
        self._changed: list[int] = []
        self._synced: list[int] = []
        self.syncs: set[str] = set()

    def run(self, *command: str, cwd: Path, inject: str = "") -> str:
        """Run a command to its end and remember what it did; returns what it said.

        `inject` as in strace(1). That nothing was missed is seen in that the model, without a cut,
        has what is there.
        """
        words = ["strace", "-f", "-qq", "-xx", "-s", "2097152", "-e", "signal=none"]
        words += ["-e", "trace=" + ",".join(f"?{call}" for call in _CALLS.split(","))]
        words += ["-e", f"inject={inject}"] if inject else []
        with tempfile.NamedTemporaryFile(prefix="power-") as trace:
            done = subprocess.run(
                [*words, "-o", trace.name, *command],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=patient(300),
                text=True,
            )
            there = _read(self.base)
            self._runs.append(
                (list(_steps(Path(trace.name))), there if done.returncode < 0 else None)
            )
        root = deepcopy(self._first)
        seen = dict.fromkeys(player for _, player in self._play(root))
        _expect_same(root, there)
        self._said = [one for player in seen for one in player.said]
        self._changed = [at for player in seen for at in player.changed]
        self._synced = [at for player in seen for at, _ in player.synced]
        self.syncs = {label for player in seen for _, label in player.synced}
        return done.stdout

    def moments(self, count: int, chance: random.Random, *, run: int = 0) -> list[int]:
        """Moments to cut at, from a run on: when something has just been said, before a sync ends,
        any.
        """
        first = sum(len(steps) for steps, _ in self._runs[:run])
        kinds = [[at for at, _ in self._said], [at - 1 for at in self._synced], self._changed]
        wanted = [those for one in kinds if (those := [at for at in one if at >= first])]
        return [chance.choice(chance.choice(wanted)) for _ in range(count)]

    def last_time(self, text: str) -> int:
        """The moment at which this was said last."""
        return max(at for at, said in self._said if said == text)

    def cuts(
        self, moments: Iterable[int], *, deaf: str | None = None, seed: int = 0
    ) -> Iterator[Cut]:
        """The power is cut at each of these moments, to be looked at before the next.

        `deaf`: a pattern for the files and directories whose syncs the disk does not listen to.
        """
        times = Counter(moments)
        root = deepcopy(self._first)
        said: dict[_Player, None] = {}
        for at, player in self._play(root, deaf, seed):
            said[player] = None
            for number in range(times[at]):
                words = "".join(text for one in said for _, text in one.said)
                yield Cut(at, 1000 * seed + number, words, root)

    def _play(
        self, root: _Directory, deaf: str | None = None, seed: int = 0
    ) -> Iterator[tuple[int, _Player]]:
        at = 0
        for steps, left in self._runs:
            player = _Player(self.base, root, deaf, random.Random(seed))
            for step in steps:
                player.step(at, step)
                yield at, player
                at += 1
            if left is not None:
                _catch_up(at - 1, root, left)


def _catch_up(at: int, model: _Directory, there: _Directory) -> None:
    """Who is killed in the middle of a call has done some of it: as much as is there now."""
    for name in model.now.keys() - there.now.keys():
        model.change(at, {name: None})
    for name, node in there.now.items():
        inner = model.now.get(name)
        if isinstance(node, _File):
            if inner is None:
                inner = _File(node.label)
                model.change(at, {name: inner})
            assert isinstance(inner, _File)
            if inner.now != node.now:
                inner.resize(at, len(node.now))
                inner.write(at, 0, bytes(node.now))
        else:
            if inner is None:
                inner = _Directory(node.label)
                model.change(at, {name: inner})
            assert isinstance(inner, _Directory)
            _catch_up(at, inner, node)


def _expect_same(model: _Directory, there: _Directory) -> None:
    assert model.now.keys() == there.now.keys(), f"{model.label}: not all calls were understood"
    for name, node in there.now.items():
        mine = model.now[name]
        if isinstance(node, _File):
            assert isinstance(mine, _File)
            assert mine.now == node.now, f"{node.label}: not all calls were understood"
        else:
            assert isinstance(mine, _Directory)
            _expect_same(mine, node)
