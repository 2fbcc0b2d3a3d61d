"""The passes, one per file; the pipeline and the contract are in ``pipeline`` and ``base``."""
