"""`GrownAdamW`: AdamW in which the entries that a growth added have a step count, and a learning rate, of their own.

Under `state_policy="asymmetric_reset"` the first copy of each old entry keeps its moments and everything new starts at
zero. With the old step count Adam's bias correction would be over for both: a new second moment of zero beside a step of
thousands makes `1 / sqrt(v)` several times too large for dozens of steps. So each parameter's state holds a mask of its
new entries and the step at which they were born, and the corrections are taken with each entry's own count:

    m_hat = m / (1 - beta1^t),  v_hat = v / (1 - beta2^t),      t = step, or step - born for new entries

New entries may also be warmed up: their rate is the group's times a factor that rises linearly from 1 to `new_lr_peak`
over `new_lr_steps` of their own steps and stays there. (arXiv 2602.02472 measures 1.3 over 250 steps as best, and lets
the new entries' rate fall to the same end as the old ones'; here it keeps its ratio under any schedule.)

Parameters without a mask take torch's own AdamW step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import WarmstartError
from ..growth.state import BORN, NEW


class GrownAdamW(torch.optim.AdamW):
    """AdamW with a step count of their own for the entries that a growth added.

    Args:
        params: as for `torch.optim.AdamW`.
        new_lr_peak (`float`, defaults to 1.0): what the learning rate of new entries rises to, over that of old ones.
        new_lr_steps (`int`, defaults to 0): over how many of their own steps it rises.
        **options: as for `torch.optim.AdamW`; `amsgrad`, `maximize`, `capturable` and `differentiable` are refused.

    Its state is torch's with two more tensors, `new` (bool, the parameter's shape) and `born` (a step), for parameters
    that grew; `grow_optimizer_state(..., state_policy="asymmetric_reset")` makes it.

    Raises:
        WarmstartError: an option that has no meaning here, a factor that is not positive, steps below zero.

    Source: arXiv 2602.02472.
    """

    def __init__(self, params: Any, *args: Any, new_lr_peak: float = 1.0, new_lr_steps: int = 0, **options: Any):
        refused = sorted(name for name in ("amsgrad", "maximize", "capturable", "differentiable") if options.get(name))
        if refused:
            raise WarmstartError(
                f"GrownAdamW knows no {', '.join(refused)}. Leave it out, or pass state_policy='carry'."
            )
        if not new_lr_peak > 0 or new_lr_steps < 0:
            raise WarmstartError(
                f"new_lr_peak={new_lr_peak!r} must be above 0 and new_lr_steps={new_lr_steps!r} at least 0."
            )
        super().__init__(params, *args, **options)
        # A fused step takes gradients that overflowed and leaves them out itself; here the scaler must skip the step.
        self._step_supports_amp_scaling = False
        self.defaults |= {"new_lr_peak": float(new_lr_peak), "new_lr_steps": int(new_lr_steps)}
        for group in self.param_groups:
            for name in ("new_lr_peak", "new_lr_steps"):
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, for all parameters with a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and NEW in self.state.get(parameter, {}):
                    _step_of_two_ages(parameter, parameter.grad, self.state[parameter], group)
                    held.append((parameter, parameter.grad))
                    parameter.grad = None
        stock = torch.optim.AdamW.step
        try:
            # torch hooks the class's step once a stock AdamW was made; the hooks of this step are its own.
            (stock.__wrapped__ if getattr(stock, "hooked", False) else stock)(self)  # type: ignore[attr-defined]
        finally:
            for parameter, gradient in held:
                parameter.grad = gradient
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; masks stay masks, which torch would cast to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for entry in self.state.values():
            if NEW in entry:
                entry[NEW] = entry[NEW].to(torch.bool)


def _step_of_two_ages(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW's step with the bias corrections, and the learning rate, of each entry's own age."""
    first, second = group["betas"]
    state["step"] += 1
    old_age = float(state["step"])
    new_age = old_age - float(state[BORN])
    new = state[NEW]

    def either(young: float, old: float) -> Tensor | float:
        """What holds for a new entry or for an old one: per entry, in the parameter's dtype, where the two differ."""
        # By arithmetic: filling under a mask takes three times as long.
        return old if young == old else new.to(parameter.dtype).mul_(young - old).add_(old)

    warmed = min(1.0, new_age / group["new_lr_steps"]) if group["new_lr_steps"] else 1.0
    rates = group["lr"] * (1 + (group["new_lr_peak"] - 1) * warmed), group["lr"]
    ages = new_age, old_age
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    # The corrections as two factors, on the root of the second moment and on the rate, so that each takes one tensor.
    spread = state["exp_avg_sq"].sqrt().mul_(either(*((1 - second**age) ** -0.5 for age in ages))).add_(group["eps"])
    step = torch.div(state["exp_avg"], spread, out=spread)
    step.mul_(either(*(rate / (1 - first**age) for rate, age in zip(rates, ages, strict=True))))
    if group["weight_decay"]:
        parameter.mul_(either(*(1 - rate * group["weight_decay"] for rate in rates)))
    parameter.sub_(step)
