"""What Dynamo's graph stands for: module calls, their values as nodes, and splits that outlive a graph."""
