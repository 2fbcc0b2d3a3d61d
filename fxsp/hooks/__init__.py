"""The hook registry for eager mode."""
