"""The training state beside the weights: whose it is, how it is read, what becomes of it."""
