"""Publishing grown models: a card made from the record, saving and pushing with it."""

from .card import render_card
from .push import push_to_hub
from .save import save_grown

__all__ = ["push_to_hub", "render_card", "save_grown"]
