"""A run followed from its folder."""

import io
import subprocess
import sys
import time

import pytest
from tests.integrations.test_report import report, save

from fedpara_peft.integrations.live import standing, watch
from fedpara_peft.integrations.run_folder import ReportError, load_run


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rounds_are_told_once_and_as_they_come(tmp_path):
    """Also where the run begins after the watching does."""
    folder = tmp_path / "run"
    folder.mkdir()
    steps = iter([(), (1, 2), (1, 2), (1, 2, 3), (1, 2, 3, 4)])

    def go_on(_):
        numbers = next(steps)
        if numbers:
            save(folder, *map(report, numbers), arguments={"num_rounds": 4}, clients=3)

    out = io.StringIO()
    watch(folder, out, sleep=go_on)
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["round", "1", "2", "3", "4", "round"]
    # train loss, accuracies and loss of round 4; bytes, lost clients, time
    assert " ".join(lines[4].split()) == "4 0.25 0.4 0.36 0.5 3.00 kB 5.00 kB 0 0.5"
    assert lines[3].split()[-2] == "1"  # a client of round 3 did not report
    assert lines[-1] == "round 4 of 4, 32.00 kB sent, 1 did not report, 1 refused, ε = 2"


def test_a_terminal_has_a_last_line_that_says_how_it_stands(tmp_path):
    folder = save(tmp_path, *map(report, range(1, 4)), arguments={"num_rounds": 123})
    out = Terminal()

    def end(_):
        save(tmp_path, *map(report, range(1, 124)), arguments={"num_rounds": 123})

    watch(folder, out, sleep=end)
    # 120 rounds of half a second are left.
    assert "\r\033[Kround 3 of 123, 24.00 kB sent, 1 did not report" in out.getvalue()
    assert "about 1 min 00 s left\r" in out.getvalue()


def test_a_long_run_is_told_from_its_last_rounds_on(tmp_path):
    save(tmp_path, *map(report, range(1, 101)), arguments={"num_rounds": 100})
    out = io.StringIO()
    watch(tmp_path, out)
    assert [line.split()[0] for line in out.getvalue().splitlines()[1:-1]] == [
        str(n) for n in range(91, 101)
    ]


def test_before_the_first_round_it_waits():
    assert standing(None) == "waiting for the first round"


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="give a run's output_dir"):
        watch(tmp_path / "file", io.StringIO(), sleep=lambda _: None)


@pytest.mark.programs
def test_a_real_run_watched_by_a_real_process(tmp_path):
    from tests.federation.test_trainer import arguments, toy
    from tests.zoo import adapted, mlp

    from fedpara_peft import FederatedTrainer

    start = "from fedpara_cli import main; raise SystemExit(main())"
    command = [sys.executable, "-c", start, "watch", str(tmp_path), "--every", "0.1"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        time.sleep(0.5)
        data = [toy(seed=i) for i in range(3)]
        model = adapted(mlp(), base_weight="replaced")
        FederatedTrainer(model, arguments(tmp_path, num_rounds=3), data).train()
        out, _ = watching.communicate(timeout=120)
    finally:
        watching.kill()
    rounds = [line.split()[0] for line in out.splitlines()]
    assert rounds == ["round", "1", "2", "3", "round"]
    assert "round 3 of 3" in out
    assert load_run(tmp_path).model["base_weight"] == "replaced"
    assert load_run(tmp_path).weights[0][1] == "linear"
