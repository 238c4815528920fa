"""Scaling: what a run is worth in tokens of training from scratch."""

from .growing.tokens_to_loss import Bounded, loss_at_tokens, speedup, tokens_to_loss

__all__ = ["Bounded", "loss_at_tokens", "speedup", "tokens_to_loss"]
