"""Layouts of model classes: derived from the class and its config, with the few declared facts that no shape shows."""

from .derive import derive_layout

__all__ = ["derive_layout"]
