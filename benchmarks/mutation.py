"""Do the tests notice a change in the code? Makes mutants of one module and shows those that live.

$ pip install "mutmut>=3.8,<4"                          # only its operators are used, through libcst
$ python -m benchmarks.mutation textspan.py             # every mutant; shows the survivors as diffs
$ python -m benchmarks.mutation families.py --sample 150  # a seeded random sample
$ python -m benchmarks.mutation families.py --mutants 17 --tests tests/test_seen.py  # some of both

The operators are mutmut's for numbers, names, strings of one word, omitted arguments, `not`, keywords,
operators and conditional expressions. This file adds more: a number less one, the condition of an `if` forced
to True or False, x.f(...) replaced by x, torch.no_grad removed, and a call or an assignment to an attribute
or entry removed. Annotations, imports, docstrings, raise statements and the strict= of zip are not changed.

The tests run in a copy of the repository. Each mutant runs in a fork of a process that has already imported
torch and open_clip, so this works on Unix only. A mutant whose tests take more than three times as long as
usual, plus ten seconds, counts as killed.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = {  # the tests that kill mutants fastest come first
    "decompose.py": ("core", "decompose", "neurons", "families", "vendoring"),
    "families.py": ("families", "core", "decompose", "neurons"),
    "towers.py": ("families", "core", "decompose", "neurons"),
    "readouts.py": ("families", "core", "decompose", "neurons"),
    "huggingface.py": ("huggingface",),
    "blocks.py": ("families", "core", "decompose", "neurons", "vendoring"),
    "attention.py": ("families", "core"),
    "neurons.py": ("neurons", "second_order", "core", "families"),
    "diagnose.py": ("core", "decompose", "command_line"),
    "forward.py": ("forward",),
    "rivals.py": ("rivals",),
    "written.py": ("written",),
    "textspan.py": ("textspan", "cue", "roles"),
    "cue.py": ("cue", "roles"),
    "roles.py": ("roles",),
    "metrics.py": ("metrics",),
    "faithfulness.py": ("faithfulness",),
    "saved.py": ("saved",),
    "baselines.py": ("baselines",),
}


def mutants(source: str) -> list[Callable[[], str]]:
    """One function per mutant, in the order of the code; calling it gives the source with that one change.

    Making the source takes a tenth of a second, so it is made only when it is needed.
    """
    import libcst as cst
    from mutmut.mutation import mutators

    found, module = [], cst.parse_module(source)

    def words(node: cst.SimpleString) -> Iterator[cst.CSTNode]:
        if re.fullmatch(r"\"\w+\"|'\w+'", node.value):
            yield node.with_changes(value='"XX' + node.value[1:])

    def less(node: cst.Integer | cst.Float) -> Iterator[cst.CSTNode]:
        yield cst.parse_expression(f"({node.evaluated_value - 1!r})")

    def forced(node: cst.If | cst.CompIf) -> Iterator[cst.CSTNode]:
        yield from (
            node.with_changes(test=cst.Name(value), whitespace_before_test=cst.SimpleWhitespace(" "))
            for value in ("True", "False")
        )

    def call(node: cst.Call) -> Iterator[cst.CSTNode]:
        kept = {id(arg) for arg in node.args if arg.keyword and arg.keyword.value == "strict"}
        for new in mutators.operator_arg_removal(node):
            if len(new.args) < len(node.args) and kept <= {id(arg) for arg in new.args}:
                yield new
        if isinstance(node.func, cst.Attribute) and not cst.matchers.matches(
            node.func.value, cst.matchers.Name("torch")
        ):
            yield node.func.value

    def ungraded(node: cst.FunctionDef) -> Iterator[cst.CSTNode]:
        kept = [d for d in node.decorators if module.code_for_node(d.decorator) != "torch.no_grad()"]
        if len(kept) < len(node.decorators):
            yield node.with_changes(decorators=kept)

    def undone(node: cst.Expr | cst.Assign) -> Iterator[cst.CSTNode]:
        value = node.value if isinstance(node, cst.Expr) else node.targets[0].target
        if isinstance(value, cst.Call if isinstance(node, cst.Expr) else cst.Attribute | cst.Subscript):
            yield cst.Pass()

    operators = [
        (cst.Integer | cst.Float, mutators.operator_number),
        (cst.Integer | cst.Float, less),
        (cst.SimpleString, words),
        (cst.Name, mutators.operator_name),
        (cst.AugAssign, mutators.operator_augmented_assignment),
        (cst.UnaryOperation, mutators.operator_remove_unary_ops),
        (cst.CSTNode, mutators.operator_keywords),
        (cst.CSTNode, mutators.operator_swap_op),
        (cst.IfExp, mutators.operator_if_exp),
        (cst.If | cst.CompIf, forced),
        (cst.Call, call),
        (cst.FunctionDef, ungraded),
        (cst.Expr | cst.Assign, undone),
    ]

    class Visitor(cst.CSTVisitor):
        def on_visit(self, node: cst.CSTNode) -> bool:
            for kind, operator in operators:
                if isinstance(node, kind):
                    found.extend((node, new) for new in operator(node))
            strict = isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict"
            return not strict and not isinstance(
                node, cst.Annotation | cst.Import | cst.ImportFrom | cst.Raise | cst.Decorator
            )

    module.visit(Visitor())
    return [lambda node=node, new=new: module.deep_replace(node, new).code for node, new in found]


def diff(source: str, mutant: str, name: str) -> str:
    lines = difflib.unified_diff(source.splitlines(), mutant.splitlines(), name, name, lineterm="", n=0)
    return "\n".join(list(lines)[2:])


class Killers:
    """A plugin of pytest that runs the tests first that have failed before, with other mutants."""

    def __init__(self, note: Path) -> None:
        self.note, self.kills = note, Counter()

    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda item: -self.kills[item.nodeid])

    def pytest_runtest_logreport(self, report: object) -> None:
        if report.failed:
            self.note.write_text(report.nodeid)

    def count(self) -> None:
        if self.note.exists():
            self.kills[self.note.read_text()] += 1
            self.note.unlink()


def run(tree: Path, tests: list[str], limit: float, killers: Killers) -> tuple[str, float]:
    """Run each file of tests in a process of its own: "passed", "failed" or "late", and the seconds taken."""
    start = time.perf_counter()
    for test in tests:
        child = os.fork()
        if not child:
            try:
                _test(tree, test, killers)
            finally:
                os._exit(3)
        status = None
        while status is None and time.perf_counter() - start < limit:
            time.sleep(0.02)
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "late", limit
        if status:
            killers.count()
            return "failed", time.perf_counter() - start
    return "passed", time.perf_counter() - start


def _test(tree: Path, test: str, killers: Killers) -> None:
    import pytest
    from hypothesis import Phase, settings

    os.setsid()
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    # Without the phase that shrinks failing examples.
    settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutation")
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # saves half a second
    plugins = ["no:cacheprovider", "no:unraisableexception", "_hypothesis_pytestplugin"]
    options = ["-x", "-q", "--tb=no", *(f"-p{plugin}" for plugin in plugins), "--hypothesis-seed=0"]
    code = pytest.main([*options, test], [killers])
    os._exit(int(code))  # exits at once, so that nothing that belongs to the parent is closed twice


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--sample", type=int, help="run this many mutants, drawn at random [all]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutants", type=int, nargs="+", help="run these mutants, by number")
    parser.add_argument("--tests", nargs="+", help="run these tests instead of the module's")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    args = parser.parse_args()
    source = (ROOT / args.module).read_text()
    found = mutants(source)
    chosen = list(range(len(found)))
    if args.sample is not None:
        # In the order drawn, so that a run that is cut short is a random sample too.
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    chosen = args.mutants or chosen
    print(f"{args.module}: {len(found)} mutants, of them {len(chosen)} now", flush=True)
    if args.list:
        for i in chosen:
            print(f"#{i}\n{diff(source, found[i](), args.module)}")
        return
    tests = args.tests or [f"tests/test_{name}.py" for name in TESTS[args.module]]
    for name in ("torch", "open_clip", "timm", "hypothesis", "pytest"):
        importlib.import_module(name)
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        command = ["git", "ls-files", "-co", "--exclude-standard"]
        files = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for name in files.stdout.splitlines():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        killers = Killers(Path(folder) / "failed")
        result, seconds = run(tree, tests, 600, killers)
        if result != "passed":
            sys.exit("the tests do not pass on the code as it is")
        print(f"its tests take {seconds:.1f} s", flush=True)
        survivors = 0
        for done, i in enumerate(chosen, start=1):
            (tree / args.module).write_text(found[i]())
            for cached in (tree / "__pycache__").glob(f"{Path(args.module).stem}.*"):
                cached.unlink()  # a cached file's time stamp counts whole seconds, which is too coarse here
            result, taken = run(tree, tests, 10 + 3 * seconds, killers)
            if result == "passed":
                survivors += 1
                change = diff(source, found[i](), args.module)
                print(f"\n#{i} lives ({taken:.0f} s; {survivors} of {done})\n{change}", flush=True)
        killed = len(chosen) - survivors
        print(f"\n{args.module}: {len(chosen)} mutants run, {killed} killed, {survivors} alive")


if __name__ == "__main__":
    main()
