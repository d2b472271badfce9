"""Time of a federated round beside a plain hand-written loop and other simulators.

    python benchmarks/federation_speed.py [--quick] [--rounds 60] [--device cuda]

Everyone does the same work: FedAvg of an MLP 784-200-10, 100 clients of 80 random examples, 10 of
them a round, SGD with rate 0.1, nothing evaluated. The peers are optional:
``pip install pfl "flwr[simulation]"``.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import ratio, synchronize
from peft import get_peft_model
from report import ask_device, table, write
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedpara_peft import FederatedArguments, FederatedCallback, FederatedTrainer, FedParaConfig

CLIENTS, COHORT, EXAMPLES, RATE = 100, 10, 80, 0.1
WARM_UP = 2  # rounds that are not timed, in every run
PASSES = 3  # rows that run apart take turns with the others this often

PLAIN, OURS, TWO = "plain loop", "FederatedTrainer, sequential", "FederatedTrainer, two processes"
PFL, FLOWER = "apple pfl", "Flower simulation"
ALONE = "forward and backward alone"
BATCHED = "FederatedTrainer, engine='auto'"
NEEDS = {PFL: ["pfl"], FLOWER: ["flwr", "ray"]}
APART = (TWO, FLOWER)
ROWS = (PLAIN, OURS, TWO, PFL, FLOWER, ALONE)

LAUNCH = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
    "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip
#: One thread, in processes started from here as well; and nobody calls home.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True)
class Work:
    """What a sampled client does."""

    title: str
    epochs: int
    batch: int


def device() -> str:
    """What everyone trains on; Apple's variable, so that all processes know."""
    return os.environ["PFL_PYTORCH_DEVICE"]


WORKS = [Work("5 epochs, batch 10", 5, 10), Work("one step, batch 80", 1, EXAMPLES)]


@functools.cache
def clients() -> list[TensorDataset]:
    """Every client's data; made once in a process."""
    rng = torch.Generator().manual_seed(0)
    return [
        TensorDataset(
            torch.randn(EXAMPLES, 784, generator=rng),
            torch.randint(10, (EXAMPLES,), generator=rng),
        )
        for _ in range(CLIENTS)
    ]


def net(width: int = 200) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10))
    return layers.to(device())


def small() -> nn.Module:
    """The net with its first layer factorized; small enough for clients side by side to pay."""
    config = FedParaConfig(r=4, base_weight="replaced", target_modules=["0"])
    return get_peft_model(net(), config)


# The plain loop.


def train_locally(model: nn.Module, dataset: TensorDataset, epochs: int, batch: int) -> None:
    """What nearly every tutorial does on a client."""
    loader = DataLoader(dataset, batch_size=batch, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            x, y = x.to(device()), y.to(device())
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def plain(
    work: Work, build: Callable[[], nn.Module] = net, cohort: int = COHORT
) -> Callable[[], None]:
    """FedAvg by hand: state dicts loaded, and summed by their weights."""
    model, rng = build(), random.Random(0)

    def one_round() -> None:
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        mean = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        sampled = [clients()[i] for i in rng.sample(range(CLIENTS), cohort)]
        total = sum(len(dataset) for dataset in sampled)
        for dataset in sampled:
            model.load_state_dict(start)
            train_locally(model, dataset, work.epochs, work.batch)
            for name, tensor in model.state_dict().items():
                mean[name] += len(dataset) / total * tensor
        model.load_state_dict(mean)

    return one_round


def alone(work: Work) -> Callable[[], None]:
    """The arithmetic that nobody is spared: every step's gradients, of batches that lie ready."""
    model, rng = net(), random.Random(0)
    parameters = list(model.parameters())
    ready = [
        list(zip(*(t.to(device()).split(work.batch) for t in dataset.tensors), strict=True))
        for dataset in clients()
    ]

    def one_round() -> None:
        for client in rng.sample(range(CLIENTS), COHORT):
            for _ in range(work.epochs):
                for x, y in ready[client]:
                    torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)

    return one_round


# FederatedTrainer.


class InTurn(FederatedCallback):
    """Times the trainer's rounds; between two of them, the others make theirs."""

    def __init__(self, others: Mapping[str, Callable[[], None]], name: str = OURS) -> None:
        self.others, self.name = others, name
        self.seconds: dict[str, list[float]] = {each: [] for each in (name, *others)}

    def on_train_begin(self, *_: Any) -> None:
        """The trainer begins."""
        self.resumed = time.perf_counter()

    def on_round_end(self, *_: Any) -> None:
        """The others' turn."""
        synchronize()
        self.seconds[self.name].append(time.perf_counter() - self.resumed)
        for name, one_round in self.others.items():
            start = time.perf_counter()
            one_round()
            synchronize()
            self.seconds[name].append(time.perf_counter() - start)
        self.resumed = time.perf_counter()

    def timed(self) -> dict[str, list[float]]:
        """Seconds of every round after the warm-up, round by round."""
        return {name: values[WARM_UP:] for name, values in self.seconds.items()}


class Paced(FederatedCallback):
    """Lets a trainer that runs in a thread of its own make one round at a time."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)

    def on_train_begin(self, *_: Any) -> None:
        """Wait to be asked for the first round."""
        self.go.acquire()

    def on_round_end(self, *_: Any) -> None:
        """The round is made; wait to be asked for the next."""
        self.done.release()
        self.go.acquire()

    def one_round(self) -> None:
        """Have it make a round."""
        self.go.release()
        self.done.acquire()


def trainer(
    folder: str,
    rounds: int,
    model: nn.Module,
    data: Sequence[TensorDataset],
    work: Work,
    cohort: int = COHORT,
    callbacks: Sequence[FederatedCallback] = (),
    engine: str = "sequential",
) -> FederatedTrainer:
    args = FederatedArguments(
        folder,
        num_rounds=WARM_UP + rounds,
        clients_per_round=cohort,
        num_local_epochs=work.epochs,
        per_client_batch_size=work.batch,
        learning_rate=RATE,
        engine=engine,
        disable_tqdm=True,
    )
    return FederatedTrainer(model, args, data, callbacks=callbacks)


def in_turn(work: Work, rounds: int) -> dict[str, list[float]]:
    """The rows that share this process, round by round in turn."""
    others = {PLAIN: plain(work), ALONE: alone(work)}
    if installed(PFL):
        others[PFL] = apple_pfl(work)
    clock = InTurn(others)
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, rounds, net(), clients(), work, callbacks=[clock]).train()
    return clock.timed()


def side_by_side(rounds: int) -> tuple[str, list[dict[str, Any]]]:
    """Many clients of a small model, which the trainer stacks on its own accord."""
    work, cohort = WORKS[0], 50
    data = clients()
    with tempfile.TemporaryDirectory() as folder:
        pace = Paced()
        sequential = trainer(f"{folder}/a", rounds, small(), data, work, cohort, [pace])
        thread = threading.Thread(target=sequential.train)
        thread.start()
        clock = InTurn({PLAIN: plain(work, small, cohort), OURS: pace.one_round}, BATCHED)
        ours = trainer(f"{folder}/b", rounds, small(), data, work, cohort, [clock], "auto")
        stacks = ours._simulation.stacked is not None and ours._simulation.stacked.wanted(cohort)
        ours.train()
        pace.go.release()
        thread.join()
    found = clock.timed()
    rows = [
        {
            "work": f"FedPara, r = 4, {cohort} clients, {work.title}",
            "row": name,
            "stacked": name == BATCHED and stacks,
            "ms": 1e3 * statistics.median(values),
            "of plain loop": ratio(found, name, PLAIN),
            "ratio": "median of paired rounds",
        }
        for name, values in found.items()
    ]
    lines = [
        [
            r["row"] + (" (batched)" if r["stacked"] else ""),
            f"{r['ms']:.1f}",
            f"{r['of plain loop']:.2f}",
        ]
        for r in rows
    ]
    return table(["", "ms a round", "of the plain loop"], lines), rows


# Apple's pfl.


class PflNet(nn.Module):
    """The same MLP with the methods that pfl asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What a client minimizes."""
        return nn.functional.cross_entropy(self.net(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        """Required; asked for in the first round, which is not timed."""
        from pfl.metrics import Weighted

        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


def apple_pfl(work: Work) -> Callable[[], None]:
    """Central iterations, one a call."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Stop(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Any]:
            return True, Metrics()

    asyncio.set_event_loop(asyncio.new_event_loop())  # pfl expects one
    data = FederatedDataset(
        lambda user: PyTorchTensorDataset(clients()[user].tensors, user_id=user),
        get_user_sampler("minimize_reuse", range(CLIENTS)),
    )
    module = PflNet()
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    algorithm = FederatedAveraging()
    never = 10**9
    return functools.partial(
        algorithm.run,
        NNAlgorithmParams(
            central_num_iterations=never,
            evaluation_frequency=never,
            train_cohort_size=COHORT,
            val_cohort_size=None,
        ),
        SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=work.epochs,
            local_learning_rate=RATE,
            local_batch_size=work.batch,
        ),
        callbacks=[Stop()],
        send_metrics_to_platform=False,  # it would print them
    )


# Flower.

kept_net = functools.cache(net)


def flower_client(message: Any, context: Any) -> Any:
    """A client's turn, in one of Ray's actors; data and model stay there."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    torch.set_num_threads(1)
    model, config = kept_net(), message.content["config"]
    dataset = clients()[int(context.node_config["partition-id"])]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train_locally(model, dataset, int(config["epochs"]), int(config["batch"]))
    metrics = MetricRecord({"num-examples": len(dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


def flower(work: Work, rounds: int) -> list[float]:
    """Seconds from the beginning of a round to that of the next."""
    from flwr.app import ArrayRecord, ConfigRecord
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    begun = []

    class Timed(FedAvg):  # type: ignore[misc]
        def configure_train(self, *args: Any) -> Any:
            begun.append(time.perf_counter())
            return super().configure_train(*args)

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
            replies = list(replies)
            # Flower goes on without clients that failed, and would look faster for it.
            trained = sum(not reply.has_error() for reply in replies)
            if trained != COHORT:
                raise RuntimeError(f"{trained} of {COHORT} clients trained")
            return super().aggregate_train(server_round, replies)

    def serve(grid: Any, _: Any) -> None:
        strategy = Timed(
            fraction_train=COHORT / CLIENTS,
            fraction_evaluate=0.0,
            min_train_nodes=COHORT,  # the first round may begin before clients have joined
            min_available_nodes=CLIENTS,
        )
        strategy.start(
            grid,
            ArrayRecord(net().state_dict()),
            num_rounds=WARM_UP + rounds + 1,  # the last one has no next
            train_config=ConfigRecord({"epochs": work.epochs, "batch": work.batch}),
        )

    server, client = ServerApp(), ClientApp()
    server.main()(serve)
    client.train()(flower_client)
    gpus = int(device() == "cuda")
    resources = {
        "init_args": {"num_cpus": 2, "num_gpus": gpus},
        "client_resources": {"num_cpus": 1, "num_gpus": gpus / 2},
    }
    run_simulation(server, client, num_supernodes=CLIENTS, backend_config=resources)
    return [b - a for a, b in itertools.pairwise(begun)][WARM_UP:]


# Rows that run in processes of their own.


def apart(row: str, work: Work, rounds: int) -> list[float]:
    """Seconds of every round of a row that this script runs in another process."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable, *(LAUNCH if row == TWO else []), __file__,
                "--rounds", str(rounds), "--device", device(),
                "--apart", row, str(WORKS.index(work)), folder,
            ],
            env={**os.environ, "FLWR_HOME": folder},
            capture_output=True,
            text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{row} failed:\n{done.stderr}")
        return list(json.loads((Path(folder) / "seconds.json").read_text()))


def run_apart(row: str, work: Work, folder: str, rounds: int) -> None:
    """The other process."""
    if row == FLOWER:
        # Not as __main__: Ray's actors are to import the client, not to be sent it every time.
        import federation_speed

        seconds = federation_speed.flower(work, rounds)
    else:
        ours = trainer(folder, rounds, net(), clients(), work)
        history = ours.train()
        ours.accelerator.end_training()  # else a process may end while the other still speaks to it
        if not ours.accelerator.is_main_process:
            return
        seconds = [report.seconds for report in history][WARM_UP:]
    (Path(folder) / "seconds.json").write_text(json.dumps(seconds))


# The tables.


def installed(row: str) -> bool:
    if row == TWO and device() == "cuda" and torch.cuda.device_count() < 2:
        return False  # Accelerate gives each process a GPU of its own
    return all(find_spec(package) for package in NEEDS.get(row, []))


def beside_others(rounds: int) -> tuple[str, list[dict[str, Any]]]:
    """A round of the same work, everyone's."""
    rows = []
    for work in WORKS:
        seconds: dict[str, list[float]] = {}
        for _ in range(PASSES):
            found = in_turn(work, rounds)
            found |= {row: apart(row, work, rounds) for row in APART if installed(row)}
            for name, values in found.items():
                seconds.setdefault(name, []).extend(values)
        for name in ROWS:
            row: dict[str, Any] = {"work": work.title, "row": name, "installed": name in seconds}
            rows.append(row)
            if name in seconds:
                middle = statistics.median(seconds[name])
                row |= {
                    "ms": 1e3 * middle,
                    "of plain loop": middle / statistics.median(seconds[PLAIN])
                    if name in APART
                    else ratio(seconds, name, PLAIN),
                    "ratio": "of medians" if name in APART else "median of paired rounds",
                }
            print(row, flush=True)
    lines = []
    for name in ROWS:
        release = [version(NEEDS[name][0])] if name in NEEDS and installed(name) else []
        cells = [" ".join([name, *release])]
        for row in (r for r in rows if r["row"] == name):
            mark = "\\*" if name in APART else ""
            ms, of_plain = row.get("ms"), row.get("of plain loop")
            cells += [f"{ms:.1f}", f"{of_plain:.2f}{mark}"] if ms else ["not here", "-"]
        lines.append(cells)
    header = [""]
    for work in WORKS:
        header += [f"{work.title}: ms a round", "of the plain loop"]
    return table(header, lines), rows


def growth(rounds: int) -> tuple[str, list[dict[str, Any]]]:
    """FederatedTrainer's round as clients, cohort and model grow."""
    sizes = [(100, 10, 200), (1_000, 10, 200), (10_000, 10, 200)]
    sizes += [(100, 50, 200), (100, 100, 200), (100, 10, 800), (100, 10, 3200)]
    work = Work("one step, batch 10", 1, 10)
    x, y = torch.randn(1_000, 784), torch.randint(10, (1_000,))
    shards = [TensorDataset(a, b) for a, b in zip(x.split(10), y.split(10), strict=True)]
    seconds: dict[tuple[int, int, int], list[float]] = {size: [] for size in sizes}
    for _ in range(PASSES):
        for size in sizes:
            number, cohort, width = size
            data = [shards[i % len(shards)] for i in range(number)]
            clock = InTurn({})
            with tempfile.TemporaryDirectory() as folder:
                trainer(folder, rounds, net(width), data, work, cohort, [clock]).train()
            seconds[size] += clock.timed()[OURS]
    rows, lines = [], []
    first = statistics.median(seconds[sizes[0]])
    for size in sizes:
        number, cohort, width = size
        middle = statistics.median(seconds[size])
        parameters = sum(p.numel() for p in net(width).parameters())
        row = {
            "clients": number,
            "cohort": cohort,
            "width": width,
            "parameters": parameters,
            "ms": 1e3 * middle,
            "of first row": middle / first,
            "ratio": "of medians",
        }
        rows.append(row)
        sizes_shown = [f"{number:,}", str(cohort), f"{width:,}", f"{parameters:,}"]
        lines.append([*sizes_shown, f"{1e3 * middle:.1f}", f"{middle / first:.2f}"])
        print(rows[-1], flush=True)
    header = ["clients", "a round", "hidden width", "parameters", "ms a round", "of the first row"]
    return table(header, lines), rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small clients, nothing written")
    parser.add_argument("--rounds", type=int, default=60, help="rounds timed, per row and work")
    parser.add_argument("--apart", nargs=3, help=argparse.SUPPRESS)
    ask_device(parser)
    options = parser.parse_args()
    os.environ |= {**SETTINGS, "PFL_PYTORCH_DEVICE": options.device}
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    if options.apart:
        row, work, folder = options.apart
        run_apart(row, WORKS[int(work)], folder, options.rounds)
        return
    if options.quick:
        print(side_by_side(1)[0])
        return
    each = -(-options.rounds // PASSES)
    peers, rows = beside_others(each)
    stacking, more = side_by_side(PASSES * each)
    growing, grown = growth(each)
    text = (
        f"An MLP 784-200-10, {CLIENTS} clients of {EXAMPLES} random examples, {COHORT} a round, "
        "FedAvg, SGD with rate 0.1, nothing evaluated. The second work, one step a client, is "
        f"nearly pure overhead. {PASSES * each} rounds a row.\n\n{peers}\n\n"
        "Plain loop: a DataLoader and a new torch.optim.SGD for every client, load_state_dict, a "
        "weighted sum of state dicts. Forward and backward alone: the gradients of as many batches "
        "that lie ready, a bound from below for whoever trains clients one after the other. Rows "
        "without \\* make their rounds in turn "
        "in one process and one thread: medians of paired ratios. \\*: ratio of medians, in "
        f"processes of their own, with the other rows in {PASSES} turns. Two processes: "
        "accelerate launch, one thread each, RoundReport.seconds. pfl: SimulatedBackend, in "
        "process; it does not shuffle. Flower: run_simulation, Ray, two actors of one CPU, stock "
        "FedAvg; its server and its engine look for messages every 0.1 s.\n\n"
        "## Many small clients\n\n"
        "The first layer FedPara of r = 4, 50 clients a round, 5 epochs, batch 10; one thread, all "
        f"three in turn, medians of paired ratios.\n\n{stacking}\n\n"
        "## As a federation grows\n\n"
        "FederatedTrainer, sequential, one thread, one step of batch 10 a client; ratios of "
        f"medians.\n\n{growing}"
    )
    title = "A federated round beside a plain loop and other simulators"
    write("federation_speed", title, text, [*rows, *more, *grown], options.device)


if __name__ == "__main__":
    main()
