"""What `docs/hyper-parameters.md` tells to type works, in the order in which it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from hf_warmstart.cli import main

from ..scaling.planted import Planted

DOCUMENT = Path(__file__).parents[2] / "docs" / "hyper-parameters.md"


def test_the_documents_python_and_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Planted(noise=0.005).runs().to_csv("runs.csv", index=False)
    text = DOCUMENT.read_text()
    # The second trains probes: tests/scaling/test_probes.py does.
    code, _ = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (commands,) = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    exec(code, names := {})  # noqa: S102
    assert names["args"].learning_rate == names["found"].learning_rate and Path("law.png").is_file()
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "hf-warmstart" and main(arguments) == 0, line
    assert Path("my-law", "config.json").is_file() and Path("run.yaml").is_file()
    assert capsys.readouterr().err == ""
