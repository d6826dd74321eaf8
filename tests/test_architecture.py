"""The chart of the code, held by reading its imports.

    row 6  put together          cli  sandbox ─► daemon ─► workers ─► config
    row 5  answer over HTTP      api          web
    row 4  move mail, look       receive      deliver      admin
    row 3  take in, sign         submit   sign
    row 2  keep, decide, state   policy   queue   route   report
    row 1  words                 mail

Imports go down, never sideways, never up. Modules that touch network, disk,
database or clock are listed by name; every other one is pure.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RELAY = ROOT / "relay"

ROWS = {
    "mail": 1,
    "policy": 2,
    "queue": 2,
    "route": 2,
    "report": 2,
    "submit": 3,
    "sign": 3,
    "receive": 4,
    "deliver": 4,
    "admin": 4,
    "api": 5,
    "web": 5,
    "config": 6,
    "workers": 6,
    "daemon": 6,
    "sandbox": 6,
    "cli": 6,
    "__main__": 6,
}

# Nouns of a neighbour that may be read sideways: who reads -> what.
NOUNS = {
    "queue": {"relay.policy.settings"},
    "route": {"relay.policy.settings"},
    "report": {
        "relay.policy.settings",
        "relay.queue.entry",
        "relay.queue.nodes",
        "relay.queue.settle",
    },
}

# Row 6 is put together in this order.
PUT_TOGETHER_ROW = 6
PUT_TOGETHER = {"config": 0, "workers": 1, "daemon": 2, "sandbox": 3, "cli": 4, "__main__": 5}

# The shells: they may touch network, disk, database or clock.
SHELLS = {
    "relay.mail.files",
    "relay.mail.threads",
    "relay.queue.change_steps",
    "relay.queue.dispatch",
    "relay.queue.engine",
    "relay.queue.event_search",
    "relay.queue.move",
    "relay.queue.move_directory",
    "relay.queue.postgres",
    "relay.queue.request",
    "relay.queue.sqlite",
    "relay.route.credentials",
    "relay.route.dns",
    "relay.route.dns_response",
    "relay.route.local_address",
    "relay.route.name_servers",
    "relay.route.judged",
    "relay.route.router",
    "relay.route.secret_files",
    "relay.report.deliverylog",
    "relay.submit.certificates",
    "relay.receive.connection",
    "relay.receive.listener_state",
    "relay.receive.intake",
    "relay.receive.listener",
    "relay.deliver.wake_up",
    "relay.deliver.attempt",
    "relay.deliver.connecting",
    "relay.deliver.hand_over",
    "relay.deliver.hop_trial",
    "relay.deliver.connection",
    "relay.deliver.dialogue",
    "relay.deliver.floors",
    "relay.deliver.https",
    "relay.deliver.login",
    "relay.deliver.memory",
    "relay.deliver.negotiate",
    "relay.deliver.pool",
    "relay.deliver.probe",
    "relay.deliver.protocol",
    "relay.deliver.transfer",
    "relay.deliver.recorder",
    "relay.deliver.report_sender",
    "relay.deliver.runner",
    "relay.deliver.scheduler",
    "relay.deliver.sts_fetch",
    "relay.deliver.sts_policies",
    "relay.deliver.tls",
    "relay.deliver.tokens",
    "relay.deliver.tls_report_sender",
    "relay.deliver.tls_reports",
    "relay.sign.keys",
    "relay.submit.secrets",
    "relay.admin.client",
    "relay.admin.control",
    "relay.admin.control_socket",
    "relay.api.schemas",
    "relay.api.bodies",
    "relay.api.caller",
    "relay.api.domains",
    "relay.api.endpoints",
    "relay.api.entrance",
    "relay.api.events",
    "relay.api.forms",
    "relay.api.openapi",
    "relay.api.rate",
    "relay.api.operator",
    "relay.api.sending",
    "relay.api.server",
    "relay.api.state",
    "relay.api.targets",
    "relay.api.webhooks",
    "relay.web.queries",
    "relay.web.guard",
    "relay.web.jobs",
    "relay.web.live",
    "relay.web.pages",
    "relay.web.site",
    "relay.config",
    "relay.daemon",
    "relay.workers",
    "relay.cli",
    "relay.__main__",
}

IMPURE = {
    "aiohttp",
    "aiosmtpd",
    "aiosmtplib",
    "argon2",
    "asyncio",
    "dns",
    "fcntl",
    "os",
    "pathlib",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "uvloop",
}

CLOCKS = {"now", "utcnow", "today"}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(RELAY.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"), str(path))


MODULES = dict(_modules())


def _imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            # `from relay.queue import store` names a module too.
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else node.module), node.lineno


def _package(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _is_shell(module: str) -> bool:
    # The sandbox has servers of its own: all of it is a shell.
    return any(
        module == shell or module.startswith(f"{shell}.") for shell in SHELLS | {"relay.sandbox"}
    )


def _may_import(importer: str, imported: str) -> bool:
    here, there = _package(importer), _package(imported)
    if there in ("", here):
        return True
    if ROWS[here] == ROWS[there] == PUT_TOGETHER_ROW:
        return PUT_TOGETHER[there] < PUT_TOGETHER[here]
    if there == "config":
        return False
    return ROWS[there] < ROWS[here] or imported in NOUNS.get(here, set())


def test_every_module_has_its_place_on_the_chart() -> None:
    assert {_package(name) for name in MODULES} - {""} <= set(ROWS)
    missing = {shell for shell in SHELLS if shell not in MODULES}
    assert not missing, f"listed as shells but not there: {sorted(missing)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_the_chart(module: str) -> None:
    wrong = [
        f"{module}:{line} imports {imported}"
        for imported, line in _imports(MODULES[module])
        if imported.split(".")[0] == "relay" and not _may_import(module, imported)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not _is_shell(name)))
def test_a_decision_touches_neither_network_nor_disk_nor_clock(module: str) -> None:
    tree = MODULES[module]
    wrong = [
        f"{module}:{line} imports {name}"
        for name, line in _imports(tree)
        if name.split(".")[0] in IMPURE
    ]
    wrong += [
        f"{module}:{node.lineno} asks the clock"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CLOCKS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("datetime", "date")
    ]
    wrong += [
        f"{module}:{node.lineno} opens a file"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open"
    ]
    assert not wrong, wrong


def test_no_module_imports_a_name_that_another_keeps_to_itself() -> None:
    wrong = [
        f"{module}:{node.lineno} imports {alias.name}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("relay")
        for alias in node.names
        if alias.name.startswith("_") and alias.name != "__version__"
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_opens_as_a_manual_page_does(module: str) -> None:
    assert ast.get_docstring(MODULES[module]), f"{module} says nothing of itself"


def test_docs_flow_marks_each_shell_of_the_lower_rows_where_it_names_it_first() -> None:
    text = (ROOT / "docs/flow.md").read_text(encoding="utf-8")
    pure = {module.rpartition(".")[2] for module in MODULES if not _is_shell(module)}
    shells = {shell.rpartition(".")[2] for shell in SHELLS if ROWS[_package(shell)] < 5} - pure
    first = {name: re.search(rf"`(?:\w+/)*{name}/?`( †)?", text) for name in shells}
    assert [name for name, found in first.items() if found and not found[1]] == []


def _table_of_flow() -> dict[str, set[str]]:
    """What docs/flow.md says each package of the lower rows imports."""
    rows = re.findall(
        r"^\| `(\w+)` \| (.*) \|$",
        (ROOT / "docs/flow.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {
        package: {name.split(".")[0] for name in re.findall(r"[a-z_.]+", said)}
        for package, said in rows
        if package not in ("mail", "config") and ROWS[package] < PUT_TOGETHER_ROW
    }


@pytest.mark.parametrize(
    "package", sorted(name for name, row in ROWS.items() if 1 < row < PUT_TOGETHER_ROW)
)
def test_docs_flow_tells_what_each_package_imports(package: str) -> None:
    imported = {
        _package(name)
        for module, tree in MODULES.items()
        if _package(module) == package
        for name, _ in _imports(tree)
        if name.startswith("relay.")
    }
    assert _table_of_flow()[package] == imported - {package}
