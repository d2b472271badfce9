"""Differential privacy of the clients (DP-FedAvg, McMahan et al., arXiv:1710.06963).

Every update is clipped to norm C and the server adds Gaussian noise to their sum,

    Δ = (Σ_i clip(Δ_i, C) + N(0, (z C)² I)) / m,

so that the global model hardly depends on any one client. ε is computed by ``dp-accounting``.
"""

from __future__ import annotations

from typing import Any

import torch

from ..comm.state import State
from .arguments import FederatedArguments
from .errors import ArgumentsError
from .random import derived_seed


class GaussianMechanism:
    """Noise for a run, and what it has cost so far.

    Args:
        args: the run's settings.
        population: number of clients.
        cohort_size: clients sampled a round, without replacement.
        names: of the communicated tensors that would not be protected (buffers, extra states).

    Raises:
        ArgumentsError: something that travels would not be protected, or ``dp-accounting`` is not
            installed.
    """

    def __init__(
        self,
        args: FederatedArguments,
        population: int,
        cohort_size: int,
        names: list[str],
    ) -> None:
        try:
            import dp_accounting.rdp
        except ImportError:
            raise ArgumentsError(
                "dp_noise_multiplier needs an accountant: pip install 'fedpara-peft[privacy]'"
            ) from None
        self._accounting: Any = dp_accounting
        if names:
            raise ArgumentsError(
                f"{len(names)} tensors that travel would not be protected, first {names[:2]}: use "
                "group norm instead of batch norm, and a strategy that sends updates alone"
            )
        if args.client_sampling != "uniform":
            raise ArgumentsError("dp_noise_multiplier needs client_sampling='uniform'")
        self._args = args
        self._size = (population, cohort_size)

    def add_noise(self, mean: State, count: int, round: int) -> State:
        """Noise on a mean of clipped updates.

        Args:
            mean: the mean.
            count: updates that it is of.
            round: rounds completed, for the derived randomness.
        """
        assert self._args.clip_update_norm is not None
        std = self._args.dp_noise_multiplier * self._args.clip_update_norm / count
        noisy = {}
        for name, tensor in mean.items():
            generator = torch.Generator().manual_seed(
                derived_seed(self._args.seed, round, f"noise {name}")
            )
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            noisy[name] = tensor + (std * noise).to(tensor.dtype).to(tensor.device)
        return noisy

    def epsilon(self, rounds: int) -> float:
        """The ε at ``dp_delta`` after so many rounds, of exchanging one client for another."""
        # Exchanging a client moves the sum by up to 2 C; noise is counted in units of that.
        library = self._accounting
        event = library.SampledWithoutReplacementDpEvent(
            *self._size, library.GaussianDpEvent(self._args.dp_noise_multiplier / 2)
        )
        accountant = library.rdp.RdpAccountant(
            neighboring_relation=library.NeighboringRelation.REPLACE_ONE
        )
        accountant.compose(event, rounds)
        return float(accountant.get_epsilon(self._args.dp_delta))
