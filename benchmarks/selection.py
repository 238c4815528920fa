"""The study of arXiv 2604.04281 in miniature: which widened state continues best, per regime, and which cheap metric tells.

    python -m benchmarks.selection --train TRAIN.txt --eval HELD_OUT.txt --output runs/selection-study
    python -m benchmarks.selection ... --setting full --document docs/selection.md

For each seed a parent is trained on the text and saved at two steps; from each of them, under each of four regimes (shuffle
and dropout apart), every candidate runs the whole continuation once, through `select_warmstart`; seeds are the repeats.
What is there is not run again, and the same command in a second process takes the half of it. `quick` takes minutes and shows
that all runs; its figures mean nothing. `full` is meant for two cores and less than an hour.

What the paper's author did not publish (schedule, betas, sizes of noise, exact formulas) is ours; `docs/selection.md` says
what. The generated part of the document lies between markers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import t as student
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from examples.quickstart_text import blocks, spread
from hf_warmstart import Candidate, WarmstartTrainingArguments, select_warmstart
from hf_warmstart.cli.coverage import versions
from hf_warmstart.selection.outcomes import agreement, loss_auc
from hf_warmstart.selection.report import SelectionReport
from hf_warmstart.selection.run import held

from .document import replaced
from .selection_runs import common_arguments, documents, made_if_free, made_once, tokenizer_of, train_parent

REGIMES = ("deterministic", "shuffled", "dropout", "stochastic")
MARKERS = "<!-- figures: made by benchmarks.selection -->", "<!-- figures: end -->"
LENGTH, VOCABULARY = 128, 1024
METRICS = (
    "kl",
    "loss_change",
    "loss@{}",
    "auc@{}",
    "kl@{}",
    "drift_logits@{}",
    "drift_hidden@{}",
    "drift_parameters@{}",
)
METRICS += ("escape@{}", "gradient_noise@{}")


@dataclass(frozen=True)
class Setting:
    """How large the study is.

    Args:
        width, layers, heads: of the parent; it grows to twice the width. batch: blocks of a step. eval_blocks: held out.
        parent_steps: where parents are saved. seeds: of parents and their continuations. regimes: which are run.
        lags: of the probes. steps: of a continuation. candidates: names; all where empty. learning_rate: of all runs.
        documents: of each file, None for all.
    """

    width: int = 48
    layers: int = 3
    heads: int = 2
    batch: int = 16
    eval_blocks: int = 96
    parent_steps: tuple[int, ...] = (1000, 2000)
    seeds: tuple[int, ...] = (0, 1, 2)
    regimes: tuple[str, ...] = REGIMES
    lags: tuple[int, ...] = (4, 16, 64)
    steps: int = 128
    eval_every: int = 16
    candidates: tuple[str, ...] = ()
    learning_rate: float = 1e-3
    documents: int | None = None


SETTINGS = {
    "full": Setting(),
    "quick": Setting(
        width=32,
        layers=2,
        batch=4,
        eval_blocks=16,
        parent_steps=(40, 80),
        seeds=(0,),
        regimes=("deterministic", "stochastic"),
        lags=(2, 4),
        steps=16,
        eval_every=4,
        candidates=("exact_copy", "perturbed_copy", "asymmetric_reset", "reference_slice"),
        documents=300,
    ),
}


def candidates(setting: Setting) -> list[Candidate]:
    """The paper's four families, uneven copy, and weights only; all twice as wide."""
    wide: dict[str, Any] = {"width": 2}
    reset: dict[str, Any] = {"width_operator": "exact_copy", "state_policy": "asymmetric_reset", **wide}
    pool = [
        Candidate("exact_copy", width_operator="exact_copy", **wide),
        Candidate("perturbed_copy_small", width_operator="perturbed_copy", noise=0.05, **wide),
        Candidate("perturbed_copy", width_operator="perturbed_copy", noise=0.2, **wide),
        Candidate("asymmetric_reset", **reset),
        Candidate("asymmetric_reset_rewarmed", new_lr_peak=1.3, new_lr_steps=64, **reset),
        Candidate("reference_slice", width_operator="reference_slice", **wide),
        Candidate("uneven_copy", width_operator="uneven_copy", **wide),
        Candidate(
            "weights_only", width_operator="exact_copy", state_policy="reset", schedule_policy="continue", **wide
        ),
    ]
    return [candidate for candidate in pool if not setting.candidates or candidate.name in setting.candidates]


# -- running ----------------------------------------------------------------------------------------------------------


def load_data(train: Path, held_out: Path, output: Path, setting: Setting) -> tuple[Dataset, Dataset, int]:
    """Blocks of tokens to train on and to evaluate on, and how many tokens there are."""
    tokenizer = tokenizer_of(output / "tokenizer", lambda: documents(train, setting.documents), VOCABULARY)
    made = []
    for path, count in ((train, 10**9), (held_out, setting.eval_blocks)):
        rows = spread(blocks(tokenizer, documents(path, setting.documents), LENGTH), count).tolist()
        made.append(Dataset.from_dict({"input_ids": rows, "labels": rows}))
    return made[0], made[1], len(tokenizer)


def make_parent(folder: Path, setting: Setting, seed: int, data: Dataset, vocabulary: int) -> None:
    """A parent without dropout, saved at each of its steps."""
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=setting.width, n_layer=setting.layers, n_head=setting.heads, n_positions=LENGTH,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    first, *_, last = setting.parent_steps
    arguments = common_arguments(setting.batch, setting.learning_rate, seed)
    train_parent(folder, GPT2LMHeadModel(config), data, last, first, arguments)


def run_study(train: Path, held_out: Path, output: Path, setting: Setting) -> None:
    """Run what is missing: first parents and selections that no other process is at, each whole, so that nobody waits at their
    ends; then a share of what the others are at."""
    output.mkdir(parents=True, exist_ok=True)
    data, evaluation, vocabulary = load_data(train, held_out, output, setting)
    for shares in (False, True):
        for seed in setting.seeds:
            base = output / f"parent-seed-{seed}"
            last = base / f"checkpoint-{setting.parent_steps[-1]}"
            made = made_once if shares else made_if_free
            if not made(last, lambda base=base, seed=seed: make_parent(base, setting, seed, data, vocabulary)):
                continue
            for step, regime in product(setting.parent_steps, setting.regimes):
                folder = selection_folder(output, seed, step, regime)
                if (folder / "selection.json").is_file():
                    continue
                with held(folder.with_name(f".{folder.name}.lock")) as mine:
                    if mine or shares:
                        select(base / f"checkpoint-{step}", folder, setting, seed, regime, data, evaluation)


def select(
    parent: Path, folder: Path, setting: Setting, seed: int, regime: str, data: Dataset, evaluation: Dataset
) -> None:
    """Run every candidate to the end, once."""
    select_warmstart(
        parent,
        candidates(setting),
        train_dataset=data,
        eval_dataset=evaluation,
        # Where the parent stopped in the data, so that nothing is continued on what it has just seen.
        args=WarmstartTrainingArguments(
            str(folder),
            max_steps=10 * setting.steps,
            data_policy="continue",
            **common_arguments(setting.batch, setting.learning_rate, seed),
        ),
        regime=regime,
        probe_steps=setting.lags,
        continuation_steps=setting.steps,
        eval_every=setting.eval_every,
        repeats=1,
        data_collator=default_data_collator,
    )


def selection_folder(output: Path, seed: int, step: int, regime: str) -> Path:
    return output / f"seed-{seed}-step-{step}-{regime}"


# -- the figures ------------------------------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """What one regime gave, one entry for each parent.

    Args:
        probe, area, final: name -> mean loss of the first probe, of the continuation, and its last loss, in each setting.
        metrics: of each setting, name -> cheap metrics. flops: of all settings together.
    """

    probe: dict[str, list[float]] = field(default_factory=dict)
    area: dict[str, list[float]] = field(default_factory=dict)
    final: dict[str, list[float]] = field(default_factory=dict)
    metrics: list[dict[str, dict[str, float]]] = field(default_factory=list)
    escape: dict[str, list[float]] = field(default_factory=dict)

    @property
    def settings(self) -> int:
        return len(self.metrics)

    def winners(self, losses: Mapping[str, Sequence[float]]) -> list[str]:
        """The candidate of least loss in each setting."""
        return [min(losses, key=lambda name: losses[name][k]) for k in range(self.settings)]


def gather(output: Path, setting: Setting, probe_lag: int) -> dict[str, Outcomes]:
    """The outcomes of each regime, from the reports on disk."""
    found: dict[str, Outcomes] = {}
    for regime in setting.regimes:
        made = found.setdefault(regime, Outcomes())
        for seed in setting.seeds:
            for step in setting.parent_steps:
                folder = selection_folder(output, seed, step, regime)
                if not (folder / "selection.json").is_file():
                    continue
                report = SelectionReport.load(folder)
                rows = [row for row in report.table if row["loss"] is not None]
                for row in rows:
                    name, curve = row["candidate"], report.curves[row["candidate"]][0]
                    made.probe.setdefault(name, []).append(loss_auc(curve, probe_lag))
                    made.area.setdefault(name, []).append(row["auc"])
                    made.final.setdefault(name, []).append(row["final_loss"])
                    made.escape.setdefault(name, []).append(
                        row["metrics"].get(f"escape@{setting.lags[-1]}", float("nan"))
                    )
                made.metrics.append({row["candidate"]: row["metrics"] for row in rows})
    return found


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % interval; None for fewer than three values, where it says nothing."""
    count = len(values)
    mean = sum(values) / count
    if count < 3:
        return mean, None
    error = sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, float(student.ppf(0.975, count - 1)) * error


def figures(found: Mapping[str, Outcomes], setting: Setting, name: str) -> str:
    """The generated part of the document."""
    lag = paper_lag(setting)
    count = {regime: made.settings for regime, made in found.items()}
    parts = [
        f"Setting `{name}`: {setting.layers} layers, width {setting.width} to {2 * setting.width}, batch {setting.batch} x "
        f"{LENGTH} tokens, parents at steps {list(setting.parent_steps)}, seeds {list(setting.seeds)}; settings run: {count}. "
        + ", ".join(f"{package} {version}" for package, version in versions().items())
        + ". Seeds and steps of the parent are taken as repeats, with 95 % intervals (t) from three on."
        + (" This setting shows that all runs; its figures say nothing of the claims." if name == "quick" else ""),
        "\n".join(claims(found, setting)),
    ]
    for regime, made in found.items():
        if made.settings:
            parts += [
                f"### `{regime}`",
                "\n".join(_losses(made, lag, setting.steps)),
                "\n".join(_agreements(made, setting)),
            ]
    return "\n\n".join(parts)


def paper_lag(setting: Setting) -> int:
    """The lag that stands for the paper's 16 steps."""
    return 16 if 16 in setting.lags else setting.lags[-1]


def claims(found: Mapping[str, Outcomes], setting: Setting) -> list[str]:
    """The paper's claims beside what was measured; the switches between its two regimes stand in the same row."""
    lag, steps = paper_lag(setting), setting.steps
    lines = [
        f"| claim of the paper | {' | '.join(f'`{regime}`' for regime in found)} |",
        "|---|" + "---|" * len(found),
    ]

    def row(claim: str, cell: Any) -> None:
        lines.append(
            f"| {claim} | " + " | ".join(cell(made) if made.settings else "not run" for made in found.values()) + " |"
        )

    def first(losses: str, name: str) -> Any:
        def cell(made: Outcomes) -> str:
            winners = made.winners(getattr(made, losses))
            return f"first in {winners.count(name)} of {len(winners)}"

        return cell

    def against(losses: str, name: str, other: str) -> Any:
        def cell(made: Outcomes) -> str:
            values = getattr(made, losses)
            if name not in values or other not in values:
                return "not run"
            mean, reach = interval([b - a for a, b in zip(values[name], values[other], strict=True)])
            return f"{mean:+.4f}" + ("" if reach is None else f" ± {reach:.4f}")

        return cell

    row(f"exact copy first in every probe ({lag} steps, mean loss)", first("probe", "exact_copy"))
    row(f"exact copy first after stochastic continuation ({steps} steps, mean loss)", first("area", "exact_copy"))
    row(
        f"structured non-clone first after deterministic continuation ({steps} steps, mean loss)",
        first("area", "reference_slice"),
    )
    row(
        "reference slice behind exact copy, mean loss (negative: ahead)",
        against("area", "exact_copy", "reference_slice"),
    )
    row("the same, last loss", against("final", "exact_copy", "reference_slice"))
    row("asymmetric reset behind exact copy, mean loss", against("area", "exact_copy", "asymmetric_reset"))
    row(
        f"escape tells who continues best: Spearman (escape at {setting.lags[-1]} counts as good)",
        _spearman(setting, "escape@{}", -1),
    )
    row(f"divergence from the parent after {lag} steps tells it: Spearman", _spearman(setting, f"kl@{lag}"))
    row(f"mean loss of {lag} steps tells it: Spearman", _spearman(setting, f"auc@{lag}"))
    row(f"loss after {setting.lags[-1]} steps tells it: Spearman", _spearman(setting, "loss@{}", -1))
    return lines


def _spearman(setting: Setting, metric: str, lag: int | None = None) -> Any:
    name = metric.format(setting.lags[lag]) if lag is not None else metric

    def cell(made: Outcomes) -> str:
        values = [
            found[name]["spearman"]
            for found in _agreement_of(made)
            if name in found and found[name]["spearman"] is not None
        ]
        if not values:
            return "not known"
        mean, reach = interval(values)
        return f"{mean:+.2f}" + ("" if reach is None else f" ± {reach:.2f}")

    return cell


def _agreement_of(made: Outcomes) -> list[dict[str, dict[str, Any]]]:
    """Agreement of the cheap metrics with the continuation's mean loss, in each setting."""
    rankings = [sorted(made.area, key=lambda name: made.area[name][k]) for k in range(made.settings)]
    return [agreement(metrics, ranking) for metrics, ranking in zip(made.metrics, rankings, strict=True)]


def _losses(made: Outcomes, lag: int, steps: int) -> list[str]:
    lines = [
        f"| candidate | mean loss, {lag} steps | mean loss, {steps} steps | last loss | behind the best, last loss | escape |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|")
    means = {name: sum(values) / len(values) for name, values in made.final.items()}
    best = min(means, key=means.__getitem__)
    for name in sorted(means, key=means.__getitem__):
        behind, reach = interval([b - a for a, b in zip(made.final[best], made.final[name], strict=True)])
        cells = [
            f"{sum(values) / len(values):.4f}" for values in (made.probe[name], made.area[name], made.final[name])
        ]
        cells.append("" if name == best else f"{behind:+.4f}" + ("" if reach is None else f" ± {reach:.4f}"))
        cells.append(f"{sum(made.escape[name]) / len(made.escape[name]):.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _agreements(made: Outcomes, setting: Setting) -> list[str]:
    lines = [
        "| metric | " + " | ".join(f"lag {lag}" for lag in setting.lags) + " |",
        "|---|" + "--:|" * len(setting.lags),
    ]
    for metric in METRICS:
        if "{}" in metric:
            lines.append(
                f"| `{metric[:-3]}` | "
                + " | ".join(_spearman(setting, metric, k)(made) for k in range(len(setting.lags)))
                + " |"
            )
        else:
            lines.append(
                f"| `{metric}` at step 0 | {_spearman(setting, metric)(made)} |" + " |" * (len(setting.lags) - 1)
            )
    return lines


def main() -> None:
    """Run, print, and write the document where one is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="text to train on")
    parser.add_argument("--eval", type=Path, required=True, help="held-out text")
    parser.add_argument("--output", type=Path, required=True, help="for parents and arms")
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="quick")
    parser.add_argument("--document", type=Path, help="put the figures between its markers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    setting, begun = SETTINGS[options.setting], time.monotonic()
    run_study(options.train, options.eval, options.output / options.setting, setting)
    found = gather(options.output / options.setting, setting, paper_lag(setting))
    text = figures(found, setting, options.setting)
    print(text)
    print(
        json.dumps(
            {"seconds": round(time.monotonic() - begun, 1), "settings": {n: m.settings for n, m in found.items()}}
        )
    )
    if options.document is not None:
        options.document.write_text(replaced(options.document.read_text(), MARKERS, text))


if __name__ == "__main__":
    main()
