"""A run whose clients train nothing: their outcomes are made up. The seam for tests of the run."""

import torch
from accelerate import Accelerator
from tests.federation.test_trainer import arguments
from tests.zoo import mlp

from fedpara_peft import FedAvg
from fedpara_peft.federation.client.local import LocalTrainer
from fedpara_peft.federation.crew import Crew
from fedpara_peft.federation.data.fingerprint import model_facts, settings_facts
from fedpara_peft.federation.data.loss import DefaultLoss
from fedpara_peft.federation.observers.trackers import Trackers
from fedpara_peft.federation.run import Run
from fedpara_peft.federation.server.channel import Channel
from fedpara_peft.federation.server.round import RoundServer
from fedpara_peft.federation.state import ClientUpdate, Outcome, Refused, ServerState

SIZES = (10, 20, 30, 40, 50)


class MadeUp:
    """A backend; see :class:`~fedpara_peft.federation.backend.Backend`.

    Attributes:
        asked: what the run asked of it, in order.
    """

    needs_payload = False
    names = ("ann", "bob", "cy", "dee", "eve")
    num_examples = SIZES

    def __init__(self, outcome):
        self.outcome, self.asked = outcome, []

    def facts(self):
        return {"clients": {"number of clients": len(self.names)}}

    def begin(self, server, history, saved):
        self.asked.append(("begin", server.round, list(saved)))

    def send(self, opened):
        return opened.cohort

    def outcomes(self, opened):
        found = (self.outcome(client, opened) for client in opened.reporting)
        return (outcome for outcome in found if outcome is not None)

    def end_round(self, opened, report, needed):
        self.asked.append(("end", report.round, sorted(needed)))

    def commit(self):
        self.asked.append(("commit",))

    def rollback(self, round):
        self.asked.append(("rollback", round))

    def evaluate(self, server):
        return {}


def sends(client, opened, value=1.0, loss=1.0, **more):
    """A client whose update is ``value`` everywhere."""
    update = {n: torch.full_like(opened.part.params[n], value) for n in opened.uplink.params}
    sent = ClientUpdate(client, SIZES[client], update, loss)
    return Outcome(client, opened.uplink.form.size, sent, **more)


def refused(client, reason="norm", error=None, **more):
    """A client of which nothing is used."""
    return Outcome(client, refused=Refused(client, reason, "it is made up", error), **more)


def made_up(folder, outcome, strategy=None, callbacks=(), **changes):
    """A run of ``mlp(norm=False)`` and its backend.

    Args:
        folder: its ``output_dir``.
        outcome: of a client and an open round; None: the client does not report.
    """
    strategy = strategy or FedAvg()
    args = arguments(folder, **{"clients_per_round": 5, **changes})
    accelerator = Accelerator(project_dir=args.output_dir)
    model = mlp(norm=False).to(accelerator.device)
    local = LocalTrainer(model, args, accelerator, strategy, DefaultLoss())
    backend = MadeUp(outcome)
    rounds = RoundServer(
        args, strategy, Channel(args, strategy), SIZES, ServerState(0, local.shared), [],
        backend.names,
    )  # fmt: skip
    facts = {**settings_facts(args, strategy), **model_facts(local.shared)}
    run = Run(
        args, strategy, backend, rounds, local, Crew(accelerator), Trackers(accelerator, args),
        list(callbacks), None, facts,
    )  # fmt: skip
    return run, backend
