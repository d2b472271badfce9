"""Secure aggregation: a server that sees the sum of a cohort's updates and no single one.

The practical secure aggregation of Bonawitz et al. (CCS 2017), as machines without input or output:
bytes in, bytes out.
"""
