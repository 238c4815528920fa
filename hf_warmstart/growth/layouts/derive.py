"""Deriving the layout of a model class from the class itself.

A small probe of the class answers every question that it can:

| question | answered by |
|---|---|
| how long is an axis, in which attributes | changing one attribute at a time (`labels`) |
| which axis of a matrix is written, which is read | the module's type (Linear, Conv1D, Embedding, norm) |
| residual stream, or an inner space of the same size | the flow of tensors in one forward pass (`flow`) |
| which space a norm reads and makes; which norm feeds the tied head | the same flow |
| does a norm centre; does it multiply by 1 + weight | running the norm module alone |
| is the embedding multiplied by something that depends on the width | the first layer's input over the table |
| ties, the stack of layers, ends of branches | the model's own tables; the flow |

What no shape and no flow shows (the order inside a fused axis) is declared in `families/<model_type>.json`, each fact
with its reason. What can be neither derived nor read there raises a `LayoutError` that names every such tensor.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import LayoutError
from ..axes import Axis, Dual, Fixed, Gain, Postnorm, Prenorm, Product, Scaled, Space, axis_from_data
from ..layout import Kind, Layout, Role, SpaceInfo, TensorLayout, collect
from ..twin import HEAD_DIM, build, layer_period, twin_config
from .flow import Flow, is_norm, trace
from .labels import Labels, measure_labels
from .measure import centres, embedding_multiplier, offset_of

RESIDUAL = Space("residual")
QUERIES = Product("kv_heads", "group", "head_dim")
KEYS = Product("kv_heads", "head_dim")
HEAD_ATTRIBUTES = {"num_attention_heads", "num_key_value_heads", "head_dim"}
SPACE_NAMES = {"vocab_size": "vocab", "max_position_embeddings": "positions", "hidden_size": "residual"}


_derived: dict[tuple[type, str], Layout] = {}


def derive_layout(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Layout:
    """The layout of `model_class` under the switches of `config`; sizes do not matter.

    Raises:
        LayoutError: tensors that could not be placed, all named; or a class without the attributes that are asked.
    """
    missing = [
        name for name in ("hidden_size", "num_attention_heads", "num_hidden_layers") if not hasattr(config, name)
    ]
    if missing:
        raise LayoutError(
            f"{model_class.__name__}: its config has no {missing}, from which layouts are derived. This class cannot be "
            "grown yet."
        )
    # The probe replaces all sizes, so that models of one family share one derivation.
    probe = _probe_config(config)
    key = model_class, json.dumps(probe.to_dict(), sort_keys=True, default=str)
    if key not in _derived:
        try:
            _derived[key] = _Derivation(model_class, probe).layout()
        except LayoutError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # Whatever a class does with a probe that it cannot run, it means one thing: nothing can be derived.
            raise LayoutError(
                f"{model_class.__name__}: its small probe could not be run ({type(error).__name__}: {error}). This class "
                "cannot be grown yet."
            ) from error
    return _derived[key]


def _probe_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small config whose sizes are as different from each other as the class allows."""
    sizes = {"num_attention_heads": 6, "hidden_size": 6 * HEAD_DIM}
    if getattr(config, "num_key_value_heads", None) is not None:
        sizes["num_key_value_heads"] = 2  # grouped, so that queries and keys show apart
    for name, value in {"intermediate_size": 28, "ffn_dim": 28, "n_inner": 28, "moe_intermediate_size": 20}.items():
        if name in config.to_dict():
            sizes[name] = value
    # An explicit head_dim, where the class heeds one, frees the heads from the width.
    sizes["head_dim"] = HEAD_DIM
    return twin_config(config, sizes, max(2, layer_period(config)))


@cache
def declared(model_type: str) -> Mapping:
    """The declared facts of a family; empty for most."""
    path = resources.files(__package__) / "families" / f"{model_type}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


class _Derivation:
    """One derivation; the parts of the layout are filled in turn."""

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig):
        self.config = config
        self.model = build(model_class, config)
        self.labels: Labels = measure_labels(model_class, config)
        self.facts = declared(config.model_type)
        self.prefix, self.layers = self._stack()
        ids = torch.arange(12).reshape(1, -1) % config.vocab_size
        self.flow: Flow = trace(self.model, self.layers, {"input_ids": ids})
        self.modules = dict(self.model.named_modules())
        self.ties = dict(self.model.all_tied_weights_keys)
        # Where heads move without the width, shapes alone tell their axes from the residual stream's.
        self.heads_visible = any(HEAD_ATTRIBUTES & set(slopes) for slopes in self.labels.slopes.values())
        self.scaled = embedding_multiplier(self.model) not in (None, 1.0)
        self.prenorms = self._prenorms()
        self.unplaced: list[str] = []

    # -- the whole ------------------------------------------------------------------------------------------------

    def layout(self) -> Layout:
        tensors: dict[str, TensorLayout] = {}
        layout = Layout(self.config.model_type, {}, {}, self.prefix)
        for name in self.labels.shapes:
            module_name, _, leaf = name.rpartition(".")
            placed = self._declared_tensor(name) or self._place(module_name, leaf, name)
            if placed is None:
                self.unplaced.append(f"{name} {self.labels.shapes[name]}")
                continue
            template, _ = layout.template(name)
            if tensors.setdefault(template, placed) != placed:
                self.unplaced.append(f"{name}: its layer differs from those before")
        if self.unplaced:
            raise LayoutError(
                f"{type(self.model).__name__}: {len(self.unplaced)} tensors could not be placed in spaces:\n"
                f"{collect(self.unplaced)}\nDeclare them in growth/layouts/families/{self.config.model_type}.json."
            )
        ends = sorted({layout.template(name)[0] for name in self._branch_ends()})
        return Layout(
            self.config.model_type, self._spaces(tensors), tensors, self.prefix, tuple(ends), self.ties, self.scaled
        )

    def _stack(self) -> tuple[str, list[nn.Module]]:
        """The templated prefix of the layers, and their modules."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_hidden_layers:
                return f"{name}.{{i}}", list(module)
        return "", []

    def _spaces(self, tensors: Mapping[str, TensorLayout]) -> dict[str, SpaceInfo]:
        centred = any(centres(m) for n, m in self.modules.items() if is_norm(m) and self._norm_on_residual(n))
        kinds: dict[str, Kind] = {
            "residual": "layer_normed" if centred else "rms_normed",
            "kv_heads": "heads",
            "group": "heads",
            "head_dim": "fixed",
            "vocab": "indexed",
            "positions": "indexed",
        }
        attributes = {
            "residual": self.labels.groups["hidden_size"],
            "kv_heads": ("num_key_value_heads",),
            "group": ("num_attention_heads",),
            "head_dim": ("head_dim",),
            "vocab": ("vocab_size",),
            "positions": ("max_position_embeddings",),
        }
        used = {space for tensor in tensors.values() for axis in tensor.axes for space in axis.spaces()}
        return {
            name: SpaceInfo(
                kinds.get(name, "routed" if self._routes(name) else "elementwise"), attributes.get(name, (name,))
            )
            for name in sorted(used)
        }

    def _routes(self, attribute: str) -> bool:
        """Whether an attribute counts experts: it moves the leading axis of a parameter of rank three."""
        return any(axis == 0 and len(self.labels.shapes[name]) == 3 for name, axis in self.labels.moved_by(attribute))

    # -- one tensor -----------------------------------------------------------------------------------------------

    def _declared_tensor(self, name: str) -> TensorLayout | None:
        for pattern, fact in self.facts.get("tensors", {}).items():
            if fnmatch.fnmatch(name, pattern):
                return TensorLayout.from_data(fact)
        return None

    def _declared_axis(self, module_name: str, leaf: str) -> Axis | None:
        """The declared order of a fused output axis."""
        for pattern, fact in self.facts.get("fused", {}).items():
            if fnmatch.fnmatch(module_name, pattern) or fnmatch.fnmatch(f"{module_name}.{leaf}", pattern):
                return axis_from_data(fact["order"])
        return None

    def _place(self, module_name: str, leaf: str, name: str) -> TensorLayout | None:
        module = self.modules[module_name]
        rank = len(self.labels.shapes[name])
        if module_name not in self.flow.calls:
            return None
        if isinstance(module, nn.Embedding) and leaf == "weight":
            table = self._axis(module_name, name, 0, "read"), self._axis(module_name, name, 1, "write")
            return self._tensor(table, ("read", "write"))
        if is_norm(module) and leaf in ("weight", "bias"):
            reads, makes = self._norm_axes(module_name, name)
            if reads is None or makes is None:
                return None
            if leaf == "bias":
                return TensorLayout((makes,), ("write",))
            return TensorLayout((Gain(reads, makes),), ("write",), offset_of(module))
        if rank == 1 and leaf == "bias":
            return self._tensor((self._axis(module_name, name, 0, "write"),), ("write",))
        if isinstance(module, Conv1D):
            axes = self._axis(module_name, name, 0, "read"), self._axis(module_name, name, 1, "write")
            return self._tensor(axes, ("read", "write"))
        if rank == 2:
            # nn.Linear, and bare `weight` parameters used as F.linear does (routers)
            axes = self._axis(module_name, name, 0, "write"), self._axis(module_name, name, 1, "read")
            return self._tensor(axes, ("write", "read"))
        if rank == 3:
            return self._experts(module, name)
        return None

    @staticmethod
    def _tensor(axes: tuple[Axis | None, ...], roles: tuple[Role, ...]) -> TensorLayout | None:
        placed = tuple(axis for axis in axes if axis is not None)
        return TensorLayout(placed, roles) if len(placed) == len(axes) else None

    def _experts(self, module: nn.Module, name: str) -> TensorLayout | None:
        """Stacked experts: (experts, out, in), or (experts, in, out) where the class says that it transposes."""
        module_name, _, leaf = name.rpartition(".")
        roles: tuple[Role, Role] = ("read", "write") if getattr(module, "is_transposed", False) else ("write", "read")
        inner = [bool(self._inner_attribute(name, axis)) for axis in (1, 2)]
        if inner[0] == inner[1]:
            return None
        axes: list[Axis | None] = [self._named_axis(name, 0)]
        for axis, role in ((1, roles[0]), (2, roles[1])):
            if inner[axis - 1]:
                slope = self._inner_attribute(name, axis)[1]
                axes.append(self._named_axis(name, axis) if slope == 1 else self._declared_axis(module_name, leaf))
            else:
                axes.append(RESIDUAL if role == "write" else self._source_of(module_name))
        return self._tensor(tuple(axes), ("write", *roles))

    # -- one axis -------------------------------------------------------------------------------------------------

    def _inner_attribute(self, name: str, axis: int):
        """The attribute, other than the width and the heads', that moves an axis, and its slope."""
        slopes = {a: s for a, s in self.labels.of(name, axis).items() if a not in HEAD_ATTRIBUTES | {"hidden_size"}}
        return next(iter(slopes.items()), None) if len(slopes) == 1 else None

    def _named_axis(self, name: str, axis: int) -> Axis | None:
        inner = self._inner_attribute(name, axis)
        return Space(SPACE_NAMES.get(inner[0], inner[0])) if inner else None

    def _axis(self, module_name: str, name: str, axis: int, role: Role) -> Axis | None:
        """The expression of one axis of an Embedding, Linear, Conv1D or bias."""
        slopes = self.labels.of(name, axis)
        inner = self._inner_attribute(name, axis)
        if inner:
            return (
                self._named_axis(name, axis)
                if inner[1] == 1
                else self._declared_axis(module_name, name.rpartition(".")[2])
            )
        if not slopes:
            return Fixed(self.labels.shapes[name][axis])
        module = self.modules[module_name]
        if isinstance(module, nn.Embedding):
            is_table = module is self.model.get_input_embeddings()
            return Scaled(RESIDUAL) if is_table and self.scaled else RESIDUAL
        if self.heads_visible:
            residual = set(slopes) == {"hidden_size"}
        else:
            residual = self.flow.reads_residual(module_name) == (role == "read")
        if residual:
            return self._source_of(module_name) if role == "read" else RESIDUAL
        heads = self._heads_axis(slopes) or self._declared_axis(module_name, name.rpartition(".")[2])
        return Prenorm(heads) if heads is not None and role == "write" and module_name in self.prenorms else heads

    def _heads_axis(self, slopes) -> Axis | None:
        """Queries or keys by the attributes that move them; None for a fused axis, whose order no shape shows."""
        moved = {a: s for a, s in slopes.items() if a in HEAD_ATTRIBUTES}
        if "num_attention_heads" in moved and "num_key_value_heads" in moved:
            return None
        if "num_attention_heads" in moved:
            return QUERIES if moved["num_attention_heads"] == HEAD_DIM else None
        if "num_key_value_heads" in moved:
            return KEYS if moved["num_key_value_heads"] == HEAD_DIM else None
        if slopes.get("hidden_size") == 1:
            return QUERIES  # heads that the class ties to the width
        if "head_dim" in moved:
            # As many keys and values as queries (no attribute of their own moved), or one axis of a head.
            count = moved["head_dim"]
            if count == 1:
                return Space("head_dim")
            return QUERIES if count == self.config.num_attention_heads else KEYS if count == self._kv_heads() else None
        return None

    def _kv_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads

    def _source_of(self, module_name: str) -> Axis:
        """What a module on the residual level reads: the stream itself, or a norm's image of it."""
        maker = self.flow.maker_of(module_name)
        if maker is not None and is_norm(self.modules[maker]):
            return self._norm_axes(maker, f"{maker}.weight")[1] or RESIDUAL
        return RESIDUAL

    # -- norms ----------------------------------------------------------------------------------------------------

    def _norm_on_residual(self, module_name: str) -> bool:
        call = self.flow.calls.get(module_name)
        return call is not None and call.reads in self.flow.residual

    def _norm_axes(self, module_name: str, name: str) -> tuple[Axis | None, Axis | None]:
        """The axes that a norm reads and makes."""
        if self._norm_on_residual(module_name):
            if self._feeds_tied_head(module_name):
                table = Scaled(RESIDUAL) if self.scaled else RESIDUAL
                return RESIDUAL, Dual(table)
            return RESIDUAL, Postnorm(RESIDUAL)
        maker = self.flow.maker_of(module_name)
        if maker in self.prenorms:
            heads = self._heads_axis(self.labels.of(name, 0))
            return (Prenorm(heads), heads) if heads is not None else (None, None)
        slopes = self.labels.of(name, 0)
        if not slopes or set(slopes) == {"head_dim"}:
            axis = Space("head_dim") if slopes else Fixed(self.labels.shapes[name][0])
            return axis, axis
        return None, None

    def _prenorms(self) -> set[str]:
        """Matrices whose whole inner output goes through one norm (OLMo 2's q and k)."""
        found = set()
        for name, call in self.flow.calls.items():
            maker = self.flow.maker_of(name)
            if not is_norm(call.module) or maker is None or self._norm_on_residual(name):
                continue
            matrix = self.modules[maker]
            if isinstance(matrix, nn.Linear) and matrix.out_features == len(call.module.weight):
                found.add(maker)
        return found

    def _feeds_tied_head(self, module_name: str) -> bool:
        head = self.model.get_output_embeddings()
        if head is None or not self.ties:
            return False
        name = next((n for n, m in self.modules.items() if m is head), "")
        return f"{name}.weight" in self.ties and self.flow.maker_of(name) == module_name

    # -- the model ------------------------------------------------------------------------------------------------

    def _branch_ends(self) -> list[str]:
        """Tensors in layers that end a residual branch: the last matrix with its bias, or the norm behind it."""
        ends = []
        prefix = self.prefix.split("{i}")[0]
        for name, call in self.flow.calls.items():
            if not self.prefix or not name.startswith(prefix) or is_norm(call.module):
                continue
            for leaf, parameter in call.module.named_parameters(recurse=False):
                placed = self._declared_tensor(f"{name}.{leaf}") or self._place(name, leaf, f"{name}.{leaf}")
                if placed is None or parameter.ndim == 1:
                    continue
                writes = [a for a, role in zip(placed.axes, placed.roles, strict=True) if role == "write"]
                if RESIDUAL not in writes:
                    continue
                norm = self.flow.reader_norm(name)
                owner = norm if norm is not None else name
                ends += [f"{owner}.{leaf}" for leaf in ([leaf] if norm is None else ["weight"])]
                if getattr(self.modules[owner], "bias", None) is not None:
                    ends.append(f"{owner}.bias")
        return ends
