"""The ranks of a group among each other: what must be alike, who is late, lost or gone."""
