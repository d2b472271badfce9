"""Differential privacy of the clients (DP-FedAvg, McMahan et al., arXiv:1710.06963).

Every update is clipped to norm C and the server adds Gaussian noise to their sum,

    Δ = (Σ_i clip(Δ_i, C) + N(0, (z C)² I)) / m,

with m the number of clients expected to report, so that the global model hardly depends on any one
client. ε is computed by ``dp-accounting``, for what ``client_sampling`` is:

    uniform    cohorts of one size: ε of exchanging one client for another, which moves the sum by
               up to 2 C
    poisson    every client by itself: ε of adding or removing one, which moves it by up to C

It is meant for those who see global models: cohorts,
losses and evaluations in a run's folder carry no noise, and its checkpoints hold the noise's seed.

Where clients add the noise, ``dp_mode`` says how: ``local``, each all of it to its own update, or
``distributed``, each a share of the sum's. Then ε is against the server, which knows who takes
part: of T rounds that a client was in, no amplification by sampling; of exchanging it, as above.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch

from ....comm.state import State
from ....maths.precision import as_real, from_real, wide
from ...arguments import FederatedArguments
from ...errors import ArgumentsError
from ...random import torch_generator
from .adaptive_clip import AdaptiveClip


def require_protected(names: list[str]) -> None:
    """Raise where something travels that no noise would protect.

    Raises:
        ArgumentsError: there are such names.
    """
    if names:
        raise ArgumentsError(
            f"{len(names)} tensors that travel would not be protected, first {names[:2]}: use "
            "group norm instead of batch norm, and a strategy that sends updates alone"
        )


def noise_seed(args: FederatedArguments) -> int | None:
    """A seed for a new run's noise, unrelated to the run's other randomness; None without noise."""
    if not args.dp_noise_multiplier or args.dp_noise_seed is not None:
        return args.dp_noise_seed
    return secrets.randbits(63)


class GaussianMechanism:
    """Noise for a run, and what it has cost so far.

    Args:
        args: the run's settings.
        population: number of clients.
        cohort_size: clients sampled a round, without replacement.
        names: of what travels and would not be protected: buffers, and what the strategy sends
            beside w_t and beside updates.

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
            import dp_accounting.pld
            import dp_accounting.rdp
        except ImportError:
            raise ArgumentsError(
                "dp_noise_multiplier needs an accountant: pip install 'fedpara-peft[privacy]'"
            ) from None
        self._accounting: Any = dp_accounting
        require_protected(names)
        self._central = args.noise_mode == "central"
        if self._central and args.client_sampling == "weighted":
            raise ArgumentsError(
                "dp_noise_multiplier needs client_sampling='uniform' or 'poisson': of clients that "
                "are drawn by their examples no ε is known"
            )
        if self._central and args.dp_accountant == "pld" and args.client_sampling != "poisson":
            raise ArgumentsError(
                "dp_accountant='pld' needs client_sampling='poisson': privacy loss distributions "
                "are known of clients that are drawn each by itself; or use dp_accountant='rdp'"
            )
        self._args = args
        adaptive = AdaptiveClip.of(args, cohort_size)
        self._multiplier = adaptive.sum_multiplier if adaptive else args.dp_noise_multiplier
        self._size = (population, cohort_size)
        self._expected = cohort_size * (1 - args.drop_out_probability)

    @property
    def share(self) -> float:
        """Clients expected to report, of the population; how many did is not told."""
        return self._expected / self._size[0]

    def add_noise(
        self, mean: State, count: int, seed: int, round: int, clip_norm: float | None = None
    ) -> State:
        """The noisy sum of clipped updates, divided by the clients expected to report.

        How many did report may tell something of them, so the divisor does not depend on it.

        Args:
            mean: mean of the updates, zero if there are none.
            count: updates that it is of.
            seed: of the run's noise.
            round: rounds completed, for the derived randomness.
            clip_norm: the round's in place of ``clip_update_norm``, where it follows the updates.
        """
        clip = self._args.clip_update_norm if clip_norm is None else clip_norm
        assert clip is not None
        std = self._multiplier * clip / self._expected
        noisy = {}
        for name, tensor in mean.items():
            generator = torch_generator(seed, round, name)
            sum_part = wide(as_real(tensor)).cpu() * (count / self._expected)
            noise = torch.randn(sum_part.shape, generator=generator, dtype=torch.float64)
            noisy[name] = from_real(sum_part + std * noise, tensor)
        return noisy

    def epsilon(self, rounds: int) -> float:
        """The ε at ``dp_delta`` after so many rounds; see the file's first lines for what of."""
        accountant = self._accountant()
        accountant.compose(self._round(), rounds)
        return float(accountant.get_epsilon(self._args.dp_delta))

    def _round(self) -> Any:
        """A round as the library describes it."""
        library, noise = self._accounting, self._args.dp_noise_multiplier
        population, cohort = self._size
        if not self._central:
            return library.GaussianDpEvent(noise / 2)
        if self._args.client_sampling == "poisson":
            return library.PoissonSampledDpEvent(
                cohort / population, library.GaussianDpEvent(noise)
            )
        # Noise is counted in units of what a client can move the sum by.
        return library.SampledWithoutReplacementDpEvent(
            population, cohort, library.GaussianDpEvent(noise / 2)
        )

    def _accountant(self) -> Any:
        library = self._accounting
        of = library.NeighboringRelation
        if self._args.dp_accountant == "pld":
            return library.pld.PLDAccountant(neighboring_relation=of.ADD_OR_REMOVE_ONE)
        poisson = self._args.client_sampling == "poisson"
        relation = of.ADD_OR_REMOVE_ONE if poisson else of.REPLACE_ONE
        return library.rdp.RdpAccountant(neighboring_relation=relation)
