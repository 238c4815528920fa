"""The help of every command: examples that parse, a first example that runs, and what all commands have in common."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_warmstart import Certificate
from hf_warmstart.cli import COMMANDS, EPILOG, completion, main, make_parser
from hf_warmstart.cli.completion import subparsers

from ..hub.minihub import MiniHub
from .world import make_world, publish_model

PARSERS = subparsers(make_parser())
WRITES = {"certify", "grow", "select", "sweep", "fit", "recommend", "push", "run"}


def examples(command) -> list[list[str]]:
    """The commands that a help shows, in order, without the program's name."""
    text = command.EXAMPLES.replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("hf-warmstart ")]
    return [shlex.split(line)[1:] for line in lines if ">" not in line]


def name_of(command) -> str:
    return examples(command)[0][0]


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_every_command_teaches_by_examples_that_it_understands(command):
    parser = PARSERS[name_of(command)]
    shown = parser.format_help()
    for line in command.EXAMPLES.splitlines():
        assert line in shown
    for arguments in examples(command):
        assert make_parser().parse_args(arguments).command == name_of(command)
    assert all(len(line) <= 128 for line in shown.splitlines())


def test_every_command_has_the_same_switches():
    assert list(PARSERS) == [name_of(command) for command in COMMANDS]
    for name, parser in PARSERS.items():
        options = {option for action in parser._actions for option in action.option_strings}
        assert "--debug" in options, name
        assert "--json" in options or name == "completion", name
        assert ("--dry-run" in options) is (name in WRITES), name
        silent = [action.dest for action in parser._actions if not action.help and not action.choices]
        assert silent == [], f"{name}: {silent} have no help"


def test_the_first_example_of_every_command_runs(use_hub, tmp_path, monkeypatch, capsys):
    make_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    # `certify` measures one; the others need not.
    certificate = Certificate(True, 0.0, 0.0, [], {}, True, "")
    monkeypatch.setattr("hf_warmstart.checkpoints.weights.whole.certify_record", lambda config: certificate)
    monkeypatch.setattr("hf_warmstart.hub.save.certify_record", lambda config: certificate)
    with MiniHub() as hub:
        use_hub(hub)
        publish_model(hub, tmp_path / "published")
        for command in COMMANDS:
            name, arguments = name_of(command), examples(command)[0]
            if command is completion:
                continue  # shtab may be absent: tests/cli/test_completion.py
            if name == "run":
                Path("recipe.yaml").write_text(recipe_in_help(command))
            assert main(arguments) == 0, arguments
            out, err = capsys.readouterr()
            assert out and "Traceback" not in err, name
        assert "README.md" in hub.repos["my-org/my-grown-model"].find("main").files
        assert hub.repos["my-org/my-grown-model"].private


def recipe_in_help(command) -> str:
    """The recipe that the help of `run` shows."""
    text = command.EXAMPLES.partition("recipe.yaml:\n")[2]
    lines = [line[2:] for line in text.splitlines() if line.startswith("  ")]
    assert set(yaml.safe_load("\n".join(lines))) == {"parent", "grow", "recommend", "train", "push"}
    return "\n".join(lines).replace("my-org/my-grown-model", "my-org/another") + "\n"


def test_exit_codes_stand_in_the_help_and_examples_of_the_whole_parse(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in (
        "0 done",
        "1 it was measured and does not hold",
        "2 it could not be done",
        "3 an error",
        "130 stopped",
    ):
        assert words in shown
    lines = [line.strip() for line in EPILOG.splitlines() if line.startswith("  hf-warmstart")]
    assert len(lines) == 3
    for line in lines[:-1]:
        make_parser().parse_args(shlex.split(line)[1:])


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["grwo"], "invalid choice: 'grwo'"),
        (["grow", "a"], "the following arguments are required: TARGET. See: hf-warmstart grow --help"),
        (["plan", "a", "--width", "wide"], "argument --width: invalid float value: 'wide'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


@pytest.fixture
def broken(monkeypatch):
    """Let `advise` do something else."""

    def use(act) -> list[str]:
        def add_to(commands) -> None:
            commands.add_parser("advise").set_defaults(run=act)

        monkeypatch.setattr("hf_warmstart.cli.COMMANDS", (argparse.Namespace(add_to=add_to),))
        return ["advise"]

    return use


def test_an_error_that_nobody_foresaw_is_one_line_unless_debug_is_asked_for(broken, capsys):
    def act(options):
        raise KeyError("x" * 2000 + "\nsecond line")

    command = broken(act)
    assert main(command) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-warmstart advise: KeyError: ") and err.endswith("--debug shows where.\n")
    assert err.count("\n") == 1 and len(err) < 600
    assert main([*command, "--debug"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "in act" in err


def test_debug_shows_where_a_request_was_refused(capsys):
    assert main(["advise", "--params", "7B", "--tokens", "2", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("hf-warmstart advise: tokens=2 cannot")


def test_the_keyboard_stops_a_command(broken, capsys):
    def act(options):
        raise KeyboardInterrupt

    assert main(broken(act)) == 130
    assert capsys.readouterr().err == "hf-warmstart advise: Stopped.\n"


@pytest.mark.parametrize("switch", [[], ["--json"]])
def test_a_reader_that_goes_away_has_an_exit_code_of_its_own(switch):
    # `advise` shows a line, and what it would import is left out.
    code = """
import os, sys
from hf_warmstart.cli import advise, main
from hf_warmstart.cli.options import console, write_json
r, w = os.pipe()
os.close(r)
os.dup2(w, 1)
advise.run = lambda options: write_json({}) if options.json else console().print("words")
raise SystemExit(main(["advise", "--tokens", "1B", *sys.argv[1:]]))
"""
    run = subprocess.run([sys.executable, "-c", code, *switch], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (141, "", "")


def test_piped_output_is_plain_text(tmp_path, capsys):
    assert main(["advise", "--params", "134.6M", "--tokens", "2.7B", "--base-params", "67M"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out and not re.search(r"[^\x00-\x7f]", out.replace("│", "")) and err == ""
    assert main(["recommend", "--law", "steplaw", "--params", "1B", "--tokens", "2B", "--dry-run", "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_dry_runs_write_nothing(tmp_path, monkeypatch, capsys):
    from ..scaling.planted import Planted

    monkeypatch.chdir(tmp_path)
    Planted(noise=0.005).runs().to_csv("runs.csv", index=False)
    commands = [
        "fit runs.csv --draws 20 --output law --plot law.png --dry-run",
        "recommend --law steplaw --params 1B --tokens 2B --yaml a.yaml --accelerate b.yaml --plot c.png --dry-run",
        "certify --all --kind causal-lm --types llama,gpt2 --output table.md --dry-run",
        "certify --all --types llama --dry-run --json",
    ]
    for line in commands:
        assert main(line.split()) == 0, line
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]
    assert "nothing was" in capsys.readouterr().out.lower()
