"""The mean of factors beside the mean of weights: measured, and made the same."""

from .bias import AveragingBias
from .exact import ExactAverage

__all__ = ["AveragingBias", "ExactAverage"]
