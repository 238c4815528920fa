"""The site has every page and every public name; where mkdocs is installed it builds."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import hf_warmstart

from .blocks import ROOT


def _pages(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for _, value in entry.items():
            if isinstance(value, str):
                yield value
            else:
                yield from _pages(value)


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(_pages(site["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_reference_has_every_public_name_and_no_other():
    found = re.findall(r"(?m)^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text())
    for path in found:
        try:
            importlib.import_module(path)
        except ModuleNotFoundError:
            module, name = path.rsplit(".", 1)
            assert hasattr(importlib.import_module(module), name), path
    names = {path.rsplit(".", 1)[1] for path in found} | {"WarmstartError"}  # errors are shown as a module
    assert {name for name in hf_warmstart.__all__ if name != "__version__"} <= names


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "hf_warmstart.growth.grow.grow" in page
    assert (tmp_path / "site" / "search" / "search_index.json").stat().st_size > 100_000
