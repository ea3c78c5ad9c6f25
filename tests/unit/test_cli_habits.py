"""How the command line behaves: order, examples, completion, pipes, colours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import cli
from dkdetr.engine.run_folder import portable_name
from tests.commands_in_text import every_command

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "dkdetr" / "FAILURES.md"
DKDETR = (sys.executable, "-c", "from cli import main; main()")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DKDETR, *words],
        cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | environment,
    )  # fmt: skip


def test_the_five_verbs_come_first():
    printed = run("--help").stdout.partition("Commands:")[2].partition("Exit codes:")[0]
    listed = re.findall(r"^  ([a-z-]+) {2,}\S", printed, re.MULTILINE)
    assert listed[:5] == ["predict", "cache-teacher", "train", "eval", "doctor"]
    assert len(listed) == len(set(listed)) > 12


def test_help_names_the_exit_codes_that_are_documented():
    table = re.findall(r"^\| (\d+) \| ", PAGE.read_text(), re.MULTILINE)
    printed = run("--help").stdout.partition("Exit codes:")[2]
    shown = re.findall(r"(?:^| )(\d+) +\w", printed)
    assert set(table) == set(shown)
    assert {"2", "3", "4", "5", "6", "7", "8", "9", "75", "130"} <= set(table)


@pytest.mark.parametrize("path", every_command(), ids=" ".join)
def test_every_command_has_a_purpose_and_an_example(path: tuple[str, ...]):
    command = get_command(cli.app)
    for word in path:
        command = command.commands[word]
    assert command.help
    assert command.epilog, f"no example for {' '.join(path)} in cli.py's _EXAMPLES"
    examples = command.epilog.splitlines()[2:]
    assert all(f"dkdetr {' '.join(path)}" in example for example in examples)
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{parameter.name} says nothing"


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("dkdetr tr", {"train"}),
        ("dkdetr cache re", {"repair"}),
        ("dkdetr train --smo", {"--smoke"}),
        ("dkdetr train --experiment ovc", {"ovcoco_r50"}),
        ("dkdetr config show lvis_r50_3", {"lvis_r50_36e"}),
        ("dkdetr eval --split lvis_m", {"lvis_minival"}),
    ],
)
def test_bash_completion(words: str, offered: set[str]):
    done = run(_DKDETR_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_shown(shell: str):
    done = run("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_DKDETR_COMPLETE" in done.stdout


def test_a_reader_that_goes_away_is_no_error():
    command = " ".join(f"'{word}'" for word in (*DKDETR, "config", "show", "trial"))
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    first, code = done.stdout.splitlines()
    assert first.startswith("name = 'trial'")
    assert code in ("0", "141")  # 0 where all of it fitted into the pipe
    assert done.stderr == ""
    closed = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (closed.stdout, closed.stderr) == ("141\n", "")


def test_an_error_is_one_line_with_its_code():
    done = run("config", "show", "absent", TERM="xterm-256color")
    assert done.returncode == 2
    assert done.stderr.startswith("error [2]: ")
    assert "\x1b" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_config_show_names_who_set_a_value():
    done = run("config", "show", "ovcoco_r50", "--set", "optim.lr=1e-4")
    lines = dict(line.partition(" = ")[::2] for line in done.stdout.splitlines())
    assert lines["optim.lr"].endswith("# --set")
    assert lines["data.sampler"].endswith("# ovcoco_r50")
    assert lines["optim.epochs"].endswith("# lvis_r50_36e")
    assert "#" not in lines["optim.weight_decay"]
    assert lines["classifier.bias_init"] == "'none'"  # as it can be typed back


@pytest.mark.parametrize(
    ("name", "safe"),
    [("trial", "trial"), ("größe 1", "größe 1"), ("a:b/c\\d", "a-b-c-d"), ("what?*", "what-"),
     ("dots. ", "dots"), ("...", "-"), ("a\nb", "a-b")],
)  # fmt: skip
def test_a_run_s_name_is_a_folder_s_anywhere(name: str, safe: str):
    assert portable_name(name) == safe


def test_the_app_is_typer_s():
    assert isinstance(cli.app, typer.Typer)
