"""masks: an attention mask that is computed from positions becomes what it means."""
