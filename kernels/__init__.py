"""The operators of fxsp: schemas, what they mean in plain tensor operations, and their adjoints."""
