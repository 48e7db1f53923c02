"""Files that can be copied alone say so by what they import."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("file", "beside"),
    [("towers.py", set()), ("decompose.py", {"towers"}), ("textspan.py", set()), ("cue.py", {"textspan"})],
)
def test_the_core_imports_torch_alone(file, beside):
    assert set(imported(ROOT / file)) - set(sys.stdlib_module_names) <= {"torch"} | beside


def test_the_check_sees_other_imports():
    assert "open_clip" in set(imported(ROOT / "zeroshot.py"))
