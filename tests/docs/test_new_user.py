"""A new user: an empty environment, the built wheel, and the tutorial from its first block to its last.

The environment holds the wheel alone; what it depends on is lent from the one that tests run in, since nothing is fetched.
Python and console commands are the environment's own, the folder holds nothing but the text that the tutorial asks for, and the
client is told of the Hub by the environment variables that its documentation names.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ..hub.minihub import MiniHub
from .blocks import ROOT, blocks_of, commands_of

TUTORIAL = ROOT / "docs" / "tutorial.md"
SOURCES = ("hf_warmstart", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# Runs what stands in a list of blocks, each as it stands, in one namespace; shell commands in a process of their own.
USER = """
import json, subprocess, sys
names = {"__name__": "tutorial"}
for kind, content in json.load(open(sys.argv[1])):
    if kind == "python":
        exec(content, names)
    else:
        subprocess.run(content, check=True)
import hf_warmstart
print("library:", hf_warmstart.__file__)
"""


@pytest.fixture
def environment(tmp_path) -> Path:
    """The folder of commands of an environment into which the wheel was installed."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, "wheel", *options, str(sources)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    commands = tmp_path / "venv" / "bin"
    [wheel] = tmp_path.glob("*.whl")
    into = ["--python", str(commands / "python"), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *into], check=True)
    [packages] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return commands


@pytest.mark.slow
def test_the_tutorial_ends_with_a_grown_model_on_the_hub(environment, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (place / "corpus.txt").write_text((ROOT / "LICENSE").read_text() * 3)
    blocks = list(blocks_of(TUTORIAL))
    assert not [block.name for block in blocks if block.how], "the tutorial's blocks run as they stand"
    steps: list[tuple[str, str | list[str]]] = []
    for block in blocks:
        if block.language == "python":
            steps.append(("python", block.text))
        else:
            assert block.language == "bash", block.name
            steps += [("bash", words) for words in commands_of(block)]
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    (tmp_path / "user.py").write_text(USER)
    with MiniHub() as hub:
        # A machine of its own: no variable of this process that could help, but the path of the environment's commands.
        theirs = {"PATH": f"{environment}:/usr/bin:/bin", "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        theirs |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        command = [str(environment / "python"), str(tmp_path / "user.py"), str(tmp_path / "steps.json")]
        done = subprocess.run(command, cwd=place, env=theirs, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"library: {environment.parent}" in done.stdout, done.stdout[-500:]
        pushed = hub.repos["me/my-grown-model"].find("main").files
    assert {"config.json", "growth.json", "model.safetensors", "README.md", "curves.png"} <= set(pushed)
    assert os.listdir(place / "runs" / "parent") == ["checkpoint-50"]
