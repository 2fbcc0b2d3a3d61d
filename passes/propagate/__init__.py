"""propagate: every value gets a type; zigzag: the tokens of a causal ring are split into heads and tails."""
