"""Stacks of layers: which attribute counts them, what makes a new layer an identity, which layers are alike.

A new layer adds nothing when every parameter that ends a residual branch in it is zero. These are found by walking back
from the layer's output to its input; the finding is then tried: the probe runs with them zeroed, and each layer must
return what it was given, or a multiple of it. Layers of which this is not known, or which must stay where they are, are
not for copying.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configs import get_attribute, layer_attributes, layer_tag
from ..layout import Stack, TensorLayout, layer_signatures
from ..twin import meta_shapes
from .analysis import Analysis, Writer
from .moves import REFUSALS, Trace, deeper_configs
from .probe import probe_inputs
from .values import Value, base_name

# Functions with f(0) = 0: a branch that is zero before them is zero behind them.
ZERO_AT_ZERO = {
    "gelu",
    "silu",
    "relu",
    "tanh",
    "leaky_relu",
    "elu",
    "hardtanh",
    "clamp",
    "square",
    "mish",
    "hardswish",
}
IDENTITY_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-2


@dataclass
class Ends:
    """What must be zero for a layer to return what it was given, up to norms.

    Args:
        refusal: what is in the way. zeros: names of the tensors that end branches. norms: those of the norms that the
            stream goes through, in order. last: whether the last norm is the layer's output. gates: names of tensors
            that multiply the stream.
    """

    refusal: str = ""
    zeros: set[str] = field(default_factory=set)
    norms: list[tuple[str, ...]] = field(default_factory=list)
    last: bool = False
    gates: set[str] = field(default_factory=set)

    def templated(self, template: Callable[[str], str]) -> tuple:
        """The norms, by templated names, and whether the last one is the output: what layers must have in common."""
        return [tuple(map(template, norm)) for norm in self.norms], self.last


def find_stacks(base: Trace, model_class: type[PreTrainedModel]) -> list[Stack]:
    """All stacks of a model whose depth an attribute sets, the main one first."""
    config = base.config
    lists = {
        name: module
        for name, module in base.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    shapes = meta_shapes(model_class, config)
    found: list[Stack] = []
    claimed: set[str] = set()
    for path in layer_attributes(config):
        layers = get_attribute(config, path)
        candidates = [name for name, module in lists.items() if len(module) == layers and name not in claimed]
        if not candidates:
            continue
        grown = _deeper(model_class, config, path, layers)
        if grown is None:
            continue
        new = set(grown) - set(shapes)
        stacks = [name for name in candidates if any(re.match(re.escape(name) + rf"\.{layers}(\.|$)", n) for n in new)]
        if not stacks:
            continue
        lost = sorted(set(shapes) - set(grown))
        inside = re.compile(rf"({'|'.join(map(re.escape, stacks))})\.(\d+)\.")
        outside = [n for n in lost if not inside.match(n)]
        claimed |= set(stacks)
        if outside:
            reason = f"more layers would drop {outside[0]}"
            found += [Stack(f"{name}.{{i}}", path, reason=reason) for name in stacks]
            continue
        # A layer that loses tensors where others follow it (the last, which alone has them) keeps its place.
        kept = {name: {int(m[2]) for n in lost if (m := inside.match(n)) and m[1] == name} for name in stacks}
        made = {name: _stack(base, [name], path, kept[name], shapes) for name in stacks}
        found += (made | _joint(base, made, shapes)).values()
    return found


def _joint(base: Trace, made: Mapping[str, Stack], names: Iterable[str]) -> dict[str, Stack]:
    """Stacks side by side that make layers only together: one list holds all attentions, another all norms.

    They say the same of a layer, each under its own prefix. What already makes layers alone is left alone.
    """
    joint: dict[str, Stack] = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in made):
        lists = [name for name in made if name.rpartition(".")[0] == parent]
        if len(lists) > 1 and any(made[name].reason for name in lists):
            together = _stack(base, lists, made[lists[0]].attribute, set(), names)
            if not together.reason and not together.copied:
                joint |= {name: dataclasses.replace(together, prefix=f"{name}.{{i}}") for name in lists}
    return joint


def layer_axes(base: Trace, model_class: type[PreTrainedModel]) -> dict[tuple[str, int], str]:
    """Axes with one part for each layer, outside of layers: the attribute that counts them."""
    shapes = meta_shapes(model_class, base.config)
    found = {}
    for path in layer_attributes(base.config):
        grown = _deeper(model_class, base.config, path, get_attribute(base.config, path)) or {}
        for name, shape in shapes.items():
            for axis, (before, after) in enumerate(zip(shape, grown.get(name, shape), strict=True)):
                if before != after:
                    found[name, axis] = path
    return found


def _deeper(model_class, config, path, layers) -> dict | None:
    """Shapes with more layers: one more, or twice as many where a pattern needs it."""
    for resized in deeper_configs(config, path, layers):
        try:
            return meta_shapes(model_class, resized)
        except REFUSALS:
            continue
    return None


def _stack(base: Trace, lists: Sequence[str], path: str, kept: Set[int], names: Iterable[str]) -> Stack:
    """One stack by the paths of its lists of modules; layers that are `kept` are not for copying.

    Nor are those that the probe's inputs leave out (a cross-attention without an image), of which nothing is known.
    """
    name = lists[0]
    prefix = f"{name}.{{i}}"
    numbers = range(get_attribute(base.config, path))
    runs = {k: [call for call in base.tape.calls if call in {f"{part}.{k}" for part in lists}] for k in numbers}
    able = [k for k in numbers if k not in kept and len(runs[k]) == len(lists)]
    calls = base.tape.calls
    found: dict[int, Ends] = {}
    problem = ""
    template = lambda n: re.sub(rf"^({'|'.join(map(re.escape, lists))})\.\d+(?=\.)", r"\1.{i}", n)  # noqa: E731
    for k in able:
        streams = _streams(calls[runs[k][0]][0], calls[runs[k][-1]][1])
        if not streams:
            continue
        ends = _layer_ends(base.analysis, *streams[0])
        if ends.refusal and len(streams) > 1:
            ends = _all_ends(base.analysis, streams) or ends
        outside = [n for n in sorted(ends.zeros | ends.gates) if not n.startswith(tuple(f"{run}." for run in runs[k]))]
        if outside:
            ends.refusal = f"{outside[0]} is shared with other layers"
        if ends.refusal:
            problem = f"{name}.{k}: {ends.refusal}"
            continue
        found[k] = ends
    if not able:
        return Stack(prefix, path, reason="each of its layers must stay where it is, or is left out by the inputs")
    if not found:
        return Stack(prefix, path, reason=problem or "no layer returns a stream like the one that it is given")
    # Layers that differ from the last (a first one with a norm of its own) are not for copying.
    last = able[-1]
    if last not in found:
        return Stack(prefix, path, reason=problem or f"{name}.{last} returns no stream like the one it is given")
    usual = found[last].templated(template)
    good = {k for k, ends in found.items() if ends.templated(template) == usual}
    norms, normed = tuple(usual[0]), found[last].last
    special = len(good) < len(able)
    signatures = layer_signatures(names, [Stack(prefix, path)])
    kinds = {k: signatures.get(f"{name}.{k}", "") for k in numbers}
    copied = {kinds[k] for k in able} if len(able) < len(numbers) else set()
    if alike := [k for k in numbers if k not in able and kinds[k] in copied]:
        return Stack(prefix, path, reason=f"{name}.{alike[0]} is not for copying, and looks like layers that are")
    stack = Stack(
        prefix,
        path,
        tuple(sorted({template(n) for k in good for n in found[k].zeros})),
        post_norms=norms if normed else (),
        inner_norms=() if normed else norms,
        gates=tuple(sorted({template(n) for k in good for n in found[k].gates})),
        append=special,
        special=special,
        copied=tuple(sorted(copied)),
    )
    return _tried(base, stack, [(runs[k][0], runs[k][-1]) for k in sorted(good)])


def _streams(read: list[Value], made: list[Value]) -> list[tuple[Value, Value]]:
    """Pairs of what enters a layer and what leaves it in the same shape; the stream, where there is one, comes first."""
    return [
        (value, out)
        for value in read
        for out in made
        if value.tensor.is_floating_point() and value.tensor.shape == out.tensor.shape and value.tensor.ndim > 1
    ]


def _all_ends(analysis: Analysis, streams: list[tuple[Value, Value]]) -> Ends | None:
    """The ends of a layer with several streams (reversible ones), each of which is added to itself; None where not."""
    made = Ends()
    for out in dict.fromkeys(leaving for _, leaving in streams):
        found = (_layer_ends(analysis, entry, leaving) for entry, leaving in streams if leaving is out)
        ends = next((ends for ends in found if not (ends.refusal or ends.norms or ends.gates)), None)
        if ends is None:
            return None
        made.zeros |= ends.zeros
    return made


def _layer_ends(analysis: Analysis, entry: Value, leaving: Value) -> Ends:
    """What must be zero for a layer to return what it was given."""
    atoms = {atom for dim in entry.dims[-1:] for atom in dim.term.atoms()}
    made = Ends()
    value = leaving
    for _ in range(8):
        # Once each: what is written in place is met on more than one way.
        writers = list(
            {(w.kind, id(w.node), w.places): w for w in analysis.writers(value, atoms, {id(entry)})}.values()
        )
        gates = analysis.identity_gates(value, entry)
        norm, biases = (None, []) if gates is not None else _stream_norm(writers)
        if gates is None and norm is None:
            if mixed := analysis.mixed(value, entry):
                return Ends(f"its stream is multiplied by activations, which no zeros make an identity ({mixed})")
            return Ends(f"its output is no sum with its input ({[str(w.node) for w in writers][:3]})")
        branches = writers if gates is None else _past_gates(analysis, writers, gates, atoms, entry)
        for writer in branches:
            if writer is norm or writer in biases:
                continue
            zeros = _zeros(analysis, writer, atoms, 0)
            if zeros is None:
                return Ends(f"{writer.kind} at {writer.node} ends a branch")
            made.zeros |= zeros
        if norm is None:
            made.gates = gates or set()
            return made
        made.last |= not made.norms and not made.zeros
        made.norms.insert(0, tuple(dict.fromkeys(p[0] for w in (norm, *biases) for p in w.places)))
        if len({id(node) for place in norm.places for node, *_ in analysis.gains[place]}) > 1:
            # It would have to be one where another layer follows, and as it is where it is used again.
            return Ends(f"the norm {made.norms[0][0]} of the stream is used more than once")
        value = analysis.before_norm(norm.reads, atoms)  # type: ignore[arg-type]
    return Ends("its stream could not be followed")


def _stream_norm(writers: list[Writer]) -> tuple[Writer | None, list[Writer]]:
    """The gain of the one norm that a stream comes from, and its biases."""
    gains = [w for w in writers if w.kind == "gain" and w.reads is not None]
    if len(gains) != 1:
        return None, []
    return gains[0], [w for w in writers if w.kind == "write" and (w.node is gains[0].node or _follows(w, gains[0]))]


def _past_gates(analysis: Analysis, writers, gates: set[str], atoms, entry: Value, depth: int = 0):
    """The writers that end branches: what multiplies the stream itself is passed, the stream is left out."""
    for writer in writers:
        if writer.kind == "stop":
            continue
        if {place[0] for place in writer.places} & gates and writer.reads is not None and depth < 12:
            inner = analysis.writers(writer.reads, atoms, {id(entry)})
            yield from _past_gates(analysis, inner, gates, atoms, entry, depth + 1)
        else:
            yield writer


def _follows(bias: Writer, norm: Writer) -> bool:
    return bias.node is not None and norm.node is not None and bias.node.scope == norm.node.scope


def _zeros(analysis: Analysis, writer: Writer, atoms, depth: int) -> set[str] | None:
    """Parameters whose zeros make one end of a walk zero; None where there are none."""
    if depth > 12:
        return None
    if writer.kind in ("write", "gain", "table"):
        return {name for name, _ in writer.places} if writer.kind != "table" else None
    options: tuple[Value, ...] = writer.operands
    if writer.kind == "blocked":
        name = base_name(writer.node) if writer.node is not None else ""
        if writer.reads is None or not (
            name in ZERO_AT_ZERO or writer.node and id(writer.node) in analysis.normalising
        ):
            return None
        options = (writer.reads,)
    for operand in options:
        found: set[str] = set()
        for inner in analysis.writers(operand, atoms):
            zeros = _zeros(analysis, inner, atoms, depth + 1)
            if zeros is None:
                break
            found |= zeros
        else:
            if found:
                return found
    return None


def _tried(base: Trace, stack: Stack, layers: Iterable[tuple[str, str]]) -> Stack:
    """The stack, after a run of the probe with the branch ends zeroed; with what is wrong with the claim, if anything.

    `layers` has the first and the last module of each layer that is to be an identity, or a multiple of it.
    """
    model = base.model
    tensors: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    saved: dict[str, Tensor] = {}

    def fill(template: str, number: float) -> None:
        for k in range(get_attribute(base.config, stack.attribute)):
            full = template.replace("{i}", str(k))
            if full in tensors and full not in saved:
                saved[full] = tensors[full].detach().clone()
                uses = [use for a in range(tensors[full].ndim) for use in base.analysis.gains.get((full, a), ())]
                tensors[full].data.fill_(number - next((offset for *_, offset in uses if offset), 0.0))

    for template in stack.branch_ends:
        fill(template, 0.0)
    for template in stack.gates:
        fill(template, 1.0)
    norms = stack.post_norms + stack.inner_norms
    for norm in norms:
        for position, template in enumerate(norm):
            fill(template, 0.0 if position else 1.0)
    problems: list[str] = []
    factors: list[float] = []
    entered: list[Tensor | None] = []

    def enter(module, args, kwargs):
        streams = (t for t in [*args, *kwargs.values()] if isinstance(t, Tensor) and t.is_floating_point())
        entered.append(next(streams, None))

    def check(module, args, output):
        given = entered.pop()
        made = output if isinstance(output, Tensor) else next((t for t in output if isinstance(t, Tensor)), None)
        if given is None or made is None or given.shape != made.shape:
            problems.append("a layer returns another shape than it is given")
            return
        if norms:
            made = _unit(made) if stack.inner_norms else made  # the norm that comes next does not see a factor
            error = min(_distance(made, _unit(given - given.mean(-1, keepdim=True))), _distance(made, _unit(given)))
            if error > NORM_TOLERANCE:
                problems.append(
                    f"with its branch ends zero a layer is no norm of its input: they differ by {error:.0e}"
                )
            return
        factors.append(float((made * given).sum() / given.square().sum()))
        if float((made - factors[-1] * given).abs().max() / given.abs().max()) > IDENTITY_TOLERANCE:
            error = _distance(made, given)
            problems.append(f"with its branch ends zero a layer still changes its input by {error:.0e}")

    handles = []
    for first, last in layers:
        handles.append(model.get_submodule(first).register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(model.get_submodule(last).register_forward_hook(check))
    try:
        with torch.no_grad():
            model(**probe_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
        for full, tensor in saved.items():
            tensors[full].data.copy_(tensor)
    if problems:
        return Stack(stack.prefix, stack.attribute, reason=problems[0])
    scaled = any(abs(factor - 1) > IDENTITY_TOLERANCE for factor in factors)
    return dataclasses.replace(stack, append=stack.append or scaled, scaled=scaled)


def _unit(value: Tensor) -> Tensor:
    """A value whose mean square is one along the last axis."""
    return value / value.square().mean(-1, keepdim=True).sqrt()


def _distance(made: Tensor, expected: Tensor) -> float:
    return float((made - expected).abs().max() / expected.abs().max())


def merge_layers(
    tensors: Mapping[str, TensorLayout], stacks: Iterable[Stack], config: PreTrainedConfig
) -> dict[str, TensorLayout]:
    """Layouts by templated name: one entry where all layers agree, else one for each kind of layer.

    A kind is a layer's entries in the config's per-layer lists; a last layer may differ from all others.
    """
    merged: dict[str, TensorLayout] = {}
    groups: dict[str, dict[int, TensorLayout]] = {}
    owner: dict[str, Stack] = {}
    for name, layout in tensors.items():
        for stack in stacks:
            prefix = stack.prefix.split("{i}")[0]
            match = re.match(re.escape(prefix) + r"(\d+)(?=\.|$)", name)
            if match:
                template = stack.prefix + name[match.end() :]
                groups.setdefault(template, {})[int(match.group(1))] = layout
                owner[template] = stack
                break
        else:
            merged[name] = layout
    for template, by_layer in groups.items():
        stack = owner[template]
        last = get_attribute(config, stack.attribute) - 1
        first = next(iter(by_layer.values()))
        if all(layout == first for layout in by_layer.values()):
            merged[template] = first
            continue
        tagged = _tagged(by_layer, stack, config, layer_signatures(tensors, stacks), last)
        merged |= {template.replace("{i}", f"{{i:{tag}}}" if tag else "{i}"): t for tag, t in tagged.items()}
    return merged


def _tagged(
    by_layer: Mapping[int, TensorLayout],
    stack: Stack,
    config: PreTrainedConfig,
    signatures: Mapping[str, str],
    last: int,
) -> dict[str, TensorLayout]:
    """One tensor's layouts by what tells its layers apart: the tensors beside it, the config's word, or being the last."""

    def beside(k: int) -> str:
        return "@" + signatures[stack.prefix.replace("{i}", str(k))]

    def says(k: int) -> str:
        return layer_tag(config, stack.attribute, k)

    def place(k: int) -> str:
        return "last" if k == last else ""

    tagged: dict[str, TensorLayout] = {}
    for tag_of in (beside, says, place, lambda k: says(k) + beside(k)):
        tagged = {}
        if all(tagged.setdefault(tag_of(k), layout) == layout for k, layout in by_layer.items()):
            break
    return tagged
