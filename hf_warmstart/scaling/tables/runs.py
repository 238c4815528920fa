"""The table of runs that laws are fitted to: one row per run, what is wrong with it said before anything is fitted.

| column | meaning | unit |
|---|---|---|
| `params` | N, parameters without lookup tables and head; the active ones of a mixture | |
| `tokens` | D, of the whole run | tokens |
| `learning_rate` | the peak | |
| `batch_tokens` | of one optimizer step, over all devices | tokens |
| `loss` | held out, at the end of the decay, mean over tokens | nats per token |

Optional: `seed` (runs that differ in nothing else are repeats), `sequence_length` (with `batch_sequences` in place of
`batch_tokens`), `compute` or `flops_per_token` (compute counted otherwise than `6 N D`), `complete` or `state`,
`planned_tokens`, `name`. Other columns are kept as they are. The usual other names are known (`lr`, `eval/loss`, ...).

Runs that did not finish, diverged or are there twice are set aside with the reason and never averaged in; a unit that cannot
be is an error, since it would spoil every run alike.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import WarmstartError
from .compute import ACCOUNTINGS, training_flops
from .run_sources import plain_name, read_table

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("params", "tokens", "learning_rate", "batch_tokens", "loss")
# Other names of the columns, without case and separators. A column under its own name goes before all of them.
ALIASES: dict[str, tuple[str, ...]] = {
    "params": (
        *(
            "n",
            "parameters",
            "n_params",
            "num_params",
            "num_parameters",
            "model_params",
            "model_parameters",
            "model_size",
        ),
        *("non_embedding_params", "params_non_embedding", "non_embedding_parameters", "active_params"),
    ),
    "tokens": (
        *(
            "d",
            "train_tokens",
            "training_tokens",
            "n_tokens",
            "num_tokens",
            "total_tokens",
            "tokens_seen",
            "token_budget",
        ),
        *("num_input_tokens_seen", "train_num_input_tokens_seen"),
    ),
    "learning_rate": (
        "lr",
        "peak_lr",
        "max_lr",
        "lr_max",
        "peak_learning_rate",
        "max_learning_rate",
        "train_learning_rate",
    ),
    "batch_tokens": ("tokens_per_batch", "batch_size_tokens", "batch_size_in_tokens", "tokens_per_step", "bs_tokens"),
    "loss": (
        *("eval_loss", "val_loss", "validation_loss", "valid_loss", "final_loss", "held_out_loss", "final_eval_loss"),
        *("eval_loss_final", "test_loss"),
    ),
    "batch_sequences": ("batch_size", "global_batch_size", "batch_size_sequences", "train_batch_size_total", "bs"),
    "sequence_length": ("seq_len", "seq_length", "sequence_len", "context_length", "max_seq_length", "block_size"),
    "compute": ("flops", "total_flops", "training_flops", "compute_budget", "budget", "c"),
    "flops_per_token": (),
    "seed": ("random_seed",),
    "complete": ("finished", "completed"),
    "state": ("status", "run_state"),
    "planned_tokens": ("target_tokens", "max_tokens"),
    "name": ("run", "run_name", "run_id", "id"),
    "problem": (),
}
FINISHED_STATES = {"finished", "complete", "completed", "success", "succeeded", "done", "ok"}
# Units by which compute is wrong when 6 N D is as much larger: what 1 stands for, in FLOPs.
COMPUTE_UNITS = {"PF-days": 8.64e19, "ZFLOPs": 1e21, "EFLOPs": 1e18, "PFLOPs": 1e15, "TFLOPs": 1e12, "GFLOPs": 1e9}
FEWEST_PARAMS, FEWEST_BATCH_TOKENS = 1000, 16
ACCOUNTING_SPREAD = 30.0  # how far other counts of compute than 6 N D may lie off it, as a factor
SAME = 1e-6  # of logarithms: settings that agree so far are the same


@dataclass(frozen=True)
class RunTable:
    """Runs that laws can be fitted to, and those that were set aside.

    Args:
        frame (`DataFrame`): the usable runs, with `COLUMNS`, `compute` in FLOPs, and whatever else the source had.
        set_aside (`DataFrame`): the others, with the same columns and `reason`.
        warnings (`list[str]`): what looks odd but may be right.
        accounting (`str`): how `compute` is counted, `"6ND"` or `"config"`.
        sequence_length (`int`, *optional*): where all runs have the same.
    """

    frame: pd.DataFrame
    set_aside: pd.DataFrame
    warnings: list[str] = field(default_factory=list)
    accounting: str = "6ND"
    sequence_length: int | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def __str__(self) -> str:
        reasons = self.set_aside["reason"].str.split(":").str[0].value_counts() if len(self.set_aside) else {}
        aside = ", ".join(f"{count} {reason}" for reason, count in dict(reasons).items())
        return f"{len(self)} runs" + (f"; set aside: {aside}" if aside else "")


def read_runs(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    accounting: str = "6ND",
    sequence_length: int | None = None,
) -> RunTable:
    """Read and check a table of runs.

    Args:
        source: a path (`.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet`, or a folder of Trainer runs), a `DataFrame`, a
            `datasets.Dataset` or a list of dicts; see `run_sources` for what is read of trackers' exports. A `RunTable` is
            returned as it is.
        columns (`dict[str, str]`, *optional*): our name -> the source's, where the source's is unusual or ambiguous.
        accounting (`str`, defaults to `"6ND"`): how compute is counted. `"config"` takes it from the columns `compute` or
            `flops_per_token`.
        sequence_length (`int`, *optional*): of all runs, where no column says it.

    Returns:
        `RunTable`. The source is untouched.

    Raises:
        WarmstartError: columns are missing or ambiguous; a number is none; a unit cannot be; or no run is usable.

    Example:

        >>> rows = [{"N": 1e8, "tokens": 2e9, "lr": lr, "batch_tokens": 2**17, "eval_loss": 3.0 + lr} for lr in (1e-3, 2e-3)]
        >>> print(read_runs(rows + [{**rows[0], "lr": 1.0, "eval_loss": float("nan")}]))
        2 runs; set aside: 1 diverged
    """
    if isinstance(source, RunTable):
        return source
    if accounting not in ACCOUNTINGS:
        raise WarmstartError(f"accounting={accounting!r} is none of {list(ACCOUNTINGS)}.")
    table = _named(read_table(source), columns or {}, accounting, sequence_length)
    _to_numbers(table)
    if "batch_tokens" not in table:
        table["batch_tokens"] = table["batch_sequences"] * table["sequence_length"]
    reasons = _reasons(table)
    usable = reasons.isna()
    _check_units(table[usable])
    _count_compute(table, accounting)
    warnings = _oddities(table[usable], accounting)
    if not usable.any():
        raise WarmstartError(f"None of {len(table)} runs is usable: {'; '.join(sorted(set(reasons)))}.")
    frame = table[usable].drop(columns=["problem"], errors="ignore").reset_index(drop=True)
    aside = (
        table[~usable]
        .assign(reason=reasons[~usable])
        .drop(columns=["problem"], errors="ignore")
        .reset_index(drop=True)
    )
    lengths = set(frame["sequence_length"].dropna().astype(int)) if "sequence_length" in frame else set()
    return RunTable(frame, aside, warnings, accounting, lengths.pop() if len(lengths) == 1 else None)


def _named(
    table: pd.DataFrame, columns: Mapping[str, str], accounting: str, sequence_length: int | None
) -> pd.DataFrame:
    """The table with our names of columns, everything that is wrong with them in one error."""
    problems = []
    if unknown := sorted(set(columns) - set(ALIASES)):
        problems.append(f"columns= names {unknown}, which are none of {sorted(ALIASES)}")
    if absent := sorted(str(theirs) for theirs in columns.values() if theirs not in table.columns):
        problems.append(f"columns= points to {absent}, which the table lacks")
    found, ambiguous = _found(table, columns)
    problems += [
        f"{ours} may be any of {[str(c) for c in several]}: pass columns={{{ours!r}: {str(several[0])!r}}}"
        for ours, several in ambiguous.items()
    ]
    wanted = {ours: (ours,) for ours in COLUMNS} | {"batch_tokens": ("batch_tokens", "batch_sequences")}
    if accounting == "config":
        wanted["compute"] = ("compute", "flops_per_token")
    for ours, any_of in wanted.items():
        if not any(name in found or name in ambiguous for name in any_of):
            near = difflib.get_close_matches(
                ours, [str(c) for c in table.columns if c not in found.values()], n=1, cutoff=0.0
            )
            hint = f" (nearest: {near[0]!r}; columns={{{ours!r}: {near[0]!r}}} would take it)" if near else ""
            problems.append(f"{' or '.join(any_of)} is missing{hint}")
    if "batch_sequences" in found and not {"batch_tokens", "sequence_length"} & set(found) and sequence_length is None:
        problems.append(
            f"{str(found['batch_sequences'])!r} counts sequences: pass sequence_length=, or name a column in tokens by "
            "columns={'batch_tokens': ...}"
        )
    if problems:
        raise WarmstartError(
            f"In a table of runs with the columns {[str(c) for c in table.columns]}: {'; '.join(problems)}."
        )
    named = table.rename(columns={theirs: ours for ours, theirs in found.items()})
    return (
        named
        if "sequence_length" in named or sequence_length is None
        else named.assign(sequence_length=sequence_length)
    )


def _found(table: pd.DataFrame, columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Our name -> the table's, and our names for which several columns could stand."""
    plain: dict[str, list[Any]] = {}
    for column in table.columns:
        if column not in columns.values():
            plain.setdefault(plain_name(column), []).append(column)
    found: dict[str, Any] = {ours: theirs for ours, theirs in columns.items() if theirs in table.columns}
    ambiguous = {}
    for ours, others in ALIASES.items():
        own = plain.get(ours, [])
        aliased = [column for name in others for column in plain.get(name, [])]
        # `loss` beside an evaluation's loss is the training's, in Trainer's logs.
        candidates = own + aliased if ours == "loss" or not own else own
        if ours in found or not candidates:
            continue
        if len(candidates) > 1:
            ambiguous[ours] = candidates
        else:
            found[ours] = candidates[0]
    return found, ambiguous


def _to_numbers(table: pd.DataFrame) -> None:
    """Columns of numbers as such, in place; text that is none is an error, except that of a loss that diverged."""
    import pandas as pd

    problems = []
    for name in (*COLUMNS, "batch_sequences", "compute", "flops_per_token", "sequence_length", "planned_tokens"):
        if name in table:
            numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
            words = (
                table[name].notna() & numbers.isna() & ~table[name].map(str).str.lower().isin({"nan", "inf", "-inf"})
            )
            if words.any():
                problems.append(f"{name} has {sorted({str(v) for v in table.loc[words, name]})[:5]}")
            table[name] = numbers
    if problems:
        raise WarmstartError(f"These columns of the table of runs must hold numbers: {'; '.join(problems)}.")


def _reasons(table: pd.DataFrame) -> pd.Series:
    """Why each run is set aside, as `kind: detail`; None for usable ones."""
    import pandas as pd

    reasons = pd.Series([None] * len(table), index=table.index, dtype=object)

    def set_aside(where: pd.Series, words: Any) -> None:
        where = where & reasons.isna()
        reasons[where] = words[where] if isinstance(words, pd.Series) else words

    if "problem" in table:
        set_aside(table["problem"].notna(), "incomplete: " + table["problem"].map(str))
    if "state" in table:
        state = table["state"].map(str).str.strip().str.lower()
        set_aside(table["state"].notna() & ~state.isin(FINISHED_STATES), "incomplete: its state is " + state)
    if "complete" in table:
        done = table["complete"].map(str).str.strip().str.lower()
        set_aside(table["complete"].notna() & ~done.isin({"true", "1", "1.0", "yes"}), "incomplete: marked so")
    if "planned_tokens" in table:
        short = table["tokens"] < 0.99 * table["planned_tokens"]
        set_aside(
            short, "incomplete: " + (table["tokens"] / table["planned_tokens"]).map("{:.0%} of its tokens".format)
        )
    settings = [name for name in COLUMNS if name != "loss"]
    absent = table[settings].isna()
    if absent.to_numpy().any():
        set_aside(absent.any(axis=1), "incomplete: no " + absent.apply(lambda row: ", ".join(row.index[row]), axis=1))
    set_aside(~np.isfinite(table["loss"]) | (table["loss"] <= 0), "diverged: loss " + table["loss"].map(str))
    return _mark_duplicates(table, reasons)


def _mark_duplicates(table: pd.DataFrame, reasons: pd.Series) -> pd.Series:
    """Of usable runs with the same settings, and the same seed where seeds are known, all but the first are set aside."""
    first: dict[tuple, Any] = {}
    for index, row in table[reasons.isna()].iterrows():
        settings = tuple(round(math.log(max(row[n], 1e-300)) / SAME) for n in COLUMNS if n != "loss")
        key = (*settings, str(row["seed"]) if "seed" in table else None)
        if key in first:
            other = table.loc[first[key], "loss"]
            reasons[index] = f"duplicate: settings of run {first[key]}, losses {row['loss']:.6g} and {other:.6g}"
        else:
            first[key] = index
    return reasons


def _check_units(runs: pd.DataFrame) -> None:
    """Refuse numbers that no run can have, all of them in one error."""
    problems = []

    def refuse(where: Any, name: str, why: str) -> None:
        if (count := int(np.sum(where))) > 0:
            values = ", ".join(f"{value:.4g}" for value in sorted(set(runs.loc[where, name]))[:3])
            problems.append(f"{name} of {count} runs ({values}) {why}")

    for name in COLUMNS[:4]:
        refuse(runs[name] <= 0, name, "must be positive")
    refuse(
        runs["learning_rate"] > 1,
        "learning_rate",
        "is above 1, which no Adam-like optimizer trains with: percent, or its logarithm?",
    )
    refuse(
        (runs["params"] > 0) & (runs["params"] < FEWEST_PARAMS),
        "params",
        "is too few for a language model: millions or billions? Multiply",
    )
    refuse(
        runs["batch_tokens"] > runs["tokens"],
        "batch_tokens",
        "is more than the whole run's tokens: are tokens in millions or billions? Multiply",
    )
    if "sequence_length" in runs:
        short = runs["batch_tokens"] < 0.999 * runs["sequence_length"]
        refuse(
            short,
            "batch_tokens",
            "is below one sequence: sequences instead of tokens? Name the column batch_sequences",
        )
    else:
        refuse(
            (runs["batch_tokens"] > 0) & (runs["batch_tokens"] < FEWEST_BATCH_TOKENS),
            "batch_tokens",
            "is below one sequence: sequences instead of tokens? Name the column batch_sequences and pass sequence_length=",
        )
    refuse(runs["loss"] > 50, "loss", "is no cross-entropy in nats per token: a perplexity? Take its logarithm")
    if "compute" in runs and len(runs):
        ratio = float(np.median(runs["compute"] / training_flops(runs["params"], runs["tokens"])))
        if not 1 / ACCOUNTING_SPREAD < ratio < ACCOUNTING_SPREAD:
            problems.append(f"compute is {ratio:.3g} times 6 * params * tokens: {_likely_unit(ratio)}")
    if problems:
        raise WarmstartError("The table of runs has numbers in units that cannot be: " + "; ".join(problems) + ".")


def _likely_unit(ratio: float) -> str:
    near = {unit: abs(math.log(ratio * flops)) for unit, flops in COMPUTE_UNITS.items()} if ratio > 0 else {}
    unit = min(near, key=lambda name: near[name], default="")
    if unit and near[unit] < math.log(10):
        return f"it seems to be in {unit}; multiply it by {COMPUTE_UNITS[unit]:g}"
    return "compute must be in FLOPs, and params and tokens not in millions or billions"


def _count_compute(table: pd.DataFrame, accounting: str) -> None:
    """The column `compute`, in FLOPs, by the accounting; in place."""
    if accounting == "6ND":
        if "compute" in table:
            table["compute_given"] = table["compute"]
        table["compute"] = training_flops(table["params"], table["tokens"])
    elif "compute" not in table:
        table["compute"] = table["flops_per_token"] * table["tokens"]


def _oddities(runs: pd.DataFrame, accounting: str) -> list[str]:
    """What may be right, and should be looked at."""
    found = []
    ratio = runs["tokens"] / runs["params"]
    if len(runs) and (ratio.max() > 1e5 or ratio.min() < 0.1):
        found.append(
            f"Tokens per parameter run from {ratio.min():.3g} to {ratio.max():.3g}: are params and tokens both plain counts?"
        )
    if accounting == "6ND" and "compute_given" in runs:
        off = float(np.median(runs["compute_given"] / runs["compute"]))
        if abs(math.log(off)) > 0.1:
            found.append(
                f"The column compute is {off:.3g} times 6 * params * tokens and was not used; accounting='config' takes it."
            )
    return found
