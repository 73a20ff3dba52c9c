"""docs/smoke.ipynb: the commands of make smoke, stored without outputs; it runs from top to bottom."""

import ast
import json
import re
import shlex
import shutil

import pytest

from tests.toy import ROOT

NOTEBOOK = ROOT / "docs/smoke.ipynb"
CODE = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_is_short_and_has_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) <= 12 and not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_its_commands_are_those_of_make_smoke():
    """Each main([...]) has the options that the Makefile gives to that script, in the same order."""
    makefile = (ROOT / "Makefile").read_text()
    task = re.search(r"^SMOKE_TASK = (.*)$", makefile, re.MULTILINE)[1]
    recipe = makefile.partition("\nsmoke:")[2].partition("\n\n")[0].replace("$(SMOKE_TASK)", task)
    expected = []
    for script, argv in re.findall(r"^\t\$\(PYTHON\) (-m \S+|\S+\.py) (.*)$", recipe, re.MULTILINE):
        expected.append((script.removeprefix("-m tools.").removesuffix(".py"), shlex.split(argv)))
    found, names = [], {}
    for node in ast.walk(ast.parse("\n".join(CODE))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            names[node.targets[0].id] = ast.literal_eval(node.value)
    for node in ast.walk(ast.parse("\n".join(CODE))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "main":
            parts = [names[e.value.id] if isinstance(e, ast.Starred) else [ast.literal_eval(e)] for e in node.args[0].elts]
            found.append((node.func.value.id, sum(parts, [])))
    assert [call for call in found if call[0] != "plot"] == expected and len(expected) == 6


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("common", "configs", "kernels", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "docs").mkdir()
    book = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(tmp_path / "docs")}})
    client.execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert float(re.findall(r"held-out loss ([\d.]+)", printed)[-1]) < 5
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    scores = [
        json.loads((tmp_path / f"out/smoke_task{name}/glue.json").read_text())["tasks"]["own"]["score"]
        for name in ("", "_random")
    ]
    assert scores[0] > scores[1] > 50
