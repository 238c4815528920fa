"""`HparamRecommendation`: settings for one run, with intervals, sources and warnings, in the forms that trainers take."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import WarmstartError
from .recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import TrainingArguments

    from .fitted import FittedLaws


@dataclass(frozen=True)
class HparamRecommendation:
    """Settings for one run of training.

    Args:
        learning_rate (`float`): the peak, for the batch as rounded. batch_tokens (`int`): of one optimizer step.
        batch_sequences (`int`): the same in sequences.
        per_device_train_batch_size (`int`): times the next two it is `batch_sequences`.
        gradient_accumulation_steps (`int`): see there.
        world_size (`int`): devices.
        steps (`int`): optimizer steps of the run.
        equivalent_compute (`float`): FLOPs that training from scratch would need for the checkpoint's loss; of a preset, that
            were spent on the checkpoint; 0 from scratch.
        planned_compute (`float`): FLOPs of the run. total_compute (`float`): the sum, at which the laws are read.
        intervals (`dict[str, tuple[float, float]]`): 95 % intervals of `learning_rate`, `batch_tokens`,
            `equivalent_compute` and `total_compute`; empty for presets, whose sources give none.
        warnings (`list[str]`): what may make the numbers wrong, and what they do not weigh.
        optimal_learning_rate (`float`): of the laws, before rounding.
        optimal_batch_tokens (`float`): likewise.
        ridge (`float`): the exponent of the batch by which the learning rate followed it.
        recipe (`Recipe`): schedule and optimizer. sources (`dict[str, str]`): of every number.
        law (`str`): its name. params, tokens (`float`), sequence_length (`int`): of the run.
        eval_loss (`float`, *optional*): of the checkpoint, in the law's unit.
        replay_share (`float`): of the tokens, that are of the old text.
        laws (`FittedLaws`): what it was read from.

    Example:

        >>> from hf_warmstart import HparamPredictor
        >>> law = HparamPredictor.from_pretrained("deepseek")
        >>> found = law.recommend(params=7e9, tokens=2e12, sequence_length=4096)
        >>> f"{found.optimal_learning_rate:.3g} {found.optimal_batch_tokens / 1e6:.1f}M"
        '0.000425 9.2M'
    """

    learning_rate: float
    batch_tokens: int
    batch_sequences: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    steps: int
    equivalent_compute: float
    planned_compute: float
    total_compute: float
    intervals: Mapping[str, tuple[float, float]]
    warnings: list[str]
    optimal_learning_rate: float
    optimal_batch_tokens: float
    ridge: float
    recipe: Recipe
    sources: Mapping[str, str]
    law: str
    params: float
    tokens: float
    sequence_length: int
    eval_loss: float | None = None
    replay_share: float = 0.0
    laws: FittedLaws | None = field(default=None, repr=False, compare=False)

    # -- for trainers ---------------------------------------------------------------------------------------------

    def settings(self, **overrides: Any) -> dict[str, Any]:
        """Keywords of `TrainingArguments`, `overrides` before our own; the decay follows an overridden `max_steps`."""
        steps = int(overrides.get("max_steps", self.steps))
        beta1, beta2 = self.recipe.betas
        own: dict[str, Any] = {
            "learning_rate": self.learning_rate,
            "per_device_train_batch_size": self.per_device_train_batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "max_steps": self.steps,
            "warmup_steps": self.recipe.warmup_fraction,  # below 1: a share of all steps
            "lr_scheduler_type": self.recipe.schedule,
            "lr_scheduler_kwargs": self.recipe.scheduler_kwargs(steps),
            "adam_beta1": beta1,
            "adam_beta2": beta2,
            "adam_epsilon": self.recipe.epsilon,
            "weight_decay": self.recipe.weight_decay,
            "max_grad_norm": self.recipe.max_grad_norm,
            # Counted tokens are what the next recommendation reads off this run's checkpoint.
            "include_num_input_tokens_seen": "all",
        }
        if "lr_scheduler_type" in overrides and "lr_scheduler_kwargs" not in overrides:
            own["lr_scheduler_kwargs"] = {}
        return {**own, **overrides}

    def training_arguments(self, output_dir: str | os.PathLike, **overrides: Any) -> TrainingArguments:
        """`TrainingArguments` of the run.

        Args:
            output_dir (`str`): as in `TrainingArguments`.
            **overrides: any of its fields; `args_class=WarmstartTrainingArguments` makes another class of them.

        Raises:
            WarmstartError: a field that the class does not have.

        Example:

            >>> from hf_warmstart import HparamPredictor
            >>> found = HparamPredictor.from_pretrained("steplaw").recommend(params=3e8, tokens=6e9, sequence_length=2048)
            >>> args = found.training_arguments("runs/x", bf16=False, use_cpu=True)
            >>> args.lr_scheduler_type.value, args.get_warmup_steps(1000)
            ('cosine_with_min_lr', 10)
        """
        from dataclasses import fields

        from transformers import TrainingArguments

        args_class = overrides.pop("args_class", TrainingArguments)
        if unknown := sorted(set(overrides) - {f.name for f in fields(args_class)}):
            raise WarmstartError(f"{args_class.__name__} has no {unknown}.")
        return args_class(output_dir=os.fspath(output_dir), **self.settings(**overrides))

    def accelerate_config(self, *, mixed_precision: str = "bf16", num_machines: int = 1) -> dict[str, Any]:
        """What `accelerate launch --config_file` reads, for the number of processes that the batch was divided by.

        Raises:
            WarmstartError: the processes do not divide over the machines.
        """
        if num_machines < 1 or self.world_size % num_machines:
            raise WarmstartError(f"{self.world_size} processes do not divide over num_machines={num_machines}.")
        return {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "MULTI_GPU" if self.world_size > 1 else "NO",
            "num_machines": num_machines,
            "num_processes": self.world_size,
            "machine_rank": 0,
            "main_training_function": "main",
            "mixed_precision": mixed_precision,
            "use_cpu": False,
        }

    def to_yaml(self, path: str | os.PathLike | None = None, **overrides: Any) -> str:
        """The settings as a YAML file of `TrainingArguments`, as `TrlParser` and `HfArgumentParser.parse_yaml_file` read it.

        Args:
            path (*optional*): where to write it, too. **overrides: as for `training_arguments`, such as `output_dir`.
        """
        import yaml

        head = "".join(f"# {line}\n" for line in [f"hf_warmstart, law {self.law}", *self.warnings])
        text = head + yaml.safe_dump(_plain(self.settings(**overrides)), sort_keys=False, width=120)
        if path is not None:
            Path(path).write_text(text)
        return text

    # -- for people -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the laws."""
        data = {k: v for k, v in self.__dict__.items() if k not in ("laws", "recipe")}
        return _plain({**data, "recipe": self.recipe.to_dict(), "training_arguments": self.settings()})

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, value and source or interval of each setting: what the table shows."""

        def between(name: str) -> str:
            low, high = self.intervals.get(name, (math.nan, math.nan))
            return f"95 %: {low:.3g} to {high:.3g}" if low == low else ""

        def sourced(name: str) -> str:
            return "; ".join(words for words in (between(name), self.sources.get(name, "")) if words)

        parts = f"{self.per_device_train_batch_size} x {self.gradient_accumulation_steps} x {self.world_size} devices"
        decay = (
            f", decay over {self.recipe.decay_fraction:.0%}" if self.recipe.schedule == "warmup_stable_decay" else ""
        )
        own = self.recipe.sources
        found = [
            ("law", self.law, self.sources.get("law", "")),
            ("run", f"{self.params:.3g} parameters, {self.tokens:.3g} tokens", f"{self.planned_compute:.3g} FLOPs"),
            ("equivalent pre-training compute", f"{self.equivalent_compute:.3g} FLOPs", sourced("equivalent_compute")),
            ("total compute", f"{self.total_compute:.3g} FLOPs", between("total_compute")),
            ("learning rate", f"{self.learning_rate:.3g}", sourced("learning_rate")),
            ("batch, tokens", f"{self.batch_tokens:,}", sourced("batch_tokens")),
            (
                "batch, sequences",
                f"{self.batch_sequences:,} of {self.sequence_length:,}",
                f"{parts} (size x accumulation)",
            ),
            ("steps", f"{self.steps:,}", ""),
            ("schedule", self.recipe.schedule + decay, own.get("schedule", "")),
            ("warm-up", f"{self.recipe.warmup_fraction:.2g} of the steps", own.get("warmup_fraction", "")),
            ("AdamW betas", f"{self.recipe.betas[0]:.4g}, {self.recipe.betas[1]:.4g}", own.get("betas", "")),
            ("epsilon", f"{self.recipe.epsilon:.1g}", own.get("epsilon", "")),
            ("weight decay", f"{self.recipe.weight_decay:.3g}", own.get("weight_decay", "")),
            ("clipping", f"{self.recipe.max_grad_norm:.3g}", own.get("max_grad_norm", "")),
        ]
        if self.eval_loss is not None:
            found.insert(
                2, ("held-out loss", f"{self.eval_loss:.4f} nats per token", self.sources.get("eval_loss", ""))
            )
        if self.replay_share:
            new = self.tokens * (1 - self.replay_share)
            found.insert(2, ("replay", f"{self.replay_share:.0%} of the tokens", f"{new:.3g} tokens of new text"))
        return found

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        return "\n".join([*lines, *(f"! {words}" for words in self.warnings)])

    def plot(self, path: str | os.PathLike | None = None) -> Figure:
        """Laws, data, intervals and this run's point; written to a file where a path is given.

        Raises:
            WarmstartError: the recommendation was read from plain data, without its laws.
        """
        from .plots import plot_recommendation

        if self.laws is None:
            raise WarmstartError(
                "This recommendation does not carry its laws. Make it anew with predictor.recommend(...)."
            )
        figure = plot_recommendation(self, self.laws)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _plain(value: Any) -> Any:
    """A value as YAML and JSON have it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") else value
