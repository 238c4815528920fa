"""How exact is a growth: the certificate of every family and operator, and parent and child trained side by side.

    python -m benchmarks.exactness > docs/exactness.md

Everything is measured in true float64 on random twins (see `hf_warmstart.growth.certify`), so the digits after the
first depend on the machine's order of summation, and no run depends on time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hf_warmstart import certify
from hf_warmstart.growth.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from tests.growth.test_parent_coordinates import CASES, follow
from tests.models import FAMILIES, tiny_config

WIDTHS = (2, 1.5)
LIMITS = Path(__file__).with_name("limits.md")  # proven, not measured


def _cell(certificates) -> str:
    worst = max(c.max_relative_error for c in certificates)
    pullback = max(c.max_pullback_error for c in certificates)
    whole = all(c.reload_ok and not c.unreached and not c.frozen for c in certificates)
    exact = all(c.exact for c in certificates)
    return f"{worst:.0e} / {pullback:.0e}" + ("" if whole else " (!)") if exact else f"not exact ({worst:.0e})"


def main() -> None:
    torch.set_num_threads(1)
    operators = [*WIDTH_OPERATORS, *DEPTH_OPERATORS]
    print("# Exactness\n")
    print("Made by `python -m benchmarks.exactness > docs/exactness.md`.\n")
    print(
        "Largest difference of logits over the largest logit / largest error of the pulled-back gradient of any parameter\n"
        "(`W_out^T G' R_in = G`), in true float64 on random twins: the worst of width 2 and 1.5, or of depth 1.5 and 2.\n"
        "Save and reload, reach and frozen entries were checked as well; `(!)` would mark a finding.\n"
    )
    print("| family | " + " | ".join(f"`{name}`" for name in operators) + " |")
    print("|---|" + "---|" * len(operators))
    for family in FAMILIES:
        cells = []
        for name in operators:
            asked = (
                [{"width": width, "width_operator": name} for width in WIDTHS]
                if name in WIDTH_OPERATORS
                else [{"depth": depth, "depth_operator": name} for depth in (1.5, 2)]
            )
            cells.append(_cell([certify(tiny_config(family), **options) for options in asked]))
        print(f"| {family} | " + " | ".join(cells) + " |")
    print("\n## Why some are not exact\n")
    for operator in (*WIDTH_OPERATORS.values(), *DEPTH_OPERATORS.values()):
        if not operator.exact:
            print(f"- `{operator.name}`: {operator.reason} ({operator.source}).")
    print("\n" + LIMITS.read_text())
    print("## The carried training state\n")
    print(
        "A parent is trained for 20 AdamW steps and grown by `exact_copy`, width 2; then parent and child take 100 steps on\n"
        "the same batches, the child in its parent's coordinates (weight decay 0.1, clipping active), in true float64.\n"
    )
    print("| model | largest difference of loss, state carried | without the state (10 steps) |")
    print("|---|---|---|")
    for family, changes in CASES:
        carried, _ = follow(family, carry=True, steps=100, **changes)
        fresh, _ = follow(family, carry=False, steps=10, **changes)
        tied = " (tied)" if changes.get("tie_word_embeddings") else ""
        print(f"| {family}{tied} | {carried:.0e} | {fresh:.0e} |")


if __name__ == "__main__":
    main()
