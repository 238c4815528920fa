"""What is measured on a run's own checkpoints: spectra of matrices, scale of activations, escape from the parent.

spectrum     effective rank of a matrix, exp(entropy of its normalised singular values), over the largest it could have
activations  root mean square of each layer's output, on random tokens
escape       |w - P w| / |w|, P the projection on what equal copies span (`selection.escape`)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import WarmstartError
from ..growth.config import GrowthConfig
from ..growth.configs import model_class_of
from ..growth.layouts.moves import REFUSALS
from ..growth.layouts.probe import probe_inputs
from ..growth.plan import GrowthPlan, GrowthRecord, make_plan
from ..growth.precision import quiet
from ..growth.source import read_config
from ..selection.escape import copies_entries, escape, family
from ..selection.metrics import effective_rank
from .contents import Contents

MOST_BYTES = 2**30  # of one checkpoint's weights; larger ones are not loaded
MOST_CHECKPOINTS = 8


@dataclass
class Measures:
    """By the name of a checkpoint, in their order.

    Args:
        spectrum: family of matrices -> mean share of the full rank, of the first and the last checkpoint. activations: of each
            layer. escape: of the whole model, and by family. skipped: what was not measured, and why.
    """

    spectrum: dict[str, dict[str, float]] = field(default_factory=dict)
    activations: dict[str, list[float]] = field(default_factory=dict)
    escape: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)


def measure(contents: Contents) -> Measures:
    """Measure a run's checkpoints, at most eight of them, one after the other."""
    found = Measures()
    models = contents.models
    if not models:
        found.skipped.append("Spectrum, activations and escape: the folder holds no whole weights.")
    size = max((_bytes(path) for _, path in models), default=0)
    if size > MOST_BYTES:
        found.skipped.append(
            f"Spectrum, activations and escape: {size / 2**30:.1f} GiB of weights are not loaded for a report."
        )
        return found
    shown = (
        models if len(models) <= MOST_CHECKPOINTS else [*models[:: len(models) // MOST_CHECKPOINTS + 1], models[-1]]
    )
    for number, (name, folder) in enumerate(shown):
        with quiet():
            model = model_class_of(read_config(folder)).from_pretrained(folder).eval()
        if number in (0, len(shown) - 1):
            found.spectrum[name] = _spectrum(model, contents)
        _activations(model, name, found)
        _escape(model, name, contents, found)
        del model
    return found


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


def _plan(model: PreTrainedModel, contents: Contents) -> GrowthPlan | None:
    records = GrowthRecord.all_of(model.config)
    if not records:
        return None
    asked = GrowthConfig.from_dict(records[-1].growth_config)
    return make_plan(type(model), records[-1].parent_config(model.config), asked)


@torch.no_grad()
def _spectrum(model: PreTrainedModel, contents: Contents) -> dict[str, float]:
    """Mean over matrices of one family of effective rank over full rank."""
    plan = _plan(model, contents)
    ranks: dict[str, list[float]] = {}
    for name, matrix in model.named_parameters():
        if matrix.ndim == 2 and min(matrix.shape) > 1:
            place = family(plan, name) if plan is not None else name.rpartition(".")[0]
            ranks.setdefault(place, []).append(effective_rank(matrix.float()) / min(matrix.shape))
    return {place: sum(values) / len(values) for place, values in sorted(ranks.items())}


@torch.no_grad()
def _activations(model: PreTrainedModel, name: str, found: Measures) -> None:
    try:
        states = model(**probe_inputs(model), output_hidden_states=True).hidden_states
    except (*REFUSALS, AttributeError) as error:
        states, words = None, f"{type(error).__name__}: {error}"
    else:
        words = "it gives no hidden states"
    if states:
        found.activations[name] = [float(state.double().square().mean().sqrt()) for state in states]
    else:
        found.skipped.append(f"Activations of {name}: {type(model).__name__} was not run on random tokens ({words}).")


def _escape(model: PreTrainedModel, name: str, contents: Contents, found: Measures) -> None:
    try:
        plan = _plan(model, contents)
    except WarmstartError as error:
        found.skipped.append(f"Escape of {name}: {error}")
        return
    if plan is None or not copies_entries(plan):
        return
    tensors = {n: t for n, t in model.state_dict().items() if n in plan.target_shapes}
    state = escape(plan, tensors, tensors).state
    if state is not None:
        found.escape[name] = state
