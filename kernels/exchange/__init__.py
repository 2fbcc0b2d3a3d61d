"""The exchange of tokens for heads: its orders, operators and Triton kernels."""
