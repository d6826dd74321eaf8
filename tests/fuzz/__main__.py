"""`make fuzz`: each target for a while, led by coverage where atheris is installed, by chance
elsewhere.

    python -m tests.fuzz [--seconds 60] [target …]

An input that breaks a promise is written to build/fuzz/ and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from types import FunctionType

from tests.fuzz.mutation import mutated
from tests.fuzz.operator_targets import close
from tests.fuzz.targets import SEEDS, TARGETS, WORDS

FOUND = Path("build/fuzz")


def by_coverage(name: str, seconds: int) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

    corpus = FOUND / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed{number}").write_bytes(seed)
    words = FOUND / "words"
    words.write_text("".join('"' + "".join(f"\\x{o:02x}" for o in word) + '"\n' for word in WORDS))
    for function in gc.get_objects():
        # Only the relay's code: so a start takes seconds, and inputs are kept for its paths alone.
        if isinstance(function, FunctionType) and str(function.__module__).startswith("relay."):
            atheris.instrument_func(function)
    options = [
        f"-max_total_time={seconds}",
        "-max_len=2000",
        f"-dict={words}",
        f"-artifact_prefix={FOUND}/{name}-",
    ]
    atheris.Setup(
        [sys.argv[0], "-verbosity=0", "-print_final_stats=1", *options, str(corpus)], TARGETS[name]
    )
    atheris.Fuzz()


def by_chance(name: str, seconds: int) -> None:
    random, ends, count = Random(time.time_ns()), time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        octets = mutated(random, SEEDS[name])
        count += 1
        try:
            TARGETS[name](octets)
        except Exception:
            (FOUND / f"{name}-crash").write_bytes(octets)
            print(f"{name}: {octets!r}", file=sys.stderr)
            raise
    close()
    print(f"{name}: {count} inputs, nothing found")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    FOUND.mkdir(parents=True, exist_ok=True)
    if asked.one:
        try:
            import atheris  # noqa: F401
        except ImportError:
            by_chance(asked.targets[0], asked.seconds)
        else:
            by_coverage(asked.targets[0], asked.seconds)
        return 0
    failed = []
    for name in asked.targets or TARGETS:
        print(f"--- {name}", flush=True)
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--one",
            "--seconds",
            str(asked.seconds),
            name,
        ]
        # libFuzzer ends its process, and lets nobody tidy up.
        with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
            run = subprocess.run(command, check=False, env={**os.environ, "TMPDIR": directory})
        if run.returncode:
            failed.append(name)
    print(f"found something in: {', '.join(failed)} (see {FOUND}/)" if failed else "nothing found")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
