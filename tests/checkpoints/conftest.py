"""Fixtures: the Hub in memory of `tests/hub`."""

from ..hub.conftest import use_hub

__all__ = ["use_hub"]
