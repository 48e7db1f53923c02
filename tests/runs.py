"""Runs of the command line in this process."""

import contextlib
import io
import json
from types import SimpleNamespace
from typing import NamedTuple

from evaluate import main


def words(*argv):
    """Arguments one by one, as a shell gives them; what starts with two hyphens is split at its spaces."""
    return [word for arg in map(str, argv) for word in (arg.split() if arg.startswith("--") else [arg])]


class Ran(NamedTuple):
    code: int
    results: dict | None  # what results.json holds
    out: str  # what was printed


def run(tmp_path, *argv):
    argv = words(*argv)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main([*argv, "--out", str(tmp_path / "results")])
    path = tmp_path / "results" / argv[argv.index("--task") + 1] / "results.json"
    results = json.loads(path.read_text()) if path.exists() else None
    return Ran(code, results, out.getvalue())


def captured(task, job):
    """Results, sections of the page, and what was printed of a task that is run on a job of one's own."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        results, sections = task.run(job)
    return SimpleNamespace(results=results, sections=sections, out=out.getvalue())


def assert_refused(tmp_path, capsys, argv, *fragments):
    """The one line that a run ends with, exit code 2; what was there before is still there."""
    argv = words(*argv)
    folder = tmp_path / "results" / argv[argv.index("--task") + 1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text("earlier results")
    capsys.readouterr()
    try:
        code = main([*argv, "--out", str(tmp_path / "results")])
    except SystemExit as error:  # argparse
        code = error.code
    stderr = [line.split("\r")[-1] for line in capsys.readouterr().err.splitlines()]
    lines = [line for line in stderr if line.startswith("evaluate.py: ")]
    assert code == 2
    assert len(lines) == 1
    after = stderr[stderr.index(lines[0]) + 1 :]
    assert not "".join(after).strip()  # nothing of it on further lines
    assert "Traceback" not in "".join(stderr)
    for fragment in fragments:
        assert fragment in lines[0]
    assert (folder / "results.json").read_text() == "earlier results"
    assert [path.name for path in folder.iterdir()] == ["results.json"]
    return lines[0]
