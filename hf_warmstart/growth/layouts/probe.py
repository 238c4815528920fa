"""Probes: tiny models of a config's class, with every switch of the config, for reading a class's layout off its maths.

A probe's config keeps what decides how a class computes (activations, ties, biases, norms, rope types, kinds of layers,
experts or none, sizes left unset) and shrinks what does not. Sizes are recognised by the names of their attributes;
`probes.json` holds, by model type, what no name tells.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..layerwise import ABOVE, BELOW, PER_LAYER, UPTO, carry, is_integer, lists_layers, marks, own_of

HEADS = 4
HEAD_DIM = 16  # a quarter of it may be rotated, in two halves of two
HIDDEN = HEADS * HEAD_DIM
VOCABULARY = 64
POSITIONS = 64
EXPERTS = 4
LAYERS = 4  # at most this many layers once every kind of layer is there
KINDS = 6  # a per-layer list with more different values than this does not mark kinds of layers

Level = Mapping[str, Any]
Rule = int | Callable[[int, str, Level], int] | None


def at_most(limit: int) -> Rule:
    """The rule that keeps small values and cuts larger ones."""
    return lambda value, name, level: min(value, limit)


def key_value_heads(value: int, name: str, level: Level) -> int:
    """Heads of keys and values: one stays one, as many as the queries' stay as many, else 2."""
    queries = level.get(re.sub(r"key_value|kv|key", "attention", name), level.get("num_attention_heads"))
    queries = level.get("linear_num_value_heads", queries) if "linear" in name else queries
    return HEADS if value == (queries[0] if isinstance(queries, list) else queries) else min(value, 2)


def heads(value: int, name: str, level: Level) -> int:
    """Heads; those of state space layers fill an inner width that is a multiple of the hidden size."""
    is_state = "mamba" in name or name == "num_heads" and "state_size" in level
    return HEADS * level.get("mamba_expand", level.get("expand", 1)) if is_state else HEADS


def head_dim(value: int, name: str, level: Level) -> int:
    """Width of a head; of its rotated part in the classes that give that part's width as the head's."""
    inner = level.get("attention_hidden_size")
    if inner and value * level["num_attention_heads"] == inner:
        return HEAD_DIM * inner // level["hidden_size"]
    return HEAD_DIM // 2 if value == level.get("qk_rope_head_dim") else HEAD_DIM


def width(value: int, name: str, level: Level) -> int:
    """A width of hidden states; one that is not the hidden size, of the level or of another, stays apart from it."""
    stages, hidden = level.get(name), level.get("hidden_size")
    if isinstance(stages, (list, tuple)):
        return max(1, round(2 * value / stages[0])) * HIDDEN // 4
    if name == "embed_dim" and "depths" in level:  # the first stage's; the hidden size is the last one's
        return HIDDEN // 2
    if not is_integer(hidden) or value in level["all_hidden"]:
        return HIDDEN
    return min(max(round(value * HIDDEN / hidden / 2) * 2, 8), 4 * HIDDEN)


def intermediate(value: int, name: str, level: Level) -> int:
    """Inner width of a feed-forward layer, distinct for dense, routed and shared ones; of a state space layer."""
    expand = level.get("mamba_expand", level.get("expand"))
    if expand and (value == expand * level["hidden_size"] or "ssm" in name):
        return int(expand * HIDDEN)
    if "shared" in name:
        return 12
    return 20 if "moe" in name or "expert" in name else 24


PERIODIC = r".*(interval|layer_period|pattern|sparse_step|every_n_layers|_frequency|layer_step)"
# By attribute name, the first match counts. A number is set, a function makes one, None keeps the value. Zeros, unset
# values and booleans are switches and always stay.
RULES: tuple[tuple[str, Rule], ...] = (
    (r"(?!kv_).*(channel|kernel|stride|padding|dilation|mult|factor|ratio|label|scale|seed|expansion).*", None),
    (r".*type_vocab_sizes?|num_conv_layers|num_feat_extract_layers|pretraining_tp|chunk_size_feed_forward", None),
    (r".*vocab.*", VOCABULARY),
    (
        r".*positions?(_embeddings)?|n_ctx|context_length|max_seq_len|model_max_length|max_.*length|max_.*chunksize|rel_extent",
        at_most(POSITIONS),
    ),
    (r".*position_embeddings.*|max_pos_emb|.*max_distance|mem_len|.*num_buckets", at_most(16)),
    (r"index_topk", at_most(8)),
    (r".*shared_experts?|zero_expert_num|.*(top_?k(_(?!group)\w+)?|num_experts_per_tok(en)?|moe_k)", at_most(2)),
    (r"topk_group", 1),
    (r".*(experts?_groups?|n_group|(num|n)_?groups)", at_most(2)),
    (r".*(num|n)_\w*experts", at_most(EXPERTS)),
    (r".*rank", at_most(8)),
    (r"qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"qk_head_dim", HEAD_DIM + HEAD_DIM // 2),
    (r"(\w*_)?(head_dim|dim_head|d_head|d_kv|kv_channels|attention_head_size|mamba_headdim)", head_dim),
    (r".*(state_size|d_state)", at_most(8)),
    (r".*(key_value_heads|kv_heads|kv_n_heads|linear_num_key_heads)", key_value_heads),
    (r".*((num|n|attention)_\w*heads?|attention_heads)(_per_layer)?", heads),
    (
        r".*((intermediate|ffn_hidden|feed_forward)_size\w*|ffn_dim|d_ff|dff|dim_ff|d_inner|n_inner|mlp_dim|d_ssm)",
        intermediate,
    ),
    (r".*chunk_(left|right)_context|left_chunk", at_most(1)),
    (r".*(window|local_attention|chunk|context_size|block_size).*", at_most(4)),
    (r"conv_dim", HIDDEN),
    (r"image_size", 32),
    (r"patch_size", at_most(8)),
    (PERIODIC, at_most(2)),
    (r"(\w*_)?(offset)", at_most(1)),
    (r".*(layers?|layers_per_stack|depths?|num_(encoder_)?blocks)", at_most(2)),
    (
        r".*(hidden_size\w*|d_model|n_embd|hidden_dim|emb_dim|embed_dims?|embedding_dim|embedding_size|_out_dim)|dim|.*(embed|proj)\w*_(dim|size)",
        width,
    ),
)
DROPPED = r".*(dropout|pdrop|dropout_\w+|layerdrop|drop_\w*rate|drop_path\w*|dropout_p|jitter_noise)"
RETURNED = r"out_features|out_indices|stage_names"  # which stages a backbone returns: the last where unset
TOKEN = r".*(token_id|token_index|(pad|bos|eos|unk|mask)_(index|idx)|suppress_token)s?"


@cache
def overrides() -> dict[str, dict[str, Any]]:
    """What no name tells, by model type."""
    return json.loads(Path(__file__).with_name("probes.json").read_text())


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """A function applied to a value or to all entries of nested lists."""
    return [_map(entry, function) for entry in value] if isinstance(value, (list, tuple)) else function(value)


def _product(value: Any, attribute: Callable[[str], Any]) -> Any:
    """A value of `probes.json`; "2*head_dim" and the like stand for products of numbers and attributes."""
    if not isinstance(value, str) or "*" not in value:
        return value
    return int(math.prod(float(part) if part[0].isdigit() else attribute(part) for part in value.split("*")))


def layer_sources(data: Level, layers: int) -> tuple[int, ...]:
    """The layers that a probe keeps: each kind's first, then seconds and further ones while they are few."""
    said = [list(map(str, found)) for name, value in data.items() if (found := marks(name, value, layers))]
    said = [entries for entries in said if len(set(entries)) <= KINDS]
    kinds = list(zip(*said, strict=True)) if said else [()] * layers
    periodic = any(re.fullmatch(PERIODIC, name) and is_integer(value) and value > 1 for name, value in data.items())
    number = LAYERS if len(set(kinds)) > 1 or periodic else 2
    order = sorted(range(layers), key=lambda k: (kinds[:k].count(kinds[k]), k))
    return tuple(sorted(order[: max(number, len(set(kinds)))]))


def _shrink(config: PreTrainedConfig, data: dict[str, Any], hidden_sizes: set[int]) -> dict[str, Any]:
    """A level of a config as a dict, with small sizes."""
    names = config.attribute_map
    standard = {own: name for name, own in names.items()}  # a user's own class may name its sizes as it likes
    level = {**data, **{k: data[v] for k, v in names.items() if v in data}, "all_hidden": hidden_sizes}
    stages = next((data[key] for key in ("depths", "depth") if isinstance(data.get(key), (list, tuple))), None)
    layers: Any = len(stages) if stages else level.get("num_hidden_layers", getattr(config, "num_hidden_layers", None))
    sources = layer_sources(data, layers) if is_integer(layers) else ()
    sources = sources[:2] if stages else sources
    small: dict[str, Any] = {}
    for name, value in data.items():
        nested, carried = vars(config).get(name), value if name == PER_LAYER else carry(name, value, layers, sources)
        if re.fullmatch(RETURNED, name):
            continue
        if isinstance(nested, PreTrainedConfig):
            small[name] = _shrink(nested, value, hidden_sizes)
        elif sources and name == names.get("num_hidden_layers", "num_hidden_layers"):
            small[name] = len(sources)
        elif re.fullmatch(DROPPED, name):
            small[name] = _map(value, lambda v: type(v)(0) if isinstance(v, float) or is_integer(v) else v)
        elif re.fullmatch(f"{BELOW}|{UPTO}|{ABOVE}", name) or lists_layers(name, value):
            small[name] = carried
        else:
            known = any(re.fullmatch(pattern, name) for pattern, _ in RULES)
            small[name] = _map(carried, partial(_size, name if known else standard.get(name, name), level=level))
    if data.get("per_layer_config"):
        small["per_layer_config"] = _heterogeneous(data, small, sources, level)
    _fit_rotation(small)
    facts = overrides().get(config.model_type, {})
    for path, value in [*facts.get("set", {}).items(), *facts.get("fill", {}).items()]:
        *folders, last = path.split(".")
        target = reduce(dict.__getitem__, folders, small)
        if path in facts.get("set", {}) or target.get(last) in (None, {}):
            target[last] = _map(copy.deepcopy(value), partial(_product, attribute=target.__getitem__))
    return small


def _size(name: str, value: Any, level: Level) -> Any:
    """One number of a config after its name's rule."""
    if not is_integer(value) or value <= 0 or re.fullmatch(TOKEN, name):
        return value
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name):
            return value if rule is None else rule(value, name, level) if callable(rule) else rule
    if value in level["all_hidden"] and re.fullmatch(r".*(_dim|_size|width)", name):
        return HIDDEN
    return value


def _heterogeneous(data: Level, small: Level, sources: tuple[int, ...], level: Level) -> dict[str, Any]:
    """Layers' own attributes, at the same ratio to the other layers' where that gives a whole number."""
    result: dict[str, Any] = {}
    for new, source in enumerate(sources):
        for name, value in (own_of(data["per_layer_config"], source) or {}).items():
            base, to = data.get(name), small.get(name)
            scaled = is_integer(value) and is_integer(base) and is_integer(to) and base and value * to % base == 0
            result.setdefault(str(new), {})[name] = value * to // base if scaled else _size(name, value, level)
    return result


def _fit_rotation(small: dict[str, Any]) -> None:
    """Make rotary settings agree with the small heads, in place."""
    width = small.get("qk_rope_head_dim") or small.get("head_dim") or HEAD_DIM
    rope = small.get("rope_parameters")
    entries = [rope, *rope.values()] if isinstance(rope, dict) else []
    for entry in [small, *(entry for entry in entries if isinstance(entry, dict))]:
        partial = entry.get("partial_rotary_factor")
        rotated = max(2, int(width * partial) // 2 * 2) if isinstance(partial, float) else width
        if isinstance(partial, float):
            entry["partial_rotary_factor"] = rotated / width
        for name in ("long_factor", "short_factor"):
            if isinstance(entry.get(name), (list, tuple)):
                entry[name] = [1.0 + k for k in range(rotated // 2)]
        if is_integer(entry.get("original_max_position_embeddings")):
            longest, factor = small.get("max_position_embeddings", POSITIONS), entry.get("factor") or 2
            entry["original_max_position_embeddings"] = max(1, int(longest / factor))
        parts = len(entry.get("mrope_section") or ())
        if parts:
            entry["mrope_section"] = [rotated // 2 // parts + (k < rotated // 2 % parts) for k in range(parts)]


def _fit_tokens(data: dict[str, Any], taken: dict[int, int]) -> None:
    """Move token ids into the small vocabulary, in place: equal ones stay equal."""

    def fit(value: Any) -> Any:
        if is_integer(value) and value >= VOCABULARY:
            return taken.setdefault(value, VOCABULARY - 1 - len(taken))
        return value

    for name, value in data.items():
        if isinstance(value, dict):
            _fit_tokens(value, taken)
        elif isinstance(name, str) and re.fullmatch(TOKEN, name):
            data[name] = _map(value, fit)


def _levels(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and all configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _levels(value)


def probe_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small config of the same class and switches."""
    found = (getattr(level, "hidden_size", None) for level in _levels(config))
    hidden_sizes = {size for size in found if is_integer(size)}
    data = _shrink(config, copy.deepcopy(config.to_dict()), hidden_sizes)
    _fit_tokens(data, {})
    data.pop("quantization_config", None)
    probe = type(config).from_dict(data)
    probe._attn_implementation = "eager"
    probe._experts_implementation = "eager"
    set_dtype(probe, torch.float32)
    return probe


def set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Give a config and all configs inside it a dtype, in place."""
    for level in _levels(config):
        level.dtype = dtype


def own_config(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that a class takes: for the text model of a composite config, the one inside."""
    return next((level for level in _levels(config) if isinstance(level, model_class.config_class)), config)


# Shapes of the inputs by name; `probes.json` has those of the types that want others. A text stands for "batch",
# "length", an attribute of the model's config or of one inside it, or a product of such.
SHAPES: dict[str, Any] = {
    "input_ids": ["batch", "length"],
    "pixel_values": ["batch", "num_channels", "image_size", "image_size"],
    "input_values": ["batch", 2400],
    "input_features": ["batch", 24, "num_mel_bins"],
}


def probe_inputs(model: PreTrainedModel, seed: int = 0, batch: int = 2, length: int = 12) -> dict[str, Any]:
    """Random inputs for one forward pass, the same for the same seed."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    known = inspect.signature(model.forward).parameters
    special: list[Any] = []
    for level in _levels(config):
        _map([value for name, value in vars(level).items() if re.fullmatch(TOKEN, name)], special.append)
    ordinary = torch.tensor(sorted(set(range(VOCABULARY)) - set(special)))

    def attribute(name: str) -> Any:
        found = (value for level in _levels(config) if (value := getattr(level, name, None)))
        value = {"batch": batch, "length": length}.get(name) or next(found, 3 if name == "num_channels" else 32)
        return value[0] if isinstance(value, (list, tuple)) else value

    def size(entry: int | str) -> int:
        return attribute(entry) if isinstance(entry, str) and "*" not in entry else _product(entry, attribute)

    def draw(name: str, shape: Any) -> Any:
        if isinstance(shape, dict) and "fill" in shape:
            return torch.full([size(entry) for entry in shape["shape"]], shape["fill"])
        if isinstance(shape, dict):
            return {key: draw(name, entry) for key, entry in shape.items()}
        if isinstance(shape[0], list):
            return tuple(draw(name, entry) for entry in shape)
        sizes = [size(entry) for entry in shape]
        if name.endswith("_ids"):
            return ordinary[torch.randint(len(ordinary), sizes, generator=generator)]
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(model.dtype)

    own = overrides().get(config.model_type, {}).get("inputs", {})
    shapes = {**SHAPES, **own}
    main = model.main_input_name
    if main not in shapes or main not in known:
        main = next(name for name in shapes if name in known)
    names = [name for name in own if name in known] if main in own else [main, *(n for n in own if n in known)]
    inputs = {name: draw(name, shapes[name]) for name in names}
    if "decoder_input_ids" in known and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = draw("decoder_input_ids", ["batch", max(1, length - 3)])
    if {"use_cache", "kwargs"} & set(known):
        inputs["use_cache"] = False
    return inputs


def output_of(outputs: Any) -> Tensor:
    """The tensor to compare: logits where there are any, else the last hidden state."""
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        value = getattr(outputs, name, None)
        if isinstance(value, Tensor):
            return value
    return next(value for value in outputs.to_tuple() if isinstance(value, Tensor))
