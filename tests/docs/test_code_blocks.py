"""Every code block of the README and of `docs/` runs, in order, at small size; what is written there is what works."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from hf_warmstart.cli import main, make_parser

from ..scaling.studies import study
from .blocks import KNOWN, PAGES, ROOT, Block, blocks_of, commands_of

# peft 0.21 still calls names that transformers 5.23 has renamed; short runs warn of what long ones do not have.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
# What makes a block small: the same code, less of it.
SMALL = {
    "sequence_length=2048": "sequence_length=16",
    "max_steps=500": "max_steps=2",
    "max_steps=50,": "max_steps=10,",
    "save_steps=50": "save_steps=10",
    "eval_steps=10": "eval_steps=5",
    'checkpoint-50"': 'checkpoint-10"',
    "checkpoint-50 ": "checkpoint-10 ",
}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [page for page in PAGES if any(b.page == page and b.language in ("python", "bash") for b in BLOCKS)]


def small(text: str) -> str:
    for old, new in SMALL.items():
        text = text.replace(old, new)
    return text


def test_there_are_blocks_of_known_languages_only():
    assert len([block for block in BLOCKS if block.language == "python"]) > 8
    unknown = [block.name for block in BLOCKS if block.language not in KNOWN]
    assert unknown == [], "name the language of a fenced block; text for output"
    assert not [b.name for b in BLOCKS if b.how == "skip" and not b.what.startswith("because ")]


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: b.name)
def test_python_compiles(block):
    ast.parse(block.text)


# The others run with the slow tests: each trains or certifies something for seconds.
OFTEN = {"README", "adapters", "growth-advice", "space-maps"}
MARKED = [pytest.param(p, id=p.stem, marks=[] if p.stem in OFTEN else pytest.mark.slow) for p in RUN]


@pytest.mark.parametrize("page", MARKED)
def test_the_blocks_of_a_page_run_in_order(page, workplace, hub, capsys):  # noqa: F811
    _run_page(page, workplace)


def _growth_runs(workplace) -> None:
    pd.DataFrame(study(noise=0.001)).to_csv("runs.csv", index=False)


def _model_of_that_name(workplace) -> None:
    """A folder that the id names too, with model and tokenizer."""
    shutil.copytree("runs/base/checkpoint-500", "my-org/my-model")


PREPARATIONS = {"growth runs in runs.csv": _growth_runs, "my-org/my-model is there": _model_of_that_name}


def _run_page(page: Path, workplace) -> None:
    # A checkpoint that the page makes itself is not to be there already.
    if "LlamaForCausalLM(config)" in page.read_text():
        shutil.rmtree(workplace.folder / "runs")
    for block in blocks_of(page):
        if block.how == "skip":
            continue
        if block.how == "after":
            PREPARATIONS[block.what](workplace)
        if block.language == "python":
            # Empty lines in front give a traceback the page's own line numbers.
            code = compile("\n" * block.line + small(block.text), str(page), "exec")
            exec(code, workplace.names)  # noqa: S102
        elif block.language == "bash":
            for words in commands_of(block):
                _run([small(f"{word} ").rstrip() for word in words], block)


def _run(words: list[str], block: Block) -> None:
    """Run a command, or, where it would install or train for long, see that what it names is there."""
    program, *arguments = words
    if program == "hf-warmstart":
        assert main(arguments) == 0, (block.name, words)
    elif program == "rm":
        assert not any(Path(path).is_absolute() or ".." in path for path in arguments), words
        subprocess.run(words, check=True)
    elif program == "make":
        targets = re.findall(r"(?m)^(\w+):", (ROOT / "Makefile").read_text())
        assert [word for word in arguments if "=" not in word][0] in targets, words
    elif program in ("python", "accelerate"):
        files = [word for word in arguments if word.startswith(("examples/", "benchmarks/")) or word.endswith(".yaml")]
        modules = [b.replace(".", "/") + ".py" for a, b in zip(arguments, arguments[1:], strict=False) if a == "-m"]
        assert files or modules, words
        assert not [path for path in (*files, *modules) if not (ROOT / path).exists()], words
    elif program == "pip":
        extras = re.findall(r"(?m)^(\w+) =$", (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1])
        asked = [extra for word in arguments for extra in re.findall(r"\[(\w+)\]", word)]
        assert arguments[0] == "install" and set(asked) <= set(extras), words
    else:
        raise AssertionError(f"{block.name}: nothing is known of {program!r}; mark the block or teach this test.")


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "bash" and b.how == "skip"], ids=lambda b: b.name
)
def test_commands_that_are_not_run_are_parsed(block):
    for words in commands_of(block):
        if words[0] == "hf-warmstart":
            make_parser().parse_args(words[1:])


def test_a_broken_block_is_caught(workplace, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nfrom hf_warmstart import growl\n```\n")
    with pytest.raises(ImportError, match="growl"):
        _run_page(page, workplace)
    page.write_text("```bash\nhf-warmstart plan runs/base/checkpoint-500 --width 1.01\n```\n")
    with pytest.raises(AssertionError):
        _run_page(page, workplace)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=lambda b: b.name)
def test_blocks_that_need_a_clone_say_so(block):
    words = [word for command in commands_of(block) for word in command]
    needs = "make" in words or any(word.startswith(("examples/", "benchmarks", ".[")) or word == "." for word in words)
    assert needs == (block.how == "clone"), "mark it with <!-- test: clone -->"
    assert not needs or "clone" in block.section, "who has the wheel alone cannot follow it, and has to know"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
