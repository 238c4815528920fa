"""What a study is made of: sizes of models, arms, budgets.

`N` counts all parameters, as arXiv 2605.13405 does. Embeddings are tied, so that these are also the parameters that a token
is multiplied with, and `6 N D` leaves out attention alone. The growth factor of an arm is `g = N_target / N_base`, and its
budget `r = D / N_target` tokens per parameter since the growth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from transformers import LlamaConfig

from hf_warmstart import WarmstartError
from hf_warmstart.scaling.sweeps.config import SweepConfig
from hf_warmstart.scaling.tables.compute import count_parameters

CARRY, ASYMMETRIC, FRESH = "carry", "asymmetric_reset", "reset"
STATE_WORDS = {CARRY: "carried", ASYMMETRIC: "asymmetric reset", FRESH: "fresh"}


@dataclass(frozen=True)
class Size:
    """A Llama: width, units of the MLP, layers, heads of `head_dim`."""

    hidden: int
    inner: int
    layers: int
    heads: int
    head_dim: int = 8

    def config(self, vocabulary: int, length: int) -> LlamaConfig:
        """Its config, with tied embeddings."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            head_dim=self.head_dim,
            vocab_size=vocabulary,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )


@dataclass(frozen=True)
class Arm:
    """A way to grow one size into another and go on.

    Args:
        target, base: names of sizes. width, depth: operators; each counts where that axis grows. shrink: of `szp`.
        state: what becomes of the optimizer's state. warmup: whether the rate is warmed up anew; None: with a fresh state only.
        transfer: whether the rate is the base's, carried over by muP (as in the paper), instead of the one tuned for the
            target from scratch. long: whether it is run to the last budget, instead of the second.
    """

    target: str
    base: str
    width: str = "perturbed_copy"
    depth: str = "identity_blocks"
    shrink: float = 0.4
    state: str = CARRY
    warmup: bool | None = None
    transfer: bool = False
    long: bool = False

    @property
    def warms_up(self) -> bool:
        """Whether the rate rises from 0 after the growth."""
        return self.state == FRESH if self.warmup is None else self.warmup


def paper(target: str, base: str, shrink: float = 0.4, long: bool = False) -> Arm:
    """The paper's own recipe: shrink, pad, perturb; a fresh state; the base's rate by muP."""
    return Arm(target, base, "szp", shrink=shrink, state=FRESH, transfer=True, long=long)


@dataclass(frozen=True)
class Setting:
    """A study.

    Args:
        sizes: by name. targets: names of those that are grown into, with the base whose rate is carried over to scratch.
        arms: in the order in which they are run. controls: (target, base) of bases that are trained on for equal FLOPs.
        rungs: tokens per parameter of a target at which runs end, rising. scratch_rungs: of runs from scratch, further, so that
            tokens to a loss can be read off. base_rung: of bases.
        rates: tried for every size from scratch. factors: on the rate of an arm, tried for each arm. scratch_factors: on the
            rate that muP carries over to scratch; tried where there are several.
        seeds: reported. tuning_seed: of all trials, and of no reported run.
        vocabulary, length, batch: tokens of the vocabulary, of a sequence; sequences of a step.
        max_epochs: passes over the text at most, of any one run; budgets shrink where they would take more.
        eval_tokens: of held-out text, at most. bf16, per_device_batch: as in `SweepConfig`.
        checks: names of the arms' methods on which the advice is checked, see `calibration`; without any the report is about
            the arms alone: neither the paper's claims nor laws are in it.
        target_by_target: whether a target is run with all its seeds before the next one is begun, instead of a seed of all
            targets: where time may end within a study, one target with intervals tells more than two without.
    """

    sizes: Mapping[str, Size]
    targets: Mapping[str, str]
    arms: tuple[Arm, ...]
    controls: tuple[tuple[str, str], ...]
    rungs: tuple[float, ...] = (5.0, 10.0, 20.0)
    scratch_rungs: tuple[float, ...] = (5.0, 10.0, 20.0, 30.0)
    base_rung: float = 20.0
    rates: tuple[float, ...] = (4e-3, 8e-3, 16e-3)
    factors: tuple[float, ...] = (1.0, 0.5)
    scratch_factors: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 1000
    vocabulary: int = 1024
    length: int = 128
    batch: int = 16
    max_epochs: float = 4.0
    eval_tokens: int = 2**16
    bf16: bool = False
    per_device_batch: int = 32
    checks: tuple[str, ...] = ("szp 0.4, fresh", "perturbed_copy, carried")
    target_by_target: bool = False

    @cached_property
    def params(self) -> dict[str, int]:
        """All parameters of each size."""
        return {name: count_parameters(self.config(name)).total for name in self.sizes}

    def config(self, size: str) -> LlamaConfig:
        """The config of a size."""
        return self.sizes[size].config(self.vocabulary, self.length)

    def growth_factor(self, target: str, base: str) -> float:
        """g of a pair of sizes."""
        return self.params[target] / self.params[base]

    def method(self, arm: Arm) -> str:
        """What an arm is called: operators of the axes that grow, state, and warm-up where it is not the usual one."""
        target, base = self.sizes[arm.target], self.sizes[arm.base]
        operators = []
        if target.hidden != base.hidden:
            operators.append(f"szp {arm.shrink:g}" if arm.width == "szp" else arm.width)
        if target.layers != base.layers:
            operators.append(arm.depth)
        words = [" + ".join(operators), STATE_WORDS[arm.state]]
        if arm.warms_up != (arm.state == FRESH):
            words.append("re-warmed" if arm.warms_up else "not warmed up")
        return ", ".join(words)

    def asked(self, warmup: bool = True) -> SweepConfig:
        """Optimizer and schedule of a run."""
        return SweepConfig(
            stop_ratio=None,
            warmup=0.05 if warmup else 0.0,
            bf16=self.bf16,
            per_device_batch=self.per_device_batch,
            max_eval_tokens=self.eval_tokens,
        )


QUICK = Setting(
    sizes={"target": Size(32, 48, 2, 4), "width": Size(16, 24, 2, 2), "depth": Size(32, 48, 1, 4)},
    targets={"target": "width"},
    arms=(
        paper("target", "width", long=True),
        Arm("target", "width", long=True),
        Arm("target", "depth", depth="stack"),
        Arm("target", "width", state=ASYMMETRIC),
    ),
    controls=(("target", "width"),),
    rungs=(0.05, 0.1, 0.2),
    scratch_rungs=(0.05, 0.1, 0.2, 0.4),
    base_rung=0.3,
    rates=(1e-2, 2e-2),
    seeds=(0, 1),
    vocabulary=300,
    length=16,
    batch=8,
    eval_tokens=2**11,
)  # fmt: skip

# 0.13M parameters. At 0.08 s for a step of the first target (2,048 tokens, one core) all runs take about 9,500 s.
HOUR = Setting(
    sizes={
        "48x3": Size(48, 128, 3, 6),
        "32x3": Size(32, 86, 3, 4),
        "48x1": Size(48, 128, 1, 6),
        "20x3": Size(20, 54, 3, 2),
        "24x1": Size(24, 64, 1, 3),
        "12x3": Size(12, 32, 3, 2),
    },
    targets={"48x3": "32x3", "32x3": "20x3"},
    arms=(
        paper("48x3", "32x3", long=True),
        Arm("48x3", "32x3", long=True),
        Arm("48x3", "48x1", depth="stack", long=True),
        paper("48x3", "20x3", long=True),
        Arm("48x3", "20x3", long=True),
        Arm("48x3", "24x1", depth="stack", long=True),
        paper("48x3", "32x3", shrink=1.0),
        Arm("48x3", "32x3", state=FRESH),
        Arm("48x3", "48x1"),
        Arm("48x3", "32x3", "reference_slice"),
        Arm("48x3", "32x3", "uneven_copy"),
        Arm("48x3", "32x3", state=ASYMMETRIC),
        Arm("48x3", "32x3", "reference_slice", state=ASYMMETRIC),
        Arm("48x3", "20x3", "reference_slice", state=ASYMMETRIC),
        paper("32x3", "20x3", long=True),
        Arm("32x3", "20x3", long=True),
        paper("32x3", "12x3", long=True),
        Arm("32x3", "12x3", long=True),
    ),
    controls=(("48x3", "32x3"), ("48x3", "48x1"), ("48x3", "20x3")),
)  # fmt: skip

# More ways to start and more seeds where runs are cheap: the hour's second target, near twofold, at 10 tokens per parameter.
# Scratch tries four rates of its own and three that muP carries over, every arm three.
TWOFOLD = Setting(
    sizes={name: HOUR.sizes[name] for name in ("32x3", "20x3")},
    targets={"32x3": "20x3"},
    arms=(
        paper("32x3", "20x3"),
        Arm("32x3", "20x3", "reference_slice"),
        Arm("32x3", "20x3", "reference_slice", state=ASYMMETRIC),
        Arm("32x3", "20x3", "reference_slice", state=FRESH),
        paper("32x3", "20x3", shrink=0.3),
        Arm("32x3", "20x3", "szp"),
        Arm("32x3", "20x3"),
    ),
    controls=(("32x3", "20x3"),),
    scratch_rungs=(5.0, 10.0, 20.0),
    rates=(4e-3, 8e-3, 16e-3, 32e-3),
    factors=(2.0, 1.0, 0.5),
    scratch_factors=(2.0, 1.0, 0.5),
    seeds=tuple(range(8)),
    checks=(),
)  # fmt: skip

# 0.65M parameters and g to 8.
OVERNIGHT = Setting(
    sizes={
        "96x5": Size(96, 256, 5, 12),
        "64x5": Size(64, 172, 5, 8),
        "96x2": Size(96, 256, 2, 12),
        "44x5": Size(44, 118, 5, 4),
        "64x2": Size(64, 172, 2, 8),
        "28x5": Size(28, 75, 5, 4),
        "28x2": Size(28, 75, 2, 4),
    },
    targets={"96x5": "64x5", "64x5": "44x5"},
    arms=(
        paper("96x5", "64x5", long=True),
        Arm("96x5", "64x5", long=True),
        Arm("96x5", "96x2", depth="stack", long=True),
        paper("96x5", "44x5", long=True),
        Arm("96x5", "44x5", long=True),
        Arm("96x5", "64x2", depth="stack", long=True),
        paper("96x5", "28x5", long=True),
        Arm("96x5", "28x5", long=True),
        Arm("96x5", "28x2", depth="stack"),
        paper("96x5", "64x5", shrink=1.0),
        Arm("96x5", "64x5", state=FRESH),
        Arm("96x5", "96x2"),
        Arm("96x5", "64x5", "reference_slice"),
        Arm("96x5", "64x5", "uneven_copy"),
        Arm("96x5", "64x5", state=ASYMMETRIC),
        paper("64x5", "28x5", long=True),
        Arm("64x5", "28x5", long=True),
        paper("64x5", "44x5", long=True),
        Arm("64x5", "44x5", long=True),
    ),
    controls=(("96x5", "64x5"), ("96x5", "96x2"), ("96x5", "44x5"), ("96x5", "28x5")),
    rates=(3e-3, 6e-3, 12e-3),
)  # fmt: skip

# 32M and 127M parameters on one GPU.
GPU = Setting(
    sizes={
        "512x10": Size(512, 1376, 10, 8, 64),
        "384x10": Size(384, 1024, 10, 6, 64),
        "512x5": Size(512, 1376, 5, 8, 64),
        "256x10": Size(256, 688, 10, 4, 64),
        "1024x10": Size(1024, 2752, 10, 16, 64),
        "768x10": Size(768, 2048, 10, 12, 64),
    },
    targets={"512x10": "384x10", "1024x10": "768x10"},
    arms=(
        paper("512x10", "384x10", long=True),
        Arm("512x10", "384x10", long=True),
        Arm("512x10", "512x5", depth="stack", long=True),
        paper("512x10", "256x10", long=True),
        Arm("512x10", "256x10", long=True),
        Arm("512x10", "384x10", "reference_slice"),
        Arm("512x10", "384x10", state=FRESH),
        paper("1024x10", "768x10", long=True),
        Arm("1024x10", "768x10", long=True),
        paper("1024x10", "512x10", long=True),
        Arm("1024x10", "512x10", long=True),
    ),
    controls=(("512x10", "384x10"), ("512x10", "512x5")),
    scratch_rungs=(5.0, 10.0, 20.0, 40.0),
    rates=(7.5e-4, 1.5e-3, 3e-3),
    length=256,
    batch=64,
    bf16=True,
    per_device_batch=64,
    eval_tokens=2**17,
    target_by_target=True,
)  # fmt: skip

SETTINGS = {"quick": QUICK, "hour": HOUR, "twofold": TWOFOLD, "overnight": OVERNIGHT, "gpu": GPU}


def tenth(setting: Setting) -> Setting:
    """The GPU's setting at about a tenth of its widths and a thousandth of its budgets, to try it on a CPU."""
    small = {
        name: Size(size.hidden // 8, size.inner // 8, max(1, size.layers // 2), size.heads, size.head_dim // 8)
        for name, size in setting.sizes.items()
    }
    return replace(setting, sizes=small, max_epochs=0.001, batch=4, per_device_batch=8, eval_tokens=2**12)


def only(setting: Setting, targets: Sequence[str]) -> Setting:
    """A setting without other targets than these, and without what they do not need.

    Raises:
        WarmstartError: it has no such targets.
    """
    if unknown := sorted(set(targets) - set(setting.targets)):
        raise WarmstartError(f"The setting has no targets {unknown}; it has {list(setting.targets)}.")
    arms = tuple(arm for arm in setting.arms if arm.target in targets)
    controls = tuple(pair for pair in setting.controls if pair[0] in targets)
    kept = {name: base for name, base in setting.targets.items() if name in targets}
    needed = {*kept, *kept.values(), *(arm.base for arm in arms), *(base for _, base in controls)}
    sizes = {name: size for name, size in setting.sizes.items() if name in needed}
    return replace(setting, sizes=sizes, targets=kept, arms=arms, controls=controls)
