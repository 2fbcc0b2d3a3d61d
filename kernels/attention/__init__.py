"""Attention over split keys: rings, merged blocks, bands, and the kernels of a block."""
