"""What a run starts from: parameters, held-out loss, tokens seen and whether the learning rate was decayed already.

Read from a checkpoint's folder (`config.json`, `trainer_state.json`, and the growth record of a grown model), measured on the
model, or given. Whatever is passed outright goes before what a file says.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, WarmstartError
from ...hub.save import GROWTH_NAME
from ..tables.compute import ParameterCount, count_parameters, flops_per_token, training_flops
from ..tables.evaluation import Fingerprint, evaluate

ANNEALED = 0.1  # of the peak: a learning rate that ends below it was decayed


@dataclass(frozen=True)
class StartingState:
    """What a run starts from.

    Args:
        params (`float`): N, of the model that is trained now. flops_per_token (`float`, *optional*): from its config.
        loss (`float`, *optional*): held out, nats per token. loss_error (`float`): its standard error.
        loss_source (`str`): where the loss is from. fingerprint (`Fingerprint`, *optional*): what it was measured on.
        tokens_seen (`float`, *optional*): in training so far. spent_compute (`float`, *optional*): FLOPs of it.
        annealed (`bool`, *optional*): whether the learning rate had been decayed; None where it is not known.
        hidden_size, vocab_size (`int`, *optional*), family (`str`, *optional*): from the config.
        from_scratch (`bool`): whether there is no checkpoint at all. grown (`bool`): whether a growth record was found.
    """

    params: float
    loss: float | None = None
    loss_error: float = 0.0
    loss_source: str = ""
    fingerprint: Fingerprint | None = None
    tokens_seen: float | None = None
    spent_compute: float | None = None
    annealed: bool | None = None
    flops_per_token: float | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    family: str | None = None
    from_scratch: bool = False
    grown: bool = False


def starting_state(
    *,
    sequence_length: int,
    accounting: str,
    params: float | None = None,
    checkpoint: str | os.PathLike | None = None,
    model: Any = None,
    config: Any = None,
    eval_dataset: Any = None,
    eval_loss: float | None = None,
    eval_fingerprint: Fingerprint | None = None,
    tokenizer: Any = None,
    tokens_seen: float | None = None,
    annealed: bool | None = None,
) -> StartingState:
    """The state that a run starts from.

    Args:
        sequence_length (`int`): of the run, in tokens. accounting (`str`): of compute.
        params, eval_loss, tokens_seen, annealed: given outright, before what files say.
        checkpoint: a folder with `config.json`, and `trainer_state.json` where there is one; a Hub id for its config alone.
        model (`PreTrainedModel`, *optional*): the model in memory. config (`PreTrainedConfig`, *optional*): of a model to come.
        eval_dataset, tokenizer: what the loss is measured on. eval_fingerprint: what `eval_loss` was measured on.

    Raises:
        WarmstartError: contradictory or impossible arguments; or the parameters are not known. CheckpointError: a damaged file.
    """
    _check(params, eval_loss, tokens_seen, eval_dataset, model, checkpoint, sequence_length)
    folder = Path(checkpoint) if checkpoint is not None and Path(checkpoint).is_dir() else None
    if config is None and model is not None:
        config = model.config
    if config is None and checkpoint is not None:
        config = _config_of(checkpoint, folder)
    count = _count(config, params)
    if params is None:
        if count is None:
            raise WarmstartError(
                "The number of parameters is not known. Pass params=, or a checkpoint, model or config."
            )
        params = float(count.non_embedding)
    record, parent_params = _growth(config)
    trained = _trainer_state(folder)
    seen = tokens_seen if tokens_seen is not None else trained.get("tokens")
    loss, error, source, measured = _loss(
        checkpoint, folder, model, eval_dataset, eval_loss, eval_fingerprint, tokenizer, trained, record
    )
    text = config.get_text_config() if config is not None else None
    per_token = (
        flops_per_token(config, sequence_length, count) if accounting == "config" and config is not None else None
    )
    return StartingState(
        params=params,
        loss=loss,
        loss_error=error,
        loss_source=source,
        fingerprint=measured,
        tokens_seen=seen,
        spent_compute=training_flops(parent_params or params, seen) if seen is not None else None,
        annealed=annealed if annealed is not None else trained.get("annealed"),
        flops_per_token=per_token,
        hidden_size=getattr(text, "hidden_size", None),
        vocab_size=getattr(text, "vocab_size", None),
        family=getattr(text, "model_type", None),
        from_scratch=checkpoint is None and model is None and eval_loss is None and tokens_seen is None,
        grown=record is not None,
    )


def _check(params, eval_loss, tokens_seen, eval_dataset, model, checkpoint, sequence_length) -> None:
    problems = []
    if sequence_length < 1:
        problems.append(f"sequence_length={sequence_length} must be at least 1")
    if params is not None and not 1000 <= params < math.inf:
        problems.append(f"params={params!r} must be a count of parameters, 1000 or more")
    if eval_loss is not None and not 0 < eval_loss < 50:
        problems.append(f"eval_loss={eval_loss!r} must be a cross-entropy in nats per token, above 0 and below 50")
    if tokens_seen is not None and not 0 <= tokens_seen < math.inf:
        problems.append(f"tokens_seen={tokens_seen!r} must be 0 or more")
    if eval_dataset is not None and eval_loss is not None:
        problems.append("eval_loss and eval_dataset exclude one another: the loss is either known or measured")
    if eval_dataset is not None and model is None and checkpoint is None:
        problems.append("eval_dataset needs model= or checkpoint= to be evaluated")
    if problems:
        raise WarmstartError("; ".join(problems) + ".")


def _config_of(checkpoint: Any, folder: Path | None) -> Any:
    from transformers import AutoConfig

    if folder is not None and not (folder / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())
        raise CheckpointError(f"{str(checkpoint)!r} gives no config: {words}") from error


def _count(config: Any, params: float | None) -> ParameterCount | None:
    if config is None:
        return None
    try:
        return count_parameters(config)
    except WarmstartError:
        if params is None:
            raise
        return None


def _growth(config: Any) -> tuple[Any, float | None]:
    """The last growth record of a config, and the parameters of the parent that trained the tokens seen."""
    from ...growth.plan import GrowthRecord

    records = GrowthRecord.all_of(config) if config is not None else []
    if not records:
        return None, None
    return records[-1], float(count_parameters(records[-1].parent_config(config)).non_embedding)


def _trainer_state(folder: Path | None) -> dict[str, Any]:
    """Tokens seen, the last evaluation and whether the rate was decayed, from `trainer_state.json`; empty without one."""
    path = folder / "trainer_state.json" if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text())
        logs, step = state["log_history"], int(state["global_step"])
        rates = [float(log["learning_rate"]) for log in logs if "learning_rate" in log]
        losses = [float(log["eval_loss"]) for log in logs if "eval_loss" in log and log.get("step") == step]
        tokens = float(state.get("num_input_tokens_seen") or 0)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path.name} of {path.parent.name} cannot be read: {type(error).__name__}: {error}"
        ) from error
    found: dict[str, Any] = {"tokens": tokens or None, "loss": losses[-1] if losses else None}
    if len(rates) > 2 and max(rates) > 0:
        # The rate rises first: only one that fell from its peak was decayed.
        found["annealed"] = rates[-1] < ANNEALED * max(rates) and rates.index(max(rates)) < len(rates) - 1
    return found


def _loss(checkpoint, folder, model, eval_dataset, eval_loss, eval_fingerprint, tokenizer, trained, record):
    """The loss, its error, where it is from, and what it was measured on."""
    if eval_loss is not None:
        return float(eval_loss), 0.0, "given", eval_fingerprint
    if eval_dataset is not None:
        model = model if model is not None else _load(checkpoint)
        measured = evaluate(model, eval_dataset, tokenizer=tokenizer)
        return measured.loss, measured.error, "measured", measured.fingerprint
    if trained.get("loss") is not None:
        return trained["loss"], 0.0, "trainer_state.json", None
    if record is not None and folder is not None and (folder / GROWTH_NAME).is_file():
        return _loss_of_growth(folder / GROWTH_NAME), 0.0, GROWTH_NAME, None
    return None, 0.0, "", None


def _loss_of_growth(path: Path) -> float | None:
    """The held-out loss that was given when a grown model was saved."""
    try:
        loss = (json.loads(path.read_text()).get("metrics") or {}).get("eval_loss")
        return None if loss is None else float(loss)
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{path.name} of {path.parent.name} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _load(checkpoint: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())
        raise CheckpointError(f"{str(checkpoint)!r} cannot be loaded to be evaluated: {words}") from error
