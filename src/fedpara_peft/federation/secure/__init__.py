"""Secure aggregation in a round: who agrees on what, what a client seals, who passes messages."""
