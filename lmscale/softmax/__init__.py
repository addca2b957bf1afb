"""The softmax over a table: heads, samplers, the formulas and their gradients."""
