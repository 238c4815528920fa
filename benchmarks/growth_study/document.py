"""A study's report in Markdown, made of its runs alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.growing.gain_law import GainLaw
from hf_warmstart.scaling.growing.growth_laws import GrowthLaws

from .calibration import Choice, check_advice
from .chosen import chosen, tried
from .claims import BUDGET, Claim, claims, fewest_tokens, runners_up
from .jobs import SCRATCH, TRANSFERRED, trials_of
from .plots import plot_isoflops, plot_ladders
from .running import Study
from .settings import STATE_WORDS
from .table import Cell, Interval, cells_of, runs_of
from .text import STUDY

RUNS, ISOFLOPS, LADDERS = "growth-study-{}-runs.csv", "growth-study-{}-isoflops.png", "growth-study-{}-tokens.png"
DRAWS = 400
SPEEDUP = "{:.2f}"
LEAST_TOKENS_PER_PARAMETER = 1.0  # below which `advise_growth` refuses


@dataclass(frozen=True)
class Report:
    """What a study says.

    Args:
        study. name: of its setting, and of what is written. runs: the table. cells: arms at budgets.
        claims: on the first target. laws: fitted to the runs, or why there are none. choices: the advice on held-out cells.
    """

    study: Study
    name: str
    runs: pd.DataFrame
    cells: list[Cell]
    claims: list[Claim]
    laws: GrowthLaws | str
    choices: list[Choice]

    @classmethod
    def of(cls, study: Study, name: str) -> Report:
        """Of what is finished.

        Raises:
            WarmstartError: nothing is.
        """
        runs = runs_of(study)
        made = cls(study, name, runs, cells_of(study, runs), [], "not asked for", [])
        if not made.is_judged:
            return made
        try:
            laws: GrowthLaws | str = GrowthLaws.fit(runs, draws=DRAWS, source="the study")
        except WarmstartError as fault:
            laws = str(fault)
        judged = claims(made.cells, made.target, study.setting.rungs)
        return replace(made, claims=judged, laws=laws, choices=check_advice(runs, study.setting.checks))

    @property
    def is_judged(self) -> bool:
        """Whether claims, laws and advice are in it: with checks, unless too little text left less than laws are about."""
        setting, scale = self.study.setting, self.study.scale(self.target)
        return bool(setting.checks) and (scale == 1 or scale * setting.rungs[0] >= LEAST_TOKENS_PER_PARAMETER)

    @property
    def target(self) -> str:
        """The first target, which the claims are about."""
        return next(iter(self.study.setting.targets))

    def write(self, folder: Path) -> str:
        """Write the table of runs and the plots into a folder; the text that goes with them."""
        self.runs.to_csv(folder / RUNS.format(self.name), index=False)
        if self.study.setting.checks:
            plot_isoflops(
                self.runs,
                self.cells,
                {name: self._drawn().get(name) for name in self.study.setting.checks},
                list(self.study.setting.targets),
                folder / ISOFLOPS.format(self.name),
            )
            scale = self.study.scale(self.target)
            plot_ladders(self.runs, self.cells, self.target, scale, folder / LADDERS.format(self.name))
        return self.text()

    def _drawn(self) -> dict[str, GainLaw]:
        """The laws of the methods that were run at several growth factors."""
        if isinstance(self.laws, str):
            return {}
        return {name: self.laws.gains[name] for name in self.study.setting.checks if name in self.laws.gains}

    def text(self) -> str:
        """All of it."""
        drawn = bool(self.study.setting.checks)
        parts = [_facts(self.study, self.runs)]
        if drawn and not self.is_judged:
            parts.append(
                f"So little is below {LEAST_TOKENS_PER_PARAMETER:g} token per parameter, which neither the paper's claims nor "
                "the laws are about: none is judged or fitted."
            )
        if self.is_judged:
            rows = [[c.paper, c.found, f"**{c.verdict}**"] for c in self.claims]
            parts += ["### The paper's claims", _table(["the paper", "here", "verdict"], rows)]
        parts += [
            "### The warm start that needs the fewest tokens",
            self._winners(),
            "### Every arm",
            self._arms(),
            "### Loss against scratch by budget, %",
            self._budgets(),
        ]
        if drawn:
            parts += [
                f"![loss over growth factor]({ISOFLOPS.format(self.name)})",
                f"![loss over tokens]({LADDERS.format(self.name)})",
            ]
        parts += ["### Scratch, and rates", _scratch(self.study, self.runs), self._trials()]
        if self.is_judged:
            parts += [
                "### The laws, fitted to these runs",
                self._laws(),
                "### The advice on cells that were left out",
                _choices(self.choices),
            ]
        return "\n\n".join(part for part in parts if part)

    @property
    def budget(self) -> float:
        """The budget that arms are compared at."""
        rungs = self.study.setting.rungs
        return BUDGET if BUDGET in rungs else rungs[min(1, len(rungs) - 1)]

    @property
    def _budget_words(self) -> str:
        """That budget, and what it holds where budgets are smaller than they are named."""
        held = {target: self.study.scale(target) * self.budget for target in self.study.setting.targets}
        if all(tokens == self.budget for tokens in held.values()):
            return f"{self.budget:g} tokens per parameter"
        words = ", ".join(f"{tokens:.2g} of {target}" for target, tokens in held.items())
        return f"the budget named {self.budget:g} (tokens per parameter: {words})"

    def _winners(self) -> str:
        lines = []
        own = [cell for cell in self.cells if cell.target == self.target]
        for near in (2, 4, 8):
            most = fewest_tokens(own, near, self.budget)
            if most is None:
                continue
            arm = next(a for a in self.study.setting.arms if _is(self.study, a, most))
            lines.append(
                f"- Near {near}x, at {self._budget_words}: **{most.method}** from {most.base} (g = "
                f"{most.growth_factor:.2f}), state `{arm.state}` ({STATE_WORDS[arm.state]}), "
                f"{most.rate_factor:g} times the tuned rate: {_said(most.speedup, SPEEDUP)} times fewer tokens than "
                f"scratch; in FLOPs with the base's own {_said(most.speedup_with_base, SPEEDUP)}."
            )
            lines += self._chosen([c for c in own if c.near == near and c.rung == self.budget], most)
            for cell, gap in runners_up(own, most)[:4]:
                percent = gap.map(lambda x: 100 * x).text("{:+.2f}")
                told = "" if gap.low is not None and gap.low > 0 else ", not told apart"
                lines.append(f"  - {cell.method} from {cell.base}: loss {percent} % over it{told}.")
        return "\n".join(lines) if lines else "Nothing can be said yet."

    def _chosen(self, cells: list[Cell], most: Cell) -> list[str]:
        """What the trials alone chose among some cells."""
        found = chosen(cells, tried(self.study, self.target, self.budget))
        if found is None:
            return []
        cell = found[0]
        same = "the same" if cell is most else f"{cell.method} from {cell.base}, {_said(cell.speedup, SPEEDUP)} times"
        return [
            f"  - Chosen by the trials on seed {self.study.setting.tuning_seed}, which is not among these: {same}."
        ]

    def _trials(self) -> str:
        """The trials of all arms."""
        rows = [
            [target, t.base, t.method, t.text()]
            for target in self.study.setting.targets
            for t in tried(self.study, target, self.budget)
        ]
        head = f"loss at {self.budget:g} by the factor on the rate, tuning seed"
        return _table(["target", "from", "arm", head], rows) if rows else ""

    def _arms(self) -> str:
        heads = ["target", "from", "g", "arm", "rate", "loss", "against scratch, %", "speed-up", "with the base's FLOPs",
                 "equal total FLOPs, nats", "against the base trained on, nats", "seeds"]  # fmt: skip
        rows = []
        for cell in (cell for cell in self.cells if cell.rung == self.budget):
            percent = cell.change.map(lambda x: 100 * x) if cell.change else None
            rows.append([
                cell.target, cell.base, f"{cell.growth_factor:.2f}", cell.method, f"{cell.rate_factor:g}",
                f"{sum(cell.losses.values()) / len(cell.losses):.4f}", _said(percent, "{:+.2f}"),
                _said(cell.speedup, "{:.2f}"), _said(cell.speedup_with_base, "{:.2f}"),
                _said(cell.at_equal_flops, "{:+.3f}"), _said(cell.against_control, "{:+.3f}"), str(len(cell.losses)),
            ])  # fmt: skip
        words = (
            f"At {self._budget_words} since the growth. *Rate*: the factor on the tuned rate that the arm's "
            "trials chose. *Speed-up*: tokens that scratch needs for the arm's loss over the arm's own. *Equal total FLOPs*: "
            "loss less that of scratch with the FLOPs of base and arm together; *the base trained on*: less that of the base "
            "itself, continued for the arm's FLOPs. Below 0 growing is better. 95 % intervals over seeds, paired by seed."
        )
        return words + "\n\n" + _table(heads, rows)

    def _budgets(self) -> str:
        rungs = [rung for rung in self.study.setting.rungs if any(cell.rung == rung for cell in self.cells)]
        found: dict[tuple, dict[float, str]] = {}
        for cell in self.cells:
            key = (cell.target, cell.base, f"{cell.growth_factor:.2f}", cell.method)
            percent = cell.change.map(lambda x: 100 * x) if cell.change else None
            found.setdefault(key, {})[cell.rung] = _said(percent, "{:+.2f}")
        rows = [[*key, *(by.get(rung, "") for rung in rungs)] for key, by in found.items()]
        return _table(["target", "from", "g", "arm", *(f"{rung:g}" for rung in rungs)], rows)

    def _laws(self) -> str:
        if isinstance(self.laws, str):
            return f"None: {self.laws}"
        lines = []
        if self.laws.scratch is not None:
            lines.append(f"- scratch: {self.laws.scratch}, within {self.laws.scratch_error:.1%} of its runs")
        rows = []
        for name, law in self._drawn().items():
            for rung in self.study.setting.rungs:
                optimum, bound = law.optimum(rung), law.upper_bound(rung)
                change = law.change(2.0, rung)
                ends = "" if change.interval is None else " ({:+.2f} to {:+.2f})".format(
                    *(100 * x for x in change.interval)
                )  # fmt: skip
                rows.append([name, f"{rung:g}", str(optimum), str(bound), f"{100 * (change.value or 0):+.2f}{ends}"])
        lines += [f"- {note}" for note in self.laws.notes]
        table = _table(["method", "r", "optimum", "upper bound", "loss at g = 2, %"], rows) if rows else ""
        said = f'`advise_growth(params, tokens, laws="{RUNS.format(self.name)}")` uses them.'
        return "\n\n".join(part for part in ("\n".join(lines), table, said) if part)


def _is(study: Study, arm: Any, cell: Cell) -> bool:
    return (arm.target, arm.base, study.setting.method(arm)) == (cell.target, cell.base, cell.method)


def _said(interval: Interval | None, form: str) -> str:
    return "" if interval is None else interval.text(form)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _facts(study: Study, runs: pd.DataFrame) -> str:
    """What was run, on what, and how far it is."""
    said = json.loads((study.folder / STUDY).read_text())
    records = [record for job in study.jobs if (record := study.record(job.name))]
    setting = study.setting
    devices = sorted({record["device"] for record in records})
    versions = sorted({record["torch"] for record in records})
    scaled = {name: study.scale(name) for name in setting.targets if study.scale(name) < 1}
    lines = [
        f"{len(records)} of {len(study.jobs)} runs, {sum(r['seconds'] for r in records):,.0f} process-seconds on "
        f"{', '.join(devices)} (torch {', '.join(versions)}); seeds {sorted(int(s) for s in runs['seed'].unique())}, trials "
        f"on seed {setting.tuning_seed}.",
        f"Text: {', '.join(said['text'])}, {said['train_tokens']:,} tokens; {said['held_out_tokens']:,} held out. At most "
        f"{runs['epochs'].max():.1f} passes over the text by one model, its base's included.",
    ]
    if scaled:
        words = ", ".join(f"{name} {factor:.3g}" for name, factor in scaled.items())
        lines.append(
            f"The text is too short for the budgets: so that no run takes more than {setting.max_epochs:g} passes over it, "
            f"they are multiplied by: {words}. Budgets are named as they would be, and hold so much less."
        )
    rows = [
        [name, f"{setting.params[name]:,}", f"{size.hidden}", f"{size.layers}",
         f"{study.flops_per_token[name] / (6 * setting.params[name]):.2f}"]
        for name, size in setting.sizes.items()
    ]  # fmt: skip
    return "\n\n".join([*lines, _table(["size", "parameters", "width", "layers", "FLOPs per token over 6 N"], rows)])


def _scratch(study: Study, runs: pd.DataFrame) -> str:
    """Losses from scratch, tuned and transferred, and which rates were tuned."""
    rows = []
    for target in study.setting.targets:
        for kind, words in ((SCRATCH, "tuned"), (TRANSFERRED, "by muP from its base")):
            own = runs[(runs["kind"] == kind) & (runs["target"] == target)].dropna(subset="loss")
            for rung, part in own.groupby("rung"):
                made = Interval.of(part["loss"])
                rate = f"{part['learning_rate'].iloc[0]:g}"
                rows.append([target, words, rate, f"{rung:g}", made.text("{:.4f}"), str(made.seeds)])
    tuned = []
    for size in study.setting.sizes:
        trials = [(job.rate, study.record(job.name)) for job in trials_of(study.setting, size)]
        losses = {rate: made["rows"][-1]["loss"] for rate, made in trials if made}
        if losses:
            words = ", ".join(f"{rate:g}: {'diverged' if x is None else f'{x:.4f}'}" for rate, x in losses.items())
            known = [rate for rate, x in losses.items() if x is not None]
            at = min(known, key=lambda rate: losses[rate], default=None)
            edge = " (edge of what was tried)" if at in (min(losses), max(losses)) else ""
            tuned.append([size, words, f"{at:g}{edge}" if at is not None else "none"])
    first = _table(["target", "rate", "peak", "tokens per parameter", "loss", "seeds"], rows)
    return first + "\n\n" + _table(["size", "loss by rate, tuning seed", "tuned"], tuned)


def _choices(choices: Sequence[Choice]) -> str:
    if not choices:
        return "No cells yet."
    good = sum(choice.good for choice in choices)
    rows = [
        [c.target, c.method, f"{c.rung:g}", "none" if c.advised is None else f"{c.advised:.2f}", f"{c.best:.2f}",
         c.reason if c.regret is None else f"{100 * c.regret:.2f}"]
        for c in choices
    ]  # fmt: skip
    words = (
        f"Within 0.2 % of the best loss in {good} of {len(choices)} cells ({good / len(choices):.0%}). A growth factor of 1 is "
        "scratch."
    )
    return words + "\n\n" + _table(["target", "method", "r", "advised g", "best g", "regret, %"], rows)
