"""docs/growth-advice.md: what it prints is what its commands and its code print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hf_warmstart.cli import main

ROOT = Path(__file__).parents[2]


def blocks(kind: str) -> list[str]:
    text = (ROOT / "docs" / "growth-advice.md").read_text()
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.S)


def test_the_example_is_what_the_command_prints(capsys):
    (command,) = blocks("bash")
    program, *arguments = shlex.split(command)
    assert program == "hf-warmstart" and main(arguments) == 0
    assert capsys.readouterr().out == blocks("text")[0]


def test_the_table_is_what_its_code_prints(capsys):
    exec(blocks("python")[0], {})  # noqa: S102
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == blocks("text")[1].splitlines()
