"""What a checkpoint says of itself as a base: how large it is, and how many tokens it has seen."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ...errors import WarmstartError

# As transformers names it; from there it would take torch.
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Base:
    """A model to grow from.

    Args:
        params (`int`): all parameters, tied ones once. tokens (`float`, *optional*): that it has seen; None where not known.
        growths (`int`): how often it was grown already, by its record. note: how the tokens are known, or why not.
    """

    params: int
    tokens: float | None
    growths: int
    note: str


def read_base(checkpoint: str | os.PathLike) -> Base:
    """Read size and tokens off a checkpoint folder; of a Hub id the size alone. No weights are loaded.

    The tokens are `num_input_tokens_seen` of `trainer_state.json` where the run counted them, else `total_flos`, which
    `Trainer` counts as six times the tokens times the parameters outside of lookup tables.

    Raises:
        WarmstartError: there is no config, or a damaged state.
    """
    from ...growth.plan import GrowthRecord
    from ...growth.source import read_config
    from ..tables.compute import count_parameters

    config = read_config(checkpoint)
    count = count_parameters(config)
    growths = len(GrowthRecord.all_of(config))
    state = Path(checkpoint, TRAINER_STATE)
    if not state.is_file():
        return Base(count.total, None, growths, f"no {TRAINER_STATE} beside the config")
    try:
        data = json.loads(state.read_text(encoding="utf-8"))
        counted, flops = float(data.get("num_input_tokens_seen") or 0), float(data.get("total_flos") or 0)
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as fault:
        raise WarmstartError(f"{TRAINER_STATE} in {state.parent} is damaged, or cannot be read: {fault}") from fault
    if counted > 0:
        return Base(count.total, counted, growths, f"num_input_tokens_seen of {TRAINER_STATE}")
    if flops > 0:
        return Base(
            count.total, flops / (6 * (count.total - count.embedding)), growths, f"total_flos of {TRAINER_STATE}"
        )
    return Base(count.total, None, growths, f"{TRAINER_STATE} counts neither tokens nor FLOPs")
