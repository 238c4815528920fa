"""The package as a whole: its public names, its documentation, its house rules."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_warmstart

ROOT = Path(__file__).parents[1]
MODULES = sorted(m.name for m in pkgutil.walk_packages(hf_warmstart.__path__, "hf_warmstart."))


def test_public_names_are_sorted_and_importable():
    assert hf_warmstart.__all__ == sorted(hf_warmstart.__all__)
    for name in hf_warmstart.__all__:
        assert getattr(hf_warmstart, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'shrink_model'"):
        hf_warmstart.shrink_model  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, hf_warmstart; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    if name.startswith("hf_warmstart.growth") or name.startswith("hf_warmstart.scaling"):
        assert doctest.testmod(module).failed == 0
    assert module.__doc__, f"{name} does not say what it is for"


def test_growth_is_pure():
    """No trainer, card or plot, and no other part of the library, is imported by `growth/`."""
    for path in (ROOT / "hf_warmstart" / "growth").rglob("*.py"):
        imports = re.findall(r"^\s*(?:from|import)\s+(\S+)", path.read_text(), flags=re.MULTILINE)
        assert not {
            i for i in imports if re.search(r"Trainer|matplotlib|rich|jinja2|\.(training|hub|cli|scaling)", i)
        }, path


def test_model_types_are_named_in_layouts_only():
    for path in (ROOT / "hf_warmstart").rglob("*.py"):
        if "layouts" not in path.parts:
            assert not re.search(r"model_type\s*(==|!=| in )", path.read_text()), path


def test_public_names_stand_in_the_readme():
    text = (ROOT / "README.md").read_text()
    missing = [
        name for name in ("grow", "plan_growth", "certify", "WarmstartTrainer", "push_to_hub") if name not in text
    ]
    assert missing == []
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_start_up_benchmark_measures_what_it_says(monkeypatch, capsys):
    from benchmarks import start_up

    given = {start_up.BARE: [1.0, 2.0, 4.0], "import hf_warmstart": [1.5, 2.25, 5.0]}
    rows = {row["case"]: row for row in start_up.rows(given)}
    assert rows[start_up.BARE]["beyond"] == 0 and rows[start_up.BARE]["ratio"] == 1
    assert rows["import hf_warmstart"]["beyond"] == 0.5 and rows["import hf_warmstart"]["ratio"] == 1.25
    monkeypatch.setattr(start_up, "seconds", lambda arguments: 0.5)
    monkeypatch.setattr("sys.argv", ["start_up", "--pairs", "2"])
    start_up.main()
    assert "| `hf-warmstart --help` | 0.500 | +0.000 | 1.00 |" in capsys.readouterr().out
