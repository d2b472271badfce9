"""Differential privacy: noise and its ε, and a clipping norm that follows the updates."""

from .adaptive_clip import AdaptiveClip
from .mechanism import GaussianMechanism, noise_seed

__all__ = ["AdaptiveClip", "GaussianMechanism", "noise_seed"]
