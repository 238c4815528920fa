"""What each optimizer keeps for a parameter, how every piece grows, and its settings in the parent's coordinates.

An optimizer's entry for one parameter is recognised by the names of its tensors; `RULES` holds a row for each. A piece
is of one of few kinds:

- `first_moment`: an average of gradients, which grows by the dual maps, `G' = R_out G W_in^T`;
- `second_moment`: an average (or maximum) of their squares, which grows by the squares of the dual factors;
- `update`: an average of the steps themselves, which grows as the weight does, `W_out U R_in^T`;
- `row`, `column`: Adafactor's two means of the second moment. The moment they stand for, `r c^T / mean(r)`, is grown as
  a second moment and its means are taken anew: for even copies these are the means that the child would have had;
- `scalar`: a count, kept.

For even copies each of the child's tensors is `w' = s tile(w)` with gradient `G' = gamma tile(G)` and N copies of each
entry. What the settings must become for the child to move as its parent follows from each optimizer's step:

| optimizer | learning rate | epsilon | weight decay |
|---|---|---|---|
| Adam, decoupled decay | s | gamma | 1 / s |
| Adam, decay in the gradient | s | gamma | gamma / s |
| SGD | s / gamma | | gamma / s |
| Lion | s | | 1 / s |
| Adafactor (transformers), rate relative to the weight | 1 | gamma^2, s | 1 / s |
| Adafactor (transformers), absolute rate | s | gamma^2 | 1 / s |
| Adafactor (torch) | 1 | gamma, s | 1 |
| Muon | s sqrt(N) adjust / adjust' | gamma sqrt(N) | 1 / the rate's |

Muon: the orthogonal factor of a tiled matrix is the tiled factor over `sqrt(N)`, and Newton-Schulz, an odd polynomial of
the matrix over its Frobenius norm, keeps that exactly; torch runs it in bfloat16, so a run follows to that precision.
`adjust` is Muon's own factor for a matrix's shape.

Sources: arXiv 2602.10545 (Adam's factors), 1804.04235 (Adafactor), 2302.06675 (Lion), 2502.16982 (Muon's adjustment);
the others are derived here and measured in `tests/growth/test_parent_coordinates.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import StateError, WarmstartError
from .transform import ReadRows, TensorGrowth

# The optimizer of `state_policy="asymmetric_reset"`, by class name.
GROWN = "GrownAdamW"

Piece = Literal["first_moment", "second_moment", "update", "row", "column", "scalar"]


@dataclass(frozen=True)
class Factors:
    """Factors of one tensor under even copies: on the weight `s`, on the gradient `gamma`, and copies of each entry.

    Args:
        weight, gradient, copies: the three factors. before, after: the tensor's shape in parent and child.
        shifted: whether `w' = s (w + 1) - 1` with `s != 1`, so that decay towards zero has no counterpart.
    """

    weight: float
    gradient: float
    copies: float
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    shifted: bool = False


Settings = dict[str, Any]
Convert = Callable[[Mapping[str, Any], Factors], Settings]


def _adam(group: Mapping[str, Any], f: Factors) -> Settings:
    decay = 1 / f.weight if group.get("decoupled_weight_decay", True) else f.gradient / f.weight
    return {
        "lr": group["lr"] * f.weight,
        "eps": group["eps"] * f.gradient,
        "weight_decay": group["weight_decay"] * decay,
    }


def _sgd(group: Mapping[str, Any], f: Factors) -> Settings:
    ratio = f.weight / f.gradient
    return {"lr": group["lr"] * ratio, "weight_decay": group["weight_decay"] / ratio}


def _lion(group: Mapping[str, Any], f: Factors) -> Settings:
    return {"lr": group["lr"] * f.weight, "weight_decay": group["weight_decay"] / f.weight}


def _adafactor(group: Mapping[str, Any], f: Factors) -> Settings:
    relative = group["scale_parameter"]
    if group["relative_step"] and not relative:
        raise WarmstartError(
            "Adafactor with relative_step=True and scale_parameter=False has no rate that could follow the parent's. Pass "
            "scale_parameter=True, or relative_step=False and lr."
        )
    small, floor = group["eps"]
    settings = {
        "eps": (small * f.gradient**2, floor * f.weight if relative else floor),
        "weight_decay": group["weight_decay"] / f.weight,
    }
    return settings if relative else {**settings, "lr": group["lr"] * f.weight}


def _torch_adafactor(group: Mapping[str, Any], f: Factors) -> Settings:
    small, floor = group["eps"]
    return {"eps": (None if small is None else small * f.gradient, floor * f.weight)}


def _muon(group: Mapping[str, Any], f: Factors) -> Settings:
    rate = f.weight * math.sqrt(f.copies) * _adjustment(group, f.before) / _adjustment(group, f.after)
    return {
        "lr": group["lr"] * rate,
        "eps": group["eps"] * f.gradient * math.sqrt(f.copies),
        "weight_decay": group["weight_decay"] / rate,
    }


def _adjustment(group: Mapping[str, Any], shape: tuple[int, ...]) -> float:
    """Muon's factor on the learning rate for a matrix of a shape."""
    rows, columns = shape[:2]
    if group.get("adjust_lr_fn") == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


@dataclass(frozen=True)
class StateRule:
    """One kind of optimizer entry.

    Args:
        name: as users know it. pieces: its state tensors and their kinds; all may be there, `marks` must be.
        classes: the optimizers that keep it, by class name, each with its settings in the parent's coordinates.
    """

    name: str
    pieces: Mapping[str, Piece]
    marks: frozenset[str]
    classes: Mapping[str, Convert]

    def fits(self, keys: Iterable[str]) -> bool:
        """Whether an entry with these tensors is of this kind."""
        keys = set(keys)
        return self.marks <= keys <= set(self.pieces)

    def grow(
        self, growth: TensorGrowth, entry: Mapping[str, Any], rows: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """The entry of the grown parameter, or of some of its rows (from one number to another).

        An entry that reads from disk is asked for one piece at a time, and for `entry.rows(key, start, stop)` only.
        """
        grown: dict[str, Any] = {}
        for key in entry:
            kind = self.pieces[key]
            if rows is not None and kind in ("row", "column"):
                raise StateError(cut_mean(growth.name, key))
            if kind == "row":
                column = next(k for k, other in self.pieces.items() if other == "column")
                grown[key], grown[column] = grow_factored(growth, entry[key], entry[column])
            elif kind in ("first_moment", "second_moment", "update"):
                if rows is None:
                    grown[key] = growth.grow(entry[key], kind)
                else:
                    grown[key] = growth.moment_rows(reader(entry, key), kind, *rows)
            elif kind == "scalar":
                value = entry[key]
                grown[key] = value.clone() if isinstance(value, Tensor) else value
        return {key: grown[key] for key in entry}

    def shape(self, key: str, shape: tuple[int, ...], value: Tensor) -> tuple[int, ...]:
        """The shape that a piece has for a parameter of a shape (Adafactor keeps its means with or without the axis)."""
        kind = self.pieces[key]
        if kind == "scalar":
            return tuple(value.shape)
        kept = value.ndim == len(shape)
        if kind == "row":
            return (*shape[:-1], 1) if kept else shape[:-1]
        if kind == "column":
            return (*shape[:-2], 1, shape[-1]) if kept else (*shape[:-2], shape[-1])
        return shape


def cut_mean(name: str, key: str) -> str:
    """What is said of one of Adafactor's means on several processes."""
    return (
        f"{name}: {key} averages over an axis that is cut over processes; Adafactor's factored moments exist only in whole. "
        "Train without sharding, or pass state_policy='reset'."
    )


def reader(entry: Mapping[str, Any], key: str) -> ReadRows:
    """What reads rows of one piece of an entry."""
    if hasattr(entry, "rows"):
        return lambda start, stop: entry.rows(key, start, stop)
    return lambda start, stop: entry[key][start:stop]


def grow_factored(growth: TensorGrowth, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Adafactor's two means of a grown tensor, in the forms that they came in.

    Args:
        row: means over the last axis, (..., rows) or (..., rows, 1). column: over the one before, (..., columns) or
            (..., 1, columns).
    """
    rank = len(growth.maps)
    rows = row if row.ndim == rank else row.unsqueeze(-1)
    columns = column if column.ndim == rank else column.unsqueeze(-2)
    mean = rows.mean(dim=-2, keepdim=True)
    whole = growth.grow(rows * columns / mean.clamp(min=torch.finfo(mean.dtype).tiny), "second_moment")
    return (
        whole.mean(dim=-1, keepdim=row.ndim == rank),
        whole.mean(dim=-2, keepdim=column.ndim == rank),
    )


_ADAM: Mapping[str, Piece] = {
    "step": "scalar",
    "exp_avg": "first_moment",
    "exp_avg_sq": "second_moment",
    "max_exp_avg_sq": "second_moment",
}

RULES: tuple[StateRule, ...] = (
    StateRule("Adam", _ADAM, frozenset({"exp_avg", "exp_avg_sq"}), {"AdamW": _adam, "Adam": _adam, GROWN: _adam}),
    StateRule(
        "Adafactor (transformers)",
        {
            "step": "scalar",
            "RMS": "scalar",
            "exp_avg": "update",
            "exp_avg_sq": "second_moment",
            "exp_avg_sq_row": "row",
            "exp_avg_sq_col": "column",
        },
        frozenset({"step", "RMS"}),
        {"transformers.Adafactor": _adafactor},
    ),
    StateRule(
        "Adafactor (torch)",
        {"step": "scalar", "row_var": "row", "col_var": "column", "variance": "second_moment"},
        frozenset({"step"}),
        {"torch.Adafactor": _torch_adafactor},
    ),
    StateRule(
        "SGD or Muon",
        {"momentum_buffer": "first_moment"},
        frozenset({"momentum_buffer"}),
        {"SGD": _sgd, "Muon": _muon},
    ),
    StateRule("Lion", {"step": "scalar", "exp_avg": "first_moment"}, frozenset({"exp_avg"}), {"Lion": _lion}),
)


def rule_for_entry(entry: Mapping[str, Any]) -> StateRule | None:
    """The rule that an entry follows by the names of its tensors; None where no rule knows them."""
    return next((rule for rule in RULES if rule.fits(entry)), None)


def same_buffers(groups: Iterable[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> bool:
    """Whether a state's groups are of an optimizer that averages as this one does.

    SGD's buffer is a sum of gradients and Muon's an average, `1 / (1 - momentum)` apart, under one name; Muon's groups tell.
    """
    muon = [any("ns_steps" in group for group in side) for side in (groups, optimizer.param_groups)]
    return muon[0] == muon[1]


def class_key(optimizer: torch.optim.Optimizer) -> str:
    """An optimizer's class as the rules name it: two of them are called Adafactor."""
    kind = type(optimizer)
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}" if kind.__name__ == "Adafactor" else kind.__name__


def rule_for_optimizer(optimizer: torch.optim.Optimizer) -> StateRule:
    """The rule of an optimizer's class.

    Raises:
        StateError: no rule knows the class.
    """
    key = class_key(optimizer)
    for rule in RULES:
        if key in rule.classes:
            return rule
    raise StateError(
        f"{type(optimizer).__name__} is no optimizer whose state is known to grow; those are "
        f"{sorted(name for rule in RULES for name in rule.classes)}. Pass one of them, or state_policy='reset'."
    )


def settings_in_parent_coordinates(optimizer: torch.optim.Optimizer) -> Convert:
    """What converts an optimizer's group settings for a tensor with given factors."""
    return rule_for_optimizer(optimizer).classes[class_key(optimizer)]
