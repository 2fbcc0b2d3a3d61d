"""Values that stay split between graphs: what they are, how they are converted, and when a graph may return one."""
