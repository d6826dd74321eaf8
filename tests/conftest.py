"""What every test may ask for.

`@pytest.mark.needs("postfix", ...)` names the programs of the operating system a
test runs. Where one is missing the test is skipped and says so; under
RELAY_REQUIRE_TOOLS=1 (as in .ci/run) that is a failure, so that nothing is
skipped unseen.

`make test` runs several processes, and the tests of a file stay together: they share servers,
and addresses of their own. Ports differ between the processes (`tests.rigs.ports`).
"""

from __future__ import annotations

import os
import shutil

import pytest

from relay.daemon.files import raise_limit
from tests.rigs import postgres

_FILES = 20_000
"""A table of tests has a thousand hosts; most users may open 1,024 files unless they ask."""
_SBIN = ("/usr/sbin", "/sbin", "/usr/local/sbin")


def _find(program: str) -> str | None:
    if program == "root":
        return "root" if os.geteuid() == 0 else None
    if program == "postgresql":
        return postgres.program("initdb")
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *_SBIN]))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "torture: a short form of a long sweep; `make torture` runs the long one"
    )
    raise_limit(_FILES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/system comes first: its files take minutes, and one of them alone at the end, too."""
    items.sort(key=lambda item: "system" not in item.path.parts)


def pytest_runtest_setup(item: pytest.Item) -> None:
    wanted = [program for mark in item.iter_markers("needs") for program in mark.args]
    missing = [program for program in wanted if _find(program) is None]
    if not missing:
        return
    reason = f"needs {', '.join(missing)} from the operating system"
    if os.environ.get("RELAY_REQUIRE_TOOLS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
