"""`GrowthConfig`: what a person asks for."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..errors import WarmstartError
from ..version import __version__
from .operators import DEPTH_OPERATORS, WIDTH_OPERATORS, OperatorOptions

CONFIG_NAME = "growth_config.json"
AUTO = "auto"
# What a config says about files and runs, not about the model.
_NOT_COMPARED = {"_name_or_path", "transformers_version", "dtype", "use_cache", "return_dict"}


@dataclass(frozen=True)
class GrowthConfig:
    """A growth, as asked for.

    Args:
        width (`float`, *optional*): multiplies the residual stream, MLP units, query heads and key/value heads (one
            key/value head stays one). Vocabulary, positions, `head_dim` and experts keep their size; models whose heads are
            counted by a table of constants (ALiBi) grow `head_dim` instead of heads.
        depth (`float`, *optional*): multiplies the number of layers.
        growth_factor (`float`, *optional*): multiplies the total number of parameters; the sizes are solved for.
        sizes (`dict[str, int]`, *optional*): config attributes by their transformers names, such as
            `{"hidden_size": 768}`; those of a part by their path (`"text_config.hidden_size"`) where the name alone is not
            clear. They go before `width` and `depth`; what is not named keeps its size.
        target_config (`PreTrainedConfig` or `dict`, *optional*): a config of the grown model; its sizes are taken.
        width_operator (`str`, defaults to `"auto"`): one of `exact_copy`, `perturbed_copy`, `uneven_copy`,
            `reference_slice`, `szp`; or `"auto"`: `reference_slice` where all that grows can take fresh units, else
            `perturbed_copy`. A plan, and the record of what was grown, hold the operator's name, never `"auto"`.
        depth_operator (`str`, defaults to `"identity_blocks"`): one of `identity_blocks`, `stack`, `interleave`,
            `overlap`.
        noise (`float`, defaults to 0.2): `perturbed_copy`: paired noise over the root mean square of the weights. Another
            value than this asks for `perturbed_copy` where no operator is named.
        uneven_ratio (`float`, defaults to 0.5): `uneven_copy`: the share of each copy over the copy before it.
        shrink (`float`, defaults to 0.4): `szp`: factor on the parent's weights.
        seed (`int`, defaults to 0): seed of everything random.

    Example:

        >>> GrowthConfig(width=2, depth=1.5).width_operator
        'auto'
    """

    width: float | None = None
    depth: float | None = None
    growth_factor: float | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    target_config: Any = None
    width_operator: str = AUTO
    depth_operator: str = "identity_blocks"
    noise: float = 0.2
    uneven_ratio: float = 0.5
    shrink: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target_config is not None:
            object.__setattr__(self, "target_config", _scalars(self.target_config))
        problems = [
            f"{name}={value!r} must be a number of at least 1"
            for name in ("width", "depth", "growth_factor")
            if (value := getattr(self, name)) is not None and (not _is_number(value) or value < 1)
        ]
        if self.width_operator not in (AUTO, *WIDTH_OPERATORS):
            problems.append(f"width_operator={self.width_operator!r} is none of {sorted((AUTO, *WIDTH_OPERATORS))}")
        if self.depth_operator not in DEPTH_OPERATORS:
            problems.append(f"depth_operator={self.depth_operator!r} is none of {sorted(DEPTH_OPERATORS)}")
        for name in ("noise", "uneven_ratio", "shrink"):
            if not _is_number(getattr(self, name)) or getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)!r} must be a number of at least 0")
        if self.width_operator == "uneven_copy" and self.uneven_ratio == 0:
            problems.append("uneven_ratio=0 would leave copies that nothing reads; pass more than 0")
        if self.growth_factor is not None and (self.width or self.target_config or self.sizes):
            problems.append("growth_factor solves for the sizes; pass it with depth at most, not with width or sizes")
        if not isinstance(self.seed, int):
            problems.append(f"seed={self.seed!r} must be an integer")
        if problems:
            raise WarmstartError("GrowthConfig: " + "; ".join(sorted(problems)) + ".")

    @property
    def options(self) -> OperatorOptions:
        """The operators' options."""
        return OperatorOptions(self.noise, self.uneven_ratio, self.shrink)

    def to_dict(self) -> dict:
        """Plain data, stamped with the library's version; fields at their defaults are left out."""
        data: dict[str, Any] = {"library_version": __version__}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None and value != item.default and value != {}:
                data[item.name] = dict(value) if isinstance(value, Mapping) else value
        # Operators and seed decide the bits, so they are always written.
        data |= {name: getattr(self, name) for name in ("width_operator", "depth_operator", "seed")}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GrowthConfig:
        """Read what `to_dict` wrote; unknown fields raise."""
        data = {name: value for name, value in data.items() if name != "library_version"}
        unknown = sorted(set(data) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise WarmstartError(f"A growth config has no fields {unknown}; it may come from a newer hf_warmstart.")
        return cls(**data)

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write `growth_config.json` into a folder (made if missing)."""
        path = Path(folder) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> GrowthConfig:
        """Read `growth_config.json` from a folder."""
        path = Path(folder) / CONFIG_NAME
        if not path.is_file():
            raise WarmstartError(f"{path} does not exist. Save a GrowthConfig there with save_pretrained first.")
        return cls.from_dict(json.loads(path.read_text()))

    @classmethod
    def of(cls, growth_config: GrowthConfig | PreTrainedConfig | Mapping | None, options: Mapping) -> GrowthConfig:
        """The config behind `grow(model, growth_config, **options)`; other keywords are sizes by name.

        Raises:
            WarmstartError: both a config and options were given, or nothing was asked for.
        """
        fields = {item.name for item in dataclasses.fields(cls)}
        if isinstance(growth_config, PreTrainedConfig):
            growth_config = cls(target_config=growth_config, **{k: v for k, v in options.items() if k in fields})
            options = {k: v for k, v in options.items() if k not in fields}
        if isinstance(growth_config, Mapping):
            growth_config = cls.from_dict(growth_config)
        if growth_config is not None:
            if options:
                raise WarmstartError(
                    f"A growth config and the options {sorted(options)} were both given. Put the options into the config."
                )
            return growth_config
        own = {name: value for name, value in options.items() if name in fields}
        loose = {name: value for name, value in options.items() if name not in fields}
        made = cls(**{**own, "sizes": {**own.get("sizes", {}), **loose}})
        if not (made.width or made.depth or made.growth_factor or made.sizes or made.target_config):
            raise WarmstartError("Nothing to grow: pass width, depth, growth_factor, sizes or target_config.")
        return made


def _scalars(target: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, switches and names of a target config: what a growth compares, and no path."""
    data = target.to_dict() if isinstance(target, PreTrainedConfig) else target
    return {n: v for n, v in data.items() if n not in _NOT_COMPARED and isinstance(v, (bool, int, float, str))}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
