"""`certify`: proof of a growth on a small random twin, in true float64.

The twin has the parent's class, switches, ties, layer pattern and head grouping, and the growth's ratios; all its
parameters and buffers are random, so that nothing is right by being zero or one. On held-out tokens:

1. the grown twin's logits equal the twin's;
2. the pulled-back gradient `W_out^T G' R_in` equals the twin's gradient, for every parameter: the strongest check,
   since a wrong axis, factor, tie or norm shows there even where the logits happen to agree;
3. every parameter is reached by a gradient; entries that gradient descent could never move are counted as frozen;
4. save and reload give the same logits with an empty loading report.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .config import GrowthConfig
from .grow import apply_plan
from .layout import Layout
from .plan import GrowthPlan, make_plan
from .precision import quiet, true_float64
from .source import class_and_config
from .twin import HEAD_DIM, build, layer_period, randomise, twin_config

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
    """

    exact: bool
    max_relative_error: float
    max_pullback_error: float
    unreached: list[str] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)
    reload_ok: bool = True
    reason: str = ""
    worst_pullback: str = ""

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
    **options,
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
    """The same growth on a small twin: same ratios where they are simple, same operators, options and seed."""
    before, after = plan.sizes
    config = plan.source_config
    small: dict[str, tuple[int, int]] = {"kv_heads": (1, 1), "group": (1, 1)}
    for name in ("kv_heads", "group"):
        small[name] = _shrink(before[name], after[name], least=2 if before[name] > 1 else 1, most=6)
    heads = tuple(small["kv_heads"][k] * small["group"][k] for k in (0, 1))
    follows_heads = Fraction(after["residual"], before["residual"]) == Fraction(heads[1], heads[0])
    if follows_heads:
        small["residual"] = heads[0] * HEAD_DIM, heads[1] * HEAD_DIM
    else:
        small["residual"] = _shrink(
            before["residual"], after["residual"], least=heads[0] * HEAD_DIM, most=96, of=heads[0]
        )
    for name, info in plan.layout.spaces.items():
        if info.kind == "elementwise":
            small[name] = _shrink(before[name], after[name], least=12, most=64)
    sizes = [
        {
            a: pair[k]
            for name, pair in small.items()
            if name in plan.layout.spaces
            for a in plan.layout.spaces[name].attributes
        }
        | {"num_attention_heads": heads[k]}
        for k in (0, 1)
    ]
    if getattr(config, "num_key_value_heads", None) is None:
        for part in sizes:
            part.pop("num_key_value_heads", None)
    for part in sizes:
        part.pop("head_dim", None)
    layers = _shrink(config.num_hidden_layers, plan.layer_map.after, least=max(2, layer_period(config)), most=12)
    if plan.layer_map.is_identity:
        layers = (min(max(2, layer_period(config)), config.num_hidden_layers),) * 2
    twin = twin_config(config, sizes[0], layers[0], torch.float64)
    changed = {name: value for name, value in sizes[1].items() if value != sizes[0][name]}
    if layers[0] != layers[1]:
        changed["num_hidden_layers"] = layers[1]
    asked = dataclasses.replace(
        plan.growth_config, width=None, depth=None, growth_factor=None, target_config=None, sizes=changed
    )
    return make_plan(plan.model_class, twin, asked, plan.layout)


def _shrink(before: int, after: int, least: int, most: int, of: int = 1) -> tuple[int, int]:
    """Small sizes in the ratio of large ones; the nearest whole ratio where the exact one is not small."""
    ratio = Fraction(after, before)
    for size in range(least, most + 1):
        if size % of == 0 and (ratio * size).denominator == 1 and size <= before:
            return size, int(ratio * size)
    small = min(before, most)
    small -= small % of
    grown = max(small, round(float(ratio) * small))
    return small, grown + (after > before and grown == small)


@dataclass(frozen=True)
class Comparison:
    """Parent and child of a plan, filled with random numbers, and how far they are apart."""

    parent: PreTrainedModel
    child: PreTrainedModel
    ids: Tensor
    logits: Tensor
    max_relative_error: float
    max_pullback_error: float
    worst_pullback: str

    @property
    def same(self) -> bool:
        """Whether logits and pulled-back gradients agree."""
        return self.max_relative_error < LOGITS_TOLERANCE and self.max_pullback_error < PULLBACK_TOLERANCE


def compare(plan: GrowthPlan) -> Comparison:
    """Build a plan's parent with random weights, grow it, and compare logits and gradients on held-out tokens.

    Meant for twins; call it inside `true_float64()`.
    """
    parent = build(plan.model_class, plan.source_config)
    randomise(parent, seed=plan.growth_config.seed + 1)
    child = apply_plan(parent, plan)
    ids = _held_out(parent, plan.growth_config.seed)
    before, after = (_logits_and_gradients(model, ids) for model in (parent, child))
    pullback, worst = _pullback_error(parent, child, plan)
    return Comparison(parent, child, ids, after, _relative(before, after), pullback, worst)


def certify_plan(plan: GrowthPlan) -> Certificate:
    """Certify a plan on the model that it describes, filled with random numbers. Meant for twins: everything is run."""
    # Built inside, so that constants that the class computes are computed in float64 too.
    with true_float64():
        found = compare(plan)
        unreached = sorted(n for n, p in found.child.named_parameters() if p.requires_grad and p.grad is None)
        reload_ok = _reloads(found.child, found.ids, found.logits)
        frozen = _frozen(found.parent, found.child, plan)
    error, pullback = found.max_relative_error, found.max_pullback_error
    reason = plan.reason
    if plan.exact and error >= LOGITS_TOLERANCE:
        reason = f"the logits differ by {error:.1e} of the largest"
    elif plan.exact and pullback >= PULLBACK_TOLERANCE:
        reason = f"the pulled-back gradient of {found.worst_pullback} differs by {pullback:.1e}"
    return Certificate(
        plan.exact and found.same, error, pullback, unreached, frozen, reload_ok, reason, found.worst_pullback
    )


def _held_out(model: PreTrainedModel, seed: int) -> Tensor:
    """Tokens that no derivation has seen: three sequences over the whole vocabulary."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (3, 23), generator=generator)


def _logits_and_gradients(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits in `eval` mode; the gradient of the next-token loss is left on the parameters."""
    model.eval().zero_grad()
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
    return logits.detach()


def _relative(before: Tensor, after: Tensor) -> float:
    if before.shape != after.shape or not bool(after.isfinite().all()):
        return float("inf")
    return float((after - before).abs().max() / before.abs().max())


def _pullback_error(parent: PreTrainedModel, child: PreTrainedModel, plan: GrowthPlan) -> tuple[float, str]:
    """The largest error of `W_out^T G' R_in = G` over parameters, and where it is."""
    gradients = {name: p.grad for name, p in parent.named_parameters() if p.grad is not None}
    grown = {name: p.grad for name, p in child.named_parameters() if p.grad is not None}
    pulled: dict[str, Tensor] = {}
    for name in plan.names:
        growth = plan.tensor(name)
        if name in grown and not growth.new_layer:
            source = plan.source_name(name)
            pulled[source] = pulled.get(source, torch.zeros(())) + growth.pull_gradient(grown[name])
    floor = GRADIENT_FLOOR * max(float(g.abs().max()) for g in gradients.values())
    errors: Mapping[str, float] = {
        name: float((pulled[name] - g).abs().max()) / max(float(g.abs().max()), floor) if name in pulled else 1.0
        for name, g in gradients.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _reloads(child: PreTrainedModel, ids: Tensor, expected: Tensor) -> bool:
    """Whether `save_pretrained` and `from_pretrained` give the same model, with nothing missing, unexpected or odd."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), quiet():
        child.save_pretrained(folder)
        loaded, report = type(child).from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.float64,
            attn_implementation="eager",
            **({"experts_implementation": "eager"} if child.config._experts_implementation is not None else {}),
        )
        logits = loaded.eval()(input_ids=ids, use_cache=False).logits
    return not any(report.values()) and _relative(expected, logits) < LOGITS_TOLERANCE


def _frozen(parent: PreTrainedModel, child: PreTrainedModel, plan: GrowthPlan) -> dict[str, int]:
    """Entries of the child that no step moves although the parent's entries in their place move."""
    before, after = _moved(parent), _moved(child)
    frozen = {}
    for name, moved in after.items():
        expected = before[plan.source_name(name)]
        for axis, axis_map in enumerate(plan.tensor(name).maps):
            expected = expected.index_select(axis, axis_map.filled().source)
        if count := int((expected & ~moved).sum()):
            frozen[name] = count
    return frozen


def _moved(model: PreTrainedModel) -> dict[str, Tensor]:
    """Per parameter, the entries with a non-zero gradient in any of a few AdamW steps over all tokens and positions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = min(vocabulary, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(5)
    with torch.enable_grad():
        for _ in range(REACH_STEPS):
            rows = torch.stack([torch.randperm(vocabulary, generator=generator)[:length] for _ in range(8)])
            optimizer.zero_grad()
            model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    moved[name] |= parameter.grad != 0
            optimizer.step()
    return moved


__all__ = ["Certificate", "certify", "certify_plan", "twin_plan"]
