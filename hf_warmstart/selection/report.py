"""`SelectionReport`: the ranking, how sure it is, what it cost, and how well cheaper metrics would have told it.

A report is plain data with a few questions to it. It is saved as `selection.json`, `selection.md` and `selection.png`, and
goes with the card of the grown model (`push_to_hub(model, ..., selection=report)`), or to the Hub alone (`report.push_to_hub`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WarmstartError
from ..growth.layout import collect
from ..version import __version__
from .candidates import Candidate
from .halving import LEVEL, Margin, margin
from .outcomes import agreement, cheap_metrics, final_loss, loss_auc
from .regimes import Regime

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from ..training import WarmstartTrainer
    from .rounds import Progress, Selection

JSON_NAME, MARKDOWN_NAME, PLOT_NAME = "selection.json", "selection.md", "selection.png"


@dataclass
class SelectionReport:
    """What a selection found.

    Args:
        best (`str`): the name of the choice.
        table (list of `dict`): one row per candidate, best first: `rank`, `candidate`, `stage` (`"chosen"`, `"continued"`,
            `"probed"`, `"out"`), `reason`, `repeats`, `loss` (mean over repeats of what candidates were ranked by, nats per
            token), `behind` (paired mean difference to the choice), `low` and `high` (its interval), `error` (its standard
            error), `final_loss`, `auc`, `probe_loss`, `metrics` (the cheap metrics), `parameters`, `step_flops`, `exact`.
        agreement (`dict`): regime -> cheap metric -> `spearman`, `top_1`, `candidates`.
        cost_fraction (`float`): FLOPs of the selection over those of the planned run with the choice.
        margin (`dict`): of the choice over the next: `mean`, `low`, `high`, `error`, `repeats`, `clear`.
        unsure (list of `str`): what was not settled. notes: what was said beforehand.
        settings (`dict`): regime, lags, steps, objective, budget, costs and why it stopped.
        candidates: each candidate as plain data. curves: evaluations of each candidate in each repeat.
    """

    best: str
    table: list[dict[str, Any]]
    agreement: dict[str, dict[str, dict[str, Any]]]
    cost_fraction: float
    margin: dict[str, Any]
    unsure: list[str]
    settings: dict[str, Any]
    candidates: dict[str, dict[str, Any]]
    curves: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._selection: Selection | None = None

    # -- saving ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain data, stamped with the library's version."""
        data = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"library_version": __version__, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SelectionReport:
        """Read what `to_dict` wrote."""
        return cls(**{name: value for name, value in data.items() if name != "library_version"})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> SelectionReport:
        """The report in a folder.

        Raises:
            WarmstartError: there is none.
        """
        path = Path(folder) / JSON_NAME
        if not path.is_file():
            raise WarmstartError(
                f"{Path(folder).name} holds no {JSON_NAME}. Pass the output_dir of a selection that has ended."
            )
        return cls.from_dict(json.loads(path.read_text()))

    def save(self, folder: str | os.PathLike) -> Path:
        """Write JSON, Markdown and PNG into a folder (made if missing); the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / JSON_NAME).write_text(json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False) + "\n")
        (folder / MARKDOWN_NAME).write_text(self.to_markdown() + "\n")
        self.plot(folder / PLOT_NAME)
        return folder

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> SelectionReport:
        """The report in a folder or on the Hub.

        Args:
            source: the `output_dir` of a selection, or the Hub id that `push_to_hub` was given.
            **options: of `huggingface_hub.hf_hub_download`, such as `revision`, `token` and `cache_dir`.

        Raises:
            WarmstartError: there is none, or the Hub does not give it.
        """
        if Path(source).is_dir():
            return cls.load(source)
        from .published import fetched_report

        return cls.load(fetched_report(os.fspath(source), **options))

    def push_to_hub(self, repo_id: str, *, license: str | None = None, **options: Any) -> CommitInfo:
        """Push the report (JSON, Markdown, PNG) and a card in one commit.

        Args:
            repo_id (`str`): made if missing. license (`str`, *optional*): the Hub's identifier of the licence. Never guessed.
            **options: `commit_message`, `private`, `token`, `revision` and `create_pr`, as for `hf_warmstart.push_to_hub`.

        Returns:
            The `huggingface_hub.CommitInfo` of the commit.

        Raises:
            HubError: the Hub refused, or the connection broke; what to do is said.
        """
        from .published import push_report

        return push_report(self, repo_id, license=license, **options)

    def to_markdown(self, heading: str = "# Choice of the warm start") -> str:
        """The report in words and tables."""
        from .report_text import markdown

        return markdown(self, heading)

    def plot(self, path: str | os.PathLike) -> None:
        """Draw curves, rank over lag, and metrics against the outcome, into a PNG."""
        from .plots import draw

        draw(self, path)

    # -- going on -------------------------------------------------------------------------------------------------

    def candidate(self, name: str | None = None) -> Candidate:
        """A candidate by name; by default the choice."""
        return Candidate.from_dict(self.candidates[name or self.best])

    def start(
        self, *, parent: str | os.PathLike | None = None, args: Any = None, **trainer_kwargs: Any
    ) -> WarmstartTrainer:
        """The trainer for the choice; `train()` starts the planned run.

        Args:
            parent: as for `select_warmstart`, for a report that was loaded; by default the one that it was given.
            args: likewise. The choice's policies go before those in `args`.
            **trainer_kwargs: for `WarmstartTrainer`; by default the data that the selection was given.

        Returns:
            A `WarmstartTrainer` whose model is grown under the regime (its dropout is in the config), and which writes this
            report into the model's card.

        Raises:
            WarmstartError: a loaded report was not told the parent or the arguments.
        """
        from .start import make_trainer

        return make_trainer(self, parent, args, trainer_kwargs)

    @property
    def regime(self) -> Regime:
        """What was random."""
        return Regime(self.settings["shuffle"], self.settings["dropout"])


def make_report(selection: Selection, progress: Progress) -> SelectionReport:
    """The report of a selection that has ended.

    Raises:
        WarmstartError: every candidate is out; all reasons are named.
    """
    study = selection.study
    ranking = progress.ranking
    if not progress.alive or progress.alive[0] in progress.out:
        lines = [f"{name}: {reason}" for name, reason in progress.out.items()]
        raise WarmstartError(f"No candidate is left:\n{collect(lines)}")
    best = ranking[0]
    metrics = {name: cheap_metrics(study, name, progress.probes[name]) for name in ranking}
    rivals = max(1, len(progress.alive) - 1)
    table = []
    for place, name in enumerate(ranking, start=1):
        behind = _behind(progress, best, name, rivals)
        curves = progress.curves.get(name, [])
        plan = study.plans[name]
        table.append(
            {
                "rank": place if name not in progress.out else None,
                "candidate": name,
                "stage": _stage(progress, best, name),
                "reason": progress.out.get(name) or dict(progress.dropped).get(name, ""),
                "repeats": len(curves),
                "loss": _mean(progress.losses.get(name, [])),
                "behind": behind.mean if behind else None,
                "low": behind.low if behind else None,
                "high": behind.high if behind else None,
                "error": behind.error if behind else None,
                "final_loss": _mean([final_loss(rows) for rows in curves]),
                "auc": _mean([loss_auc(rows) for rows in curves]),
                "probe_loss": metrics[name].get(f"loss@{study.probe_steps}"),
                "metrics": metrics[name],
                "parameters": plan.parameters_after,
                "step_flops": study.step_flops(name),
                "exact": plan.exact and not study.candidates[name].fresh,
            }
        )
    table += [_refused_row(name, reason) for name, reason in sorted(selection.refused.items())]
    continued = [name for name in ranking if name in progress.losses and name not in progress.out]
    planned = study.planned_steps * study.step_flops(best)
    second = next((name for name in ranking[1:] if name in progress.losses and name not in progress.out), None)
    first_margin = _behind(progress, best, second, rivals) if second else None
    settings = {
        "regime": study.regime.name,
        "shuffle": study.regime.shuffle,
        "dropout": study.regime.dropout,
        "probe_steps": list(study.lags),
        "continuation_steps": study.continuation_steps,
        "steps": progress.steps,
        "match": selection.match,
        "schedule": study.schedule,
        "objective": selection.objective,
        "repeats": selection.repeats,
        "planned_steps": study.planned_steps,
        "parent": study.parent.name,
        "seed": study.args.seed,
        "budget_flops": selection.budget,
        "spent_flops": progress.spent,
        "stopped": progress.stopped,
        "level": LEVEL,
    }
    report = SelectionReport(
        best,
        table,
        {study.regime.name: agreement(metrics, continued)} if len(continued) > 1 else {study.regime.name: {}},
        progress.spent / planned,
        _margin_data(first_margin, second),
        [],
        settings,
        {name: candidate.to_dict() for name, candidate in study.candidates.items()},
        {name: progress.curves.get(name) or [progress.probes[name]] for name in ranking},
        list(selection.notes),
    )
    report.unsure = unsure(report, progress)
    report._selection = selection
    return report


def unsure(report: SelectionReport, progress: Progress) -> list[str]:
    """What a selection did not settle, in sentences."""
    found = []
    margin_of, second = report.margin, report.margin.get("candidate")
    if second is None and report.best in progress.losses:
        found.append(f"All others were left behind by step {progress.steps[report.best]}: later ones are not seen.")
    elif second is None:
        found.append(
            f"Nothing was continued ({progress.stopped}): {report.best} is the probe's choice, and probes rank badly."
        )
    elif not margin_of["clear"]:
        reach = "" if margin_of["low"] is None else f" ({margin_of['low']:+.4f} to {margin_of['high']:+.4f})"
        found.append(
            f"{report.best} is ahead of {second} by {margin_of['mean']:.4f} nats{reach} over {margin_of['repeats']} repeats: "
            "not clear."
        )
    # How much a difference within one repeat scatters, by those that were repeated.
    scatters = [row["error"] * math.sqrt(row["repeats"]) for row in report.table if row["error"] is not None]
    once = [row for row in report.table if row["stage"] == "continued" and row["repeats"] == 1]
    for row in once:
        if not scatters or row["behind"] < 2 * max(scatters):
            found.append(f"{row['candidate']} was dropped after one repeat, {row['behind']:.4f} nats behind.")
    probed = [row["candidate"] for row in report.table if row["stage"] == "probed"]
    if probed and second is not None and report.settings["objective"] == "extrapolated":
        found.append(
            f"{len(probed)} candidates were dropped, left behind by another one that they did not catch up with "
            f"({', '.join(probed)}): what would turn later is not seen."
        )
    elif probed and second is not None:
        found.append(
            f"{len(probed)} candidates were dropped by the loss at step {report.settings['probe_steps'][-1]} of the probe "
            f"({', '.join(probed)}): what would overtake later is not seen."
        )
    rates = sorted({rate for rate in progress.rates.values() if rate})
    if len(rates) > 1 and rates[-1] > 1.05 * rates[0]:
        found.append(
            f"Candidates ended at learning rates from {rates[0]:.3g} to {rates[-1]:.3g}: a higher rate hides loss that its "
            "decay would show, so that schedule policies are not compared fairly by short runs."
        )
    return found


def _stage(progress: Progress, best: str, name: str) -> str:
    if name in progress.out:
        return "out"
    if name == best:
        return "chosen"
    return "continued" if name in progress.losses else "probed"


def _behind(progress: Progress, best: str, name: str, rivals: int) -> Margin | None:
    """The margin of the choice over a candidate, over the repeats that both have."""
    if name == best or name not in progress.losses or best not in progress.losses:
        return None
    return margin(progress.losses[best], progress.losses[name], rivals)


def _margin_data(found: Margin | None, name: str | None) -> dict[str, Any]:
    if found is None:
        return {
            "candidate": None,
            "mean": None,
            "low": None,
            "high": None,
            "error": None,
            "repeats": 0,
            "clear": False,
        }
    return {"candidate": name, **found.__dict__, "clear": found.clear}


def _refused_row(name: str, reason: str) -> dict[str, Any]:
    keys = (
        "loss",
        "behind",
        "low",
        "high",
        "error",
        "final_loss",
        "auc",
        "probe_loss",
        "parameters",
        "step_flops",
        "exact",
    )
    row: dict[str, Any] = dict.fromkeys(keys)
    return {"rank": None, "candidate": name, "stage": "out", "reason": reason, "repeats": 0, "metrics": {}, **row}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
