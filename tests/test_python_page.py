"""docs/python.md and the notebook beside it: the same recipes, which print what stands there.

python tests/test_python_page.py    # runs the recipes, and writes their outputs into both
"""

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE, NOTEBOOK = ROOT / "docs" / "python.md", ROOT / "docs" / "walkthrough.ipynb"
RECIPE = re.compile(r"^```python\n(.*?)^```\n\n```\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
PATH = (
    'import sys\n\nsys.path.insert(0, "..")  # the root of the repository, from the folder of this notebook'
)


def recipes():
    """(code, what it prints) of each."""
    return RECIPE.findall(PAGE.read_text(encoding="utf-8"))


def cells(page):
    """The notebook's cells: the page's prose and recipes in order."""
    prose, *rest = RECIPE.split(page)
    found = [("markdown", prose.strip(), ""), ("code", PATH, "")]
    for code, printed, prose in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        found += [("code", code.strip(), printed), ("markdown", prose.strip(), "")]
    return [cell for cell in found if cell[1]]


def lines(text):
    return text.splitlines(keepends=True)


def notebook(page):
    """The page as a notebook of format 4.5."""
    made, count = [], 0
    for i, (kind, source, printed) in enumerate(cells(page)):
        cell = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": lines(source)}
        if kind == "code":
            count += 1
            stream = {"name": "stdout", "output_type": "stream", "text": lines(printed)}
            cell |= {"execution_count": count, "outputs": [stream] if printed else []}
        made.append(dict(sorted(cell.items())))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def run_cells(sources):
    """What each prints, run one after the other in one namespace."""
    space, printed = {"__name__": "__main__"}, []
    for source in sources:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(source, "cell", "exec"), space)
        printed.append(out.getvalue())
    return printed


def in_a_process(sources, folder):
    """The same in a new process in another folder: this one's demo world is smaller (conftest.py)."""
    program = "import json, sys\nfrom test_python_page import run_cells\n"
    program += "sources = json.load(sys.stdin)\nprint(json.dumps(run_cells(sources)))"
    command = [sys.executable, "-c", f"import sys\nsys.path += {[str(ROOT), str(ROOT / 'tests')]}\n{program}"]
    done = subprocess.run(command, input=json.dumps(sources), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_notebook_holds_the_recipes_of_the_page_and_their_outputs():
    assert json.loads(NOTEBOOK.read_text(encoding="utf-8")) == notebook(PAGE.read_text(encoding="utf-8"))
    assert len(recipes()) == 6


def test_another_output_or_recipe_would_be_noticed():
    page = PAGE.read_text(encoding="utf-8")
    (code, printed), *_ = recipes()
    for changed in (page.replace(printed, printed[1:]), page.replace(code, code[1:])):
        assert json.loads(NOTEBOOK.read_text(encoding="utf-8")) != notebook(changed)


@pytest.mark.parametrize("number", range(6))
def test_a_recipe_is_complete(number):
    """It defines or imports every name that it uses, so that it runs in an empty file."""
    tree = ast.parse(recipes()[number][0])
    known = {*dir(__builtins__ if not isinstance(__builtins__, dict) else object), *__builtins__}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    assert {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} <= known


@pytest.mark.slow
def test_the_cells_of_the_notebook_print_what_stands_in_it(tmp_path):
    """In one namespace, as in jupyter; the cell that needs transformers where it is installed."""
    code = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    code = [
        cell for cell in code if find_spec("transformers") or "transformers" not in "".join(cell["source"])
    ]
    printed = in_a_process(["".join(cell["source"]) for cell in code], tmp_path)
    told = ["".join(line for output in cell["outputs"] for line in output["text"]) for cell in code]
    assert printed == told
    assert len([text for text in printed if text]) >= 5


def write():
    """Run the recipes, and write what they print into the page and the notebook."""
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(
        r"(^```python\n.*?^```\n)(\n```\n.*?^```\n)?", r"\1\n```\n```\n", page, flags=re.MULTILINE | re.DOTALL
    )
    codes = [code for code, _ in RECIPE.findall(page)]
    found = iter(run_cells(codes))
    page = RECIPE.sub(lambda match: f"```python\n{match[1]}```\n\n```\n{next(found)}```\n", page)
    PAGE.write_text(page, encoding="utf-8")
    text = json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"
    NOTEBOOK.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write()
