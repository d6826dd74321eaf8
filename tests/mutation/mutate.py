"""Break the decisions about TLS one by one, and see that a test notices each time.

    python tests/mutation/mutate.py [MODULE …]   every mutant; exit 1 if one survives
    python tests/mutation/mutate.py --list       what would be broken

Two kinds of mutants are made of each module's syntax tree. Cells: in a table whose rows are
tuples of names, each cell is replaced by each other name of its kind. Operators: a number, a
truth value or a status is changed, a condition negated or taken for true or false, the
branches of a choice swapped, `and` and `or` exchanged, an argument left out. Each mutant runs
in a process of its own, in memory: no file is touched. The module's own unit tests have to
fail. A mutant that no test could notice is listed in `EQUIVALENT`, with the reason.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import importlib.util
import io
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis  # noqa: F401  imported once here, and not again by each child
import pytest
import pytest_asyncio  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]

TARGETS = {
    "relay.route.security": (
        "tests/unit/route/test_security.py",
        "tests/unit/route/test_floors.py",
    ),
    "relay.route.floor": (
        "tests/unit/route/test_floors.py",
        "tests/unit/route/test_mta_sts.py",
        "tests/unit/deliver/test_floors_at_hand.py",
    ),
    "relay.route.forecast": (
        "tests/unit/route/test_forecast.py",
        "tests/unit/route/test_floors.py",
    ),
    "relay.route.dane": ("tests/unit/route/test_dane.py",),
    "relay.deliver.tally": ("tests/unit/deliver/test_tally.py",),
    "relay.policy.rules": ("tests/unit/policy/test_rules.py",),
    "relay.route.chain": ("tests/unit/route/test_chain.py",),
    "relay.route.memory": ("tests/unit/route/test_memory.py",),
    "relay.route.suggestions": ("tests/unit/route/test_suggestions.py",),
    "relay.deliver.floors": (
        "tests/unit/deliver/test_floors_at_hand.py",
        "tests/unit/deliver/test_attempt_requiretls.py",
    ),
}

_SILENT_DEFAULT = "a default that is silent is false all the same"
_ORDER = "only the order of the weights counts"
_SHORT_CUT = "only saves the loop, which finds nothing"

_ANCHOR = "nothing but its name and its key is said by a bare anchor"
_BARE = (
    "x509.CertificateBuilder().subject_name(name).issuer_name(name)"
    ".public_key(_certificate_key(key)).serial_number(1)"
)
_BARE_IN_DATE = (
    f"{_BARE}.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))"
)

EQUIVALENT = {
    "10000 → 10001": "the size of a cache",
    "if settings is None → if True": "only resolves again",
    "any((is_issued(leaf, others, roots, name, now) for name in _names(leaf)[:1])): 1 → 2": "any "
    "one of its names will do",
    "if floor == NO_FLOOR → if False": "only saves making an equal requirement",
    "Tlsa(255, 255, 255, b''): 255 → 256": "either is a record that does not count",
    f"{_BARE}: 1 → 2": _ANCHOR,
    "timedelta(days=1): 1 → 2": _ANCHOR,
    f"{_BARE_IN_DATE}.add_extension(x509.BasicConstraints(ca=True, path_length=None),"
    " critical=True): "
    "True → False": _ANCHOR,
    "TlsRule(require_tls=False, skip_verification=False) → without require_tls": _SILENT_DEFAULT,
    "TlsRule(require_tls=False, skip_verification=False) "
    "→ without skip_verification": _SILENT_DEFAULT,
    "if not table or not domain → if False": _SHORT_CUT,
    "if not rules.destinations → if False": _SHORT_CUT,
    "return 3 if outcome.status == NO_REQUIRETLS else 2: 3 → 4": _ORDER,
    "not table or not domain → and": _SHORT_CUT,
    "rules.overlay and sender_domain → or": "only saves a look-up, which finds nothing",
    "return -1: 1 → 2": _ORDER,
    "return 2: 2 → 3": _ORDER,
    "dot >= 0: 0 → 1": "no domain begins with a dot",
    "domain.find('.', dot + 1): 1 → 2": "no label is empty",
    "return not setting.value: not setting.value → without not": (
        "what was refused is as strict as can be"
    ),
}
"""Mutants that change nothing anybody could see, and why."""

SECONDS_PER_MUTANT = 60


@dataclass(frozen=True)
class Mutant:
    module: str
    line: int
    what: str
    tree: ast.Module

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.what}"


def mutants(module: str) -> Iterator[Mutant]:
    """All of a module, in the order of its lines."""
    tree = ast.parse(_path(module).read_text(encoding="utf-8"))
    found = [*_cells(tree), *_operators(tree)]
    for line, what, mutated in sorted(found, key=lambda one: (one[0], one[1])):
        yield Mutant(module, line, what, mutated)


def _path(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


_Found = tuple[int, str, ast.Module]


def _replaced(tree: ast.Module, index: int, new: ast.AST) -> ast.Module:
    """A copy of the tree with its node number `index` (in the order of `ast.walk`) another one."""
    mutated = copy.deepcopy(tree)
    old = list(ast.walk(mutated))[index]
    for parent in ast.walk(mutated):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(item is old for item in value):
                value[:] = [new if item is old else item for item in value]
    return ast.fix_missing_locations(mutated)


# --- cells of tables ---------------------------------------------------------------------------


def _cells(tree: ast.Module) -> Iterator[_Found]:
    numbers = {id(node): n for n, node in enumerate(ast.walk(tree))}
    for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        rows = [row for row in table.values if _is_row(row)]
        for row in rows:
            assert isinstance(row, ast.Tuple)
            for column, cell in enumerate(row.elts):
                assert isinstance(cell, ast.Name)
                for other in sorted(_kin(tree, cell.id) - {cell.id}):
                    what = f"cell {column} of the row, {cell.id} → {other}"
                    new = ast.Name(other, ast.Load())
                    yield cell.lineno, what, _replaced(tree, numbers[id(cell)], new)


def _is_row(node: ast.expr) -> bool:
    return isinstance(node, ast.Tuple) and all(isinstance(cell, ast.Name) for cell in node.elts)


def _kin(tree: ast.Module, name: str) -> set[str]:
    """The module's names that the same call makes as `name`: such as `_TLS = Step(…)`."""
    makers = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            (target,) = node.targets
            if isinstance(target, ast.Name):
                makers[target.id] = ast.unparse(node.value.func)
    return {other for other, maker in makers.items() if maker == makers.get(name)}


# --- operators ---------------------------------------------------------------------------------


def _operators(tree: ast.Module) -> Iterator[_Found]:
    ignored, around = _unseen(tree), _surroundings(tree)
    for number, node in enumerate(ast.walk(tree)):
        if id(node) in ignored:
            continue
        for what, new in _variants(node):
            line = getattr(node, "lineno", 0)
            yield line, f"{around.get(id(node), '')}{what}", _replaced(tree, number, new)


def _surroundings(tree: ast.Module) -> dict[int, str]:
    """For a bare number and the like, the smallest comparison, call or return it stands in."""
    around: dict[int, str] = {}
    for node in ast.walk(tree):  # from the outside in: the last word is the closest
        if isinstance(node, ast.Compare | ast.Call | ast.Return):
            for inner in ast.walk(node):
                if inner is not node and isinstance(inner, ast.Constant | ast.UnaryOp):
                    around[id(inner)] = f"{ast.unparse(node)}: "
    return around


def _unseen(tree: ast.Module) -> set[int]:
    """Nodes that say something to people and tools only: docstrings, annotations, `__all__`,
    imports.
    """
    unseen: set[int] = set()
    for node in ast.walk(tree):
        hidden: list[ast.AST | None] = []
        if isinstance(node, ast.Import | ast.ImportFrom):
            hidden = [node]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            hidden = [node]
        if isinstance(node, ast.AnnAssign):
            hidden = [node.annotation]
        if isinstance(node, ast.FunctionDef):
            hidden = [node.returns, *(argument.annotation for argument in node.args.args)]
            hidden += [argument.annotation for argument in node.args.kwonlyargs]
            hidden += node.decorator_list
        if isinstance(node, ast.ClassDef):
            hidden = [*node.decorator_list]
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            hidden = [node]
        for root in hidden:
            if root is not None:
                unseen |= {id(inner) for inner in ast.walk(root)}
    return unseen


def _variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    text = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
    match node:
        case ast.Constant(value=bool() as value):
            yield f"{value} → {not value}", ast.Constant(not value)
        case ast.Constant(value=int() as value):
            yield f"{value} → {value + 1}", ast.Constant(value + 1)
        case ast.Constant(value=str() as value) if _STATUS.fullmatch(value):
            yield f"{value!r} → {value[:-1]}9", ast.Constant(f"{value[:-1]}9")
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield f"{text} → without not", operand
        case ast.BoolOp(op=operator, values=values):
            other: ast.boolop = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield (
                f"{text} → {'or' if isinstance(other, ast.Or) else 'and'}",
                ast.BoolOp(other, values),
            )
        case ast.Compare(left=left, ops=[operator_], comparators=right) if (
            type(operator_) in _OPPOSITES
        ):
            opposite = _OPPOSITES[type(operator_)]()
            yield f"{text} → opposite", ast.Compare(left, [opposite], right)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield f"{text} → swapped", ast.IfExp(test, orelse, body)
        case ast.If(test=test, body=statements, orelse=rest):
            for value in (True, False):
                yield (
                    f"if {ast.unparse(test)} → if {value}",
                    ast.If(ast.Constant(value), statements, rest),
                )
        case ast.Call(func=function, args=arguments, keywords=keywords) if len(keywords) > 1:
            for keyword in keywords:
                kept = [one for one in keywords if one is not keyword]
                yield f"{text} → without {keyword.arg}", ast.Call(function, arguments, kept)
        case _:
            pass


_STATUS = re.compile(r"[245]\.\d\.\d+")
"""The only texts that decide something: enhanced status codes."""

_OPPOSITES: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
}


# --- running -----------------------------------------------------------------------------------


def survives(mutant: Mutant | None, tests: tuple[str, ...]) -> bool:
    """Whether the tests pass with this mutant in place of its module (None: without a mutant)."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS_PER_MUTANT)
        os._exit(_run_child(mutant, tests))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _run_child(mutant: Mutant | None, tests: tuple[str, ...]) -> int:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        if mutant is not None:
            _install(mutant)
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", *tests]
        with contextlib.redirect_stdout(io.StringIO()):
            return int(pytest.main(arguments))
    except BaseException:  # a mutant that cannot even be imported is noticed, too
        return 1


def _install(mutant: Mutant) -> None:
    spec = importlib.util.spec_from_file_location(mutant.module, _path(mutant.module))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[mutant.module] = module
    exec(compile(mutant.tree, str(_path(mutant.module)), "exec"), module.__dict__)
    parent, _, name = mutant.module.rpartition(".")
    setattr(importlib.import_module(parent), name, module)


def main() -> int:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if "--list" in sys.argv:
        for module in TARGETS:
            print(*mutants(module), sep="\n")
        return 0
    began, count, survivors = time.monotonic(), 0, []
    for module in sys.argv[1:] or TARGETS:
        tests = TARGETS[module]
        if not survives(None, tests):
            print(f"{module}: its tests fail without any mutant; nothing can be learned from them")
            return 1
        for mutant in mutants(module):
            count += 1
            if mutant.what not in EQUIVALENT and survives(mutant, tests):
                survivors.append(mutant)
                print(f"survived: {mutant}", flush=True)
    seconds = time.monotonic() - began
    print(f"{count} mutants, {len(survivors)} survived, {seconds:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
