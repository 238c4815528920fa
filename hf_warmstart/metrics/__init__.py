"""Held-out loss, perplexity and bits per byte of language models, every predicted token counted once; all without a network."""

from .held_out import METRIC, compute_metrics, held_out_metrics, load_metric, token_losses

__all__ = ["METRIC", "compute_metrics", "held_out_metrics", "load_metric", "token_losses"]
