"""From a report to the trainer of its choice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import WarmstartError
from ..growth.configs import config_dtype
from ..growth.grow import grow
from ..growth.plan import make_plan
from ..growth.source import class_and_config
from ..training import WarmstartTrainer
from .study import as_warmstart_arguments, candidate_arguments

if TYPE_CHECKING:
    from .report import SelectionReport


def make_trainer(
    report: SelectionReport, parent: str | os.PathLike | None, args: Any, trainer_kwargs: Mapping[str, Any]
) -> WarmstartTrainer:
    """The trainer of a report's choice; see `SelectionReport.start`."""
    study = report._selection.study if report._selection is not None else None
    folder = Path(parent) if parent is not None else study.parent if study is not None else None
    arguments = args if args is not None else study.args if study is not None else None
    missing = [name for name, value in (("parent", folder), ("args", arguments)) if value is None]
    if folder is None or arguments is None:
        raise WarmstartError(
            f"This report was loaded and does not know {' and '.join(missing)}. Pass them to start()."
        )
    candidate, regime = report.candidate(), report.regime
    model_class, config = class_and_config(folder)
    config = regime.configured(config)
    if candidate.fresh:
        torch.manual_seed(candidate.growth.seed)
        target = make_plan(model_class, config, candidate.growth).target_config
        model = model_class(target).to(config_dtype(config) or torch.float32)
    else:
        model = grow(model_class.from_pretrained(folder, config=config), candidate.growth)
    order = {"train_sampling_strategy": "random" if regime.shuffle else "sequential"}
    own = candidate_arguments(as_warmstart_arguments(arguments), candidate, **order)
    given = {}
    if study is not None:
        given = {"train_dataset": study.train_dataset, "eval_dataset": study.eval_dataset, **study.trainer_options}
    start = {"warmstart_from": None if candidate.fresh else folder}
    trainer = WarmstartTrainer(model, own, **{**given, **start, **trainer_kwargs})
    trainer.selection = report
    return trainer
