"""What the runs in a folder say: regret, search compute, tables and the picture. Reads files; trains nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hf_warmstart import WarmstartError
from hf_warmstart.cli.coverage import versions
from hf_warmstart.scaling.fits.optima import find_optima
from hf_warmstart.scaling.sweeps.cost import FORWARD_SHARE, GRID_POINTS, GRID_SEEDS
from hf_warmstart.scaling.sweeps.design import Point, best_point, on_edge
from hf_warmstart.scaling.tables.compute import training_flops

from ..intervals import interval
from .jobs import parent_file
from .setting import PROBE, Setting, Target
from .study import LAWS_NAME, SETTING_NAME, preset_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10  # % of the loss that the picture's colours tell apart
# What is compared with the grid, by the name of its file.
KINDS = {"recommended": "recommended by the laws alone", "probed": "recommended by laws and probes"}
MARKERS = "<!-- figures: made by benchmarks.hparams -->", "<!-- figures: end -->"


def report(folder: Path, setting: Setting) -> dict[str, Any]:
    """The report of a folder's runs; what is not there yet is named under `missing`.

    Raises:
        WarmstartError: the folder holds runs of another setting, or none.
    """
    file = folder / SETTING_NAME
    if not file.is_file() or file.read_text() != json.dumps(setting.to_dict(), indent=2):
        raise WarmstartError(f"{str(folder)!r} holds no runs of this setting.")
    target, missing = Target(setting), []
    parents = {}
    for name in setting.parents:
        if parent_file(folder, name).is_file():
            parents[name] = of_parent(folder, target, name)
            missing += parents[name].pop("missing")
        else:
            missing.append(f"parent {name}")
    made: dict[str, Any] = {
        "versions": versions(),
        "target": {"params": target.params, "tokens": target.tokens},
        "parents": parents,
    }
    if (folder / LAWS_NAME).is_file():
        laws = json.loads((folder / LAWS_NAME).read_text())
        made |= laws | {"search": _search(folder, target, laws["sweep"]["spent_flops"], parents)}
    else:
        missing.append("sweep")
    made["regret"] = {}
    for kind in KINDS:
        pairs = [pair for of in parents.values() for pair in of.get(kind, {}).get("pairs", [])]
        if len(pairs) == len(setting.parents) * len(setting.fresh_seeds):
            made["regret"][kind] = interval(pairs)
    return made | {"missing": missing}


def of_parent(folder: Path, target: Target, name: str) -> dict[str, Any]:
    """Grid, recommended settings and presets of one parent, as far as they are there."""
    setting, missing = target.setting, []
    said = json.loads(parent_file(folder, name).read_text())
    runs = target_runs(folder, name)
    means = mean_losses(runs, setting.grid_seeds)
    grid = {point: loss for point, loss in means.items() if _is_power(point)}
    found: dict[str, Any] = {
        "loss_before": said["loss"],
        "tokens_before": said["tokens"],
        "grid": [_said(point, loss, target) for point, loss in sorted(grid.items())],
    }
    best = best_point(grid)
    if best is None or len(grid) < setting.side**2:
        return found | {"missing": [f"grid of {name} ({len(grid)} of {setting.side**2} points)"]}
    surface = _surface(runs, grid, target)
    away: dict[str, Any] = {
        "points": len(grid),
        "edge": on_edge(grid, setting.shared),
        "mean_seconds": _seconds(runs, grid),
    }
    losses = np.array(list(grid.values()))
    found["grid_best"] = _said(best, grid[best], target) | away
    found["grid_median_regret"] = float(np.median(losses[np.isfinite(losses)]) / grid[best] - 1)
    if surface is not None:
        found["surface"] = {
            "learning_rate": surface.learning_rate, "batch_tokens": surface.batch_tokens, "loss": surface.loss
        }  # fmt: skip
    found["probes"] = len(list((folder / f"probes-{name}").glob("*.json")))
    for kind in KINDS:
        file = parent_file(folder, name).with_name(f"{kind}.json")
        if file.is_file():
            found[kind] = _compared(json.loads(file.read_text()), runs, best, means, surface, target)
        if "pairs" not in found.get(kind, {}):
            missing.append(f"comparison on fresh seeds of {name} ({kind})")
    found["presets"], first = {}, setting.grid_seeds[0]
    for preset, point in preset_points(target, parent_file(folder, name)).items():
        if not isinstance(point, Point):
            found["presets"][preset] = {"refused": point}
        elif (point, first) in runs:
            loss = _loss(runs[point, first])
            regret = loss / _loss(runs[best, first]) - 1 if math.isfinite(loss) else "diverged"
            found["presets"][preset] = _said(point, loss, target) | {"regret": regret}
        else:
            missing.append(f"{preset} of {name}")
    return found | {"missing": missing}


def _compared(
    ours: dict[str, Any],
    runs: dict[tuple[Point, int], dict[str, Any]],
    best: Point,
    means: dict[Point, float],
    surface: Any,
    target: Target,
) -> dict[str, Any]:
    """What the laws said, and its regret: in pairs on fresh seeds, and by the quadratic through the grid."""
    setting, point = target.setting, Point(ours["learning_rate"], ours["batch_sequences"])
    found = ours | _said(point, means.get(point, math.nan), target)
    if surface is not None:
        at = surface.loss_at(point.learning_rate, point.batch_sequences * setting.length)
        found["surface_regret"] = at / surface.loss - 1
    fresh = [(runs.get((point, seed)), runs.get((best, seed))) for seed in setting.fresh_seeds]
    if all(a and b for a, b in fresh):
        found["pairs"] = [_loss(a) / _loss(b) - 1 for a, b in fresh]  # type: ignore[arg-type]
        found["regret"] = interval(found["pairs"])
    return found


def target_runs(folder: Path, name: str) -> dict[tuple[Point, int], dict[str, Any]]:
    """(point, seed) -> what a run from a parent left."""
    found = {}
    for file in sorted((folder / f"target-{name}").glob("b*.json")):
        run = json.loads(file.read_text())
        found[Point(run["learning_rate"], run["batch_sequences"]), run["seed"]] = run
    return found


def mean_losses(runs: dict[tuple[Point, int], dict[str, Any]], seeds: Sequence[int]) -> dict[Point, float]:
    """Point -> mean loss over seeds, of the points that have all of them; infinite where one diverged."""
    points = {point for point, _ in runs}
    whole = [point for point in points if all((point, seed) in runs for seed in seeds)]
    return {point: float(np.mean([_loss(runs[point, seed]) for seed in seeds])) for point in whole}


def _search(folder: Path, target: Target, sweep_flops: float, parents: dict[str, Any]) -> dict[str, Any]:
    """What the search cost, in FLOPs by the configs and in seconds of one core, over a grid on the target."""
    setting = target.setting
    rows = [json.loads(line) for line in (folder / "sweep" / "runs.jsonl").read_text().splitlines()]
    evaluated = json.loads((folder / "sweep" / "sweep.json").read_text())["eval"]["sequences"] * setting.length
    grid_flops = GRID_POINTS * GRID_SEEDS * target.tokens * target.flops_per_token
    eval_flops = FORWARD_SHARE * target.flops_per_token * evaluated
    probes = max((of.get("probes", 0) for of in parents.values()), default=0)
    seconds = [of["grid_best"]["mean_seconds"] for of in parents.values() if "grid_best" in of]
    spent = sum(row["seconds"] for row in rows)
    return {
        "sweep_flops": sweep_flops,
        "evaluation_flops": eval_flops,
        "grid_flops": grid_flops,
        "share": (sweep_flops + eval_flops) / grid_flops,
        "share_of_several_targets": (sweep_flops / len(setting.parents) + eval_flops) / grid_flops,
        "probes_share": probes * (PROBE * target.tokens * target.flops_per_token + eval_flops) / grid_flops,
        "sweep_seconds": spent,
        "share_of_seconds": spent / (GRID_POINTS * GRID_SEEDS * float(np.mean(seconds))) if seconds else None,
    }


def _surface(runs: dict[tuple[Point, int], dict[str, Any]], grid: dict[Point, float], target: Target) -> Any:
    """The quadratic through the grid's runs near its best; None where it is not convex, or lowest beyond the grid."""
    rows = [
        {"learning_rate": point.learning_rate, "batch_tokens": point.batch_sequences * target.setting.length,
         "loss": _loss(run), "params": target.params, "tokens": target.tokens,
         "compute": training_flops(target.params, target.tokens)}
        for (point, seed), run in runs.items()
        if point in grid and seed in target.setting.grid_seeds and run["loss"] is not None
    ]  # fmt: skip
    [optimum], _ = find_optima(pd.DataFrame(rows), draws=2)
    return optimum if optimum.curvature is not None and not optimum.edges else None


def _loss(run: dict[str, Any]) -> float:
    return math.inf if run["loss"] is None else run["loss"]


def _seconds(runs: dict[tuple[Point, int], dict[str, Any]], grid: dict[Point, float]) -> float:
    """Of a core, of a run of the grid."""
    return float(np.mean([run["seconds"] for (point, _), run in runs.items() if point in grid]))


def _is_power(point: Point) -> bool:
    """Whether a point is the grid's: a rate that is a power of two, and a batch that is."""
    mantissa, _ = math.frexp(point.learning_rate)
    return mantissa == 0.5 and point.batch_sequences & (point.batch_sequences - 1) == 0


def _said(point: Point, loss: float, target: Target) -> dict[str, Any]:
    told = None if math.isnan(loss) else loss if math.isfinite(loss) else "diverged"
    batch = point.batch_sequences * target.setting.length
    return {"learning_rate": point.learning_rate, "batch_tokens": batch, "loss": told}


# -- for people -------------------------------------------------------------------------------------------------------


def as_table(made: dict[str, Any], setting: str) -> str:
    """The report in Markdown."""
    lines = []
    if made["regret"] and "search" in made:
        search, targets = made["search"], len(made["parents"])
        lines += [
            f"Setting `{setting}`: a target of {made['target']['params']:,} parameters, {made['target']['tokens']:,} tokens "
            f"of continued training.",
            "",
            "| | value | 95 % interval |",
            "|---|--:|--:|",
            *(
                f"| loss regret, {label}: {found['seeds']} pairs of runs with fresh seeds | {_percent(found['mean'])} "
                f"| {_percent(found['low'])} to {_percent(found['high'])} |"
                for kind, label in KINDS.items()
                if (found := made["regret"].get(kind))
            ),
            f"| search compute of the laws, of {GRID_POINTS} points and {GRID_SEEDS} seeds on the target "
            f"| {search['share']:.1%} | counted |",
            f"| that and the most probes of a parent | {search['share'] + search['probes_share']:.1%} | counted |",
            f"| the same for each of the {targets} parents, which the sweep served alike "
            f"| {search['share_of_several_targets'] + search['probes_share']:.1%} | counted |",
        ]
        if search["share_of_seconds"] is not None:
            lines.append(
                f"| the sweep in seconds of a core, of that grid's | {search['share_of_seconds']:.1%} | measured |"
            )
        lines.append("")
    lines += ["| parent | settings | learning rate | batch tokens | loss | regret |", "|---|---|--:|--:|--:|--:|"]
    for name, of in made["parents"].items():
        lines += [f"| {name} | {' | '.join(row)} |" for row in _rows(of)]
    for name, of in made["parents"].items():
        if refused := [preset for preset, said in of.get("presets", {}).items() if "refused" in said]:
            lines.append(f"\nRefused for {name}: {', '.join(f'`{preset}`' for preset in refused)}.")
    if made["missing"]:
        lines.append(f"\nNot there yet: {'; '.join(made['missing'])}.")
    return "\n".join(lines)


def _rows(of: dict[str, Any]) -> list[list[str]]:
    """Settings, rate, batch, loss and regret of one parent's rows."""
    rows = []
    if best := of.get("grid_best"):
        edge = f", on its edge in {' and '.join(best['edge'])}" if best["edge"] else ""
        rows.append([f"grid's best of {best['points']}{edge}", *_cells(best), "0"])
        rows.append(["grid's median", "", "", "", _percent(of["grid_median_regret"])])
    if surface := of.get("surface"):
        rows.append(["minimum of the quadratic through the grid", *_cells(surface), ""])
    for kind, label in KINDS.items():
        if ours := of.get(kind):
            regret, words = ours.get("regret"), "-"
            if regret:
                words = f"{_percent(regret['mean'])} ({_percent(regret['low'])} to {_percent(regret['high'])})"
            rows.append([f"**{label}**", *_cells(ours), words])
            if "surface_regret" in ours:
                rows.append(["the same, by the quadratic", "", "", "", _percent(ours["surface_regret"])])
    for preset, said in of.get("presets", {}).items():
        if "refused" not in said:
            rows.append([f"`{preset}`", *_cells(said), _percent(said["regret"])])
    return rows


def _cells(said: dict[str, Any]) -> list[str]:
    loss = said["loss"]
    words = "-" if loss is None else loss if isinstance(loss, str) else f"{loss:.4f}"
    return [f"{said['learning_rate']:.3g}", f"{said['batch_tokens']:,.0f}", words]


def _percent(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.2%}"


def write_document(path: Path, words: str) -> None:
    """Put words between the markers of a document.

    Raises:
        WarmstartError: it has no markers.
    """
    text = path.read_text()
    if any(text.count(marker) != 1 for marker in MARKERS):
        raise WarmstartError(f"{path} needs one line {MARKERS[0]!r} and one line {MARKERS[1]!r} to write between.")
    before, rest = text.split(MARKERS[0])
    path.write_text(f"{before}{MARKERS[0]}\n\n{words}\n\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def plot(made: dict[str, Any]) -> Figure:
    """The loss over learning rate and batch on each parent's grid, with the recommended point and the presets'."""
    from matplotlib.figure import Figure

    names = [name for name, of in made["parents"].items() if "grid_best" in of]
    if not names:
        raise WarmstartError("No grid is complete yet: there is nothing to plot.")
    figure = Figure(figsize=(6.4 * len(names), 5.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _panel(figure, axes, name, made["parents"][name])
    return figure


def _panel(figure: Figure, axes: Any, name: str, of: dict[str, Any]) -> None:
    """One parent's grid in steps of two; a preset beyond the picture is marked on its rim."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    best = of["grid_best"]["loss"]
    colours = ScalarMappable(Normalize(0, SHOWN), "viridis_r")
    at = [_log2(point) for point in [*of["grid"], *(of[kind] for kind in KINDS if kind in of)]]
    low, high = np.min(at, axis=0) - 1.2, np.max(at, axis=0) + 1.2
    for point in of["grid"]:
        x, y = _log2(point)
        away = SHOWN if isinstance(point["loss"], str) else 100 * (point["loss"] / best - 1)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, color=colours.to_rgba(away)))
        words = "div." if isinstance(point["loss"], str) else f"{away:.1f}"
        shade = "white" if away > 0.4 * SHOWN else "black"
        axes.annotate(words, (x, y - 0.32), ha="center", va="center", fontsize=8, color=shade)
    figure.colorbar(colours, ax=axes, label=f"loss over the grid's best, % ({SHOWN} and above alike)")
    marks = {"recommended": ("*", "red"), "probed": ("X", "blue"), "surface": ("P", "black")}
    for kind, (marker, colour) in marks.items():
        if (point := of.get(kind)) is not None:
            label = KINDS.get(kind, "quadratic's minimum")
            axes.plot(*_log2(point), marker, color=colour, markersize=13, mec="white", label=label)
    axes.plot([], [], "o", color="tab:orange", mec="black", label="presets (on the rim: beyond it)")
    for preset, said in of["presets"].items():
        if "refused" not in said:
            x, y = np.clip(_log2(said), low + 0.1, high - 0.1)
            axes.plot(x, y, "o", color="tab:orange", markersize=7, mec="black")
            side = -1 if x > high[0] - 1 else 1
            axes.annotate(preset, (x, y), xytext=(7 * side, 5), textcoords="offset points", fontsize=9, color="tab:orange",
                          ha="left" if side > 0 else "right", weight="bold")  # fmt: skip
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="batch, tokens", ylabel="peak learning rate")
    axes.set_xticks(ticks := range(math.ceil(low[0]), math.floor(high[0]) + 1), [f"{2**k:,}" for k in ticks])
    axes.set_yticks(ticks := range(math.ceil(low[1]), math.floor(high[1]) + 1), [f"{2.0**k:.2g}" for k in ticks])
    axes.set_title(f"target continued from the parent {name!r}, loss {of['loss_before']:.2f} before", fontsize=10)
    axes.legend(loc="upper left", fontsize=8)


def _log2(said: dict[str, Any]) -> tuple[float, float]:
    return math.log2(said["batch_tokens"]), math.log2(said["learning_rate"])
