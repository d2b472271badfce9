"""``fedpara`` answers at once what needs no torch, and says what the commands say."""

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import fedpara_cli
from fedpara_cli.describe import described
from fedpara_peft.cli.main import build_parser

ROOT = Path(__file__).parents[2]


def commands_of(parser):
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices


def ran(*argv):
    """What the command prints in a process of its own, and what it imported."""
    program = (
        "import sys, fedpara_cli\n"
        "try: fedpara_cli.main()\n"
        "finally: print('IMPORTED', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, timeout=60
    )
    said, _, imported = done.stderr.rpartition("IMPORTED")
    return done.returncode, done.stdout, said, set(imported.split())


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["--help"], 0, "write a page on a federated run"),
        (["--version"], 0, f"fedpara-peft {version('fedpara-peft')}\n"),
        (["plan", "--help"], 0, "--task-type"),
        (["completion", "bash"], 0, "--target-modules"),
        (["completion", "fish"], 0, "__fish_seen_subcommand_from merge"),
        ([], 2, "required: COMMAND"),
        (["plan", "m", "--r", "many"], 2, "invalid int value: 'many'"),
        (["convert", "a", "b", "--to", "zip"], 2, "invalid choice: 'zip'"),
    ],
)
def test_answers_without_importing_torch(argv, status, says):
    returned, out, err, imported = ran(*argv)
    assert returned == status
    assert says in out + err
    assert "argparse" in imported
    heavy = {"torch", "numpy", "peft", "transformers", "huggingface_hub", "fedpara_peft"}
    assert not heavy & imported
    assert len(imported) < 300


def test_the_file_says_what_the_commands_take():
    written = json.loads((ROOT / "src/fedpara_cli/commands.json").read_text())
    assert written == described(), "run python -m fedpara_cli.describe"


@pytest.mark.parametrize("name", commands_of(build_parser()))
def test_help_is_the_commands_own(name):
    ours, theirs = (commands_of(p)[name] for p in (fedpara_cli.build_parser(), build_parser()))
    assert ours.format_help() == theirs.format_help()


def test_it_takes_what_the_commands_take():
    argv = [
        "plan",
        "m",
        "--gamma",
        "0.1",
        "--clients",
        "3",
        "--megabits-per-s",
        "1",
        "2.5",
        "--strategy",
        "scaffold",
    ]
    ours, theirs = (vars(p.parse_args(argv)) for p in (fedpara_cli.build_parser(), build_parser()))
    del ours["command"], theirs["run"]
    assert ours == theirs
    assert ours["megabits_per_s"] == [1, 2.5]


def test_a_command_is_run_and_its_status_returned(tmp_path, capsys):
    assert fedpara_cli.main(["report", str(tmp_path)]) == 2
    assert "holds neither history.json nor a checkpoint" in capsys.readouterr().err


def test_the_command_that_is_installed_is_this_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["fedpara"] == "fedpara_cli:main"
    assert "commands.json" in project["tool"]["setuptools"]["package-data"]["fedpara_cli"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["fedpara", "me"], ["merge"]),
        (["fedpara", "plan", "--cli"], ["--clients", "--clients-per-round"]),
        (["fedpara", "completion", ""], ["-h", "--help", "bash", "zsh", "fish"]),
        (["fedpara", "merge", "./ad"], []),  # files, by the shell itself
    ],
)
def test_bash_completes(words, offered, capsys):
    fedpara_cli.main(["completion", "bash"])
    script = capsys.readouterr().out
    quoted = " ".join(f"'{word}'" for word in words)
    script += f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _fedpara\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == offered
