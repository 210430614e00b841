"""Would the tests notice? Changes the package in small ways, one at a time, and says for which changes no test fails.

docs/mutants.md has the command. Run it in a clone: with --in-place it writes defects into the files. The tests are
collected once; each mutant runs in a fork, with those tests alone that reach the changed lines. There the mutant of a
function replaces the function's code. For a mutant of anything else (a constant, a default, a function that runs when a
module is imported) the fork imports the package and the tests again.

Not changed are texts for people (strings with a space, and all that is raised or formatted), annotations, decorators.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path.cwd()
SOURCE = ROOT / "entrypoints"
LEAST_SECONDS = 20  # of the processor, that a mutant may use, however fast the tests are without it
WAIT_FACTOR = 8  # how much longer than that it may take on a busy machine
MEMORY = 16 << 30  # of addresses
FAILED_TEST = 9  # the descriptor on which a fork names the test that failed
ALIVE = ("survived", "unreached")
# What the tests need and takes long to import, without threads of its own: imported once, before the forks.
EARLY = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "huggingface_hub", "hypothesis", "jinja2"}

COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}  # fmt: skip
CALCULATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.MatMult: ast.Add,
}  # fmt: skip

# ---------------------------------------------------------------------------- mutants


@dataclass
class Mutant:
    """One change.

    Args:
        lines: first and last line of the statement that it is in.
        function: qualified name of the outermost function that it is in; "" where it runs when the module is imported.
        before, after: the changed part as text.
        apply: changes a fresh tree of the module.
    """

    lines: tuple[int, int]
    function: str
    before: str
    after: str
    apply: Callable[[ast.Module], None]

    def __str__(self) -> str:
        return f"{self.lines[0]}: {self.before} → {self.after}"


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module."""
    return _Mutants(ast.parse(source)).found


class _Mutants:
    """Walks a tree. A place in it is a path of field names and numbers, which is valid in every fresh tree."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[Mutant] = []
        self._body(tree, (), "", "")

    def _body(self, node: Any, path: tuple, function: str, scope: str) -> None:
        """Statements of a module, a class, a function or a compound statement."""
        for name in ("body", "orelse", "finalbody"):
            for number, statement in enumerate(getattr(node, name, ())):
                self._statement(statement, (*path, name, number), function, scope)
        for name in ("handlers", "cases"):
            for number, part in enumerate(getattr(node, name, ())):
                self._body(part, (*path, name, number), function, scope)

    def _statement(self, node: ast.stmt, path: tuple, function: str, scope: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self._expressions(node.args, (*path, "args"), (node.lineno, node.lineno), function)
            self._body(node, path, function or scope + node.name, "")
            return
        if isinstance(node, ast.ClassDef):
            self._body(node, path, function, f"{scope}{node.name}.")
            return
        if _is_left_alone(node):
            return
        lines = (node.lineno, node.end_lineno or node.lineno)
        if hasattr(node, "body"):  # its head alone; what is inside follows
            lines = (node.lineno, max(node.lineno, node.body[0].lineno - 1))
        self._whole(node, path, lines, function)
        for name, value in ast.iter_fields(node):
            if name in ("body", "orelse", "finalbody", "handlers", "cases", "annotation", "targets", "target"):
                continue
            quiet = isinstance(node, ast.Raise) or (isinstance(node, ast.Assert) and name == "msg")
            self._expressions(value, (*path, name), lines, function, quiet)
        if isinstance(node, (ast.If, ast.While)):
            self._negated(node.test, (*path, "test"), lines, function)
        self._body(node, path, function, scope)

    def _expressions(self, value: Any, path: tuple, lines: tuple[int, int], function: str, quiet: bool = False) -> None:
        if isinstance(value, list):
            for number, entry in enumerate(value):
                self._expressions(entry, (*path, number), lines, function, quiet)
            return
        if not isinstance(value, ast.AST) or isinstance(value, ast.JoinedStr) or quiet:
            return
        for change in _changes(value):
            self._add(value, change, path, lines, function)
        if isinstance(value, ast.IfExp):
            self._negated(value.test, (*path, "test"), lines, function)
        for name, entry in ast.iter_fields(value):
            if name not in ("annotation", "ctx"):
                self._expressions(entry, (*path, name), lines, function)

    def _whole(self, node: ast.stmt, path: tuple, lines: tuple[int, int], function: str) -> None:
        """A statement that is left out, or does something else."""
        other: ast.stmt | None = None
        if isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign, ast.Delete, ast.Raise, ast.Assert)):
            other = ast.Pass()
        elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
            other = ast.Return(ast.Constant(None))
        elif isinstance(node, (ast.Break, ast.Continue)):
            other = ast.Continue() if isinstance(node, ast.Break) else ast.Break()
        if other is not None and function:  # at the top of a module a missing name fails at once
            self._add(node, other, path, lines, function)
        if isinstance(node, ast.AugAssign):
            calculated = ast.AugAssign(node.target, CALCULATED[type(node.op)](), node.value)
            self._add(node, calculated, path, lines, function)

    def _negated(self, test: ast.expr, path: tuple, lines: tuple[int, int], function: str) -> None:
        if not isinstance(test, (ast.Compare, ast.UnaryOp)):  # those have mutants of their own
            self._add(test, ast.UnaryOp(ast.Not(), test), path, lines, function)

    def _add(self, old: ast.AST, new: ast.AST, path: tuple, lines: tuple[int, int], function: str) -> None:
        def apply(tree: ast.Module) -> None:
            parent: Any = tree
            for step in path[:-1]:
                parent = parent[step] if isinstance(step, int) else getattr(parent, step)
            replacement = ast.copy_location(copy.deepcopy(new), old)
            if isinstance(path[-1], int):
                parent[path[-1]] = replacement
            else:
                setattr(parent, path[-1], replacement)
            ast.fix_missing_locations(tree)

        before, after = (" ".join(ast.unparse(node).split())[:160] for node in (old, new))
        self.found.append(Mutant(lines, function, before, after, apply))


def _is_left_alone(node: ast.stmt) -> bool:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring, or ...
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Pass))


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What an expression may become."""
    if isinstance(node, ast.Compare):
        for place, op in enumerate(node.ops):
            for other in COMPARED[type(op)]:
                yield ast.Compare(node.left, [*node.ops[:place], other(), *node.ops[place + 1 :]], node.comparators)
    elif isinstance(node, ast.BinOp):
        yield ast.BinOp(node.left, CALCULATED[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.comprehension):
        for place, test in enumerate(node.ifs):
            rest = [*node.ifs[:place], ast.UnaryOp(ast.Not(), test), *node.ifs[place + 1 :]]
            yield ast.comprehension(node.target, node.iter, rest, node.is_async)
    elif isinstance(node, ast.Call) and len(node.args) > 1:
        first, second, *rest = node.args
        starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
        if not starred and ast.dump(first) != ast.dump(second):
            yield ast.Call(node.func, [second, first, *rest], node.keywords)
    elif isinstance(node, ast.Constant):
        yield from map(ast.Constant, _other_values(node.value))


def _other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1] if value else [1]
    if isinstance(value, float):
        return [2 * value if value else 1.0]
    if isinstance(value, str):
        return [] if any(map(str.isspace, value)) else [value + "~"]
    return [value + b"~"] if isinstance(value, bytes) else []


# ---------------------------------------------------------------------------- which tests reach which line


class Tracer:
    """Collects the lines of the package's functions that run, in all threads."""

    def __init__(self) -> None:
        self.lines: dict[str, set[int]] = {}
        self._inside = str(SOURCE)

    def __enter__(self) -> Tracer:
        threading.settrace(self._call)
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(self._inside) or frame.f_code.co_name == "<module>":
            return None
        lines = self.lines.setdefault(str(Path(file).relative_to(ROOT)), set())

        def local(frame: types.FrameType, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return local

        return local(frame, event, argument)


class Watch:
    """A pytest plugin: what a fixture of more than one test runs counts for every test that uses it."""

    def __init__(self) -> None:
        self.shared: dict[str, dict[str, set[int]]] = {}
        self.tracer: Tracer | None = None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        if self.tracer is None or fixturedef.scope == "function":
            yield
            return
        outer = self.tracer
        with Tracer() as self.tracer:
            yield
        _merge(self.shared.setdefault(fixturedef.argname, {}), self.tracer.lines)
        self.tracer = outer.__enter__()


def _merge(into: dict[str, set[int]], lines: dict[str, set[int]]) -> None:
    for file, found in lines.items():
        into.setdefault(file, set()).update(found)


def observe(items: list[Any], watch: Watch, imported: dict[str, set[int]], out: Path) -> None:
    """Run the tests that `out` does not have and add what they reach; a test that fails or is skipped is left out."""
    empty: dict[str, Any] = {"seconds": {}, "lines": {}, "left_out": [], "early": []}
    found = json.loads(out.read_text()) if out.exists() else empty
    items = [item for item in items if item.nodeid not in found["seconds"] and item.nodeid not in found["left_out"]]
    lines: dict[str, dict[str, set[int]]] = {}
    for place, item in enumerate(items):
        began = time.process_time()
        with Tracer() as watch.tracer:
            tracer = watch.tracer
            reports = runtestprotocol(item, log=False, nextitem=items[place + 1] if place + 1 < len(items) else None)
        watch.tracer = None
        if any(report.failed or report.skipped for report in reports):
            found["left_out"].append(item.nodeid)
        else:
            found["seconds"][item.nodeid], lines[item.nodeid] = time.process_time() - began, tracer.lines
    for item in items:
        if item.nodeid in lines:
            for name in item.fixturenames:
                _merge(lines[item.nodeid], watch.shared.get(name, {}))
    found["lines"] |= {test: {file: sorted(each) for file, each in files.items()} for test, files in lines.items()}
    found["at_import"] = {file: sorted(each) for file, each in imported.items()}
    found["early"] = sorted({*found["early"], *(name for name in sys.modules if name.split(".")[0] in EARLY)})
    out.write_text(json.dumps(found))


class Seen:
    """What `observe` wrote."""

    def __init__(self, file: Path, slowest: float) -> None:
        found = json.loads(file.read_text())
        self.seconds: dict[str, float] = {test: s for test, s in found["seconds"].items() if s <= slowest}
        self.early: list[str] = found["early"]
        self._at_import = {file: set(lines) for file, lines in found["at_import"].items()}
        self._lines = {
            test: {file: set(lines) for file, lines in found["lines"][test].items()} for test in self.seconds
        }
        self._reach = {test: sum(map(len, files.values())) for test, files in self._lines.items()}

    def is_imported(self, file: str, mutant: Mutant) -> bool:
        """It takes effect when the module is imported."""
        return not mutant.function or not self._at_import.get(file, set()).isdisjoint(_range(mutant))

    def tests_for(self, file: str, mutant: Mutant, budget: float) -> list[str]:
        """The tests that reach the mutant, those that reach little else first, for `budget` seconds.

        The fast ones are taken, and of a test with parameters the later cases cost more.
        """
        wanted = None if self.is_imported(file, mutant) else _range(mutant)
        found = [test for test, files in self._lines.items() if _touch(files.get(file), wanted)]
        if not found:  # or only in processes that a test starts: those that reach the module
            found = [test for test, files in self._lines.items() if _touch(files.get(file), None)]
        found.sort(key=lambda test: (self._reach[test], self.seconds[test]))
        names = [test.partition("[")[0] for test in found]
        turn = {test: names[:place].count(name) for place, (test, name) in enumerate(zip(found, names, strict=True))}
        taken: list[str] = []
        total = 0.0
        for test in sorted(found, key=lambda test: (1 + turn[test]) * (self.seconds[test] + 0.005)):
            total += self.seconds[test]
            if taken and total > budget:
                break
            taken.append(test)
        taken.sort(key=found.index)
        files = list(dict.fromkeys(test.partition("::")[0] for test in taken))
        return sorted(taken, key=lambda test: files.index(test.partition("::")[0]))  # a file's fixtures once


def _range(mutant: Mutant) -> set[int]:
    return set(range(mutant.lines[0], mutant.lines[1] + 1))


def _touch(lines: set[int] | None, wanted: set[int] | None) -> bool:
    return bool(lines) and (wanted is None or not wanted.isdisjoint(lines or ()))


# ---------------------------------------------------------------------------- a mutant's run


def run_mutant(mutant: Mutant, file: str, anew: bool, items: list[Any], folder: Path) -> int:
    """0 if all tests pass with it. In a fork."""
    path = ROOT / file
    tree = ast.parse(path.read_text())
    mutant.apply(tree)
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    if anew or not _replace_function(sys.modules.get(name), mutant.function, tree, path):
        return _run_anew(name, tree, path, [item.nodeid for item in items], folder)
    items[0].config._tmp_path_factory._basetemp = None
    items[0].config._tmp_path_factory._given_basetemp = folder
    for place, item in enumerate(items):
        following = items[place + 1] if place + 1 < len(items) else None
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            os.write(FAILED_TEST, item.nodeid.encode())
            return 1
    return 0


def _replace_function(module: Any, qualified: str, tree: ast.Module, file: Path) -> bool:
    """Give a function of the imported module the code that it has in the tree; False where that cannot be."""
    target: Any = module
    for name in qualified.split("."):
        target = vars(target).get(name) if target is not None else None
    if isinstance(target, property):
        target = target.fget
    target = getattr(target, "func", target) if type(target).__name__ == "cached_property" else target
    target = getattr(target, "__func__", target)
    while hasattr(target, "__wrapped__"):
        target = target.__wrapped__
    if not isinstance(target, types.FunctionType):
        return False
    codes = [code for code in _codes(compile(tree, str(file), "exec")) if code.co_qualname == qualified]
    if len(codes) != 1 or codes[0].co_freevars != target.__code__.co_freevars:
        return False
    target.__code__ = codes[0]
    return True


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a tree."""

    def __init__(self, name: str, tree: ast.Module, file: Path) -> None:
        self.name, self.tree, self.file = name, tree, file

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        places = [str(self.file.parent)] if self.file.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(name, self.file, loader=self, submodule_search_locations=places)

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.tree, str(self.file), "exec"), module.__dict__)


class _Names:
    """A pytest plugin: names the first test that fails."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            os.write(FAILED_TEST, report.nodeid.encode())


def _run_anew(name: str, tree: ast.Module, file: Path, tests: list[str], folder: Path) -> int:
    """Import the package and the tests again, with the mutant, and run them."""
    for loaded in list(sys.modules):
        origin = getattr(sys.modules[loaded], "__file__", None) or ""
        if loaded != "__main__" and (loaded.split(".")[0] == "slipway" or origin.startswith(str(ROOT / "tests"))):
            del sys.modules[loaded]
    sys.meta_path.insert(0, _Finder(name, tree, file))
    words = [*tests, "-x", "-q", "-s", "-p", "no:cacheprovider", f"--basetemp={folder}"]
    return int(pytest.main(words, plugins=[_Names()]))


class Running:
    """A fork that runs a mutant."""

    def __init__(self, work: Callable[[Path], int], seconds: float) -> None:
        self.began = time.monotonic()
        self._until = self.began + WAIT_FACTOR * seconds
        self._folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        self._reading, writing = os.pipe()
        os.set_blocking(self._reading, False)
        if not (child := os.fork()):
            code = 1
            try:
                _confine(writing, int(seconds))
                code = work(self._folder / "tests")
            except BaseException:  # whatever a defect may do: the tests did not pass
                code = 1
            os._exit(code)
        self._child = child
        os.close(writing)

    def ended(self) -> tuple[str, str] | None:
        """(its state, the test that failed), once it has ended or its time is over."""
        pid, status = os.waitpid(self._child, os.WNOHANG)
        if not pid and time.monotonic() < self._until:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child, signal.SIGKILL)  # it, or what it started and left
        if not pid:
            os.waitpid(self._child, 0)
        code = os.waitstatus_to_exitcode(status) if pid else -signal.SIGKILL
        state = "survived" if code == 0 else "timeout" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "killed"
        with contextlib.suppress(BlockingIOError):
            by = os.read(self._reading, 1000).decode()
        os.close(self._reading)
        shutil.rmtree(self._folder, ignore_errors=True)
        return state, by


def _confine(writing: int, seconds: int) -> None:
    """A fork is a group of its own, is silent, ends with its parent, and has a limit of time and of memory."""
    from slipway.signals import die_with_parent

    os.dup2(writing, FAILED_TEST)
    os.setpgid(0, 0)
    die_with_parent()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


# ---------------------------------------------------------------------------- the whole


@dataclass
class Chosen:
    """A mutant that is to be run; `number` is its place among all mutants of its file."""

    file: str
    number: int
    mutant: Mutant


def chosen(options: argparse.Namespace) -> Iterator[Chosen]:
    """The sample of each module, without what has a result."""
    done = {(r["file"], r["number"]) for r in results(options.out)}
    again = {(r["file"], r["number"]) for r in results(options.again) if r["state"] in ALIVE}
    for file in options.modules:
        found = list(enumerate(mutants_of((ROOT / file).read_text())))
        if options.again is not None:
            found = [entry for entry in found if (file, entry[0]) in again]
        elif options.only:
            found = [entry for entry in found if entry[0] in options.only]
        elif options.sample and len(found) > options.sample:
            found = sorted(random.Random(f"{options.seed} {file}").sample(found, options.sample), key=lambda e: e[0])
        yield from (Chosen(file, number, mutant) for number, mutant in found if (file, number) not in done)


def results(path: Path | None) -> list[dict[str, Any]]:
    """The last result of each mutant in a file of results."""
    if path is None or not path.exists():
        return []
    return list({(r["file"], r["number"]): r for r in map(json.loads, path.open())}.values())


def record(out: Path, one: Chosen, state: str, began: float, tests: int, by: str) -> None:
    """Add a result to the file."""
    digest = hashlib.sha256((ROOT / one.file).read_bytes()).hexdigest()[:8]
    found = {"file": one.file, "number": one.number, "key": str(one.mutant), "function": one.mutant.function}
    found |= {"state": state, "seconds": round(time.monotonic() - began, 2), "tests": tests, "by": by, "hash": digest}
    with out.open("a") as file:
        file.write(json.dumps(found) + "\n")


class Mutate:
    """The pytest plugin that runs the mutants in place of the tests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.watch, self.imported = options, Watch(), Tracer()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        with self.imported:
            for file in self.options.modules:
                name = ".".join((ROOT / file).relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
                importlib.import_module(name)
            yield

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        options = self.options
        if options.nemo:
            importlib.import_module("forked").import_nemo()
        if not (child := os.fork()):
            session.config.pluginmanager.register(self.watch)
            observe(session.items, self.watch, self.imported.lines, options.seen)
            os._exit(0)
        os.waitpid(child, 0)
        seen = Seen(options.seen, options.slowest)
        for name in seen.early:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        self._run(seen, {item.nodeid: item for item in session.items})
        return True

    def _run(self, seen: Seen, items: dict[str, Any]) -> None:
        todo = chosen(self.options)
        running: list[tuple[Running, Chosen, int]] = []
        while True:
            while len(running) < self.options.jobs and (one := next(todo, None)) is not None:
                tests = [test for test in seen.tests_for(one.file, one.mutant, self.options.budget) if test in items]
                if not tests:
                    record(self.options.out, one, "unreached", time.monotonic(), 0, "")
                    continue
                running.append((self._start(one, seen, tests, [items[test] for test in tests]), one, len(tests)))
            if not running:
                return
            for entry in list(running):
                process, one, tests_run = entry
                if (end := process.ended()) is not None:
                    record(self.options.out, one, end[0], process.began, tests_run, end[1])
                    running.remove(entry)
            time.sleep(0.01)

    def _start(self, one: Chosen, seen: Seen, tests: list[str], items: list[Any]) -> Running:
        seconds = LEAST_SECONDS + 5 * sum(seen.seconds[test] for test in tests)
        anew = seen.is_imported(one.file, one.mutant)
        return Running(lambda folder: run_mutant(one.mutant, one.file, anew, items, folder), seconds)


def in_place(options: argparse.Namespace) -> None:
    """Put each mutant into the file itself and run the tests as a person does: for those that start processes."""
    for one in chosen(options):
        path = ROOT / one.file
        source = path.read_text()
        tree = ast.parse(source)
        one.mutant.apply(tree)
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options.tests]
        began, state, by = time.monotonic(), "timeout", ""
        try:
            path.write_text(ast.unparse(tree) + "\n")
            done = subprocess.run(words, capture_output=True, text=True, timeout=options.limit)
            state = "killed" if done.returncode else "survived"
            by = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), "")[:200]
        except subprocess.TimeoutExpired:
            pass
        finally:
            path.write_text(source)
        record(options.out, one, state, began, len(options.tests), by)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", required=True, help="files of the package, from the root of the clone")
    parser.add_argument("--tests", nargs="+", default=[], help="files of tests that run in this process")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"), help="gets a line for each mutant")
    parser.add_argument("--seen", type=Path, default=Path("seen.json"), help="which tests reach which lines: a cache")
    parser.add_argument("--jobs", type=int, default=2, help="mutants that run at a time")
    parser.add_argument("--budget", type=float, default=1e9, help="most seconds of tests for a mutant")
    parser.add_argument("--slowest", type=float, default=20.0, help="seconds; slower tests are left out")
    parser.add_argument("--nemo", action="store_true", help="import NeMo before the forks")
    parser.add_argument("--sample", type=int, default=60, help="mutants of a module, by chance; 0 = all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="these, by their numbers in the module")
    parser.add_argument("--again", type=Path, help="a file of results: only the mutants that lived")
    parser.add_argument("--in-place", action="store_true", help="write each mutant into its file and start pytest anew")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds for the tests of a mutant in its file")
    parser.add_argument("--count", action="store_true", help="say how many mutants each module has, and end")
    options = parser.parse_args()
    if options.count:
        for file in options.modules:
            print(len(mutants_of((ROOT / file).read_text())), file)
        return 0
    if options.in_place:
        in_place(options)
        return 0
    return int(pytest.main([*options.tests, "-q", "-s", "-p", "no:cacheprovider"], plugins=[Mutate(options)]))


if __name__ == "__main__":
    sys.exit(main())
