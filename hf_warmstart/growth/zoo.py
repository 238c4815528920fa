"""The zoo: every type of model that transformers ships in its Auto mappings, and what a suite of growths does to each.

A type's default config, shrunk by `probe_config`, is grown in all the ways of `SUITE` on random twins in true float64.
What comes out is one of

- exact: planned as exact, and outputs and pulled-back gradients of parent and child agree;
- post-norm: new layers add nothing, but each norms the stream once more; planned as approximate, and measured;
- approximate: planned as such for another reason, and measured;
- refused: nothing is grown, and the reason says why;
- not exact: planned as exact, measured otherwise. This is a fault of this library.

Types whose class cannot be built even from its own default config are kept apart, with the class's own words.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..errors import WarmstartError
from .certify import Certificate, certify_plan, compare, twin_plan
from .config import GrowthConfig
from .layouts import layout_of
from .layouts.probe import overrides, own_config, probe_config
from .plan import GrowthPlan, make_plan
from .precision import true_float64
from .twin import FAULTS, meta_shapes

KINDS: Mapping[str, str] = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq-lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "ctc": "MODEL_FOR_CTC_MAPPING_NAMES",
}
TOLERANCE = 1e-9  # of relative and pull-back errors, in float64
HELD_OUT = 20


class Status(str, enum.Enum):
    """What came of one growth of one type."""

    EXACT = "exact"
    POST_NORM = "post-norm"
    APPROXIMATE = "approximate"
    REFUSED = "refused"
    NOT_EXACT = "not exact"


@dataclass(frozen=True)
class Growth:
    """One growth of the suite; a whole one is measured in every way of running, the others by two comparisons."""

    name: str
    options: Mapping[str, Any]
    whole: bool = False


SUITE = (
    Growth("width 2", {"width": 2, "width_operator": "perturbed_copy"}, whole=True),
    Growth("width 1.5", {"width": 1.5, "width_operator": "uneven_copy"}),
    Growth("width 1.5 slice", {"width": 1.5, "width_operator": "reference_slice"}),
    Growth("depth 2", {"depth": 2, "depth_operator": "identity_blocks"}, whole=True),
)


@dataclass(frozen=True)
class GrowthResult:
    """One growth of one type, measured.

    Args:
        growth: its name in the suite. reason: why it is refused or not exact.
        relative_error: largest difference of outputs over the largest output. pullback_error: that of the pulled-back
            gradients (see `Certificate`). Both None where nothing was grown.
        checks: for whole growths, whether `padding`, `sdpa`, `cache` and `reload` agree; ways that the class does not
            go are missing.
        unreached: parameters of the child without a gradient. frozen: entries that gradient descent does not move.
        unexpected: refused by an error that is no `WarmstartError`, or for want of time: a fault of this library.
    """

    growth: str
    status: Status
    reason: str = ""
    relative_error: float | None = None
    pullback_error: float | None = None
    seconds: float = 0.0
    checks: dict[str, bool] = field(default_factory=dict)
    unreached: int = 0
    frozen: int = 0
    unexpected: bool = False


@dataclass(frozen=True)
class TypeResult:
    """One row of the table: a type under the suite.

    Args:
        cannot_build: the class's own words, where it cannot be built.
        declared: types that `probes.json` has an entry for: its own, or one inside its config.
        seconds: all in all, the derivation of the layout included.
    """

    kind: str
    model_type: str
    model_class: str
    results: tuple[GrowthResult, ...] = ()
    cannot_build: str = ""
    declared: tuple[str, ...] = ()
    seconds: float = 0.0

    def result(self, growth: str) -> GrowthResult | None:
        """The result of one growth of the suite."""
        return next((result for result in self.results if result.growth == growth), None)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def entries(kinds: Iterable[str] = (), types: Iterable[str] = ()) -> list[tuple[str, str]]:
    """(kind, model type) of everything in the mappings, or of the kinds and types that are named.

    Raises:
        WarmstartError: names that no mapping has; all are named.
    """
    kinds, types = tuple(kinds) or tuple(KINDS), set(types)
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise WarmstartError(f"No kinds of models {unknown}. There are {list(KINDS)}.")
    found = [(kind, name) for kind in kinds for name in sorted(_mapping(kind)) if not types or name in types]
    if unknown := sorted(types - {name for _, name in found}):
        raise WarmstartError(f"transformers {transformers.__version__} has no types {unknown} among {list(kinds)}.")
    return found


def held_out() -> list[str]:
    """Types of causal language models that nobody chose: the first by the hash of their name."""
    return sorted(_mapping("causal-lm"), key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:HELD_OUT]


def source_of(kind: str, model_type: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class of a type and its default config; a causal language model's config says that it decodes.

    Raises whatever class and config raise.
    """
    model_class = getattr(transformers, class_name(kind, model_type))
    config = own_config(model_class, CONFIG_MAPPING[model_type]())
    if kind == "causal-lm" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return model_class, config


def class_name(kind: str, model_type: str) -> str:
    """The class of a type; the first, where a mapping names several."""
    name = _mapping(kind)[model_type]
    return name if isinstance(name, str) else name[0]


def declared_for(config: PreTrainedConfig) -> tuple[str, ...]:
    """The types, of a config or one inside it, of which `layouts/probes.json` says by hand what no name tells.

    The files in `families/` are no declarations: they are what the derivation gives.
    """
    return tuple(sorted(_model_types(config.to_dict()) & set(overrides())))


def certify_type(kind: str, model_type: str) -> TypeResult:
    """The row of one type: every growth of the suite, measured or refused."""
    start = time.perf_counter()
    row = TypeResult(kind, model_type, class_name(kind, model_type))
    try:
        model_class, config = source_of(kind, model_type)
        row = dataclasses.replace(row, declared=declared_for(config))
    except FAULTS as error:
        return dataclasses.replace(row, cannot_build=in_words(error))
    try:
        probe = probe_config(config)
        meta_shapes(model_class, probe)
    except FAULTS as error:
        if words := _cannot_build(model_class, config):
            return dataclasses.replace(row, cannot_build=words, seconds=time.perf_counter() - start)
        return refused_row(row, f"its small probe cannot be built: {in_words(error)}", time.perf_counter() - start)
    try:
        layout_of(model_class, probe)
    except FAULTS as error:
        reason, unexpected = in_words(error), not isinstance(error, WarmstartError)
        return refused_row(row, reason, time.perf_counter() - start, unexpected)
    results = tuple(certify_growth(model_class, probe, growth) for growth in SUITE)
    return dataclasses.replace(row, results=results, seconds=time.perf_counter() - start)


def refused_row(row: TypeResult, reason: str, seconds: float, unexpected: bool = True) -> TypeResult:
    """A row whose type is refused as a whole."""
    results = tuple(GrowthResult(g.name, Status.REFUSED, reason, unexpected=unexpected) for g in SUITE)
    return dataclasses.replace(row, results=results, seconds=seconds)


def certify_growth(model_class: type[PreTrainedModel], config: PreTrainedConfig, growth: Growth) -> GrowthResult:
    """One growth of a small config, measured or refused."""
    start = time.perf_counter()
    try:
        plan = twin_plan(make_plan(model_class, config, GrowthConfig(**growth.options)))
        made = certify_plan(plan) if growth.whole else _two_comparisons(plan)
    except FAULTS as error:
        unexpected = not isinstance(error, WarmstartError)
        result = GrowthResult(growth.name, Status.REFUSED, in_words(error), unexpected=unexpected)
    else:
        result = _judged(growth, plan, made)
    return dataclasses.replace(result, seconds=time.perf_counter() - start)


def in_words(error: BaseException) -> str:
    """An error on one line; what users meet as a `WarmstartError` goes without the error's name."""
    words = " ".join(str(error).split())
    return words if isinstance(error, WarmstartError) else f"{type(error).__name__}: {words}"


def _mapping(kind: str) -> Mapping[str, str | tuple[str, ...]]:
    return getattr(modeling_auto, KINDS[kind])


def _model_types(data: Mapping[str, Any]) -> set[str]:
    """The model types of a config's plain data and of all that is inside."""
    inside = (_model_types(value) for value in data.values() if isinstance(value, Mapping))
    own = data.get("model_type")
    return ({own} if isinstance(own, str) else set()).union(*inside)


def _cannot_build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """The words in which a class refuses its own config; empty where it can be built, without memory for weights."""
    try:
        meta_shapes(model_class, config)
    except FAULTS as error:
        return in_words(error)
    return ""


def _two_comparisons(plan: GrowthPlan) -> Certificate:
    """The part of a certificate that two comparisons give."""
    with true_float64():
        found = [compare(plan, seed) for seed in (0, 1)]
    worst = max(found, key=lambda one: one.max_pullback_error)
    return Certificate(
        plan.exact and all(one.same for one in found),
        max(one.max_relative_error for one in found),
        worst.max_pullback_error,
        reason=plan.reason,
        worst_pullback=worst.worst_pullback,
    )


def _what_differs(made: Certificate, checks: Mapping[str, bool]) -> str:
    """In words, what is wrong with a growth that was planned as exact."""
    words = []
    if not made.max_relative_error < TOLERANCE:
        words.append(f"the outputs differ by {made.max_relative_error:.1e} of the largest")
    if not made.max_pullback_error < TOLERANCE:
        words.append(f"the pulled-back gradient of {made.worst_pullback} differs by {made.max_pullback_error:.1e}")
    failed = [check for check, passed in checks.items() if not passed]
    words += [f"{' and '.join(failed)} differ{'s' if len(failed) == 1 else ''}"] if failed else []
    return "; ".join(words)


def _judged(growth: Growth, plan: GrowthPlan, made: Certificate) -> GrowthResult:
    """What the measured errors make of a plan."""
    checks = {way: error < TOLERANCE for way, error in made.ways.items()}
    if growth.whole:
        checks["reload"] = made.reload_ok
    agree = made.max_relative_error < TOLERANCE and made.max_pullback_error < TOLERANCE
    if not made.ran:  # what cannot be certified is not called exact, nor wrong
        return GrowthResult(growth.name, Status.REFUSED, f"not certified: {' '.join(made.reason.split())}")
    if plan.exact and agree and all(checks.values()):
        status, reason = Status.EXACT, ""
    elif plan.exact:
        status, reason = Status.NOT_EXACT, _what_differs(made, checks)
    else:
        deeper = [stack for stack in plan.layout.stacks if not plan.layer_maps[stack.attribute].is_identity]
        normed = any(stack.normed for stack in deeper) and not any(stack.reason for stack in deeper)
        status, reason = Status.POST_NORM if normed else Status.APPROXIMATE, plan.reason
    return GrowthResult(
        growth.name,
        status,
        " ".join(reason.split()),
        made.max_relative_error,
        made.max_pullback_error,
        checks=checks,
        unreached=len(made.unreached),
        frozen=sum(made.frozen.values()),
    )
