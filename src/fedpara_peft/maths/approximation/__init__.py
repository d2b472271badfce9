"""Weights of a lower rank that stand for a weight, and how far they are from it."""
