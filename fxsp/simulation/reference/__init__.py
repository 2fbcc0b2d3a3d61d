"""What each fxsp operator means, on a list with one tensor per rank: the oracle, written apart from the kernels."""
