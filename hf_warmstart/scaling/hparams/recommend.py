"""From laws and a starting state to the settings of one run.

The method of arXiv 2606.05610: the checkpoint's held-out loss, put through the inverse of the loss law, gives its *equivalent
pre-training compute*, what training from scratch would need for that loss; with the compute of the run added, the laws of
learning rate and batch are read at the sum.

    C_pre = (A / (L - E))^(1 / gamma),   C = C_pre + C_run,   lr = a C^p,   B = b C^q

In the form of parameters and tokens, `C_pre` is that of the model's own size, and the laws are read at its
parameters and at the
tokens that the sum would buy it, `D = C / (6 N)`. Every draw of the laws goes the whole way, so that intervals hold what is
uncertain of all of them together.

Short runs from the checkpoint itself, where there are any, correct both: see `probes`.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from ...errors import WarmstartError
from ..fits.laws import interval
from ..fits.robust_fit import Array
from ..tables.compute import training_flops
from ..tables.evaluation import Fingerprint, mapped_loss
from .fitted import FittedLaws
from .presets import preset_data, tuned_recipe
from .probes import Probes
from .recommendation import HparamRecommendation
from .starting_state import StartingState, starting_state

MICRO_BATCH = 8  # sequences of a device at a time, where nobody says how many fit
FEWEST_STEPS = 100
FAR = 1e3  # draws whose compute lies further beyond the estimate count as this far
RIDGE_TESTED = 4.0  # factor of the batch beyond which a move along the ridge is not what was measured
RETENTION = (
    "Retention of what the model knew is not in the objective: these settings are the best for the held-out loss of "
    "the new text. "
    "replay_share= mixes old text in (1 to 5 % for a weak shift, about 25 % for a strong one, arXiv 2403.08763), cautious=True "
    "takes the lower end of the learning rate's interval."
)
RETENTION_PRESET = RETENTION.replace("the lower end of the learning rate's interval", "half the learning rate")


def recommend(
    laws: FittedLaws,
    *,
    tokens: float,
    sequence_length: int,
    params: float | None = None,
    checkpoint: str | os.PathLike | None = None,
    model: Any = None,
    config: Any = None,
    eval_dataset: Any = None,
    eval_loss: float | None = None,
    eval_fingerprint: Fingerprint | None = None,
    tokenizer: Any = None,
    probes: Any = None,
    tokens_seen: float | None = None,
    annealed: bool | None = None,
    world_size: int = 1,
    per_device_train_batch_size: int | None = None,
    batch_tokens: float | None = None,
    replay_share: float = 0.0,
    cautious: bool = False,
    trust_loss: bool = False,
    seed: int = 0,
) -> HparamRecommendation:
    """See `HparamPredictor.recommend`."""
    _check(tokens, sequence_length, world_size, per_device_train_batch_size, batch_tokens, replay_share)
    state = starting_state(
        sequence_length=sequence_length,
        accounting=laws.accounting,
        params=params,
        checkpoint=checkpoint,
        model=model,
        config=config,
        eval_dataset=eval_dataset,
        eval_loss=eval_loss,
        eval_fingerprint=eval_fingerprint,
        tokenizer=tokenizer,
        tokens_seen=tokens_seen,
        annealed=annealed,
    )
    warnings = list(laws.warnings)
    per_token = _flops_per_token(laws, state)
    loss = _loss_of_the_law(laws, state, trust_loss, warnings)
    equivalent, draws, source = _equivalent_compute(laws, state, loss, per_token, warnings, seed)
    probed = None if probes is None else Probes.of(probes, state.params)
    if probed is not None and not (laws.is_preset or state.from_scratch):
        spent = per_token * probed.tokens
        try:
            after, drawn = _inverted(laws, state, probed.lowest, per_token, seed)
        except WarmstartError as error:
            after, drawn = 0.0, draws
            warnings.append(f"The probes do not say what the checkpoint is worth: {error}")
        if after - spent > equivalent:
            equivalent, draws = after - spent, np.maximum(np.resize(draws, len(drawn)), drawn - spent)
            source = f"inverse of the loss law after a probe of {probed.tokens:,.0f} tokens, less those"
    planned = per_token * tokens
    total = equivalent + planned
    drawn = np.minimum(draws, FAR * max(total, *laws.range.get("compute", (0.0,)))) + planned
    size = batch_tokens / sequence_length if batch_tokens else None
    at = {"compute": total, "params": state.params, "tokens": total / per_token, "loss": loss}
    at |= {"hidden_size": state.hidden_size, "batch_sequences": size}
    best_batch = batch_tokens if laws.batch_tokens is None else _read(laws, "batch_tokens", at)
    if best_batch is None:
        raise WarmstartError(f"The law {laws.name!r} has none for the batch. Pass batch_tokens=.")
    best_rate = _read(laws, "learning_rate", at)
    many = {**at, "compute": drawn, "tokens": drawn / per_token}
    rates, batches = (_drawn(laws, name, many) for name in ("learning_rate", "batch_tokens"))
    follows = "batch_sequences" not in laws.learning_rate.exponents
    correction = ""
    if probed is not None:
        warnings += probed.doubts(equivalent / per_token)
    if probed is not None and probed.tell_the_rate(equivalent / per_token):
        factor, factors = _correction(laws, probed, at, equivalent, drawn - planned, per_token, sequence_length, seed)
        best_rate *= factor
        rates = None if rates is None else rates * factors
        correction = f"the law's times {factor:.3g}, by {len(probed.rates)} probes of {probed.tokens:,.0f} tokens"

    wanted = batch_tokens or best_batch
    per_device, accumulation = _divided(wanted / sequence_length / world_size, per_device_train_batch_size)
    sequences = per_device * accumulation * world_size
    ratio = sequences * sequence_length / best_batch
    moved = ratio**laws.ridge if follows else (sequences / size) ** 0.5  # type: ignore[operator]
    rate = best_rate * moved
    intervals = {}
    if rates is not None:
        intervals["learning_rate"] = interval(rates * moved)
        intervals["total_compute"] = interval(draws + planned)
        if not state.from_scratch:
            intervals["equivalent_compute"] = interval(draws)
    if batches is not None:
        intervals["batch_tokens"] = interval(batches)
    if cautious:
        rate = intervals["learning_rate"][0] if "learning_rate" in intervals else rate / 2
    recipe = laws.recipe
    if laws.is_preset:
        recipe = tuned_recipe(
            laws.name,
            recipe,
            params=state.params,
            tokens=tokens,
            batch_tokens=sequences * sequence_length,
            sequences=sequences,
        )
    steps = max(1, math.ceil(tokens / (sequences * sequence_length)))
    warnings += _doubts(laws, state, loss, total, total / per_token, ratio if follows else 1.0, steps, rate)
    if not state.from_scratch:
        warnings.append(RETENTION_PRESET if laws.is_preset else RETENTION)
    along = f"along the ridge B^{laws.ridge:.2g}: {laws.ridge_source}" if follows and abs(moved - 1) >= 1e-9 else ""
    sources = {
        "law": laws.describe(),
        "equivalent_compute": source,
        "eval_loss": state.loss_source,
        "learning_rate": "; ".join(words for words in (correction, along) if words),
        "batch_tokens": "given" if batch_tokens else f"the law's {best_batch:,.0f}, rounded",
    }
    return HparamRecommendation(
        learning_rate=float(rate),
        batch_tokens=sequences * sequence_length,
        batch_sequences=sequences,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        world_size=world_size,
        steps=steps,
        equivalent_compute=float(equivalent),
        planned_compute=float(planned),
        total_compute=float(total),
        intervals=intervals,
        warnings=warnings,
        optimal_learning_rate=float(best_rate),
        optimal_batch_tokens=float(best_batch),
        ridge=laws.ridge,
        recipe=recipe,
        sources=sources,
        law=laws.name,
        params=state.params,
        tokens=float(tokens),
        sequence_length=sequence_length,
        eval_loss=loss,
        replay_share=replay_share,
        laws=laws,
    )


def _check(tokens, sequence_length, world_size, per_device, batch_tokens, replay_share) -> None:
    problems = []
    if not 0 < tokens < math.inf:
        problems.append(f"tokens={tokens!r} must be positive")
    for name, value in (
        ("world_size", world_size),
        ("per_device_train_batch_size", per_device),
        ("sequence_length", sequence_length),
    ):
        if value is not None and (value != int(value) or value < 1):
            problems.append(f"{name}={value!r} must be a whole number, 1 or more")
    if batch_tokens is not None and batch_tokens < sequence_length:
        problems.append(
            f"batch_tokens={batch_tokens!r} is below one sequence of {sequence_length}: pass tokens, not sequences"
        )
    if 0 < tokens < sequence_length:
        problems.append(f"tokens={tokens!r} is less than one sequence of {sequence_length}")
    if not 0 <= replay_share < 1:
        problems.append(f"replay_share={replay_share!r} must be 0 or more and below 1")
    if problems:
        raise WarmstartError("; ".join(problems) + ".")


def _flops_per_token(laws: FittedLaws, state: StartingState) -> float:
    """Training FLOPs of one token, as the laws count."""
    if laws.accounting == "6ND":
        return training_flops(state.params, 1.0)
    if state.flops_per_token is None:
        raise WarmstartError(
            f"The law {laws.name!r} counts compute from the config ({laws.accounting!r}). Pass checkpoint=, model= or config=."
        )
    return state.flops_per_token


def _loss_of_the_law(laws: FittedLaws, state: StartingState, trust: bool, warnings: list[str]) -> float | None:
    """The state's loss as the law's own evaluation would have it.

    Raises:
        WarmstartError: it is of another text, tokenizer or family, and nothing maps it.
    """
    if state.loss is None or laws.is_preset:
        return state.loss
    law, refusals, loss = laws.fingerprint, [], state.loss
    if state.loss_source == "trainer_state.json":
        warnings.append(
            "The loss is the last evaluation in trainer_state.json: a mean over samples, of a text that it does not name. Pass "
            "eval_dataset= to have it measured over tokens."
        )
    if law is None:
        warnings.append(
            "The law does not say on which text its losses were measured: the checkpoint's must be from the same."
        )
        return loss
    if law.family and state.family and law.family != state.family:
        refusals.append(f"the model is a {state.family}, the law's runs were {law.family}")
    if state.fingerprint is not None:
        mapped = mapped_loss(loss, state.fingerprint, law)
        if mapped is None:
            refusals.append(
                "the evaluation set is not the law's, or its text is not known: pass the law's, with tokenizer="
            )
        else:
            loss = mapped
            if state.fingerprint.tokens_digest != law.tokens_digest:
                warnings.append(
                    f"The loss of another tokenizer, {state.loss:.4f}, was mapped to {mapped:.4f} by bits per byte."
                )
    elif law.vocab_size and state.vocab_size and law.vocab_size != state.vocab_size:
        refusals.append(
            f"the model has {state.vocab_size} tokens in its vocabulary, the law's {law.vocab_size}: another tokenizer"
        )
    else:
        warnings.append(
            "Nothing says on which text the loss was measured: it must be the law's own evaluation set. eval_dataset= "
            "measures it, "
            "eval_fingerprint= tells."
        )
    if refusals and not trust:
        raise WarmstartError(
            f"The law {laws.name!r} cannot turn this loss into compute: {'; '.join(refusals)}. Evaluate on the law's "
            f"own text, fit a "
            "law on yours, or pass trust_loss=True if you know better."
        )
    warnings += [f"Taken on trust: {words}." for words in refusals]
    return loss


def _equivalent_compute(
    laws: FittedLaws, state: StartingState, loss: float | None, per_token: float, warnings: list[str], seed: int
) -> tuple[float, Array, str]:
    """Compute that the checkpoint is worth: the estimate, its draws, and where it is from."""
    count = max([1, *(len(d) for d in laws.draws().values())])
    spent = state.spent_compute
    if state.from_scratch:
        return 0.0, np.zeros(count), "from scratch"
    if laws.is_preset:
        warnings.append(
            "A published law knows compute only: the checkpoint counts by the compute spent on it, whatever its loss "
            "on your text."
        )
        if spent is None:
            raise WarmstartError(
                f"The preset {laws.name!r} cannot read compute off a loss, and nothing says how many tokens the "
                f"checkpoint saw. Pass "
                "tokens_seen=, or fit a law on your own text."
            )
        return spent, np.full(count, spent), "spent on the checkpoint, 6 N D"
    if loss is None:
        raise WarmstartError(
            "Nothing says what the checkpoint's held-out loss is. Pass eval_dataset= (with model= or checkpoint=) or "
            "eval_loss=."
        )
    try:
        equivalent, draws = _inverted(laws, state, loss, per_token, seed)
    except WarmstartError as error:
        if spent is None:
            raise WarmstartError(
                f"{error} Or pass tokens_seen=, to count the compute spent on the checkpoint instead."
            ) from error
        warnings.append(f"{error} The checkpoint counts by the compute that was spent on it, {spent:.3g} FLOPs.")
        return spent, np.full(count, spent), "spent on the checkpoint, 6 N D"
    never = float(np.isinf(draws).mean())
    if never > 0.025:
        warnings.append(
            f"{never:.0%} of the law's draws never reach a loss of {loss:.4f}: its upper end is not known."
        )
    words = "inverse of the loss law"
    return equivalent, draws, words + (f"; {spent:.3g} were spent" if spent is not None else "")


def _inverted(laws: FittedLaws, state: StartingState, loss: float, per_token: float, seed: int) -> tuple[float, Array]:
    """The inverse of the loss law, with its draws; the loss's own error is drawn too."""
    generator = np.random.default_rng(seed)
    if laws.form == "params_tokens" and laws.loss_params_tokens is not None:
        law, unit = laws.loss_params_tokens, per_token
        fixed = {"params": state.params} if "params" in law.variables else {}
    elif laws.loss is not None:
        law, fixed, unit = laws.loss, {}, 1.0
    else:
        raise WarmstartError(f"The law {laws.name!r} has none of loss, so that a loss says nothing of compute.")
    estimate = law.inverse(loss, **fixed)
    draws = law.inverse_draws(loss, **fixed)
    if state.loss_error:
        asked = next(name for name in law.variables if name not in fixed)
        slope = law.gradient(**fixed, **{asked: estimate})[asked]
        shift = state.loss_error * generator.standard_normal(len(draws)) / slope / estimate
        draws = draws * np.exp(np.clip(shift, -5, 5))
    return estimate * unit, draws * unit


def _correction(
    laws: FittedLaws,
    probed: Probes,
    at: dict[str, Any],
    equivalent: float,
    draws: Array,
    per_token: float,
    length: int,
    seed: int,
) -> tuple[float, Array]:
    """What the law's learning rate is to be multiplied with for the probes' best to be the law's there; and its draws.

    Args:
        at: the run's point. equivalent, draws: compute that the checkpoint is worth. per_token: FLOPs. length: of a sequence.
    """
    spent = per_token * probed.tokens
    then = at | {"compute": equivalent + spent, "tokens": equivalent / per_token + probed.tokens}
    then["batch_sequences"] = probed.batch_tokens / length
    ridge = 1.0
    if "batch_sequences" not in laws.learning_rate.exponents and laws.batch_tokens is not None:
        ridge = (probed.batch_tokens / _read(laws, "batch_tokens", then)) ** laws.ridge
    laws_own = _drawn(
        laws, "learning_rate", then | {"compute": draws + spent, "tokens": draws / per_token + probed.tokens}
    )
    found, scattered = probed.best_rate(laws.noise, 0 if laws_own is None else len(laws_own), seed)
    factor = found / (_read(laws, "learning_rate", then) * ridge)
    return factor, np.ones(1) if laws_own is None else scattered / (laws_own * ridge)


def _read(laws: FittedLaws, name: str, at: dict[str, Any]) -> float:
    """A law's value at the run's point.

    Raises:
        WarmstartError: the law is over something that is not known of the run.
    """
    law = getattr(laws, name)
    needs = {"loss": "eval_loss=", "hidden_size": "checkpoint=, model= or config=", "batch_sequences": "batch_tokens="}
    missing = [needs.get(x, f"{x}=") for x in law.exponents if at.get(x) is None]
    if missing:
        raise WarmstartError(
            f"The law {laws.name!r} of {name} is over {sorted(law.exponents)}. Pass {' and '.join(missing)}."
        )
    return float(law(**{k: v for k, v in at.items() if v is not None}))


def _drawn(laws: FittedLaws, name: str, many: dict[str, Any]) -> Array | None:
    """The law's value in every draw, at that draw's compute; None where the law has no draws."""
    law = getattr(laws, name)
    if law is None or law.draws is None:
        return None
    size = len(law.draws)
    at = {k: np.resize(v, size) if np.size(v) > 1 else v for k, v in many.items() if v is not None}
    return law.at_draws(**at)


def _divided(per_rank: float, per_device: int | None) -> tuple[int, int]:
    """Sequences of a device at a time and accumulation steps whose product is nearest to a device's share, by ratio."""
    size = per_device or min(MICRO_BATCH, max(1, _nearest(per_rank)))
    return size, max(1, _nearest(per_rank / size))


def _nearest(value: float) -> int:
    """The whole number with the nearest ratio, 1 or more."""
    low = max(1, math.floor(value))
    return low if value * value <= low * (low + 1) else low + 1


def _doubts(laws, state, loss, compute, tokens, ratio, steps, rate) -> list[str]:
    """What may make the numbers wrong for this run."""
    found = []
    for name, value in (("compute", compute), ("params", state.params), ("tokens", tokens)):
        used = name in laws.learning_rate.exponents or (
            laws.batch_tokens is not None and name in laws.batch_tokens.exponents
        )
        low, high = laws.range.get(name, (0.0, math.inf))
        if (used or laws.is_preset) and value > high * 1.001:
            found.append(
                f"Extrapolated: {name} {value:.3g} is {value / high:.3g} times the largest that was fitted, {high:.3g}."
            )
        elif (used or laws.is_preset) and value < low / 1.001:
            found.append(
                f"Extrapolated: {name} {value:.3g} is {low / value:.3g} times below the smallest that was fitted, {low:.3g}."
            )
    if loss is not None and laws.lowest_loss is not None and loss < laws.lowest_loss:
        found.append(f"Extrapolated: the loss {loss:.4f} is below the lowest that was fitted, {laws.lowest_loss:.4f}.")
    if not 1 / RIDGE_TESTED < ratio < RIDGE_TESTED:
        found.append(
            f"The batch is {ratio:.3g} times the best: the learning rate was moved further along the ridge than it holds."
        )
    if state.annealed:
        found.append(
            "The checkpoint looks annealed (its learning rate had been decayed): its loss is lower than that of a run "
            "still under "
            "way, which the inverse takes for compute, and it adapts less readily (arXiv 2505.07796)."
        )
    if steps < FEWEST_STEPS:
        found.append(
            f"Only {steps} steps: laws of whole runs say little of so short a one; a smaller batch gives more."
        )
    ceiling = preset_data()[laws.name]["learning_rate"].get("refused_above") if laws.is_preset else None
    if ceiling and rate > ceiling:
        found.append(f"The law's source refuses learning rates above {ceiling}.")
    return found
