"""functionalize: no operator writes to a tensor any more."""
