"""What the documents tell to type works, in the order in which it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hf_warmstart.cli import main

from ..checkpoints.grown_folders import certify_once, save_parent

ROOT = Path(__file__).parents[2]


def commands(document: str) -> list[str]:
    """The shell lines of a document that grow and verify; what begins on the Hub is tried in `tests/hub`."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), flags=re.S)
    blocks = [block for block in blocks if "my-org/" not in block]
    found = [line for block in blocks for line in block.splitlines() if "warmstart" in line or "growing" in line]
    return [line for line in found if not re.match(r"hf-warmstart (plan|certify)", line)]


@pytest.mark.parametrize(("document", "count"), [("docs/streaming.md", 4), ("README.md", 3)])
def test_commands_in_documents_run(document, count, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    certify_once(monkeypatch)
    lines = [line for line in commands(document) if not line.startswith("rm ")]
    for parent in sorted(set(re.findall(r"runs/base/checkpoint-\d+", " ".join(lines)))):
        save_parent(Path(parent))
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "hf-warmstart" and main(arguments) == 0, line
    assert len(lines) == count
    assert capsys.readouterr().err == ""
    if document == "docs/streaming.md":
        (block,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), flags=re.S)
        names: dict = {}
        exec(block, names)  # noqa: S102
        assert names["record"].growth_config["depth"] == 2 and "100%" in capsys.readouterr().out
        assert {path.name for path in Path("runs").iterdir()} == {"base", "wide", "deep", "again"}


def test_what_the_document_tells_to_remove_is_what_a_stopped_run_leaves(tmp_path):
    from hf_warmstart.checkpoints.target.staging import Staging

    (line,) = [line for line in commands("docs/streaming.md") if line.startswith("rm ")]
    staging = Staging(tmp_path / "runs" / "wide")
    staging.begin("any")
    staging.close()
    left = {f"runs/{path.name}" for path in (tmp_path / "runs").iterdir()}
    assert set(shlex.split(line)[2:]) == left
