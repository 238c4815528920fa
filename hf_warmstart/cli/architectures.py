"""The document that `certify --all` writes: counts, one row per type, and the reasons of what is not exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..growth.zoo import KINDS, SUITE, TOLERANCE, GrowthResult, Status, TypeResult
from .coverage import Count, counts, figure, held_out_figure, not_exact, versions

LONGEST_REASON = 300


def document(rows: Sequence[TypeResult], command: str) -> str:
    """The whole document, in Markdown."""
    parts = ["# Architectures", *_header(command), *_summary(rows)]
    for kind in KINDS:
        of_kind = [row for row in rows if row.kind == kind]
        if of_kind:
            parts += [f"## {kind}", "\n".join(_table(of_kind))]
            parts += _reasons(of_kind)
    return "\n\n".join(parts) + "\n"


def _header(command: str) -> Iterator[str]:
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    yield f"Made by `{command}` with {used}. Do not edit."
    yield (
        "Every type in the Auto mappings of transformers: the class's default config, shrunk, is grown on random twins in "
        "true float64. Figures are the largest difference of outputs over the largest output / the largest error of the "
        "pulled-back gradient of any parameter (`W_out^T G' R_in = G`), over two seeds. "
        f"**Exact** is below {TOLERANCE:.0e} in both, and in every check that the class admits (padding, `sdpa`, cache, "
        "save and reload; for width 2 and depth 2). **post-norm**: a new layer adds nothing but norms the stream once more; "
        "planned as approximate, and measured. **approximate**: planned as such for another reason. **refused**: nothing is "
        "grown; the reasons follow each table. **NOT EXACT**: planned as exact and measured otherwise, a fault. "
        "**cannot be built**: the class refuses its own default config. *declared*: types, of the config or one inside it, of "
        "which `hf_warmstart/growth/layouts/probes.json` says by hand what no name tells; all else is derived."
    )
    yield "\n".join(f"- {growth.name}: {_options(growth.options)}" for growth in SUITE)


def _options(options) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in options.items()).replace("'", '"')


def _summary(rows: Sequence[TypeResult]) -> Iterator[str]:
    yield "## Summary"
    lines = [
        "| kind | growth | types | exact (largest error) | post-norm (largest error) | approximate | refused | not exact "
        "| cannot be built |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [_count_row(count) for count in counts(rows)]
    yield "\n".join(lines)
    unexpected = sum(result.unexpected for row in rows for result in row.results)
    if unexpected:
        yield f"{unexpected} of the refused met an error that says nothing to a user, or ran out of time: marked (!) below."
    if held_out := held_out_figure(rows):
        yield (
            f"Held out: the first {held_out.types[1]} causal language models by the sha256 of their type, chosen by nobody. "
            f"{held_out}"
        )
    if wrong := not_exact(rows):
        yield "**Planned as exact and measured otherwise:**"
        yield "\n".join(f"- {_safe(line)}" for line in wrong)


def _count_row(count: Count) -> str:
    exact = f"{count.exact} ({figure(count.exact_error)})" if count.exact else "0"
    post_norm = f"{count.post_norm} ({figure(count.post_norm_error)})" if count.post_norm else "0"
    wrong = f"**{count.not_exact}**" if count.not_exact else "0"
    cells = [count.kind, count.growth, count.types, exact, post_norm, count.approximate, count.refused, wrong]
    return "| " + " | ".join(map(str, [*cells, count.cannot_build])) + " |"


def _table(rows: Sequence[TypeResult]) -> Iterator[str]:
    yield f"| type | class | {' | '.join(growth.name for growth in SUITE)} | checks | declared | s |"
    yield "|---|---|" + "---|" * len(SUITE) + "---|---|--:|"
    for row in rows:
        cells = [cell(result) for growth in SUITE if (result := row.result(growth.name)) is not None]
        cells = cells or ["cannot be built", *[""] * (len(SUITE) - 1)]
        declared = ", ".join(row.declared)
        yield (
            f"| {row.model_type} | {row.model_class} | {' | '.join(cells)} | {checks(row)} | {declared} "
            f"| {row.seconds:.0f} |"
        )


def cell(result: GrowthResult) -> str:
    """One growth of one type in a few characters."""
    if result.status is Status.REFUSED:
        return "refused (!)" if result.unexpected else "refused"
    figures = f"{figure(result.relative_error)} / {figure(result.pullback_error)}"
    if result.status is Status.EXACT:
        return figures
    return f"**NOT EXACT** {figures}" if result.status is Status.NOT_EXACT else f"{result.status.value} {figures}"


def checks(row: TypeResult) -> str:
    """The checks that were made, by name; what failed stands out, and so do parameters that nothing trains."""
    found: dict[str, bool] = {}
    for result in row.results:
        for name, passed in result.checks.items():
            # Only what is planned as exact has to agree in every way of running; all has to be the same when reloaded.
            if name == "reload" or result.status in (Status.EXACT, Status.NOT_EXACT):
                found[name] = found.get(name, True) and passed
    words = [name if passed else f"**{name} FAILED**" for name, passed in found.items()]
    unreached, frozen = (max((getattr(r, name) for r in row.results), default=0) for name in ("unreached", "frozen"))
    words += [f"{unreached} unreached"] if unreached else []
    words += [f"{frozen} frozen"] if frozen else []
    return ", ".join(words)


def _reasons(rows: Sequence[TypeResult]) -> Iterator[str]:
    """Why types are refused, approximate or cannot be built: the same words once, with all whom they concern."""
    said: dict[tuple[str, str, bool], list[str]] = {}
    for row in rows:
        if row.cannot_build:
            said.setdefault(("cannot be built", row.cannot_build, False), []).append(row.model_type)
        by_reason: dict[tuple[str, str, bool], list[str]] = {}
        for result in row.results:
            if result.status in (Status.REFUSED, Status.APPROXIMATE):
                key = result.status.value, result.reason, result.unexpected
                by_reason.setdefault(key, []).append(result.growth)
        for (status, reason, unexpected), growths in by_reason.items():
            where = "" if len(growths) == len(SUITE) else " in " + ", ".join(growths)
            said.setdefault((status + where, reason, unexpected), []).append(row.model_type)
    for heading in sorted({heading for heading, _, _ in said}):
        lines = [
            f"- {', '.join(names)}: {'(!) ' if unexpected else ''}{_safe(reason)}"
            for (said_of, reason, unexpected), names in said.items()
            if said_of == heading
        ]
        yield f"**{heading[0].upper()}{heading[1:]}**"
        yield "\n".join(lines)


def _safe(text: str) -> str:
    """Words of classes, as they are, on one line of Markdown and of bounded length."""
    text = " ".join(text.split())
    text = text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 1] + "…"
    for sign in "\\*_|[]":
        text = text.replace(sign, "\\" + sign)
    return text.replace("<", "&lt;").replace(">", "&gt;")
