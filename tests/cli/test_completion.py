"""`hf-warmstart completion`: the scripts know every command, and a shell takes them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from hf_warmstart.cli import main, make_parser
from hf_warmstart.cli.completion import SHELLS, subparsers


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in subparsers(make_parser()):
        assert name in script
    assert "growth-factor" in script


def test_bash_completes_commands_options_and_files(tmp_path, capsys):
    pytest.importorskip("shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    (tmp_path / "model-folder").mkdir()

    def complete(*words: str) -> set[str]:
        line = f"""
cd {tmp_path}; source ./script
COMP_WORDS=({" ".join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}
_shtab_hf_warmstart; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        run = subprocess.run([bash, "--norc", "-c", line], capture_output=True, text=True, check=True)
        return set(run.stdout.split())

    assert complete("hf-warmstart", "ve") == {"verify"}
    assert "--parent" in complete("hf-warmstart", "verify", "--pa")
    assert "model-folder" in {word.rstrip("/") for word in complete("hf-warmstart", "verify", "model")}


def test_without_shtab_the_way_to_it_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'hf_warmstart[completion]'" in capsys.readouterr().err
