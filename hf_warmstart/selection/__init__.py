"""Choosing the warm start: candidates over the full training state, ranked under the regime that they will be trained in."""
