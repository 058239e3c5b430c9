"""Faces drawn from parameters: what a face is made of, what an expression is, and how both are painted."""
