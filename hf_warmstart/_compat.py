"""Shims for faults upstream, each with the issue and the condition under which it can go."""

from __future__ import annotations

import os

from transformers import PreTrainedModel

from .errors import StateError


def load_checkpoint_weights(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Load a checkpoint's weights into a model, through the conversions that `from_pretrained` knows.

    `Trainer._load_from_checkpoint` and `_load_best_model` read the file's names with a plain non-strict
    `load_state_dict`, so that renamed and fused weights (GPT-NeoX's head, Mixtral's experts) silently keep their old
    values. Upstream: transformers issue #48805, fix proposed in #48822. Can go when the lowest supported transformers
    loads both bit for bit (`tests/training/test_resume.py` without this shim).

    Raises:
        StateError: weights are missing from the folder, unexpected or of another shape; all are named.
    """
    loaded, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    problems = [f"{kind}: {sorted(map(str, names))}" for kind, names in report.items() if names]
    if problems:
        raise StateError(f"The checkpoint {os.path.basename(folder)} is not one of this model: {'; '.join(problems)}.")
    model.load_state_dict(loaded.state_dict())
