"""One page about a run: what its folder holds, as a self-contained HTML file."""

from .page import write_report

__all__ = ["write_report"]
