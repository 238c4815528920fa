"""The tutorial as a notebook with its outputs, run from top to bottom:

    pip install nbclient nbformat ipykernel
    python examples/make_notebook.py examples/tutorial.ipynb

Cells are the blocks of `docs/tutorial.md`, at their own size, on the text of this repository's LICENSE. The last step, which
pushes to the Hub, saves into a folder instead and shows the card and the curves. A test sees that the notebook still
has the tutorial's code, and outputs without a fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```\n", flags=re.S | re.M)
SAVED = """from IPython.display import Image, Markdown
from hf_warmstart.hub import save_grown

folder = save_grown(child, "runs/published", license="apache-2.0", dataset="my-text", metrics=after, parent_metrics=before,
                    history=trainer.state.log_history)
again = AutoModelForCausalLM.from_pretrained(folder)
assert held_out_metrics(again, held_out) == after
Markdown((folder / "README.md").read_text().split("---", 2)[2].split("## How to rebuild it")[0].replace("![", "(picture: "))"""
QUIET = """import os, warnings
import torch
from transformers.utils import logging as transformers_logging

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore")
_ = torch.manual_seed(0)"""


def cells() -> list[tuple[str, str]]:
    """Kind and source of each cell, from the page."""
    text, found, at = PAGE.read_text(), [("code", QUIET)], 0
    for block in FENCE.finditer(text):
        found.append(("markdown", text[at : block.start()].strip()))
        code = block[2].rstrip()
        if block[1] == "bash":
            code = "\n".join(f"!{line}" for line in code.splitlines())
        found.append(("code", SAVED if "push_to_hub(" in code else code))
        at = block.end()
    found.append(("code", 'Image("runs/published/curves.png")'))
    found.append(("markdown", _links_into_docs(text[at:].strip())))
    return [(kind, _links_into_docs(source) if kind == "markdown" else source) for kind, source in found if source]


def _links_into_docs(text: str) -> str:
    return re.sub(r"\]\((?!https?:|\.\./|#)([\w-]+\.md)", r"](../docs/\1", text)


def make(path: Path) -> None:
    """Write the notebook, executed in a folder of its own."""
    import nbformat
    from nbclient import NotebookClient

    kinds = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    notebook = nbformat.v4.new_notebook(cells=[kinds[kind](source) for kind, source in cells()])
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(ROOT / "LICENSE", Path(folder, "corpus.txt"))
        os.environ |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            if "outputs" in cell:  # progress and warnings of the machine are no part of the story
                cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
            for output in cell.get("outputs", ()):
                if "text" in output:
                    output["text"] = output["text"].replace(folder, "").replace(str(ROOT), "")
            cell.get("metadata", {}).pop("execution", None)
    nbformat.write(notebook, path)


def main() -> None:
    """Read the option and make it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "examples" / "tutorial.ipynb")
    make(parser.parse_args().output)


if __name__ == "__main__":
    main()
