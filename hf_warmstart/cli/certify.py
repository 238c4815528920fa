"""`hf-warmstart certify`: prove a growth on a small twin; with `--all`, of every type that transformers ships."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WarmstartError
from .options import add_growth_options, console, escape, growth_options, new_table, write_json

if TYPE_CHECKING:
    from ..growth.certify import Certificate


EXAMPLES = """examples:
  hf-warmstart certify runs/base/checkpoint-500 --width 1.5 --depth 2
  hf-warmstart certify my-org/my-model --depth 2 --set depth_operator=stack
  hf-warmstart certify --all --kind causal-lm --types llama,gpt2 --output table.md
"""


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "certify",
        help="prove a growth on a small random twin, in true float64",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="a folder with a config.json, or a Hub id")
    add_growth_options(parser)
    every = parser.add_argument_group("every type that transformers ships, under a fixed suite of growths")
    every.add_argument("--all", action="store_true", help="certify all types instead of one SOURCE")
    every.add_argument("--kind", metavar="K,L", help="only these kinds of models, such as causal-lm or masked-lm")
    every.add_argument("--types", metavar="A,B", help="only these model types, such as llama,gpt2")
    every.add_argument("--jobs", type=int, metavar="N", help="processes, about 1 GB each (default: one for each core)")
    every.add_argument("--output", type=Path, metavar="FILE", help="write the table there (docs/architectures.md)")
    every.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the figure between this file's coverage markers"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with --all: check the request, list the types, measure and write nothing",
    )
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Certify one source, or all types; 0 where everything that is planned as exact is exact."""
    growth = growth_options(options)
    only_all = [name for name in ("kind", "types", "jobs", "output", "readme") if getattr(options, name) is not None]
    if options.all and (options.source or growth):
        given = [options.source] if options.source else sorted(growth)
        raise WarmstartError(f"--all runs its own growths on every type: {given} cannot be given with it.")
    only_all += ["dry-run"] if options.dry_run else []
    if not options.all and only_all:
        raise WarmstartError(f"{', '.join('--' + name for name in only_all)}: only with --all.")
    if not options.all and not options.source:
        raise WarmstartError("Pass a SOURCE, or --all.")
    if options.all:
        from .certify_all import run_all

        return run_all(options)
    return run_one(options, growth)


def run_one(options: argparse.Namespace, growth: dict[str, Any]) -> int:
    """Certify one source; 0 where it is exact and can be reloaded."""
    from ..growth.certify import certify

    certificate = certify(options.source, **growth)
    if options.json:
        write_json(certificate.to_dict())
    else:
        show(certificate)
    return 0 if certificate.exact and certificate.reload_ok else 1


def show(certificate: Certificate) -> None:
    """A certificate for people."""
    out = console()
    verdict = "[bold green]exact[/]" if certificate.exact else "[bold red]not exact[/]"
    out.print(f"{verdict}: {escape(certificate.reason)}")
    table = new_table(show_header=False)
    table.add_row("outputs", f"{certificate.max_relative_error:.1e}", "of the largest")
    worst = f"of the largest, at {certificate.worst_pullback}"
    table.add_row("pulled-back gradients", f"{certificate.max_pullback_error:.1e}", escape(worst))
    for way, error in certificate.ways.items():
        table.add_row(f"outputs, {way}", f"{error:.1e}", "of the largest")
    table.add_row("save and reload", "same" if certificate.reload_ok else "[bold red]differs[/]", "")
    table.add_row("parameters without a gradient", str(len(certificate.unreached)), "")
    table.add_row("entries that never move", str(sum(certificate.frozen.values())), "")
    out.print(table)
