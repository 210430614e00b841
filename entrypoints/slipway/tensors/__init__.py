"""Tensors as names, shapes, dtypes and bits: what families, checkpoints and training share."""
