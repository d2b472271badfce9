"""A clipping norm that follows a quantile of the updates' norms (arXiv:1905.03871).

    C_{t+1} = C_t exp(-η (b_t - γ)),    b_t = 1/2 + (Σ_i ([‖Δ_i‖ ≤ C_t] - 1/2) + N(0, σ²)) / m

so that in the long run a share γ of the updates is not clipped. Whoever sends nothing says neither:
a client more or less moves the sum by 1/2, one in another's place by 1. With noise for privacy that
sum is noisy, too (σ), and both together must not tell more than the run's noise multiplier z
allows: the sum of updates then has the multiplier

    z_Δ = (z⁻² - (2σ)⁻²)^(-1/2)

which is a little larger than z; ε is that of z.
"""

from __future__ import annotations

import math

import torch

from ...arguments import FederatedArguments
from ...errors import ArgumentsError
from ...random import torch_generator
from ...state import ServerState


class AdaptiveClip:
    """Moves the clipping norm after every round.

    Args:
        args: the run's settings.
        cohort_size: clients sampled a round, in expectation.

    Attributes:
        sum_multiplier: z_Δ; 0 without noise.
    """

    def __init__(self, args: FederatedArguments, cohort_size: int) -> None:
        self._args = args
        self._expected = cohort_size * (1 - args.drop_out_probability)
        noise, self._std = args.dp_noise_multiplier, 0.0
        if noise:
            given = args.clip_count_std
            self._std = cohort_size / 20 if given is None else given
            if 2 * self._std <= noise:
                raise ArgumentsError(
                    f"clip_count_std={self._std:g} must be above half of dp_noise_multiplier="
                    f"{noise:g}: the count alone would tell more than that allows; raise it"
                )
        self.sum_multiplier = (noise**-2 - (2 * self._std) ** -2) ** -0.5 if noise else 0.0

    @classmethod
    def of(cls, args: FederatedArguments, cohort_size: int) -> AdaptiveClip | None:
        """What a run's settings ask for; None: its norm is fixed."""
        return None if args.clip_target_quantile is None else cls(args, cohort_size)

    def next(self, server: ServerState, within: int, count: int) -> float:
        """C_{t+1}.

        Args:
            server: before the round.
            within: updates that were not longer than C_t.
            count: all updates.
        """
        args = self._args
        assert server.clip_norm is not None
        assert args.clip_target_quantile is not None
        excess = within - count / 2
        if self._std:
            assert server.noise_seed is not None
            generator = torch_generator(server.noise_seed, server.round, "clipped")
            draw = torch.randn((), generator=generator, dtype=torch.float64)
            excess += self._std * float(draw)
        share = excess / self._expected + 0.5
        step = args.clip_learning_rate * (share - args.clip_target_quantile)
        return server.clip_norm * math.exp(-step)
