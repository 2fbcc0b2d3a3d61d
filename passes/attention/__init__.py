"""Attention: which operators are attentions, how one may run, what each way costs, and its lowering."""
