"""Layouts of model classes: derived from the class, with what cannot be derived declared per family."""

from .derive import derive_layout
from .lookup import layout_of

__all__ = ["derive_layout", "layout_of"]
