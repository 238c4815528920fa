"""What the quickstart's runs say: the report, its verdict in words, and the picture of the curves."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from quickstart_arms import Result

from hf_warmstart import WarmstartError, __version__
from hf_warmstart.scaling import speedup, tokens_to_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Spread of final losses between seeds at these sizes, in nats.
NOISE = 0.02
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {"carried": "#0072B2", "fresh": "#56B4E9", "scratch": "#D55E00", "control": "#009E73"}
LABELS = {
    "carried": "grown, state carried",
    "no state": "grown, no state to carry",
    "fresh": "grown, fresh state",
    "scratch": "from scratch, tuned",
    "control": "not grown, equal FLOPs",
}


@dataclass(frozen=True)
class Costs:
    """What the runs cost.

    Args:
        tokens_per_step: of every arm. small, large: training FLOPs per token of parent and child.
        base: FLOPs of the parent's own training; None where it is not known.
    """

    tokens_per_step: int
    small: float
    large: float
    base: float | None

    def flops(self, name: str, steps: int) -> float:
        """FLOPs of an arm's main run of some steps."""
        return steps * self.tokens_per_step * (self.small if name == "control" else self.large)


def make_report(results: dict[str, Result], steps: int, costs: Costs, facts: dict[str, Any]) -> dict[str, Any]:
    """The report of all arms. `steps`: of the grown arms; scratch has a rung there."""
    scratch = results["scratch"]
    ladder = {s * costs.tokens_per_step: losses["source"] for s, losses in scratch.ladder.items()}
    target = scratch.ladder[steps]["source"]
    arms = {}
    for name, result in results.items():
        last = steps if name == "scratch" else result.arm.rungs[-1]
        flops = costs.flops(name, last)
        arm: dict[str, Any] = {
            "label": LABELS[name if facts["state_carried"] or name != "carried" else "no state"],
            "learning_rate": result.arm.learning_rate,
            "new_tokens": last * costs.tokens_per_step,
            "flops": flops,
            "eval_loss": result.ladder[last],
            "ladder": {str(s * costs.tokens_per_step): losses for s, losses in result.ladder.items()},
            "curve": [[s * costs.tokens_per_step, loss] for s, loss in result.curve],
            "cpu_seconds": round(result.cpu_seconds, 1),
        }
        own = {s * costs.tokens_per_step: losses["source"] for s, losses in result.ladder.items()}
        arm["tokens_to_scratch_loss"] = _asked(own, target)
        equivalent = _asked(ladder, result.ladder[last]["source"])
        arm["scratch_tokens_for_its_loss"] = equivalent
        if "value" in equivalent:
            bounded = tokens_to_loss(ladder, result.ladder[last]["source"])
            arm["speedup"] = speedup(bounded, costs.large, flops).to_dict()
            if costs.base is not None and name != "scratch":
                arm["speedup_with_base_cost"] = speedup(bounded, costs.large, flops, base_flops=costs.base).to_dict()
        arms[name] = arm
    report = {
        "scratch_loss_at_equal_tokens": target,
        "equal_tokens": steps * costs.tokens_per_step,
        "base_flops": costs.base,
        "flops_per_token": {"parent": costs.small, "child": costs.large},
        "flops_formula": "6 (parameters in matrix products + layers * sequence length * attention width) per token",
        "arms": arms,
        **facts,
        "versions": {
            "hf_warmstart": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    return report | {"verdict": verdict(report)}


def _asked(ladder: dict[int, float], loss: float) -> dict[str, Any]:
    """Tokens-to-loss as plain data, or in words why a ladder gives none."""
    try:
        return tokens_to_loss(ladder, loss).to_dict()
    except WarmstartError as error:
        return {"none": str(error)}


def verdict(report: dict[str, Any]) -> list[str]:
    """Who is ahead, by how much, in plain sentences."""
    arms = report["arms"]
    grown, scratch, control = arms["carried"], arms["scratch"], arms["control"]
    tokens, target = report["equal_tokens"], report["scratch_loss_at_equal_tokens"]
    lines = [_against_scratch(grown, target, tokens)]
    lines += _with_the_base(grown.get("speedup_with_base_cost"))
    gap = control["eval_loss"]["source"] - grown["eval_loss"]["source"]
    ahead = "ahead of" if gap > 0 else "behind"
    tie = f", less than the {NOISE} by which seeds differ" if abs(gap) < NOISE else ""
    lines.append(
        f"At equal FLOPs the grown model is {abs(gap):.3f} nats {ahead} the parent that simply continued "
        f"({grown['eval_loss']['source']:.3f} and {control['eval_loss']['source']:.3f}){tie}."
    )
    if gap < NOISE:
        lines.append(
            "Against that control growing did not pay here. It is expected to once the parent's own curve is flat: train the "
            "parent longer, or grow for a larger budget."
        )
    if report["state_carried"]:
        other = arms["fresh"]["eval_loss"]["source"] - grown["eval_loss"]["source"]
        lines.append(
            f"Carrying the optimizer's state left the loss {abs(other):.3f} nats {'lower' if other > 0 else 'higher'} than "
            "starting with a fresh one."
        )
    else:
        lines.append("The parent brought no optimizer state, so both grown arms started with a fresh one.")
    docs = scratch["eval_loss"]["docs"] - grown["eval_loss"]["docs"]
    lines.append(
        f"On the other held-out domain the grown model is {abs(docs):.3f} nats {'ahead of' if docs > 0 else 'behind'} scratch."
    )
    return lines


def _with_the_base(found: dict[str, Any] | None) -> list[str]:
    """What growing is worth when the base's own compute is counted, where that is known."""
    if found is None:
        return []
    bound = {"=": "", "<=": "at most ", ">=": "at least "}[found["relation"]]
    needs = (
        f"scratch needs {bound}{found['value']:.2f} times the compute of base and growth together for the same loss."
    )
    if (found["value"] > 1 and found["relation"] != "<=") or (found["value"] < 1 and found["relation"] != ">="):
        said = "still pays" if found["value"] > 1 else "does not pay"
        return [f"With the base's own compute counted, growing {said} against scratch: {needs}"]
    return [f"With the base's own compute counted the ladder does not decide: {needs}"]


def _against_scratch(grown: dict[str, Any], target: float, tokens: int) -> str:
    loss, reached = grown["eval_loss"]["source"], grown["tokens_to_scratch_loss"]
    if loss > target:
        return f"Scratch is ahead of the grown model at {tokens:,} tokens: {target:.3f} against {loss:.3f} nats."
    words = f"The grown model is ahead of tuned scratch at {tokens:,} tokens: {loss:.3f} against {target:.3f} nats."
    if "value" in reached:
        bound = "" if reached["relation"] == "=" else "at most " if reached["relation"] == "<=" else "at least "
        words += f" It reached scratch's loss with {bound}{reached['value']:,.0f} new tokens"
        fewer = {"=": "", "<=": "at least ", ">=": "at most "}[reached["relation"]]
        words += f", {fewer}{tokens - reached['value']:,.0f} fewer."
    return words


def plot(report: dict[str, Any], path: Path) -> None:
    """Held-out loss against new tokens: thin lines before the decay, marks where a decayed run ends."""
    diamonds = False
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    for name, arm in report["arms"].items():
        colour = COLOURS[name]
        ends = sorted((int(tokens), losses["source"]) for tokens, losses in arm["ladder"].items())
        curve = [point for point in arm["curve"][:-1] if point[0] <= ends[-1][0]]
        axes.plot(*zip(*curve, strict=True), color=colour, alpha=0.35, linewidth=1.2) if curve else None
        axes.plot(*zip(*ends, strict=True), color=colour, marker="o", markersize=5, label=arm["label"], linewidth=1.8)
        reached = arm["tokens_to_scratch_loss"]
        if reached.get("relation") == "=" and name != "scratch":
            diamonds = True
            axes.plot(
                reached["value"],
                report["scratch_loss_at_equal_tokens"],
                marker="D",
                color=colour,
                markersize=9,
                zorder=5,
            )
    target = report["scratch_loss_at_equal_tokens"]
    axes.axhline(target, color="#555555", linestyle="--", linewidth=1)
    axes.annotate(
        f"scratch at {report['equal_tokens'] / 1e6:.2f} M tokens: {target:.3f}",
        (1, target),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color="#555555",
    )
    ends = [losses["source"] for arm in report["arms"].values() for losses in arm["ladder"].values()]
    axes.set_ylim(min(ends) - 0.12, max(ends) + 0.45)
    axes.set_xscale("log")
    ticks = [t for k in range(4, 10) for t in (10**k, 2 * 10**k, 5 * 10**k)]
    axes.set_xticks(ticks, [f"{t / 1e6:g} M" for t in ticks], minor=False)
    axes.minorticks_off()
    firsts = [min(int(tokens) for tokens in arm["ladder"]) for arm in report["arms"].values()]
    lasts = [max(int(tokens) for tokens in arm["ladder"]) for arm in report["arms"].values()]
    axes.set_xlim(min(firsts) * 0.6, max(lasts) * 1.25)
    axes.set_xlabel("new tokens (since the growth, or from the start)")
    axes.set_ylabel("held-out loss (nats per token)")
    title = "Dots: decayed runs. Faint: before the decay."
    axes.set_title(title + (" Diamonds: tokens to scratch's loss." if diamonds else ""), fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
