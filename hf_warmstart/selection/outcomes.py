"""Numbers out of arms: the loss that candidates are ranked by, the cheap metrics, and how they agree with the outcome."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from .study import Study

OBJECTIVES = ("final_loss", "auc", "extrapolated")
# Cheap metrics by the beginning of their names: whether less of it is taken for better. Escape is taken for good, after the
# paper's finding that it helps where the copies would stay locked; a negative agreement then says that it misleads.
HIGHER_IS_BETTER = ("effective_rank", "escape", "outside")


def final_loss(evaluations: Sequence[Sequence[float]]) -> float:
    """The last evaluation loss, nats per token."""
    return float(evaluations[-1][1])


def loss_auc(evaluations: Sequence[Sequence[float]], until: int | None = None) -> float:
    """The mean evaluation loss over steps: the area under its curve by trapezia, over its length.

    Args:
        evaluations: (step, loss) from step 0. until: the last step that counts.
    """
    rows = [(step, loss) for step, loss in evaluations if until is None or step <= until]
    if len(rows) < 2:
        return float(rows[0][1])
    area = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in zip(rows, rows[1:], strict=False))
    return float(area / (rows[-1][0] - rows[0][0]))


def outcomes(curves: Mapping[str, Sequence[Sequence[float]]], objective: str) -> dict[str, float]:
    """What candidates are ranked by, from their curves on the same data; `"extrapolated"` is `racing.extrapolated`."""
    measure = loss_auc if objective == "auc" else final_loss
    return {name: measure(evaluations) for name, evaluations in curves.items()}


def cheap_metrics(study: Study, name: str, evaluations: Sequence[Sequence[float]]) -> dict[str, float]:
    """A candidate's zero-step metrics and probe measures as single numbers, those that are known."""
    folder = study.arm_folder(name, 0)
    zero = _read(folder / "zero.json")
    found: dict[str, float | None] = {
        key: zero.get(key) for key in ("loss_change", "kl", "kl_reverse", "max_logit_change", "effective_rank")
    }
    if ratios := zero.get("rms_ratio"):
        found["rms_change"] = sum(abs(math.log(max(ratio, 1e-30))) for ratio in ratios) / len(ratios)
    losses = {int(step): loss for step, loss in evaluations}
    for lag in study.lags:
        measure = _read(folder / f"measure-{lag}.json")
        if lag in losses:
            found[f"loss@{lag}"] = losses[lag]
            found[f"auc@{lag}"] = loss_auc(evaluations, lag)
        for key in ("kl", "kl_reverse", "drift_logits", "drift_hidden", "drift_parameters", "gradient_noise"):
            found[f"{key}@{lag}"] = measure.get(key)
        escaped = measure.get("escape") or {}
        # One number for growths that copy and for those that do not: the share of the update's energy outside what the
        # parent spans, which for copies is the square of the relative norm.
        beside = escaped["update"] ** 2 if escaped.get("update") is not None else escaped.get("outside")
        found[f"escape@{lag}"] = beside
    return {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


def higher_is_better(metric: str) -> bool:
    return metric.startswith(HIGHER_IS_BETTER)


def agreement(metrics: Mapping[str, Mapping[str, float]], ranking: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each cheap metric agrees with a ranking.

    Args:
        metrics: of each candidate, by name. ranking: candidates that were continued, best first.

    Returns:
        For each metric `spearman` (None where fewer than three candidates have it, or it is the same for all), `top_1`
        (whether its best candidate is the ranking's; None where several are its best) and `candidates`, how many have it.
    """
    found = {}
    for metric in sorted({key for name in ranking for key in metrics[name]}):
        names = [name for name in ranking if metric in metrics[name]]
        sign = -1.0 if higher_is_better(metric) else 1.0
        values = [sign * metrics[name][metric] for name in names]
        best = [name for name, value in zip(names, values, strict=True) if value == min(values)]
        top = None if len(best) > 1 else best[0] == ranking[0]
        found[metric] = {"spearman": spearman(values), "top_1": top, "candidates": len(names)}
    return found


def spearman(values: Sequence[float]) -> float | None:
    """Spearman's correlation of values with their own order; None for fewer than three, or for equal values."""
    if len(values) < 3 or len(set(values)) == 1:
        return None
    return float(spearmanr(values, range(len(values))).statistic)


def _read(path: Any) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
