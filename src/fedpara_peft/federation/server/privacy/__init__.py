"""Differential privacy: noise and its ε, and a clipping norm that follows the updates."""

from .adaptive_clip import AdaptiveClip
from .client_noise import clipped, with_own_noise
from .mechanism import GaussianMechanism, noise_seed, require_protected

__all__ = [
    "AdaptiveClip",
    "GaussianMechanism",
    "clipped",
    "noise_seed",
    "require_protected",
    "with_own_noise",
]
