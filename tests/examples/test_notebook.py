"""The notebook has the tutorial's code, ran from top to bottom, and shows what it made."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "tutorial.ipynb").read_text())


def test_its_cells_are_the_tutorials(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    wanted = importlib.import_module("make_notebook").cells()
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in NOTEBOOK["cells"]]
    assert found == wanted, "run: python examples/make_notebook.py"


def test_it_ran_without_a_fault_and_tells_of_no_machine():
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = json.dumps(NOTEBOOK)
    assert "hf-warmstart: not found" not in text and "Traceback" not in text
    assert not [path for path in ("/tmp/", "/home/", "/root/", "/work/", "site-packages") if path in text]
