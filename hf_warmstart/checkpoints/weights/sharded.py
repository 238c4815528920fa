"""An FSDP2 checkpoint's weights, `pytorch_model_fsdp_0/`, grown from shards to shards, one tensor at a time.

Under `torch.distributed` every rank takes part and writes its share of each grown tensor; the number of ranks need not be
that of the parent's run.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from ...errors import StateError
from ...growth.plan import RECORD_KEY, GrowthPlan, GrowthRecord
from ...growth.source import parent_name
from ...growth.twin import build
from ..memory import Pieces
from ..ranks import is_main, mesh_of_ranks
from ..torch_files.later import Later, save_sharded
from ..torch_files.placement import Rows
from ..torch_files.sharded import ShardedFolder, Weights

SHARDED_MODEL = "pytorch_model_fsdp_0"


@dataclass(frozen=True)
class ShardedWeights:
    """Weights of a sharded checkpoint. Nothing is written before `write`.

    Raises:
        StateError: tensors of the parent are missing.
    """

    plan: GrowthPlan
    folder: Path

    def __post_init__(self) -> None:
        missing = sorted({self.plan.source_name(name) for name in self.plan.names} - set(self._weights))
        if missing:
            raise StateError(
                f"The weights in {SHARDED_MODEL} lack {len(missing)} of the parent's tensors: {missing[:5]}."
            )

    @property
    def _weights(self) -> Weights:
        return ShardedFolder(self.folder / SHARDED_MODEL).weights()

    def write(self, made: Path, pieces: Pieces) -> GrowthRecord:
        """Write shards and config; every rank takes part."""
        plan, weights = self.plan, self._weights

        def later(name: str) -> Later:
            described = weights.described(plan.source_name(name))
            return Later(plan.target_shapes[name], described.dtype, partial(_grown_weight, weights, plan, name))

        grown = {name: later(name) for name in plan.names}
        child = build(plan.model_class, plan.target_config, "meta")
        tied = dict(child.all_tied_weights_keys)
        state = {"model": grown | {name: grown[tied[name]] for name in tied if name in weights}}
        save_sharded(state, made / SHARDED_MODEL, mesh_of_ranks())
        config = copy.deepcopy(plan.target_config)
        record = plan.record(parent_name(plan.source_config))
        setattr(config, RECORD_KEY, [*(getattr(plan.source_config, RECORD_KEY, None) or []), record.to_dict()])
        config.architectures = [plan.model_class.__name__]
        if is_main():
            config.save_pretrained(made)
            if (self.folder / "generation_config.json").is_file():
                GenerationConfig.from_pretrained(self.folder).save_pretrained(made)
        return record


def _grown_weight(weights: Weights, plan: GrowthPlan, name: str, rows: Rows | None) -> torch.Tensor:
    """A grown weight, or some of its rows."""
    whole = plan.tensor(name).grow(weights[plan.source_name(name)], "weight")
    return whole if rows is None else whole[slice(*rows)].clone()
