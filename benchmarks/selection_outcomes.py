"""What a check of selections found: winners, ties, regrets, and the tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_warmstart.cli.coverage import versions
from hf_warmstart.selection.halving import Margin, margin, ordered
from hf_warmstart.selection.outcomes import spearman

from .selection_settings import Case, Scale, candidates


@dataclass
class Outcome:
    """What one setting gave.

    Args:
        name: of the setting. pick: of the selection. share: of running every candidate to the end once, that it cost.
        losses: candidate -> final loss in each repeat of the truth. curves: candidate -> evaluations of each repeat.
        longer: what longer races picked and cost, by their steps.
    """

    name: str
    pick: str
    share: float
    losses: dict[str, list[float]]
    curves: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    longer: dict[int, tuple[str, float]] = field(default_factory=dict)

    @property
    def winner(self) -> str:
        """The candidate of least mean loss."""
        return ordered(self.losses)[0]

    @property
    def lead(self) -> Margin:
        """Of the winner over the next."""
        first, second = ordered(self.losses)[:2]
        return margin(self.losses[first], self.losses[second])

    @property
    def tied(self) -> str | None:
        """The next candidate, where it lies behind by less than one paired standard error."""
        lead = self.lead
        return ordered(self.losses)[1] if lead.error is not None and lead.mean < lead.error else None

    @property
    def is_right(self) -> bool:
        """Whether the winner was picked, or what ties with it."""
        return self.rightly(self.pick)

    def rightly(self, choice: str) -> bool:
        """Whether a choice is the winner, or what ties with it."""
        return choice in (self.winner, self.tied)

    def regret(self, choice: str) -> float:
        """How far a choice lies behind the winner, in the mean."""
        return mean(self.losses[choice]) - mean(self.losses[self.winner])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def regrets(found: Sequence[Outcome]) -> dict[str, Any]:
    """Mean regret of the selection, of the best constant choice, and of a random one."""
    constant = {name: mean([made.regret(name) for made in found]) for name in found[0].losses}
    best = min(constant, key=lambda name: (constant[name], name))
    return {
        "selection": mean([made.regret(made.pick) for made in found]),
        "constant": constant[best],
        "constant_choice": best,
        "random": mean(list(constant.values())),
        "right": sum(made.is_right for made in found),
        "settings": len(found),
    }


def figures(scale: Scale, cases: Sequence[Case], found: Sequence[Outcome], name: str) -> str:
    """The generated part of the document."""
    head = (
        f"Set `{name}`: {len(found)} of {len(cases)} settings are complete. {len(candidates(scale))} candidates, planned runs "
        f"of {scale.steps} steps of {scale.batch} x {scale.length} tokens, {scale.repeats} repeats each; the selection may "
        f"cost {scale.share:.0%} of running every candidate to the end once: probes of {scale.probe_steps[-1]} steps, "
        f"continuations to at most {scale.continuation_steps}, {scale.schedule} schedule, ranked by `{scale.objective}`, "
        f"repeats: {scale.selector_repeats}. "
        + ", ".join(f"{package} {version}" for package, version in versions().items())
        + "."
    )
    if not found:
        return head
    sums = regrets(found)
    verdict = (
        f"**The winner or a tie was picked in {sums['right']} of {sums['settings']} settings.** Mean regret, nats per token: "
        f"selection {sums['selection']:.4f}; best constant choice, `{sums['constant_choice']}`, {sums['constant']:.4f}; "
        f"random choice {sums['random']:.4f}."
    )
    parts = [head, verdict, "\n".join(_choices(cases, found, sums)), "\n".join(_means(found))]
    if races := _races(scale, found):
        parts.append("\n".join(races))
    if lags := _lags(found):
        parts.append("\n".join(lags))
    return "\n\n".join(parts)


def _choices(cases: Sequence[Case], found: Sequence[Outcome], sums: Mapping[str, Any]) -> list[str]:
    constant = sums["constant_choice"]
    lines = [
        "| setting | parent | rate, schedule | picked | winner | its lead ± error | right "
        "| regret | of the constant | random | cost |",
        "|---|---|---|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for made in found:
        case, lead = next(c for c in cases if c.name == made.name), made.lead
        right = "yes" if made.pick == made.winner else "tie" if made.is_right else "no"
        lines.append(
            f"| {made.name} | {case.layers} layers, {case.parent_steps} steps of {case.parent_text} "
            f"| {case.learning_rate:g}, {case.schedule} | {made.pick} | {made.winner} "
            f"| {lead.mean:.4f} ± {lead.error or 0:.4f} | {right} | {made.regret(made.pick):.4f} "
            f"| {made.regret(constant):.4f} | {mean([made.regret(name) for name in made.losses]):.4f} | {made.share:.1%} |"
        )
    return lines


def _means(found: Sequence[Outcome]) -> list[str]:
    names = list(found[0].losses)
    lines = ["Mean final loss, and behind it its regret:", "", f"| setting | {' | '.join(names)} |"]
    lines.append("|---|" + "--:|" * len(names))
    for made in found:
        cells = [f"{mean(made.losses[name]):.4f} ({made.regret(name):.4f})" for name in names]
        lines.append(f"| {made.name} | {' | '.join(cells)} |")
    return lines


def _races(scale: Scale, found: Sequence[Outcome]) -> list[str]:
    """What the same selection chose without a budget, where it has chosen in all settings."""
    there = [steps for steps in scale.longer if all(steps in made.longer for made in found)]
    if not there:
        return []
    lines = [
        "The same selections without a budget, their races going on to more steps; cost and regret are means.",
        "",
    ]
    lines += ["| race to | cost | right | regret | not right in |", "|--:|--:|--:|--:|---|"]
    kinds = {f"a budget of {scale.share:.0%}": [(made, made.pick, made.share) for made in found]}
    kinds |= {f"{steps} steps": [(made, *made.longer[steps]) for made in found] for steps in there}
    for kind, picks in kinds.items():
        wrong = [f"{made.name.split('-')[0]} ({pick})" for made, pick, _ in picks if not made.rightly(pick)]
        regret, cost = mean([made.regret(pick) for made, pick, _ in picks]), mean([cost for _, _, cost in picks])
        right = f"{len(found) - len(wrong)} of {len(found)}"
        lines.append(f"| {kind} | {cost:.1%} | {right} | {regret:.4f} | {', '.join(wrong)} |")
    return lines


def _lags(found: Sequence[Outcome]) -> list[str]:
    """What single losses of the truth's own runs would have told, where they were evaluated on the way."""
    curves = [curve for made in found for of_candidate in made.curves.values() for curve in of_candidate]
    steps = [row[0] for row in curves[0]][1:-1] if curves else []
    if not steps or len({len(curve) for curve in curves}) > 1:
        return []
    lines = ["What the loss of one run at a step tells of the end: means over settings and repeats.", ""]
    lines += ["| step | Spearman | right | regret |", "|--:|--:|--:|--:|"]
    for place, step in enumerate(steps, start=1):
        ranks, rights, behind = [], [], []
        for made in found:
            order = ordered(made.losses)
            for repeat in range(len(made.losses[order[0]])):
                values = [made.curves[name][repeat][place][1] for name in order]
                choice = order[values.index(min(values))]
                ranks.append(spearman(values) or 0.0)
                rights.append(choice in (made.winner, made.tied))
                behind.append(made.regret(choice))
        lines.append(f"| {int(step)} | {mean(ranks):+.2f} | {mean(rights):.2f} | {mean(behind):.4f} |")
    return lines
