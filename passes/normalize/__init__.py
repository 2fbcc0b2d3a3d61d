"""normalize: Dynamo's graph as ATen operators above autograd."""
