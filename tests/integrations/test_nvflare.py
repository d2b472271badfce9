"""NVIDIA FLARE: the same run as the simulation's, bit for bit, over sites that are processes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from fedpara_peft import (
    ArgumentsError,
    FederatedTrainer,
    FedParaConfig,
    History,
    Scaffold,
    accuracy,
    communicated_state,
    load_local,
    local_state,
)
from fedpara_peft.comm.ledger import Ledger
from fedpara_peft.federation.folder.store import DiskStore

pytest.importorskip("nvflare", reason="the extra 'nvflare' is not installed")

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.utils import fobs
from tests.integrations import flower_task as task

from fedpara_peft.integrations.nvflare import (
    FedParaController,
    FedParaExecutor,
    NodeSetup,
    ServerSetup,
)
from fedpara_peft.integrations.nvflare.named import made_by

APP = "tests.integrations.flare_task"
ROOT = Path(__file__).parents[2]
SITES = ["site-a", "site-b", "site-c"]
INT8 = {"uplink_codec": "int8", "error_feedback": True}

# In a program of its own: FLARE's simulator changes the process that it runs in.
_RUN = """
import json, sys
from nvflare.job_config.defs import FilterType
from fedpara_peft.integrations.nvflare import FedParaExecutor, fedpara_job
from fedpara_peft.integrations.nvflare.messages import INTRODUCE, TRAIN
from tests.integrations.flare_task import Wire
asked = json.loads(sys.argv[1])
app, sites = "tests.integrations.flare_task", asked["sites"]
job = fedpara_job(
    "tests", f"{app}:server", f"{app}:node", sites, asked["config"],
    scripts=[asked["script"]],  # code of its own: FLARE's list of allowed classes is not asked
)
for site in sites:
    for kind in (FilterType.TASK_DATA, FilterType.TASK_RESULT):
        wire = Wire(asked["config"]["folder"] + "/wire")
        job.to(wire, site, filter_type=kind, tasks=[INTRODUCE, TRAIN])
sys.exit(job.simulator_run(asked["config"]["folder"] + "/workspace", threads=len(sites)))
"""


def config_of(folder, strategy="FedAvg", deadline_s=120.0, **more):
    return {"folder": str(folder), "strategy": strategy, "deadline_s": deadline_s, "more": more}


def run_in_processes(folder, **asked):
    """A run in FLARE's simulator: the server in one process, each site in its own."""
    script = str(ROOT / "tests" / "integrations" / "flower_task.py")
    given = {"sites": SITES, "script": script, "config": config_of(folder, **asked)}
    in_a_program(_RUN, json.dumps(given), cwd=folder)


def in_a_program(code, *arguments, cwd):
    example = str(ROOT / "examples" / "nvflare")
    paths = [str(ROOT), str(ROOT / "src"), example, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, cwd=cwd,
        capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


def digits_model():
    """The examples' model."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    config = FedParaConfig(
        gamma=0.1, base_weight="replaced", parameterization="pfedpara", target_modules=["0"]
    )
    return get_peft_model(net, config)


class Named:
    """A context that knows who it is."""

    def __init__(self, name=""):
        self.name = name

    def get_identity_name(self):
        return self.name


class LocalController(FedParaController):
    """Hands tasks to executors in this process; answers come in another order than asked."""

    def __init__(self, executors, config, spoil=None, late=None):
        super().__init__(f"{APP}:server", SITES, config)
        self.executors, self.spoil = executors, spoil
        self.late, self.held = late or {}, []
        self.reason, self.cancelled = None, []
        self.abort = Signal()

    def broadcast(self, task, fl_ctx, targets=None, **_):
        (site,) = targets
        if task.name == "fedpara_introduce" and site in self.late:
            self.held.append((self.late.pop(site), task, site))
            return
        self.held, held = [], self.held
        for number, asked, other in held:  # who comes late answers what is still asked
            if task.data.get("round", -1) >= number:
                self.broadcast(asked, fl_ctx, [other])
            else:
                self.held.append((number, asked, other))
        message = fobs.loads(fobs.dumps(task.data))
        result = self.executors[site].execute(task.name, message, Named(site), self.abort)
        result = fobs.loads(fobs.dumps(result))
        if self.spoil is not None and task.name == "fedpara_train":
            result = self.spoil(site, task.data, result)
        if result is None:  # it stays silent until its task is over
            return
        client_task = ClientTask(Client(site, ""), task)
        client_task.result = result
        task.result_received_cb(client_task=client_task, fl_ctx=fl_ctx)
        task.task_done_cb(task=task, fl_ctx=fl_ctx)

    def cancel_task(self, task, *_, **__):
        self.cancelled.append(task.name)

    def system_panic(self, reason, fl_ctx):
        self.reason = reason


def run(folder, spoil=None, others=None, late=None, **asked):
    """A run in this process: the controller, after its end."""
    config = config_of(folder, **asked)
    executors = {
        site: FedParaExecutor(f"{APP}:node", SITES, config | (others or {}).get(site, {}))
        for site in SITES
    }
    controller = LocalController(executors, config, spoil, late)
    controller.control_flow(controller.abort, Named())
    return controller


def simulate(folder, strategy=None, **more):
    args = task.arguments(folder / "simulated", save_every=1, **more)
    trainer = FederatedTrainer(
        task.model_fn(), args, task.clients(), task.data(), strategy=strategy,
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    return trainer


def history(folder):
    return History.load(folder / "server" / "history.json")


def kept(folder, client):
    (found,) = (folder / "nodes" / f"client-{client}").glob("run-*")
    return DiskStore(found).get(client)


def assert_same(folder, trainer):
    ours = load_file(folder / "server" / "checkpoint-4" / "server.safetensors")
    theirs = load_file(folder / "simulated" / "checkpoint-4" / "server.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for client in range(task.CLIENTS):
        found, expected = kept(folder, client), trainer.client_state(client)
        assert found.local.keys() == expected.local.keys()
        assert all(torch.equal(found.local[n], expected.local[n]) for n in expected.local)


@pytest.mark.parametrize(("strategy", "more"), [("FedAvg", {}), ("Scaffold", INT8)])
def test_sites_end_as_the_simulation_does_and_no_local_half_leaves_them(tmp_path, strategy, more):
    run_in_processes(tmp_path, strategy=strategy, **more)
    trainer = simulate(tmp_path, Scaffold() if strategy == "Scaffold" else None, **more)
    assert_same(tmp_path, trainer)
    timeless = {"seconds": 0.0, "slowest_client_s": None}
    assert [dataclasses.replace(r, **timeless) for r in history(tmp_path)] == [
        dataclasses.replace(r, **timeless) for r in trainer.history
    ]
    ledger = Ledger.load(tmp_path / "server" / "ledger.npy")
    assert list(ledger.transfers()) == list(trainer.ledger.transfers())
    wire = [path.read_bytes() for path in (tmp_path / "wire").iterdir()]
    assert len(wire) == task.CLIENTS * (1 + 4) * 2  # one introduction, four rounds, both ways
    windows = {data[i : i + 8] for data in wire for i in range(len(data) - 7)}
    shared = load_file(tmp_path / "server" / "checkpoint-1" / "server.safetensors")
    assert any(bits(t)[:8] in windows for t in shared.values())  # so that it would be seen
    for client in range(task.CLIENTS):
        for tensor in kept(tmp_path, client).local.values():
            if not tensor.is_floating_point():
                continue
            data = bits(tensor)
            parts = [data[i : i + 8] for i in range(0, len(data) - 7, 8)]
            assert parts
            assert not any(part in windows for part in parts if part.count(0) < 4)


def bits(tensor):
    return tensor.contiguous().numpy().tobytes()


def at(site, number, fault):
    def spoil(where, job, result):
        return fault(result) if (where, job["round"]) == (site, number) else result

    return spoil


def changed(name, change):
    def fault(result):
        result[name] = change(result[name])
        return result

    return fault


FAULTS = {
    "silent": (lambda result: None, None),
    "raises": (lambda result: make_reply(ReturnCode.EXECUTION_EXCEPTION), None),
    "cut": (changed("payload", lambda data: data[:-4]), "length"),
    "no bytes": (changed("payload", lambda data: "text"), "malformed"),
    "examples": (changed("num_examples", lambda count: -1), "malformed"),
    "steps": (changed("steps", lambda steps: [0.0, 0.1]), "malformed"),
    "tokens": (changed("terms", lambda terms: float("inf")), "malformed"),
    "stale": (changed("round", lambda number: number - 1), "stale"),
    "nothing": (lambda result: Shareable(), "malformed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_site_that_fails_counts_as_one_that_took_no_part(tmp_path, name, monkeypatch):
    fault, reason = FAULTS[name]
    asked = {"strategy": "Scaffold", "quorum": 0.5, "deadline_s": 4.0}
    controller = run(tmp_path, at(SITES[1], 1, fault), **asked)
    assert controller.reason is None
    report = history(tmp_path)[1]
    assert report.refused == (((1, reason),) if reason else ())
    assert report.dropped == (() if reason else (1,))
    assert not any(r.refused or r.dropped for r in history(tmp_path) if r.round != 2)
    assert controller.cancelled == (["fedpara_train"] if name == "silent" else [])
    monkeypatch.setattr(
        "fedpara_peft.federation.server.round.drop_outs",
        lambda cohort, probability, seed, round: [1] if round == 1 else [],
    )
    assert_same(tmp_path, simulate(tmp_path, Scaffold(), quorum=0.5))


def test_a_site_with_other_settings_trains_nobody(tmp_path, caplog):
    other = {"more": {"learning_rate": 0.5, "quorum": 0.9}}  # the quorum is the server's
    controller = run(tmp_path, others={SITES[1]: other}, quorum=0.5)
    assert controller.reason is None
    assert all(report.dropped == (1,) for report in history(tmp_path))
    assert "refused: site site-b (client 1): learning_rate: 0.1 here, 0.5 there" in caplog.text


def test_a_site_that_comes_late_takes_part_from_then_on(tmp_path, monkeypatch):
    controller = run(tmp_path, late={SITES[2]: 1}, quorum=0.5, deadline_s=4.0)
    assert controller.reason is None
    assert [report.dropped for report in history(tmp_path)] == [(2,), (2,), (), ()]
    monkeypatch.setattr(
        "fedpara_peft.federation.server.round.drop_outs",
        lambda cohort, probability, seed, round: [2] if round < 2 else [],
    )
    assert_same(tmp_path, simulate(tmp_path, quorum=0.5))


def test_a_run_goes_on_where_it_stopped(tmp_path):
    run(tmp_path, num_rounds=2)
    run(tmp_path)
    assert_same(tmp_path, simulate(tmp_path))


@pytest.mark.parametrize("lost", [False, True])
def test_sites_follow_the_exact_averages_remainders(tmp_path, monkeypatch, lost):
    """One that lost its folder is sent them whole, in the same round."""
    monkeypatch.setattr(task, "model_fn", task.wide_model_fn)

    def spoil(site, job, result):
        if lost and (site, job["round"]) == (SITES[1], 1):
            shutil.rmtree(tmp_path / "nodes" / "client-1")
        return result

    assert run(tmp_path, spoil, exact_average=True).reason is None
    trainer = simulate(tmp_path, exact_average=True)
    ours = load_file(tmp_path / "server" / "checkpoint-4" / "server.safetensors")
    theirs = load_file(tmp_path / "simulated" / "checkpoint-4" / "server.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ledger = list(Ledger.load(tmp_path / "server" / "ledger.npy").transfers())
    again = [t for t in ledger if t not in trainer.ledger.transfers()]
    assert [(t.round, t.client, t.direction) for t in again] == [(3, 1, "downlink")] * lost


def test_sites_are_told_the_clipping_norm_of_the_round_and_tell_their_tokens(tmp_path):
    more = {
        "clip_update_norm": 0.05, "clip_target_quantile": 0.5, "clip_learning_rate": 1.0,
        "client_weighting": "tokens", "per_client_max_steps": 2,
    }  # fmt: skip
    assert run(tmp_path, **more).reason is None
    trainer = simulate(tmp_path, **more)
    assert_same(tmp_path, trainer)
    norms = [report.clip_norm for report in history(tmp_path)]
    assert norms == [report.clip_norm for report in trainer.history]
    assert len(set(norms)) == 4


def test_an_aborted_job_says_how_to_go_on(tmp_path):
    def spoil(site, job, result):
        if job["round"] == 2:
            controller.abort.trigger(True)
            return None
        return result

    config = config_of(tmp_path)
    executors = {site: FedParaExecutor(f"{APP}:node", SITES, config) for site in SITES}
    controller = LocalController(executors, config, spoil)
    controller.control_flow(controller.abort, Named())
    assert "the job was aborted" in controller.reason
    assert "stopped after round 2 of 4" in controller.reason
    run(tmp_path)
    assert_same(tmp_path, simulate(tmp_path))


def test_a_function_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArgumentsError, match="no_such_function"):
        made_by(f"{APP}:no_such_function", NodeSetup, {})
    with pytest.raises(ArgumentsError, match="not a ServerSetup"):
        made_by(f"{APP}:node", ServerSetup, config_of(tmp_path))


# In a program of its own, too: FLARE's FedAvg, a script for its client API, and the wire recorded.
_STOCK = """
import sys
from pathlib import Path
from nvflare.job_config.defs import FilterType
from flare_digits import SITES
from stock import stock_job
from tests.integrations.flare_task import Wire
folder = Path(sys.argv[1])
job = stock_job(folder, 2)
for site in SITES:
    for kind in (FilterType.TASK_DATA, FilterType.TASK_RESULT):
        job.to(Wire(str(folder / "wire")), site, filter_type=kind, tasks=["train"])
sys.exit(job.simulator_run(str(folder / "workspace"), threads=len(SITES)))
"""


def test_a_stock_script_of_the_client_api_sends_what_is_communicated_and_no_more(tmp_path):
    in_a_program(_STOCK, str(tmp_path), cwd=tmp_path)
    model, wire = digits_model(), [path.read_bytes() for path in (tmp_path / "wire").iterdir()]
    sites = sorted((tmp_path / "sites").iterdir())
    assert len(sites) == 3
    assert len(wire) == 3 * 2 * 2  # sites, rounds, both ways
    shared, local = communicated_state(model), local_state(model)
    assert local
    for data in wire:
        assert not any(name.encode() in data for name in local)
    answers = [data for data in wire if all(name.encode() in data for name in shared)]
    assert len(answers) >= 3 * 2
    windows = {data[i : i + 8] for data in wire for i in range(len(data) - 7)}
    for site in sites:
        load_local(model, site)
        for name, tensor in local_state(model).items():
            assert not torch.equal(tensor, digits_model().state_dict()[name]), "it was not trained"
            data = bits(tensor)
            parts = [data[i : i + 8] for i in range(0, len(data) - 7, 8)]
            assert not any(part in windows for part in parts if part.count(0) < 4)
