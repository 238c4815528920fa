"""A new user: an empty environment, the built wheel, and README and tutorial, each from its first block to its last.

The environment holds the wheel alone; what it depends on is lent from the one that tests run in, since nothing is fetched.
Python and console commands are the environment's own, the folder holds nothing but the text that the tutorial asks for, and
the client is told of the Hub by the environment variables that its documentation names. Blocks are left out where their page
says that they need a clone.
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

# The pages in the order in which they are read, with the files that their text asks for.
PAGES: dict[Path, dict[str, str]] = {
    ROOT / "README.md": {},
    ROOT / "docs" / "tutorial.md": {"corpus.txt": (ROOT / "LICENSE").read_text() * 3},
}
WHAT_WAS_PUSHED = {"README.md": "my-org/my-grown-model", "tutorial.md": "me/my-grown-model"}
SOURCES = ("hf_warmstart", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
# Runs what stands in a list of blocks, each as it stands, in one namespace; shell commands in a process of their own.
USER = """
import json, subprocess, sys
names = {"__name__": "page"}
for kind, content in json.load(open(sys.argv[1])):
    if kind == "python":
        exec(content, names)
    else:
        subprocess.run(content, check=True)
import hf_warmstart
print("library:", hf_warmstart.__file__)
print("loaded:", names["again"].config._name_or_path)
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


def _steps(page: Path) -> list[tuple[str, str | list[str]]]:
    """What stands in a page's blocks, in order, but for those that say that they need a clone."""
    steps: list[tuple[str, str | list[str]]] = []
    for block in blocks_of(page):
        assert block.how in ("", "clone"), f"{block.name}: a new user's blocks run as they stand"
        if block.language == "python":
            steps.append(("python", block.text))
        elif block.how != "clone":
            assert block.language == "bash", block.name
            steps += [("bash", words) for words in commands_of(block)]
    return steps


@pytest.mark.slow
def test_readme_and_tutorial_each_end_with_a_grown_model_on_the_hub(environment, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "user.py").write_text(USER)
    with MiniHub() as hub:
        # A machine of its own: no variable of this process that could help, but the path of the environment's commands.
        theirs = {"PATH": f"{environment}:/usr/bin:/bin", "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        theirs |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        for page, asked in PAGES.items():
            for name, content in asked.items():
                (place / name).write_text(content)
            (tmp_path / "steps.json").write_text(json.dumps(_steps(page)))
            command = [str(environment / "python"), str(tmp_path / "user.py"), str(tmp_path / "steps.json")]
            done = subprocess.run(command, cwd=place, env=theirs, capture_output=True, text=True, timeout=1800)
            assert done.returncode == 0, (page.name, done.stderr[-3000:])
            assert f"library: {environment.parent}" in done.stdout, done.stdout[-500:]
            assert f"loaded: {WHAT_WAS_PUSHED[page.name]}" in done.stdout, done.stdout[-500:]
        pushed = {repo_id: set(hub.repos[repo_id].find("main").files) for repo_id in WHAT_WAS_PUSHED.values()}
    for files in pushed.values():
        assert {"config.json", "growth.json", "model.safetensors", "README.md"} <= files
    assert "curves.png" in pushed["me/my-grown-model"]
    assert os.listdir(place / "runs" / "base") == ["checkpoint-50"]
    assert {"wide", "larger", "again"} <= set(os.listdir(place / "runs"))
