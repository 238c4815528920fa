"""`certify`: proof of a growth on a small random twin, in true float64.

The twin has the parent's class, switches, ties, kinds of layers and head grouping, and the growth's ratios; all its
parameters and buffers are random, so that nothing is right by being zero or one. For two seeds, on held-out inputs:

1. the grown twin's outputs equal the twin's;
2. the pulled-back gradient `W_out^T G' R_in` equals the twin's gradient, for every parameter: the strongest check,
   since a wrong axis, factor, tie or norm shows there even where the outputs happen to agree;
3. the same under padding (attention mask), with `sdpa` attention, and token by token from a cache, where the class has
   these;
4. every parameter is reached by a gradient; entries that gradient descent could never move are counted as frozen;
5. save and reload give the same outputs with an empty loading report.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .config import GrowthConfig
from .configs import get_attribute
from .grow import apply_plan
from .layout import Layout
from .layouts.moves import REFUSALS
from .layouts.probe import output_of, probe_config, probe_inputs, set_dtype
from .maps import _column
from .plan import GrowthPlan, make_plan
from .precision import quiet, true_float64
from .sizes import implied
from .source import class_and_config
from .twin import build, randomise

LOGITS_TOLERANCE = 1e-10
PULLBACK_TOLERANCE = 1e-10
GRADIENT_FLOOR = 1e-4
REACH_STEPS = 4


@dataclass(frozen=True)
class Certificate:
    """What was measured on the twin.

    Args:
        exact: whether the growth computes the same function: logits and pulled-back gradients agree.
        max_relative_error: largest difference of logits over the largest logit.
        max_pullback_error: largest difference of pulled-back gradients over the parameter's largest gradient (over the
            model's largest times 1e-4, where a parameter's own is less: a softmax ignores the biases of keys, whose
            gradient is rounding noise).
        unreached: parameters of the grown model without a gradient.
        frozen: parameter -> number of entries whose gradient was zero at each of a few steps, while those of the parent
            that they correspond to move.
        reload_ok: whether save and reload gave the same logits and an empty loading report.
        reason: in words, why it is exact or what failed.
        worst_pullback: the parameter with the largest pull-back error.
        ways: relative error of the logits in the other ways of running that the class has: `"padding"`, `"sdpa"`, `"cache"`.
        ran: whether the class ran the twins at all, forward and backward; where it did not, nothing is proven.
    """

    exact: bool
    max_relative_error: float
    max_pullback_error: float
    unreached: list[str] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    reload_ok: bool = True
    reason: str = ""
    worst_pullback: str = ""
    ways: dict[str, float] = field(default_factory=dict)
    ran: bool = True

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"{'exact' if self.exact else 'not exact'}: {self.reason}\n"
            f"  logits {self.max_relative_error:.1e}, pulled-back gradients {self.max_pullback_error:.1e}, "
            f"reload {'ok' if self.reload_ok else 'FAILED'}, unreached {len(self.unreached)}, "
            f"frozen entries {sum(self.frozen.values())}"
        )


def certify(
    source: PreTrainedModel | PreTrainedConfig | str | os.PathLike,
    growth_config: GrowthConfig | PreTrainedConfig | None = None,
    *,
    layout: Layout | None = None,
    **options: Any,
) -> Certificate:
    """Prove, or refute, that a growth is exact, on a small random twin in true float64.

    Args:
        source: a model, a config, a folder or a Hub id; no weights are loaded.
        growth_config: what to grow; or its fields as keywords; or the target's config.
        layout: replaces the derived layout (to check the checker).
        **options: fields of `GrowthConfig`, or sizes by their transformers names.

    Returns:
        A `Certificate`. An operator that is not exact by design gives `exact=False` with the measured difference.

    Raises:
        WarmstartError: what was asked cannot be planned.
    """
    asked = GrowthConfig.of(growth_config, options)
    model_class, config = class_and_config(source)
    plan = make_plan(model_class, config, asked, layout)
    return certify_plan(twin_plan(plan))


def twin_plan(plan: GrowthPlan) -> GrowthPlan:
    """The same growth on a small twin: same ratios where they are simple, same operators, options and seed.

    Planned in true float64, as it is run: some classes do not run in plain float64, where planning measures numbers.
    """
    twin = probe_config(plan.source_config)
    set_dtype(twin, torch.float64)
    ratios: dict[Fraction, list[str]] = {}
    attributes = {path for move in plan.layout.moves for path in move.attributes}
    for path in sorted(attributes):
        before, after = (get_attribute(c, path, None) for c in (plan.source_config, plan.target_config))
        if isinstance(before, int) and isinstance(after, int) and before != after:
            ratios.setdefault(Fraction(after, before), []).append(path)
    # What the parent leaves unset and the child has to say is said to the twin too.
    sizes = {path: _value_on_twin(plan, path) for path in sorted(attributes) if _newly_set(plan, path)}
    for ratio, paths in ratios.items():
        unit = math.gcd(*(get_attribute(twin, path) for path in paths))
        nearest = Fraction(max(unit + 1, round(ratio * unit)), unit) if ratio > 1 else ratio
        sizes |= {path: int(nearest * get_attribute(twin, path)) for path in paths}
    for path, layer_map in plan.layer_maps.items():
        if not layer_map.is_identity:
            layers = get_attribute(twin, path)
            sizes[path] = max(layers + 1, round(layers * layer_map.after / layer_map.before))
    asked = dataclasses.replace(
        plan.growth_config, width=None, depth=None, growth_factor=None, target_config=None, sizes=sizes
    )
    with true_float64():
        return make_plan(plan.model_class, twin, asked, plan.layout)


def _newly_set(plan: GrowthPlan, path: str) -> bool:
    """Whether a growth gives a value to an attribute that the parent's config leaves unset."""
    unset = get_attribute(plan.source_config, path, None) is None
    return unset and isinstance(get_attribute(plan.target_config, path, None), int)


def _value_on_twin(plan: GrowthPlan, path: str) -> int:
    """The value that an attribute takes on the twin, in the child's proportion to what the parent implies."""
    space, unit = implied(plan.layout, path)
    ratio = Fraction(get_attribute(plan.target_config, path)) / Fraction(plan.sizes[0][space] * unit)
    return round(plan.layout.probe[path] * ratio)


@dataclass(frozen=True)
class Comparison:
    """Parent and child of a plan, filled with random numbers, and how far they are apart."""

    parent: PreTrainedModel
    child: PreTrainedModel
    inputs: dict[str, Any]
    output: Tensor
    max_relative_error: float
    max_pullback_error: float
    worst_pullback: str

    @property
    def same(self) -> bool:
        """Whether outputs and pulled-back gradients agree."""
        return self.max_relative_error < LOGITS_TOLERANCE and self.max_pullback_error < PULLBACK_TOLERANCE


def compare(plan: GrowthPlan, seed: int = 0) -> Comparison:
    """Build a plan's parent with random weights, grow it, and compare outputs and gradients on held-out inputs.

    Meant for twins; call it inside `true_float64()`.
    """
    parent = build(plan.model_class, plan.source_config)
    randomise(parent, seed=plan.growth_config.seed + 1 + seed)
    child = apply_plan(parent, plan)
    inputs = probe_inputs(parent, seed=1_000_003 + plan.growth_config.seed + seed, batch=3, length=11)
    before = _output_and_gradients(parent, inputs, seed)
    after = _output_and_gradients(child, inputs, seed, before.shape)
    pullback, worst = _pullback_error(parent, child, plan)
    return Comparison(parent, child, inputs, after, _relative(before, after), pullback, worst)


def certify_plan(plan: GrowthPlan) -> Certificate:
    """Certify a plan on the model that it describes, filled with random numbers. Meant for twins: everything is run."""
    # Built inside, so that constants that the class computes are computed in float64 too.
    with true_float64():
        try:
            found = compare(plan)
        except REFUSALS as fault:
            words = f"the twins do not run ({type(fault).__name__}: {fault})"
            return Certificate(False, float("inf"), float("inf"), reload_ok=False, reason=words, ran=False)
        again = compare(plan, seed=1)
        unreached = sorted(n for n, p in found.child.named_parameters() if p.requires_grad and p.grad is None)
        ways = _other_ways(found)
        reload_ok = _reload_error(found.child, found) < LOGITS_TOLERANCE
        if (
            not reload_ok
        ):  # a class may keep what it computes in another dtype, or lose a tensor: so does the parent then
            reload_ok = _reload_error(found.parent, found) >= LOGITS_TOLERANCE
        frozen = _frozen(found.parent, found.child, plan)
    error = max(found.max_relative_error, again.max_relative_error)
    pullback, worst = max(
        (found.max_pullback_error, found.worst_pullback), (again.max_pullback_error, again.worst_pullback)
    )
    wrong_ways = {way: e for way, e in ways.items() if not e < LOGITS_TOLERANCE}
    reason = plan.reason
    if plan.exact and not error < LOGITS_TOLERANCE:
        reason = f"the logits differ by {error:.1e} of the largest"
    elif plan.exact and not pullback < PULLBACK_TOLERANCE:
        reason = f"the pulled-back gradient of {worst} differs by {pullback:.1e}"
    elif plan.exact and wrong_ways:
        reason = "; ".join(f"with {way} the logits differ by {e:.1e}" for way, e in sorted(wrong_ways.items()))
    exact = plan.exact and found.same and again.same and not wrong_ways
    return Certificate(exact, error, pullback, unreached, frozen, reload_ok, reason, worst, ways)


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    return output_of(model(**inputs))


def _old(output: Tensor, shape: torch.Size) -> Tensor:
    """The logits of old tokens, where a vocabulary grew."""
    longer = output.shape[:-1] == shape[:-1] and output.shape[-1] > shape[-1]
    return output[..., : shape[-1]] if longer else output


def _output_and_gradients(
    model: PreTrainedModel, inputs: Mapping[str, Any], seed: int, shape: torch.Size | None = None
) -> Tensor:
    """The output in `eval` mode; the gradient of a random linear function of it is left on the parameters.

    A class that takes gradients in training alone, since it computes anew what it does not keep, stays in that mode:
    twins have no dropout.
    """
    try:
        return _differentiated(model.eval(), inputs, seed, shape)
    except REFUSALS as fault:
        try:
            return _differentiated(model.train(), inputs, seed, shape)
        except REFUSALS:
            raise fault from None


def _differentiated(model: PreTrainedModel, inputs: Mapping[str, Any], seed: int, shape: torch.Size | None) -> Tensor:
    model.zero_grad()
    with torch.enable_grad():
        output = _run(model, inputs)
        output = output if shape is None else _old(output, shape)
        _cotangent(output, seed).backward()
    return output.detach()


def _cotangent(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return (output * weights).sum() / output.numel() ** 0.5


def _relative(before: Tensor, after: Tensor) -> float:
    after = _old(after, before.shape)
    if before.shape != after.shape or not bool(after.isfinite().all()):
        return float("inf")
    return float((after - before).abs().max() / before.abs().max())


def _pullback_error(parent: PreTrainedModel, child: PreTrainedModel, plan: GrowthPlan) -> tuple[float, str]:
    """The largest error of `W_out^T G' R_in = G` over parameters, and where it is."""
    gradients, grown = (
        {name: p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
        for model in (parent, child)
    )
    gradients = {name: gradient for name, gradient in gradients.items() if name in plan.shapes}
    pulled: dict[str, Tensor] = {}
    for name in plan.names:
        if name in grown:
            source = plan.source_name(name)
            pulled[source] = pulled.get(source, torch.zeros(())) + plan.tensor(name).pull_gradient(grown[name])
    floor = GRADIENT_FLOOR * max(float(g.abs().max()) for g in gradients.values())
    errors: Mapping[str, float] = {
        name: float((pulled[name] - g).abs().max()) / max(float(g.abs().max()), floor) if name in pulled else 1.0
        for name, g in gradients.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _other_ways(found: Comparison) -> dict[str, float]:
    """How far child and parent are apart under padding, with another attention, and from a cache."""
    ways: dict[str, float] = {}
    accepted = inspect.signature(found.parent.forward).parameters
    ids = found.inputs.get("input_ids")
    plain = ids is not None and ids.ndim == 2 and not ids.is_floating_point()
    with torch.no_grad():
        if plain and "attention_mask" in accepted:
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            mask[1, -4:] = 0
            padded = {**found.inputs, "attention_mask": mask}
            before, after = (_attempt(model, padded) for model in (found.parent, found.child))
            if before is not None and after is not None:
                ways["padding"] = _relative(before, after)
        if found.parent._supports_sdpa:
            before, after = (_attempt(model, found.inputs, "sdpa") for model in (found.parent, found.child))
            if before is not None and after is not None:
                ways["sdpa"] = _relative(before, after)
        # transformers 5.24 renamed the argument.
        cache = next((name for name in ("cache", "past_key_values") if name in accepted), None)
        if plain and cache and "decoder_input_ids" not in found.inputs:
            before, after = (_cached(model, found.inputs, cache) for model in (found.parent, found.child))
            if before is not None and after is not None:
                ways["cache"] = _relative(before, after)
    return ways


def _attempt(model: PreTrainedModel, inputs: Mapping[str, Any], attention: str | None = None) -> Tensor | None:
    """The output, or None where the class itself does not run this way."""
    kept = model.config._attn_implementation
    try:
        if attention is not None:
            model.set_attn_implementation(attention)
        output = _run(model, inputs)
        return output if bool(output.isfinite().all()) else None
    except REFUSALS:
        return None  # a way that the parent's class does not go is no way to compare
    finally:
        if attention is not None:
            model.set_attn_implementation(kept)


def _cached(model: PreTrainedModel, inputs: Mapping[str, Any], argument: str) -> Tensor | None:
    """The outputs of the last tokens, read one by one after the first ones; None where the class keeps no cache."""
    ids = inputs["input_ids"]
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "use_cache")}
    first = ids.shape[1] - 3
    try:
        outputs = model(input_ids=ids[:, :first], use_cache=True, **rest)
        seen = []
        for k in range(first, ids.shape[1]):
            cache = getattr(outputs, argument, None)
            if cache is None:
                return None
            outputs = model(input_ids=ids[:, k : k + 1], use_cache=True, **{argument: cache}, **rest)
            seen.append(output_of(outputs)[:, -1:])
        return torch.cat(seen, 1)
    except REFUSALS:
        return None


def _reload_error(model: PreTrainedModel, found: Comparison) -> float:
    """How far a model is from itself after save and reload; infinite where the loading report is not empty."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), quiet():
        expected = _run(model, found.inputs)
        model.save_pretrained(folder)
        loaded, report = type(model).from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.float64,
            attn_implementation="eager",
            **({"experts_implementation": "eager"} if model.config._experts_implementation is not None else {}),
        )
        try:
            output = _run(loaded.eval(), found.inputs)
        except REFUSALS:
            return float("inf")  # a class that makes tensors of a dtype of its own does not run after loading
    return float("inf") if any(report.values()) else _relative(expected, output)


def _frozen(parent: PreTrainedModel, child: PreTrainedModel, plan: GrowthPlan) -> dict[str, int]:
    """Entries of the child that no step moves although the parent's entries in their place move."""
    before, after = _moved(parent), _moved(child)
    frozen = {}
    for name, moved in after.items():
        source = plan.source_name(name)
        if source not in before:
            continue
        expected = before[source]
        for axis, axis_map in enumerate(plan.tensor(name).maps):
            expected = expected.index_select(axis, axis_map.filled().source)
            if axis_map.silent == "none":  # appended rows move when a token or a position asks for them
                expected = expected & _column(~axis_map.unsourced, axis, expected.ndim)
        if count := int((expected & ~moved).sum()):
            frozen[name] = count
    return frozen


def _moved(model: PreTrainedModel) -> dict[str, Tensor]:
    """Per parameter, the entries with a non-zero gradient in any of a few AdamW steps over many inputs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    tied = set(model.all_tied_weights_keys)
    names = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in names.items()}
    with torch.enable_grad():
        for step in range(REACH_STEPS):
            inputs = probe_inputs(model, seed=5 + step, batch=8, length=32)
            optimizer.zero_grad()
            _cotangent(_run(model, inputs), step).backward()
            for name, parameter in names.items():
                if parameter.grad is not None:
                    moved[name] |= parameter.grad != 0
            optimizer.step()
    return moved


__all__ = ["Certificate", "certify", "certify_plan", "twin_plan"]
