"""The command line of the benchmark; see `benchmarks.hparams`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.sweeps.folder import write_atomically
from hf_warmstart.scaling.sweeps.pool import OutOfTimeError

from .report import as_table, plot, report, write_document
from .setting import SETTINGS
from .study import Study

TEXTS = {
    "pretrain": "what the parents know",
    "train": "of the continued training",
    "eval": "held-out text of the same kind",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Settings from laws of small proxies against a grid on the target.")
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="quick")
    for name, words in TEXTS.items():
        parser.add_argument(f"--{name}-text", type=Path, metavar="FILE", help=words)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes of one thread (default: this one)"
    )
    parser.add_argument("--device", default="cpu", help="of all runs, such as cuda, which the workers share")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no run after so many")
    parser.add_argument("--report", action="store_true", help="train nothing: say what is there")
    parser.add_argument("--document", type=Path, metavar="FILE", help="write the table between this file's markers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="loss over the grid, recommended and preset points")
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    torch.set_num_threads(1)
    late = False
    try:
        if not options.report:
            texts = {name: getattr(options, f"{name}_text") for name in TEXTS}
            if absent := [f"--{name}-text" for name, path in texts.items() if path is None]:
                parser.error(f"{', '.join(absent)} needed, or --report")
            seconds = None if options.minutes is None else 60 * options.minutes
            late = _train(Study(setting, texts, options.output, options.workers, options.device, seconds))
        made = report(options.output, setting)
        write_atomically(options.output / "report.json", json.dumps(made, indent=2) + "\n")
        table = as_table(made, options.setting)
        print(table)
        if options.document is not None:
            write_document(options.document, table)
        if options.plot is not None:
            plot(made).savefig(options.plot, dpi=110)
    except WarmstartError as error:
        print(error, file=sys.stderr)
        return 2
    return 3 if late else 0


def _train(study: Study) -> bool:
    """Whether time ran out."""
    try:
        study.run()
    except OutOfTimeError as error:
        print(error, flush=True)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
