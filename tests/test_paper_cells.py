"""The measurements of the paper's claims: interrupted runs go on, rates are tuned once."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"


@pytest.fixture
def paper(monkeypatch):
    """The benchmark's modules by name, for this process and those that it starts."""
    for folder in (BENCHMARKS, BENCHMARKS / "paper", TESTS):
        monkeypatch.syspath_prepend(str(folder))
    return __import__


@pytest.fixture
def cells(paper):
    return paper("cells")


@pytest.fixture
def run(paper, tmp_path):
    """Trains cells by pretended work; returns the results, the log of rounds and what failed."""

    def run(wanted, **limits):
        pool, cells, pretended = paper("pool"), paper("cells"), paper("pretended_work")
        results = cells.Results(tmp_path)
        work = functools.partial(pretended.work, log=tmp_path / "log")
        how = pool.Limits(**limits)
        failed = pool.train_all(wanted, results, work, how, tmp_path / "checkpoints")
        log = tmp_path / "log"
        return results, log.read_text().splitlines() if log.exists() else [], failed

    return run


def of_seeds(cells, *seeds, **given):
    return [cells.Cell("cifar10", "cpu", "fedpara", seed=seed, **given) for seed in seeds]


@pytest.mark.programs
def test_cells_wait_for_their_tuning_and_each_is_trained_once(cells, run):
    wanted = of_seeds(cells, 0, 1)
    results, log, failed = run([*wanted, wanted[0]], jobs=2)
    rounds = Counter(log)
    assert not failed
    assert set(rounds.values()) == {1}
    of_cells = Counter(line.rsplit(" ", 1)[0] for line in log)
    tuning = {f"{cells.TUNING_SEED} {rate}" for rate in wanted[0].grid}
    assert of_cells.keys() == tuning | {"0 0.1", "1 0.1"}
    last_of_tuning = max(i for i, line in enumerate(log) if line.startswith("100"))
    assert min(i for i, line in enumerate(log) if line.endswith(" 0.1 0")) <= last_of_tuning
    first = min(i for i, line in enumerate(log) if line[:2] in ("0 ", "1 "))
    assert last_of_tuning < first
    assert results.get(wanted[1])["accuracy"] == 1
    assert results.get(replace(wanted[0], method="dense")) is None


def tuned(results, wanted, best):
    """Pretend to train all that is missing; the rates of the tuning runs."""
    while (cell := results.next([wanted])) is not None:
        results.add(cell, {"accuracy": 1 - abs(cell.learning_rate - best), "diverged": False})
    return {cell.learning_rate for cell in results.tuning(wanted)[0]}


@pytest.mark.parametrize(("best", "added"), [(1.0, [1.0, 3.0]), (0.003, [0.003, 0.001]), (0.1, [])])
def test_a_grid_grows_at_the_end_where_the_best_rate_lies(cells, tmp_path, best, added):
    (wanted,) = of_seeds(cells, 0)
    results = cells.Results(tmp_path)
    assert tuned(results, wanted, best) == {*wanted.grid, *added}
    assert results.tuned(wanted).learning_rate == best
    assert results.get(wanted)["accuracy"] == 1


def test_a_grid_does_not_grow_for_ever_nor_where_it_shall_not(cells, tmp_path):
    (wanted,) = of_seeds(cells, 0)
    results = cells.Results(tmp_path)
    assert max(tuned(results, wanted, best=1e6)) == 30.0
    assert results.tuned(wanted).learning_rate == 30.0
    digits = cells.Cell("mnist", "cpu", "fedper", "classes", 0.2)
    assert tuned(results, digits, best=1e6) == set(digits.grid)


def test_a_grid_that_doubles_goes_on_doubling(cells, tmp_path):
    wanted = cells.Cell("shakespeare", "cpu", "fedpara", gamma=0.0)
    assert tuned(cells.Results(tmp_path), wanted, best=64) == {4, 8, 16, 32, 64, 128}


def test_an_optimizer_and_a_variant_with_tuning_of_its_own_have_their_own_runs(cells):
    plain = cells.Cell("cifar10", "wide", "fedpara", split="dirichlet")
    with_adamw = replace(plain, optim="adamw", variant=cells.KEPT)
    (run,) = with_adamw.tuning([0.01])
    assert (run.optim, run.variant, run.split, run.seed) == ("adamw", cells.KEPT, "iid", 100)
    (run,) = replace(plain, variant="tanh").tuning([0.01])
    assert run.variant == ""
    assert json.loads(plain.key()).keys() == {"task", "scale", "method", "split"}


@pytest.mark.programs
def test_when_time_is_up_what_trains_goes_on_next_time(cells, run, paper, monkeypatch, tmp_path):
    pool, hangs = paper("pool"), paper("pretended_work").HANGS
    wanted = of_seeds(cells, 0, hangs, learning_rate=0.1)
    given, log = pool.wait, tmp_path / "log"

    def until_the_second_round_hangs(pipes, seconds):
        assert 0 < seconds <= 60
        while not (ready := given(pipes, 0.05)):
            lines = log.read_text().splitlines() if log.exists() else []
            if len(pipes) == 1 and f"{hangs} 0.1 0" in lines:
                break
        return ready

    monkeypatch.setattr(pool, "wait", until_the_second_round_hangs)
    results, lines, failed = run(wanted, jobs=2, minutes=1)
    assert not failed
    assert results.get(wanted[0])
    assert results.get(wanted[1]) is None
    assert [line for line in lines if line.startswith(f"{hangs} ")] == [f"{hangs} 0.1 0"]
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == [pool.name(wanted[1])]


@pytest.mark.programs
def test_a_killed_queue_goes_on_where_it_was(cells, tmp_path):
    """SIGKILL to it and all its workers in the middle of a cell: no round is trained twice."""
    code = (
        "import functools, sys; from pathlib import Path\n"
        "import cells, pool, pretended_work\n"
        "folder = Path(sys.argv[1])\n"
        "wanted = [cells.Cell('cifar10', 'cpu', 'fedpara', seed=s) for s in (0,)]\n"
        "work = functools.partial(pretended_work.work, log=folder / 'log', round_s=0.1)\n"
        "if __name__ == '__main__':\n"
        "    pool.train_all(wanted, cells.Results(folder), work, pool.Limits(jobs=2), folder / 'c')"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    path = os.pathsep.join([*map(str, (BENCHMARKS, BENCHMARKS / "paper", TESTS)),
                            os.environ.get("PYTHONPATH", "")])  # fmt: skip
    command = [sys.executable, script, tmp_path]
    environment = {**os.environ, "PYTHONPATH": path}
    log = tmp_path / "log"

    first = subprocess.Popen(command, env=environment, start_new_session=True)
    while not log.exists() or len(log.read_text().splitlines()) < 5:
        assert first.poll() is None
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    lines = log.read_text().splitlines()
    assert len(lines) < 5 * 4
    subprocess.run(command, env=environment, check=True, timeout=120)
    rounds = Counter(log.read_text().splitlines())
    assert len(rounds) == 5 * 4  # four rates and a seed
    # A round that was in the log and not yet in its checkpoint may be there twice.
    assert sum(rounds.values()) <= len(rounds) + 2
    results = [
        json.loads(line) for line in (tmp_path / "cpu-cifar10.jsonl").read_text().splitlines()
    ]
    assert len({json.dumps(row["cell"]) for row in results}) == len(results) == 5
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.programs
def test_half_a_line_of_a_killed_process_is_cut_off(cells, run, tmp_path):
    (wanted,) = of_seeds(cells, 0, learning_rate=0.1)
    run([wanted])
    file = tmp_path / "cpu-cifar10.jsonl"
    whole = file.read_text()
    file.write_text(whole + '{"cell": {"task": "cif')
    results, _, _ = run(of_seeds(cells, 0, 1, learning_rate=0.1))
    assert file.read_text().startswith(whole)
    assert len(results.found) == len(file.read_text().splitlines()) == 2


@pytest.mark.programs
def test_a_cell_that_fails_does_not_stop_the_others(cells, run, paper, capsys):
    pretended = paper("pretended_work")
    wanted = of_seeds(cells, pretended.DIES, pretended.RAISES, 0, learning_rate=0.1)
    results, _, failed = run(wanted)
    assert failed == [cell.key() for cell in wanted[:2]]
    assert results.get(wanted[2])
    said = capsys.readouterr().out
    assert "ended with code 3" in said
    assert "a fault of the benchmark" in said


# Real training, at toy size.


@pytest.fixture
def toy(paper, monkeypatch):
    """The wide scale with little to do: random images of 16 pixels a side, two clients."""
    cells, inputs = paper("cells"), paper("inputs")
    torch.manual_seed(0)
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    data = TensorDataset(images, torch.arange(60) % 10)
    monkeypatch.setattr(inputs, "images", lambda *_: (data, data))
    scale = cells.Scale(2, 1, 4, 1, 8, (0.03, 0.1), 2, 0.9, width=0.125, net="VGG4")
    monkeypatch.setitem(cells.SCALES, ("wide", "cifar10"), scale)
    return cells.Cell("cifar10", "wide", "fedpara", learning_rate=0.1)


@pytest.mark.parametrize(
    "method", ["dense", "lowrank", "fedpara", "lowrank seeded", "fedpara seeded"]
)
@pytest.mark.parametrize("optim", ["sgd", "adamw", "muon"])
def test_a_wide_cell_is_trained_by_each_optimizer(toy, paper, tmp_path, method, optim):
    cell = replace(toy, method=method, optim=optim, learning_rate=0.01)
    row = paper("folding").work(cell, tmp_path, {"cifar10": ""})
    assert [point[0] for point in row["curve"]] == [1, 2, 3, 4]
    assert not row["diverged"]
    assert row["bytes"] >= 2 * 4 * 4 * row["parameters"]
    assert row["turn_s"] > 0
    assert {"torch", "peft", "fedpara-peft"} == row["versions"].keys()
    json.dumps(row, allow_nan=False)


def test_beside_other_work_no_times_are_written_down(toy, paper, tmp_path):
    row = paper("folding").work(toy, tmp_path, {"cifar10": ""}, alone=False)
    assert row["turn_s"] is row["seconds"] is None


def test_an_interrupted_cell_goes_on_from_its_checkpoint(toy, paper, tmp_path, monkeypatch):
    train = paper("train")
    whole = train.train(toy, tmp_path / "whole", {"cifar10": ""})
    given = train.arguments

    def shorter(cell, folder, **changed):
        return given(cell, folder, **{**changed, "num_rounds": 2})

    monkeypatch.setattr(train, "arguments", shorter)
    train.train(toy, tmp_path / "parts", {"cifar10": ""})
    monkeypatch.setattr(train, "arguments", given)
    again = train.train(toy, tmp_path / "parts", {"cifar10": ""})
    timed = ("seconds", "turn_s")
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in whole.items() if k not in timed
    }


def test_a_cell_that_diverges_is_a_result(toy, paper, tmp_path):
    cell = replace(toy, learning_rate=1e30, optim="sgd", variant=paper("cells").UNCLIPPED)
    row = paper("folding").work(cell, tmp_path, {"cifar10": ""})
    assert row["diverged"] or row["refused"]
    json.dumps(row, allow_nan=False)
    assert cell.score({"accuracy": 0.9, "diverged": True}) < 0


@pytest.mark.parametrize("method", ["lowrank seeded", "fedpara seeded"])
def test_folding_changes_the_factors_and_not_the_function(toy, paper, tmp_path, method):
    train, folding = paper("train"), paper("folding")
    cell = replace(toy, method=method)
    task = train.build(cell, {"cifar10": ""})
    model = train.factorize(task.model, task.targets, cell).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randn(4, 3, 16, 16)
    wanted = model(images)
    new = folding.folded(model, task.targets, cell, base_seed=5).eval()
    torch.testing.assert_close(new(images), wanted, rtol=1e-4, atol=1e-5)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [n for n, p in new.named_parameters() if p.requires_grad]
    factors = [n for n in names if "fedpara" in n]
    assert factors
    assert not any(torch.equal(model.get_parameter(n), new.get_parameter(n)) for n in factors)


def test_a_folded_cell_sends_what_clients_missed(toy, paper, tmp_path, monkeypatch):
    folding = paper("folding")
    monkeypatch.setitem(folding.FOLDED, "folded every round", 1)
    cell = replace(toy, method="fedpara seeded")
    plain = folding.work(cell, tmp_path / "plain", {"cifar10": ""})
    cell = replace(cell, variant="folded every round")
    row = folding.work(cell, tmp_path / "folded", {"cifar10": ""})
    assert [point[0] for point in row["curve"]] == [1, 2, 3, 4]
    assert row["curve"][-1][1] == row["bytes"] > plain["bytes"]
    assert row["parameters"] == plain["parameters"]
    again = folding.work(cell, tmp_path / "folded", {"cifar10": ""})
    assert again["curve"] == row["curve"]


@pytest.mark.parametrize(
    "variant",
    ["response 3", "decay of the product, λ = 0.001", "decay of what trains, λ = 0.001"],
)
def test_variants_change_the_run(toy, paper, tmp_path, variant):
    work = paper("folding").work
    cell = replace(toy, method="fedpara seeded")
    plain = work(cell, tmp_path / "plain", {"cifar10": ""})
    row = work(replace(cell, variant=variant), tmp_path / "variant", {"cifar10": ""})
    assert row["train_loss"] != plain["train_loss"]
    assert row["bytes"] == plain["bytes"]


def test_a_client_that_comes_back_is_told_all_folds_since(paper):
    catching_up = paper("folding").catching_up
    cohorts = [[["a"], ["b"]], [["a"], ["a", "c"]], [["b", "c"]], [["a"]]]
    # Part 1: a missed one fold, then none, c one. Part 2: b two, c one. Part 3: a two.
    assert catching_up(cohorts, 10, 1000) == [0, 0, 10, 10, 30, 20]
    assert catching_up(cohorts, 10, 15) == [0, 0, 10, 10, 25, 15]


@pytest.mark.parametrize(
    ("accuracies", "fell"), [([0.1, 0.4, 0.36], False), ([0.1, 0.4, 0.34, 0.5], True), ([], False)]
)
def test_a_run_collapses_when_it_falls_back_by_five_points(paper, accuracies, fell):
    curve = [[i, 0, accuracy] for i, accuracy in enumerate(accuracies)]
    assert paper("more").collapsed({"curve": curve, "diverged": False}) is fell
    assert paper("more").collapsed({"curve": curve, "diverged": True})


# Fine-tuning.


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture
def tiny(paper, monkeypatch, prepared):
    base, cells = paper("finetune.base").base, paper("finetune.cells").cells
    monkeypatch.setattr(base, "CACHE", prepared)
    base.prepare("tiny", "stdlib", cells.SCALES["toy"], "")  # once for all tests
    return cells


@pytest.mark.parametrize(
    "adapter",
    [
        "frozen", "LoRA", "rsLoRA", "LoHa", "FedPara", "FedPara, rank-stabilized",
        "FedPara, LoHa's start", "FedPara, LyCORIS's start", "FedPara, ABBA's start",
        "FedPara, factors of one variance", "FedPara, ABBA's start with Y₂ = 0 for X₂",
    ],
)  # fmt: skip
def test_an_adapter_is_fine_tuned_and_all_have_one_size(tiny, paper, tmp_path, adapter):
    work = paper("finetune.work").work
    cell = tiny.Tune("stdlib", adapter, "toy", learning_rate=0.02)
    row = work.work(cell, tmp_path / "run", "tiny")
    frozen = work.work(replace(cell, adapter="frozen"), tmp_path / "frozen", "tiny")
    assert row["parameters"] == 2 * 4 * (4 * (128 + 128) + 3 * (128 + 256))  # layers, 2r, matrices
    assert frozen["bytes"] == 0
    if adapter == "frozen":
        assert row["loss"] == frozen["loss"]
        return
    assert row["loss"] < frozen["loss"]
    assert row["bytes"] == pytest.approx(2 * 3 * 4 * row["parameters"], rel=0.2)
    assert [point[0] for point in row["curve"]] == [1, 2, 3]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("way", ["exact average", "ranks r/2, r, 2r", "int8", "int4", "one block"])
def test_an_adapter_is_federated_in_every_way(tiny, paper, tmp_path, monkeypatch, way):
    work = paper("finetune.work").work
    both = replace(tiny.SCALES["toy"], clients_per_round=2)
    monkeypatch.setitem(tiny.SCALES, "toy", both)
    plain = tiny.Tune("stdlib", "FedPara", "toy", learning_rate=0.02)
    assert way in tiny.WAYS
    row, without = (
        work.work(cell, tmp_path / str(cell.way[:3]), "tiny")
        for cell in (replace(plain, way=way), plain)
    )
    assert row["loss"] != without["loss"]
    assert (row["bytes"] > without["bytes"]) == (way == "exact average")


def test_a_row_has_loras_rate_where_it_says_so(tiny, paper, tmp_path):
    results = paper("pool").Results([tmp_path], tiny.Tune)
    for adapter, best in (("LoRA", 1e-3), ("FedPara", 3e-3)):
        for rate in (3e-4, 1e-3, 3e-3, 1e-2):
            cell = tiny.Tune("stdlib", adapter, "cpu", "adamw", 4, rate, tiny.TUNING_SEED)
            results.add(cell, {"loss": abs(rate - best), "diverged": False})
    rates = {
        way: results.tuned(tiny.Tune("stdlib", "FedPara", "cpu", way=way)).learning_rate
        for way in ("plain", "int8", tiny.LORAS_RATE)
    }
    assert rates == {"plain": 3e-3, "int8": 3e-3, tiny.LORAS_RATE: 1e-3}


def test_ways_to_federate_are_set_against_loras_last_loss(tiny, paper, tmp_path, monkeypatch):
    tables, results = paper("finetune.tables").tables, paper("pool").Results([tmp_path], tiny.Tune)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "finetune")
    kinds = [("LoRA", "plain", 0.02, 1.0), ("FedPara", "plain", 0.02, 0.5)]
    kinds.append(("FedPara", "int8", 0.025, 0.25))
    for adapter, way, fall, share in kinds:
        for seed, rate in [(100, 3e-4), (100, 1e-3), (100, 3e-3), (0, 1e-3), (1, 1e-3), (2, 1e-3)]:
            rounds = 4 if seed == 100 else None
            cell = tiny.Tune("stdlib", adapter, "cpu", "adamw", rounds, rate, seed, way)
            curve = [[i, int(1e6 * i * share), 3 - fall * i - seed / 100] for i in (2, 4, 6)]
            loss = curve[-1][2] + abs(rate - 1e-3)
            row = {"loss": loss, "diverged": False, "bytes": int(6e6 * share), "curve": curve,
                   "parameters": 7, "examples": [4, 1], "hardware": "", "versions": {}}  # fmt: skip
            if seed < 100 or way == "plain":
                results.add(cell, row)
    said = tables.section(results, "cpu", "stdlib")
    lines = {line.split(" | ")[0][2:]: line.split(" | ") for line in said.splitlines()}
    assert lines["LoRA"][-3:-1] == ["6.0", "3 of 3"]
    assert lines["FedPara"][-3:-1] == ["3.0", "3 of 3"]
    # 0.12 below the start is between the losses after rounds 4 and 6: 0.12 / 0.025 rounds.
    assert lines["FedPara, int8"][-3:-1] == ["1.2", "3 of 3"]
    assert (tmp_path / "finetune-cpu-stdlib.png").stat().st_size > 10_000
    assert tables.sent_until([(2, 5, 0.4)], 0.3) is None
    assert tables.sent_until([(2, 5, 0.4)], 0.4) == 5


def test_starts_of_the_benchmarks_own_go_as_far_in_the_first_step(tiny, paper):
    """ΔW after one sign step of the factor that is zero: mean square over LoRA's of rank 2r."""
    work, base = paper("finetune.work").work, paper("finetune.base").base
    walk = __import__("fedpara_peft.tuner.layer", fromlist=["factorized_weights"])
    model, _ = base.load("tiny", "stdlib", tiny.SCALES["toy"])
    squares = {}
    for name in ("FedPara", tiny.EQUAL, f"FedPara, ABBA's start{tiny.ZERO_Y}"):
        adapted = work.adapted(model, tiny.Tune("stdlib", name, "toy"))
        found = []
        for weight in walk.factorized_weights(adapted):
            (x1, y1, _), (x2, y2, _) = weight.halves
            n, r = y2.shape
            assert x2.any() != y2.any()
            if x2.any():
                y2 = torch.randn(n, r).sign()
            else:
                x2 = torch.randn(len(x2), r).sign()
            found.append(((x1 @ y1.T) * (x2 @ y2.T)).square().mean() / (2 * r / (3 * n)))
        squares[name] = torch.stack(found).mean().item()
    assert squares == pytest.approx(dict.fromkeys(squares, 1), rel=0.25)
    assert tiny.EQUAL in squares


def test_the_last_fifth_of_a_clients_text_is_held_out(tiny, paper):
    base = paper("finetune.base").base
    scale = tiny.Scale(2, 1, 1, 1, 1, 1, 4, 8, 2, "no")
    tokenizer = lambda text, **_: {"input_ids": [ord(c) for c in text]}  # noqa: E731
    text = "".join(map(chr, range(97, 119)))
    found = base.in_blocks({"long": text, "short": text[:20], "tiny": "ab"}, tokenizer, scale)
    assert {n: ids.shape for n, ids in found["clients"].items()} == {
        "long": (4, 4), "short": (4, 4)
    }  # fmt: skip
    assert found["held_out"].tolist() == [[ord(c) for c in text[16:20]]] * 2
    with pytest.raises(SystemExit, match="1 parts"):
        base.in_blocks({"long": text}, tokenizer, scale)
