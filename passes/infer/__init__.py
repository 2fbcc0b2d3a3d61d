"""infer: what to split in a graph that no plan speaks of."""
