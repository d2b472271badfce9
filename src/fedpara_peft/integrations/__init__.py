"""Ties to other libraries' training loops."""
