"""One run under several laws at once: how far published and fitted laws are apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...errors import WarmstartError
from .predictor import HparamPredictor
from .presets import preset_names
from .recommendation import HparamRecommendation


def laws_named(names: Iterable[str]) -> list[str]:
    """The laws that names stand for, each once: `all` is every preset."""
    return list(dict.fromkeys(own for name in names for own in (preset_names() if name == "all" else [name])))


def recommend_by(names: Iterable[str], **run: Any) -> dict[str, HparamRecommendation | WarmstartError]:
    """What each law recommends for a run, or why it cannot.

    Args:
        names: presets, folders or Hub ids; `"all"` for every preset.
        **run: as for `HparamPredictor.recommend`.

    Raises:
        WarmstartError: a law cannot be loaded.

    Example:

        >>> found = recommend_by(["all"], params=3e8, tokens=6e9, sequence_length=2048)
        >>> f"{found['deepseek'].optimal_learning_rate:.2g}", "eval_loss=" in str(found["minicpm"])
        ('0.0013', True)
    """
    found: dict[str, HparamRecommendation | WarmstartError] = {}
    for name, predictor in [(name, HparamPredictor.from_pretrained(name)) for name in laws_named(names)]:
        try:
            found[name] = predictor.recommend(**run)
        except WarmstartError as error:
            found[name] = error
    return found
