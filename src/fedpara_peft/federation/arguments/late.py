"""``FederatedArguments``: rounds that do not wait for every client."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LateArguments:
    """Rounds that do not wait for every client (FedBuff, arXiv:2106.06639)."""

    buffer_size: int | None = field(
        default=None,
        metadata={
            "help": "Asynchronous rounds: the server steps when so many updates can be used, K; "
            "who is still at work then reports in a later round. By default a round waits for its "
            "whole cohort."
        },
    )
    concurrency: int | None = field(
        default=None,
        metadata={
            "help": "With buffer_size, clients at work at once; by default those that "
            "client_fraction or clients_per_round would sample."
        },
    )
    max_staleness: int | None = field(
        default=None,
        metadata={
            "help": "With buffer_size, refuse an update during whose making the server made more "
            "steps than this; by default none is too old."
        },
    )
    staleness_exponent: float = field(
        default=0.5,
        metadata={
            "help": "With buffer_size, a: an update that is τ steps old is scaled by (1 + τ)^-a; "
            "0: not at all."
        },
    )
    client_seconds_sigma: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of the logarithm of a client's seconds from round to "
            "round; those given to the trainer (client_seconds) are the median."
        },
    )
