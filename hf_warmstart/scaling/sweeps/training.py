"""One run of a sweep: a trunk at a constant rate, and for each horizon a decay that branches off from it.

A loss before its decay is no point of a law. With warmup-stable-decay all but the decay of a shorter run is part of a
longer one (arXiv 2404.06395, section 4), so that a run of H sequences that also answers for H/2 costs a tenth more. The
rate is that of `transformers`' `warmup_stable_decay` with a linear decay to 0, so that what is found holds for `Trainer`.
The last step of a run takes the sequences that are left: all runs of a budget see exactly as many tokens.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...growth.twin import default_dtype
from .config import SweepConfig
from .design import Point
from .proxies import Proxy
from .text import Blocks

CHECKS = (0.25, 0.5)  # shares of the longest horizon at which a hopeless run is stopped
FINISHED, STOPPED, DIVERGED = "finished", "stopped", "diverged"
FINITE_EVERY = 16  # steps between looks at the loss, which make a GPU wait
RATE_FACTOR = "rate_factor"  # of a group of parameters: its rate over the run's; 1 where there is none
Begin = Callable[[], tuple[PreTrainedModel, torch.optim.Optimizer]]
Take = Callable[[PreTrainedModel, torch.optim.Optimizer], None]


@dataclass(frozen=True)
class Horizon:
    """The steps of a run of one length.

    Args:
        steps: all of them. decay: those of the linear decay at the end. warmup: those of the warm-up.
    """

    steps: int
    decay: int
    warmup: int

    @classmethod
    def of(cls, sequences: int, shortest: int, batch: int, asked: SweepConfig) -> Horizon:
        """Args: sequences of the run and of the shortest one, and of a batch."""
        steps = math.ceil(sequences / batch)
        decay = max(1, round(asked.decay * steps))
        warmup = min(round(asked.warmup * math.ceil(shortest / batch)), steps - decay)
        return cls(steps, decay, warmup)

    @property
    def stable_end(self) -> int:
        """The step at which the decay branches off."""
        return self.steps - self.decay

    def rate(self, step: int) -> float:
        """The learning rate at a step, over its peak: `get_wsd_schedule` with `decay_type="linear"`."""
        if step < self.warmup:
            return step / self.warmup
        return 1.0 if step < self.stable_end else (self.steps - step) / self.decay


@dataclass(frozen=True)
class Reference:
    """The best held-out losses of earlier rounds at the moments of `CHECKS`; None where nothing is known."""

    losses: tuple[float | None, ...] = (None,) * len(CHECKS)

    def gives_up(self, check: int, loss: float, ratio: float | None) -> bool:
        """Whether a run with a loss at a check is hopeless."""
        best = self.losses[check]
        return ratio is not None and best is not None and loss > ratio * best


@dataclass(frozen=True)
class Outcome:
    """What became of one horizon of a run.

    Args:
        status: `finished`, `stopped` or `diverged`. loss: held-out, nats per token; None unless finished.
        check_losses: held-out losses of the trunk at `CHECKS`; None where it did not come so far.
        spent_tokens, spent_evaluations: what this horizon added, in trained tokens and in passes over the held-out text.
        steps: of the whole run. seconds: that it added.
    """

    status: str
    loss: float | None
    check_losses: tuple[float | None, ...]
    spent_tokens: int
    spent_evaluations: int
    steps: int
    seconds: float


def train(
    model_class: type[PreTrainedModel],
    proxy: Proxy,
    point: Point,
    seed: int,
    texts: tuple[Blocks, Blocks],
    asked: SweepConfig,
    reference: Reference,
    device: torch.device,
    advance: Callable[[int], None] = lambda tokens: None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    take: Callable[[PreTrainedModel], None] = lambda model: None,
    begin: Begin | None = None,
    take_trunk: Take = lambda model, optimizer: None,
) -> list[Outcome]:
    """Train one proxy at one point.

    Args:
        texts: to train on, and held out. reference: for stopping. advance: told the tokens of each step. weights: to start
            from, in place of new ones. take: given the model of each horizon that was finished.
        begin: makes model and optimizer, in place of new ones of the proxy's config; a group of parameters may have a
            `rate_factor`. take_trunk: given both where the last horizon's decay begins.

    Returns:
        An outcome for each horizon. The global random state is untouched.
    """
    with _own_random_state(seed, device):
        run = _Run(model_class, proxy, point, seed, texts, asked, reference, device, advance, take, begin, take_trunk)
        if weights is not None:
            run.model.load_state_dict(weights)
        return run.run()


class _Run:
    def __init__(
        self, model_class, proxy, point, seed, texts, asked, reference, device, advance, take, begin, take_trunk
    ):
        self.proxy, self.point, self.seed, self.asked = proxy, point, seed, asked
        self.texts, self.reference, self.device = texts, reference, device
        self.advance, self.take, self.take_trunk = advance, take, take_trunk
        if begin is None:
            self.model = new_model(model_class, proxy, device)
            self.optimizer = new_optimizer(self.model, point.learning_rate, asked)
        else:
            self.model, self.optimizer = begin()
        batch, shortest = point.batch_sequences, min(proxy.horizons)
        self.horizons = [Horizon.of(sequences, shortest, batch, asked) for sequences in proxy.horizons]
        self.check_steps = [max(1, round(share * self.horizons[-1].steps)) for share in CHECKS]
        self.checked: list[float | None] = [None] * len(CHECKS)
        self.tokens = self.evaluations = 0
        self.begun = time.perf_counter()

    def run(self) -> list[Outcome]:
        outcomes: list[Outcome] = []
        step, status = 0, FINISHED
        for number, (horizon, sequences) in enumerate(zip(self.horizons, self.proxy.horizons, strict=True)):
            last = number == len(self.horizons) - 1
            loss = None
            if status == FINISHED:
                status = self._trunk(step, horizon)
                step = horizon.stable_end
            if status == FINISHED:
                if last:
                    self.take_trunk(self.model, self.optimizer)
                saved = None if last else self._state()
                branch = self._branch(horizon, sequences)
                loss = self._evaluate() if branch == FINISHED else None
                # Worse than guessing every token with the same probability is no model.
                if loss is None or not loss < math.log(self.model.config.get_text_config().vocab_size):
                    branch, loss = DIVERGED, None
                else:
                    self.take(self.model)
                if saved is not None:
                    self._restore(saved)
                outcomes.append(self._outcome(branch, loss, horizon))
            else:
                outcomes.append(self._outcome(status, None, horizon))
        return outcomes

    def _trunk(self, start: int, horizon: Horizon) -> str:
        """Train to where a horizon's decay begins, looking at the held-out loss on the way."""
        longest = self.horizons[-1]
        for step in range(start, horizon.stable_end):
            if not self._step(step, longest, self.point.batch_sequences):
                return DIVERGED
            if step + 1 in self.check_steps and self.asked.stop_ratio is not None:
                check = self.check_steps.index(step + 1)
                loss = self._evaluate()
                if not math.isfinite(loss):
                    return DIVERGED
                self.checked[check] = loss
                if self.reference.gives_up(check, loss, self.asked.stop_ratio):
                    return STOPPED
        return FINISHED

    def _branch(self, horizon: Horizon, sequences: int) -> str:
        """Decay to a horizon's end."""
        batch = self.point.batch_sequences
        for step in range(horizon.stable_end, horizon.steps):
            if not self._step(step, horizon, min(batch, sequences - step * batch)):
                return DIVERGED
        return FINISHED

    def _step(self, step: int, horizon: Horizon, batch: int) -> bool:
        """One optimizer step on the stream's next sequences; whether the loss is known to be a number still."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.point.learning_rate * group.get(RATE_FACTOR, 1.0) * horizon.rate(step)
        start = step * self.point.batch_sequences
        rows = self.texts[0].rows(start, start + batch, self.seed).to(self.device)
        loss = accumulate(self.model, rows, self.asked)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.asked.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += rows.numel()
        self.advance(rows.numel())
        look = (step + 1) % FINITE_EVERY == 0 or step + 1 in (horizon.steps, horizon.stable_end)
        return not look or bool(torch.isfinite(loss))

    def _evaluate(self) -> float:
        self.evaluations += 1
        return held_out_loss(self.model, self.texts[1], self.asked)

    def _state(self) -> tuple[dict, dict, Tensor]:
        return *copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict())), torch.get_rng_state()

    def _restore(self, saved: tuple[dict, dict, Tensor]) -> None:
        self.model.load_state_dict(saved[0])
        self.optimizer.load_state_dict(saved[1])
        torch.set_rng_state(saved[2])

    def _outcome(self, status: str, loss: float | None, horizon: Horizon) -> Outcome:
        now = time.perf_counter()
        made = Outcome(
            status, loss, tuple(self.checked), self.tokens, self.evaluations, horizon.steps, now - self.begun
        )
        self.tokens, self.evaluations, self.begun = 0, 0, now
        return made


def new_model(model_class: type[PreTrainedModel], proxy: Proxy, device: torch.device) -> PreTrainedModel:
    """A proxy with weights drawn from the global random state, in float32."""
    config = copy.deepcopy(proxy.config)
    config.dtype = torch.float32
    with default_dtype(torch.float32):
        return model_class(config).float().to(device).train()


def new_optimizer(
    model: nn.Module, learning_rate: float, asked: SweepConfig, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.AdamW:
    """AdamW, or a kind of it, with weight decay on what `Trainer` decays: all but biases and norms."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, asked.weight_decay), (False, 0.0))
    ]
    # Of small models half of a step is else the optimizer's.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    betas = asked.adam_beta1, asked.adam_beta2
    return kind(groups, lr=learning_rate, betas=betas, eps=asked.adam_epsilon, fused=fused)


def accumulate(model: PreTrainedModel, rows: Tensor, asked: SweepConfig) -> Tensor:
    """Gradients of the mean loss over the tokens of a batch (sequences, tokens), in parts that fit; the loss."""
    total = torch.zeros((), device=rows.device)
    for part in rows.split(asked.per_device_batch):
        with _autocast(rows.device, asked):
            loss = model(input_ids=part, labels=part, use_cache=False).loss * (len(part) / len(rows))
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, blocks: Blocks, asked: SweepConfig) -> float:
    """Mean loss over all predicted tokens of held-out text, in nats, summed in float64; the model is left in training mode."""
    model.eval()
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in blocks.tokens.split(asked.per_device_batch):
        rows = part.long().to(device)
        with _autocast(device, asked):
            logits = model(input_ids=rows, use_cache=False).logits
        losses = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none"
        )
        total += losses.double().sum().cpu()
        count += losses.numel()
    model.train()
    return float(total) / count


def _autocast(device: torch.device, asked: SweepConfig) -> Any:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=asked.bf16)


@contextmanager
def _own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    devices: Sequence[torch.device] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
