"""Folders of safetensors, read and written row by row, without a model and without trust."""
