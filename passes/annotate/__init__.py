"""annotate: the plan, and splits from earlier graphs, become markers in Dynamo's graph."""
