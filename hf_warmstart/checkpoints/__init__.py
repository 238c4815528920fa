"""Checkpoints: where a parent's weights and training state are read from, and grown ones written to."""
