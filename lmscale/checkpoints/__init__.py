"""Checkpoints: tensors by their paths, saved and restored in blocks of rows."""
