"""Operators that no rule describes: they join or cut the tokens themselves, or count them."""
