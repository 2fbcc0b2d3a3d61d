"""The ways to attend, one per file."""
