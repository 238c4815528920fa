"""Code blocks of the README and of `docs/`, and what is around them.

A block may have an HTML comment right before it, which readers do not see:

    <!-- test: skip because ... -->     compiled or parsed, not run
    <!-- test: after NAME -->           run after one of `PREPARATIONS`
    <!-- test: clone -->                needs files that are in the repository and not in the wheel; its section says so
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\s*$")
MARKER = re.compile(r"<!-- test: (skip|after|clone) ?(.*?) ?-->")
KNOWN = {"python", "bash", "text", "yaml", "json", "mermaid", "bibtex"}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        line (`int`): of its fence. section: the page's text from the heading above to the fence.
        how, what: the marker before it, both empty where there is none.
    """

    page: Path
    line: int
    language: str
    text: str
    section: str = ""
    how: str = ""
    what: str = ""

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """All fenced blocks of a page, in order."""
    opened, language, content, marker, section = 0, "", [], ("", ""), ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened and line.rstrip() == "```":
            yield Block(page, opened, language, "\n".join(content) + "\n", section, *marker)
            opened, content, marker = 0, [], ("", "")
        elif opened:
            content.append(line)
        elif fence:
            opened, language = number, fence[1]
        elif found := MARKER.search(line):
            marker = (found[1], found[2])
        elif line.strip():
            marker = ("", "")
            section = line if line.startswith("#") else f"{section}\n{line}"


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a shell block, without comments; a line that ends in a backslash goes on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = (shlex.split(line, comments=True) for line in lines)
    return [words for words in found if words]
