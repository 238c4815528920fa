"""`hf-warmstart plan`: what a growth would do to a model, without touching a weight."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .options import add_growth_options, console, escape, growth_options, new_table, write_json

if TYPE_CHECKING:
    from ..growth.plan import GrowthPlan


EXAMPLES = """examples:
  hf-warmstart plan runs/base/checkpoint-500 --width 1.5 --depth 2
  hf-warmstart plan my-org/my-model --set hidden_size=768 --set num_attention_heads=12
  hf-warmstart plan my-org/my-model --growth-factor 4 --json
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plan",
        help="what a growth would do: sizes, parameters, memory, exact or why not",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder with a config.json, or a Hub id")
    add_growth_options(parser)
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan; 0."""
    from ..growth.grow import plan_growth

    plan = plan_growth(options.source, **growth_options(options))
    if options.json:
        write_json(as_data(plan))
    else:
        show(plan)
    return 0


def as_data(plan: GrowthPlan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "model_class": plan.model_class.__name__,
        "growth_config": plan.growth_config.to_dict(),
        "operators": plan.operators,
        "changes": plan.changes,
        "parameters_before": plan.parameters_before,
        "parameters_after": plan.parameters_after,
        "growth_factor": plan.growth_factor,
        "output_bytes": plan.output_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "exact": plan.exact,
        "reason": plan.reason,
    }


def show(plan: GrowthPlan, needs: str | None = None) -> None:
    """A plan as a table, with what it takes: by default, growing in memory."""
    needs = needs or (
        f"weights {size_text(plan.output_bytes)}, {size_text(plan.peak_memory_bytes)} of memory beside the parent while growing"
    )
    out = console()
    title = f"{plan.model_class.__name__}: {' + '.join(plan.operators)}, seed {plan.growth_config.seed}"
    out.print(f"[bold]{escape(title)}[/]")
    table = new_table()
    table.add_column("config")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, (before, after) in plan.changes.items():
        if not isinstance(after, (list, dict)):
            table.add_row(escape(name), _number(before), _number(after))
    table.add_row("parameters", _number(plan.parameters_before), _number(plan.parameters_after))
    out.print(table)
    out.print(f"  growth factor {plan.growth_factor:.3f}; {escape(needs)}", soft_wrap=True)
    verdict = "[bold green]exact[/]" if plan.exact else "[bold yellow]not exact[/]"
    from rich.padding import Padding

    out.print(Padding(f"{verdict}: {escape(plan.reason)}", (0, 0, 0, 2)))


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(str(value))


def size_text(number: int) -> str:
    return f"{number / 2**30:,.1f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
