"""Quickstart: grow a small language model, carry its training state, and measure honestly what that is worth.

    python examples/quickstart.py            # about four minutes on two cores, no network
    python examples/quickstart.py --help     # your own model, text and growth

A small Llama is trained on Python's own standard library and then made about twice as large. Four ways to go on are
compared on held-out text, each decayed at its end and each with a tuned learning rate: the grown model with its carried
optimizer state; the same with fresh state; the large model from scratch, at several token budgets; and the small model
continued at equal FLOPs, without growing. The output folder holds the grown model with its card, `curves.png` and
`report.json`, whose verdict says who is ahead, with and without the cost of the small model's own training.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by the workers when they start

import torch
from quickstart_arms import Arm, Result, Setup, flops_per_token, run_arm, start_worker
from quickstart_report import Experiment, draw_curves, make_report, print_report
from quickstart_text import Corpus, blocks, load_corpus, spread, train_tokenizer
from quickstart_view import View
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig
from transformers.utils import logging

from hf_warmstart import GrowthConfig, WarmstartError, grow, plan_growth
from hf_warmstart.hub import save_grown

VOCABULARY = 1024
BASE = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
GROWTH = {"width": 1.5}
RUNGS_SCRATCH = (0.5, 1.0, 1.5, 2.0)  # of the grown model's steps
RUNGS = (0.25, 0.5, 1.0)
TRIAL = 0.2  # a trial's length, of the same
RATES = (0.5, 1.0, 2.0)  # tried, of --learning-rate


@dataclass(frozen=True)
class Sizes:
    """Steps and evaluation of one experiment."""

    base_steps: int
    steps: int
    warmup: int
    evaluations: int
    held_out: int
    rates: tuple[float, ...] = RATES


FULL = Sizes(base_steps=1600, steps=700, warmup=40, evaluations=14, held_out=128)
QUICK = Sizes(base_steps=40, steps=30, warmup=4, evaluations=3, held_out=16, rates=(1.0,))


def main() -> None:
    """Run the experiment; mistakes end in one line."""
    options = parse_options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        run(options)
    except (WarmstartError, OSError) as error:
        sys.exit(f"quickstart: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("quickstart: stopped")


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = parser.add_argument_group("your own model and text")
    own.add_argument("--model", help="the parent: a Trainer checkpoint (its state is carried), a folder or a Hub id")
    own.add_argument("--base-tokens", type=_positive, help="tokens that --model was trained on, to count its cost")
    text = own.add_mutually_exclusive_group()
    text.add_argument("--train-text", metavar="PATH", help="a text file, or a folder of them")
    text.add_argument("--dataset", help="a dataset's Hub id or folder")
    own.add_argument("--text-column", default="text", help="column of --dataset (text)")
    own.add_argument("--eval-text", metavar="PATH", help="second held-out domain (Python's documentation)")
    growth = parser.add_argument_group("growth")
    growth.add_argument("--width", type=float, help=f"multiply the width ({GROWTH.get('width')})")
    growth.add_argument("--depth", type=float, help="multiply the layers")
    growth.add_argument("--growth-factor", type=float, help="multiply the parameters; solves for the sizes")
    growth.add_argument("--width-operator", default=GrowthConfig.width_operator)
    growth.add_argument("--depth-operator", default=GrowthConfig.depth_operator)
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=_positive, help=f"steps of the grown model ({FULL.steps})")
    training.add_argument("--base-steps", type=_positive, help=f"steps of the base ({FULL.base_steps})")
    training.add_argument("--budget", type=_positive_number, default=1.0, help="multiplies all steps (1)")
    training.add_argument("--batch-size", type=_positive, default=16, help="sequences per step (16)")
    training.add_argument("--sequence-length", type=_positive, default=128, help="tokens per sequence (128)")
    training.add_argument("--learning-rate", type=_positive_number, default=4e-3, help="middle of the grid (4e-3)")
    training.add_argument("--seed", type=int, default=0, help="initialisation, growth and data order (0)")
    parser.add_argument("--workers", type=_positive, default=2, help="processes of one thread each (2)")
    parser.add_argument("--output", default="runs/quickstart", help="folder of the results (runs/quickstart)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: half a minute, no meaning in its numbers")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    """From text to report."""
    began = time.perf_counter()
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise WarmstartError(f"--output {options.output!r} is a file. Pass a folder.")
    sizes = _sizes(options)
    growth = GrowthConfig.of(None, _growth_options(options)).to_dict()
    growth.pop("library_version")
    base_config = None if options.model else LlamaConfig(**BASE, vocab_size=VOCABULARY)
    plan = plan_growth(options.model or base_config, **growth)
    corpus = load_corpus(options.train_text, options.dataset, options.text_column, options.eval_text)
    output.mkdir(parents=True, exist_ok=True)
    work = output / ".work"
    shutil.rmtree(work, ignore_errors=True)
    with View(f"{corpus.name}: growing {plan.parameters_before:,} to {plan.parameters_after:,} parameters") as view:
        messages = multiprocessing.get_context("spawn").Queue()
        stop = multiprocessing.get_context("spawn").Event()
        with ProcessPoolExecutor(
            options.workers, multiprocessing.get_context("spawn"), start_worker, (messages, stop)
        ) as pool:
            list(pool.map(abs, range(options.workers)))  # the workers import while the tokenizer is trained
            tokenizer, tokens = _prepare(options, corpus, sizes, plan, work)
            setup = _setup(options, sizes, growth, work)
            experiment = Experiment(
                setup=setup,
                corpus=corpus,
                train_tokens=tokens,
                plan=plan,
                flops={
                    "small": flops_per_token(plan.source_config, setup.length),
                    "large": flops_per_token(plan.target_config, setup.length),
                },
                base_tokens=options.base_tokens if options.model else sizes.base_steps * setup.batch * setup.length,
                options=vars(options),
            )
            results, trials = _train(experiment, options, sizes, pool, view, messages, stop)
    report = make_report(experiment, results, trials, time.perf_counter() - began)
    _save(output, work, report, results, tokenizer, corpus, setup)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw_curves(report, output / "curves.png")
    shutil.rmtree(work)
    print_report(report, options.output)
