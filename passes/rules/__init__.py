"""The rule table: how the dimensions of an operator's operands and results decompose into factors."""
