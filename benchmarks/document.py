"""The generated parts of documents: each lies between two markers."""

from __future__ import annotations

Markers = tuple[str, str]


def between(text: str, markers: Markers) -> str:
    """The generated part of a document."""
    return text.split(markers[0])[1].split(markers[1])[0].strip()


def replaced(text: str, markers: Markers, part: str) -> str:
    """A document with another generated part."""
    before, rest = text.split(markers[0])
    after = rest.split(markers[1])[1]
    return f"{before}{markers[0]}\n\n{part}\n\n{markers[1]}{after}"
