"""Break the code line by line, and see whether a test notices: `python tests/mutations.py [FILE ...]`.

For each file (by default every one of the rooms in mutations.yaml) ten lines are chosen by a seed, and one
mutation of each. One at a time they go into a copy of the tree, and the tests that mutations.yaml names for
the file run on it, the nearest first, until one fails. Results are JSON lines under build/, so that a run can
be stopped and goes on; what no test sees is told with its line, and whether mutations.yaml calls it
equivalent, with the reason. Exit status 1 if something else survives.

The tests run in forks of this process, which has imported torch and transformers: a new Python for each would
spend most of the time on imports. A mutation that loops for ever meets a limit of processor time, which a
busy machine does not move.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "easyedit_mdm"
SETTINGS = ROOT / "tests" / "mutations.yaml"
RESULTS = ROOT / "build" / "mutations.jsonl"
EARLY = (  # plugins that came with what is preloaded
    "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
)
# no types at run time: a mutation is to be seen by what it does, and checking them takes most of the time
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-W", EARLY]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "benchmarks", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"
)

ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
              ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.MatMult: ast.Mult}  # fmt: skip
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
               ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
EXTREMES = {
    "min": "max",
    "max": "min",
    "amin": "amax",
    "amax": "amin",
    "argmin": "argmax",
    "argmax": "argmin",
    "any": "all",
    "all": "any",
}


# ---- what can be broken ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """A piece of a file, and what takes its place.

    Attributes:
        file: path from the package's folder.
        line: where the piece begins, from 1.
        start, end: the piece, in characters.
        piece, instead: what stands there, and what is to stand there.
    """

    file: str
    line: int
    start: int
    end: int
    piece: str
    instead: str

    def __str__(self) -> str:
        """As it is told: on one line."""
        return f"{' '.join(self.piece.split())} -> {' '.join(self.instead.split())}"

    def applied(self, source: str) -> str:
        """The file with it."""
        return source[: self.start] + self.instead + source[self.end :]


def mutations_of(file: str, source: str) -> list[Mutation]:
    """Every mutation of a file that leaves it Python, in order."""
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    lines = source.splitlines()

    def place(line: int, column: int) -> int:
        """Characters before a place that the parser gives in bytes."""
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    found = []
    for node, instead in _changes(ast.parse(source)):
        start, end = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
        one = Mutation(file, node.lineno, start, end, source[start:end], instead)
        try:
            ast.parse(one.applied(source))
        except SyntaxError:
            continue
        found.append(one)
    return found


def _changes(tree: ast.Module) -> Iterator[tuple[Any, str]]:
    """(node, what takes its place) for everything below a module that runs and is no mere text."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop(0)
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
            continue
        yield from _statement(node)
        yield from _expression(node)
        pending[:0] = [
            child
            for name, child in _children(node)
            if name not in ("annotation", "returns", "decorator_list", "bases")
        ]


def _children(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """A node's children, each with the name of its field; neither docstrings nor what an error says."""
    if isinstance(node, ast.Raise):
        return
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not text:
                yield name, child


def _statement(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Left out, or without its value."""
    into = isinstance(node, ast.Assign) and not isinstance(
        node.targets[0], (ast.Name, ast.Tuple)
    )  # a missing name is no subtle fault
    if into or isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise, ast.Break, ast.Continue)):
        yield node, "pass"
    if (
        isinstance(node, ast.Return)
        and node.value is not None
        and not (isinstance(node.value, ast.Constant) and node.value.value is None)
    ):
        yield node, "return None"


def _expression(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Another operator, constant, extreme or border."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield node, _written(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield (
            node,
            _written(
                ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
            ),
        )
    if isinstance(node, ast.BoolOp):
        yield node, _written(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    if isinstance(node, ast.UnaryOp):
        yield node, _written(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield (
            node,
            repr(
                not node.value
                if isinstance(node.value, bool)
                else node.value * 2
                if isinstance(node.value, float)
                else node.value + 1
            ),
        )
    if isinstance(node, ast.Name) and node.id in EXTREMES and isinstance(node.ctx, ast.Load):
        yield node, EXTREMES[node.id]
    if isinstance(node, ast.Attribute) and node.attr in EXTREMES and isinstance(node.ctx, ast.Load):
        yield node, ast.unparse(ast.Attribute(node.value, EXTREMES[node.attr], node.ctx))
    if isinstance(node, ast.Slice):
        yield from _borders(node)


def _borders(node: ast.Slice) -> Iterator[tuple[ast.AST, str]]:
    """A slice that begins or ends one later."""
    for border in (node.lower, node.upper):
        if border is not None:
            yield border, _written(ast.BinOp(border, ast.Add(), ast.Constant(1)))


def _written(node: ast.expr) -> str:
    return f"({ast.unparse(ast.fix_missing_locations(node))})"


def chosen(file: str, source: str, lines: int, seed: int) -> list[Mutation]:
    """One mutation of each of so many lines: the same for the same file and seed."""
    by_line: dict[int, list[Mutation]] = {}
    for mutation in mutations_of(file, source):
        by_line.setdefault(mutation.line, []).append(mutation)
    rng = random.Random(f"{seed} {file}")
    return [
        rng.choice(by_line[line]) for line in sorted(rng.sample(sorted(by_line), min(lines, len(by_line))))
    ]


# ---- which tests see it, and which mutations nobody can see ------------------------------------------------


def read_settings() -> dict[str, Any]:
    """mutations.yaml."""
    return yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))


def tests_of(file: str, settings: dict[str, Any]) -> list[str]:
    """The tests of a file: test_<its name>.py, those that mutations.yaml gives for it, and those for its
    room.
    """
    path = Path(file)
    told = settings["tests"]
    names = [f"test_{path.stem}.py", *told.get(file, []), *told.get(f"{path.parent}/", [])]
    return list(dict.fromkeys(name for name in names if (ROOT / "tests" / name).exists()))


def files_of(settings: dict[str, Any]) -> list[str]:
    """Every file of the rooms, packages' own __init__.py aside."""
    found = [
        path
        for room in settings["rooms"]
        for path in (ROOT / PACKAGE / room).rglob("*.py")
        if path.name != "__init__.py"
    ]
    return sorted(str(path.relative_to(ROOT / PACKAGE)) for path in found)


def reason(mutation: Mutation, line: str, settings: dict[str, Any]) -> str | None:
    """Why nobody can see a mutation, if mutations.yaml says so; it is known by its line's text, not by its
    number.
    """
    for known in settings.get("equivalent") or []:
        if (known["file"], known["line"], known["mutation"]) == (mutation.file, line.strip(), str(mutation)):
            return known["reason"]
    return None


# ---- running -----------------------------------------------------------------------------------------------


class FirstFailure:
    """A plugin of pytest that keeps the first test that failed."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test has ended."""
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        """A file could not be collected."""
        if report.failed and not self.name:
            self.name = f"{report.nodeid} (collecting)"


def preload() -> None:
    """Import what every run of the tests imports, none of ours."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import accelerate  # noqa: F401
        import beartype  # noqa: F401
        import torch
        import transformers.models.gpt2.modeling_gpt2
        import transformers.models.llama.modeling_llama
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    torch.set_num_threads(1)
    assert not any(name.split(".")[0] == PACKAGE for name in sys.modules)


def run_tests(tree: Path, tests: Sequence[str], limit: float | None = None) -> dict[str, Any]:
    """Run tests in a fork, in a copy of the tree, until one fails.

    Args:
        limit: seconds of processor time.

    Returns:
        `code` (pytest's exit status; None: stopped at the limit), `test` (the first that failed), `seconds`
        of processor time.
    """
    told = tree / "told.json"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            _in_fork(tree, tests, limit, told)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    _, status, used = os.wait4(child, 0)
    seconds = round(used.ru_utime + used.ru_stime, 1)
    if not told.exists():
        stopped = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return {"code": None if stopped else 70, "test": "", "seconds": seconds}
    return {**json.loads(told.read_text()), "seconds": seconds}


def _in_fork(tree: Path, tests: Sequence[str], limit: float | None, told: Path) -> None:
    import pytest

    if limit is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    out = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    os.environ["PYTHONPATH"] = str(tree)
    sys.dont_write_bytecode = True
    first = FirstFailure()
    code = int(pytest.main([*OPTIONS, *(f"tests/{name}" for name in tests)], [first]))
    package = sys.modules.get(PACKAGE)
    assert package is None or Path(str(package.__file__)).is_relative_to(tree), (
        f"{package.__file__} was tested, not the copy"
    )
    told.write_text(json.dumps({"code": code, "test": first.name}))
    os._exit(0)


def key_of(mutation: Mutation, source: str, tests: Sequence[str], seen: bool) -> str:
    """What a result stands for: the file and the mutation; where no test saw it, the tests as they are,
    too.
    """
    parts = [source, mutation.file, str(mutation.start), mutation.instead]
    parts += [] if seen else [(ROOT / "tests" / name).read_text(encoding="utf-8") for name in tests]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def known_results() -> dict[str, dict[str, Any]]:
    """Results of earlier runs by key."""
    if not RESULTS.exists():
        return {}
    records = [
        json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines() if line.endswith("}")
    ]
    return {record["key"]: record for record in records}


class Runner:
    """Puts mutations into one copy of the tree, one after the other."""

    def __init__(self, tree: Path):
        self.tree, self.base = tree, {}
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT, dirs_exist_ok=True)

    def baseline(self, tests: Sequence[str]) -> float:
        """Seconds that tests take on the whole tree, where they must pass."""
        if tuple(tests) not in self.base:
            done = run_tests(self.tree, tests)
            if done["code"] != 0:
                sys.exit(
                    f"{', '.join(tests)} fail without any mutation"
                    f" ({done}):\n{(self.tree / 'output.txt').read_text()[-3000:]}"
                )
            self.base[tuple(tests)] = done["seconds"]
        return self.base[tuple(tests)]

    def run(self, mutation: Mutation, source: str, tests: Sequence[str]) -> dict[str, Any]:
        """Whether a test sees it: `seen` (a test failed), `too long`, or `unseen`."""
        path = self.tree / PACKAGE / mutation.file
        path.write_text(mutation.applied(source), encoding="utf-8")
        try:
            done = run_tests(self.tree, tests, 20 + 2 * self.baseline(tests))
        finally:
            path.write_text(source, encoding="utf-8")
        result = {None: "too long", 0: "unseen"}.get(done["code"], "seen")
        return {"result": result, "test": done["test"], "seconds": done["seconds"]}


def mutate(
    file: str, runner: Runner, settings: dict[str, Any], lines: int, seed: int
) -> list[dict[str, Any]]:
    """The results of one file; what is not known yet is run, and noted at once."""
    source, tests, known, results = (
        (ROOT / PACKAGE / file).read_text(encoding="utf-8"),
        tests_of(file, settings),
        known_results(),
        [],
    )
    if not tests:
        sys.exit(f"no tests for {file}: name them in {SETTINGS.name}")
    for mutation in chosen(file, source, lines, seed):
        found = known.get(key_of(mutation, source, tests, True)) or known.get(
            key_of(mutation, source, tests, False)
        )
        if found is None:
            runner.baseline(tests)  # before the mutation is in
            done = runner.run(mutation, source, tests)
            told = {
                "key": key_of(mutation, source, tests, done["result"] != "unseen"),
                "file": file,
                "line": mutation.line,
            }
            found = {
                **told,
                "mutation": str(mutation),
                "text": source.splitlines()[mutation.line - 1].strip(),
                **done,
            }
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")
            print(
                f"{time.strftime('%H:%M')}  {found['result']:9}{file}:{mutation.line}  {mutation} "
                f" {found['test']}",
                flush=True,
            )
        results.append({**found, "reason": reason(mutation, found["text"], settings)})
    return results


def tell(results: dict[str, list[dict[str, Any]]]) -> int:
    """A line a file, and every mutation that no test sees; returns how many of those are not called
    equivalent.
    """
    unexplained = 0
    print(f"\n{'file':40}{'broken':>8}{'seen':>8}{'equivalent':>12}{'unseen':>8}")
    for file, found in results.items():
        unseen = [r for r in found if r["result"] == "unseen"]
        open_ = [r for r in unseen if r["reason"] is None]
        unexplained += len(open_)
        print(
            f"{file:40}{len(found):8}{len(found) - len(unseen):8}{len(unseen) - len(open_):12}{len(open_):8}"
        )
        for r in unseen:
            print(
                f"    {file}:{r['line']}  {r['mutation']} "
                f" {'no test sees it' if r['reason'] is None else 'equivalent: ' + r['reason']}"
            )
    print(f"{sum(map(len, results.values()))} mutations, {unexplained} that no test sees")
    return unexplained


def main() -> int:
    """Run, tell, and say whether something survived."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "files",
        nargs="*",
        help="files or folders of the package, such as editing/value.py (default: all of the rooms)",
    )
    parser.add_argument("--lines", type=int, default=10, help="lines to break in each file (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="which lines, and how (default: 0)")
    parser.add_argument("--list", action="store_true", help="only list what would be broken")
    args = parser.parse_args()
    settings = read_settings()
    files = [
        f
        for f in files_of(settings)
        if not args.files or any(f == a or f.startswith(a.rstrip("/") + "/") for a in args.files)
    ]
    if args.list:
        for file in files:
            for mutation in chosen(
                file, (ROOT / PACKAGE / file).read_text(encoding="utf-8"), args.lines, args.seed
            ):
                print(f"{file}:{mutation.line}  {mutation}")
        return 0
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    preload()
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        runner = Runner(Path(scratch).resolve() / "tree")
        results = {file: mutate(file, runner, settings, args.lines, args.seed) for file in files}
    return min(tell(results), 1)


if __name__ == "__main__":
    sys.exit(main())
