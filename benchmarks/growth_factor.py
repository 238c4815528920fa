"""When growing pays: base, grow, continue, against training from scratch, over growth factors, operators and budgets.

    python -m benchmarks.growth_factor --setting hour --text stories.txt --eval-text held-out.txt \\
        --output runs/growth --workers 2
    python -m benchmarks.growth_factor --setting hour --output runs/growth --document docs/growth-study.md

A study is a folder of small files, one for each finished run. A process that is killed at any time costs the run that it was
at; the same command goes on with what is left, and so does a second one beside it. With `--minutes` no run is begun that
would not end in time. What is there at the end, whole or not, is printed as a report; `--document` puts it between a
document's markers, its plots and its table of runs beside it. Without `--text` nothing is run.

Settings: `quick` (seconds; shows that all runs, and no more), `hour` (0.13M parameters), `twofold` (0.07M, many arms near
twofold, eight seeds), `overnight` (0.65M, g to 8), `gpu` (32M and 127M, bfloat16). `gpu-tenth` is that one, small enough for
a CPU, to try it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.growth_study.running import Study
from benchmarks.growth_study.settings import GPU, SETTINGS, Setting, only, tenth
from benchmarks.growth_study.text import prepare
from benchmarks.growth_study.workers import run_all
from hf_warmstart import WarmstartError

SMALL = "gpu-tenth"


def main(arguments: list[str] | None = None) -> None:
    """Run what is left, and report."""
    options = _options(arguments)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    ends = None if options.minutes is None else time.time() + 60 * options.minutes
    fault = None
    try:
        setting = _setting(options)
        seeds = None if options.seeds is None else tuple(range(options.seeds))
        text = prepare(options.output, setting, options.text, options.eval_text)
        study = Study(options.output, setting, text, options.device, options.states, seeds)
        if options.text:
            try:
                run_all(study, options.workers, ends)
            except WarmstartError as error:  # the others are reported all the same
                fault = error
        from benchmarks.growth_study.document import Report  # pandas and matplotlib, which no run needs

        report = Report.of(study, options.setting)
    except WarmstartError as error:
        sys.exit(f"growth_factor: {error if fault is None else fault}")
    folder = options.output if options.document is None else options.document.parent
    words = report.write(folder)
    (options.output / "report.md").write_text(words + "\n")
    print(words)
    if options.document is not None:
        markers = tuple(f"<!-- {options.setting}: {part} -->" for part in ("made by benchmarks.growth_factor", "end"))
        before, rest = options.document.read_text().split(markers[0])
        options.document.write_text(f"{before}{markers[0]}\n\n{words}\n\n{markers[1]}{rest.split(markers[1])[1]}")
    if fault is not None:
        sys.exit(f"growth_factor: {fault}")


def _setting(options: argparse.Namespace) -> Setting:
    """The setting, with what the command changes of it."""
    setting = tenth(GPU) if options.setting == SMALL else SETTINGS[options.setting]
    if options.targets:
        setting = only(setting, options.targets)
    return setting if options.max_epochs is None else replace(setting, max_epochs=options.max_epochs)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--setting", choices=[*SETTINGS, SMALL], default="quick")
    add("--text", type=Path, nargs="+", default=[], metavar="FILE", help="to train on; without it nothing is run")
    add("--eval-text", type=Path, nargs="+", default=[], metavar="FILE", help="held-out text of the same kind")
    add("--output", type=Path, required=True, metavar="FOLDER", help="the study's files")
    add("--states", type=Path, metavar="FOLDER", help="for bases' weights and moments (default: in the study's)")
    add("--workers", type=int, default=1, help="processes, one thread each (default: 1)")
    add("--device", default="cpu", help="cpu (default) or cuda, shared by all processes")
    add("--minutes", type=float, help="begin no run that would not end by then")
    add("--seeds", type=int, help="how many are reported, from 0 (default: the setting's)")
    add("--max-epochs", type=float, help="passes over the text of any run, at most (default: the setting's)")
    add("--targets", nargs="+", metavar="SIZE", help="of the setting, only these (default: all)")
    add("--document", type=Path, metavar="FILE", help="put the report between its markers, plots and table beside it")
    options = parser.parse_args(arguments)
    if options.workers < 1 or (options.minutes is not None and options.minutes <= 0):
        parser.error("--workers must be at least 1 and --minutes positive")
    if options.seeds is not None and options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if bool(options.text) != bool(options.eval_text):
        parser.error("pass --text and --eval-text together")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: there is no GPU here")
    return options


if __name__ == "__main__":
    main()
