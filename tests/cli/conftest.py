"""Fixtures of other folders, where commands meet the Hub."""

from ..hub.conftest import use_hub

__all__ = ["use_hub"]
