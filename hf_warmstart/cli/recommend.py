"""`hf-warmstart recommend`: learning rate, batch and schedule for a run that starts from a checkpoint."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..errors import WarmstartError
from .options import console, escape, new_table, write_json

EXAMPLES = """examples:
  hf-warmstart recommend --params 300M --law steplaw --tokens 6B --yaml run.yaml
  hf-warmstart recommend runs/base/checkpoint-500 --law my-law --tokens 20B --eval-data held-out.jsonl
  hf-warmstart recommend org/model --law all --tokens 20B --tokens-seen 2T
"""
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def count(text: str) -> float:
    """A count with a unit: `20B`, `1.5T`, `300M`, `4k`, `2e9`."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)([kmbgt]?)", text.strip().replace("_", "").lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no count such as 20B, 300M or 2e9")
    return float(match[1]) * UNITS[match[2]]


def add_to(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "recommend",
        help="learning rate, batch and schedule for continued pre-training of a checkpoint",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", nargs="?", help="a folder or Hub id; none for a run from scratch"
    )
    parser.add_argument(
        "--law",
        action="append",
        required=True,
        metavar="LAW",
        help="a folder, a Hub id, a preset, or all of these: all",
    )
    parser.add_argument("--tokens", type=count, required=True, metavar="N", help="of the run: 20B, 500M, 2e9")
    parser.add_argument(
        "--sequence-length", type=int, default=2048, metavar="T", help="in tokens (default: %(default)s)"
    )
    state = parser.add_argument_group("what the run starts from, where the checkpoint does not say")
    state.add_argument("--params", type=count, metavar="N", help="parameters, without embeddings and head")
    state.add_argument("--eval-loss", type=float, metavar="L", help="held-out loss on the law's text, nats per token")
    state.add_argument(
        "--eval-data", metavar="FILE", help="the law's text, to measure the loss on: .jsonl or .parquet"
    )
    state.add_argument(
        "--probes", metavar="FILE", help="a table of short runs from the checkpoint at several learning rates"
    )
    state.add_argument("--tokens-seen", type=count, metavar="N", help="in training so far")
    state.add_argument(
        "--trust-loss", action="store_true", help="take the loss for the law's although that cannot be checked"
    )
    devices = parser.add_argument_group("what the batch is divided by")
    devices.add_argument("--world-size", type=int, default=1, metavar="N", help="devices (default: %(default)s)")
    devices.add_argument(
        "--per-device-batch-size", type=int, metavar="N", help="sequences that fit on a device (default: 8)"
    )
    devices.add_argument("--batch-tokens", type=count, metavar="N", help="a batch in place of the law's")
    parser.add_argument("--replay-share", type=float, default=0.0, metavar="X", help="of the tokens, of the old text")
    parser.add_argument("--cautious", action="store_true", help="the lower end of the learning rate's interval")
    parser.add_argument("--yaml", metavar="FILE", help="write TrainingArguments there")
    parser.add_argument("--accelerate", metavar="FILE", help="write a config of accelerate launch there")
    parser.add_argument("--plot", metavar="FILE", help="write a plot there")
    parser.add_argument("--dry-run", action="store_true", help="print, write none of the files")
    parser.add_argument("--json", action="store_true", help="write JSON to stdout")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Recommend; 0, or 2 where no law could."""
    from ..scaling.hparams.compare import laws_named, recommend_by

    names = laws_named(options.law)
    files = [f"--{name}" for name in ("yaml", "accelerate", "plot") if getattr(options, name)]
    if len(names) > 1 and files:
        raise WarmstartError(f"{', '.join(files)} take one law, got {len(names)}. Pass one --law.")
    found = recommend_by(names, **_run_of(options))
    if len(found) == 1 and isinstance(error := next(iter(found.values())), WarmstartError):
        raise error
    if options.json:
        data = {n: {"error": str(f)} if isinstance(f, WarmstartError) else f.to_dict() for n, f in found.items()}
        write_json(data if len(data) > 1 else next(iter(data.values())))
    elif len(found) > 1:
        compare(found)
    if len(found) == 1:
        (one,) = found.values()
        if not options.json:
            show(one)
        if not options.dry_run:
            _write(one, options)
        elif files and not options.json:
            console().print(f"{', '.join(files)}: nothing was written.")
    return 0 if any(not isinstance(f, WarmstartError) for f in found.values()) else 2


def _run_of(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `HparamPredictor.recommend`. What is measured is measured once, whatever the number of laws."""
    given = {
        "tokens": options.tokens,
        "sequence_length": options.sequence_length,
        "params": options.params,
        "checkpoint": options.checkpoint,
        "eval_loss": options.eval_loss,
        "probes": options.probes,
        "tokens_seen": options.tokens_seen,
        "world_size": options.world_size,
        "per_device_train_batch_size": options.per_device_batch_size,
        "batch_tokens": options.batch_tokens,
        "replay_share": options.replay_share,
        "cautious": options.cautious,
        "trust_loss": options.trust_loss,
    }
    if options.eval_data:
        given |= _evaluation(options)
    return given


def _evaluation(options: argparse.Namespace) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..scaling.tables.evaluation import evaluate

    if options.checkpoint is None or options.eval_loss is not None:
        raise WarmstartError("--eval-data measures a CHECKPOINT's loss; --eval-loss gives it. Pass one of the two.")
    path = Path(options.eval_data)
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if kind is None or not path.is_file():
        raise WarmstartError(f"{options.eval_data!r} is no .jsonl or .parquet file with text or input_ids.")
    rows = load_dataset(kind, data_files=str(path), split="train")
    try:
        model = AutoModelForCausalLM.from_pretrained(options.checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint) if "input_ids" not in rows.column_names else None
    except (OSError, ValueError) as error:
        raise WarmstartError(f"{options.checkpoint!r} cannot be evaluated: {' '.join(str(error).split())}") from error
    measured = evaluate(model, rows, tokenizer=tokenizer)
    return {"eval_loss": measured.loss, "eval_fingerprint": measured.fingerprint}


def show(found: Any) -> None:
    """One recommendation as a table, its warnings below."""
    out = console()
    table = new_table(show_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_column(style="dim", overflow="fold")
    for row in found.rows():
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)
    for words in found.warnings:
        out.print(f"[yellow]![/] {escape(words)}", soft_wrap=True)


def compare(found: dict[str, Any]) -> None:
    """What several laws recommend, one a row."""
    out = console()
    table = new_table()
    for name in ("law", "learning rate", "batch, tokens", "sequences", "total compute"):
        table.add_column(name, justify="left" if name == "law" else "right")
    table.add_column("range", overflow="fold")
    for name, one in found.items():
        if isinstance(one, WarmstartError):
            table.add_row(escape(name), "-", "-", "-", "-", escape(str(one)))
            continue
        outside = [words.removeprefix("Extrapolated: ") for words in one.warnings if words.startswith("Extrapolated")]
        cells = (
            f"{one.learning_rate:.3g}",
            f"{one.batch_tokens:,}",
            f"{one.batch_sequences:,}",
            f"{one.total_compute:.3g}",
        )
        ranged = one.laws is not None and one.laws.range
        table.add_row(escape(name), *cells, escape(" ".join(outside) or ("inside" if ranged else "not published")))
    out.print(table)
    one = next((f for f in found.values() if not isinstance(f, WarmstartError)), None)
    shared = [w for w in one.warnings if w.startswith(("Retention", "A published"))] if one is not None else []
    for words in shared:
        out.print(f"[yellow]![/] {escape(words)}", soft_wrap=True)


def _write(found: Any, options: argparse.Namespace) -> None:
    import yaml

    if options.yaml:
        found.to_yaml(options.yaml)
    if options.accelerate:
        Path(options.accelerate).write_text(yaml.safe_dump(found.accelerate_config(), sort_keys=False))
    if options.plot:
        found.plot(options.plot)
