"""The command line: what it prints for people and machines, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_warmstart import certify, plan_growth
from hf_warmstart.cli import main, make_parser
from hf_warmstart.cli.completion import subparsers
from tests.models import tiny_config


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A folder with the config of a tiny Llama."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_config("llama").save_pretrained(folder)
    return str(folder)


def test_plan_shows_sizes_and_verdict(source, capsys):
    assert main(["plan", source, "--width", "1.5", "--depth", "2"]) == 0
    words = capsys.readouterr().out
    assert "LlamaForCausalLM: reference_slice + identity_blocks" in words
    assert [line.split() for line in words.splitlines() if "hidden_size" in line] == [["hidden_size", "64", "96"]]
    assert "exact: nothing writes or nothing reads what is new" in words


def test_plan_as_json_says_what_the_plan_says(source, capsys):
    assert main(["plan", source, "--set", "hidden_size=128", "--set", "width_operator=uneven_copy", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    plan = plan_growth(source, hidden_size=128, width_operator="uneven_copy")
    assert data["changes"] == plan.changes
    assert data["parameters_after"] == plan.parameters_after
    assert (data["exact"], data["reason"]) == (True, plan.reason)


def test_certify_as_json_is_the_certificate(source, capsys):
    assert main(["certify", source, "--width", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == certify(source, width=2).to_dict()


def test_certify_says_in_its_exit_code_that_a_growth_is_not_exact(source, capsys):
    assert main(["certify", source, "--depth", "2", "--set", "depth_operator=stack"]) == 1
    assert "not exact: stack runs the parent's layers more than once" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "SOURCE"], "Nothing to grow"),
        (["plan", "SOURCE", "--width", "0.5"], "width=0.5 must be a number of at least 1"),
        (["plan", "SOURCE", "--set", "hiden_size=128"], "The nearest is 'hidden_size'"),
        (["plan", "SOURCE", "--set", "hidden_size"], "--set 'hidden_size' is not NAME=VALUE"),
        (["plan", "SOURCE", "--width", "2", "--set", "width=3"], "width is given twice"),
        (["plan", "nowhere/at-all", "--width", "2"], "No model config could be read from 'nowhere/at-all'"),
        (["certify"], "Pass a SOURCE, or --all"),
        (["certify", "SOURCE", "--width", "2", "--types", "llama"], "--types: only with --all"),
        (["certify", "SOURCE", "--all"], "cannot be given with it"),
        (["certify", "--all", "--width", "2"], "['width'] cannot be given with it"),
        (["certify", "--all", "--kind", "causal"], "No kinds of models ['causal']"),
        (["certify", "--all", "--types", "llama,lama"], "no types ['lama']"),
        (["certify", "--all", "--types", "llama", "--jobs", "0"], "--jobs 0 must be at least 1"),
        (["certify", "--all", "--types", "llama", "--output", "no/where.md"], "there is no folder no"),
        (["certify", "--all", "--types", "llama", "--readme", "no/where.md"], "there is no such file"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(source, capsys, arguments, words):
    assert main([source if argument == "SOURCE" else argument for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"hf-warmstart {arguments[0]}: ")
    assert words in err
    assert "Traceback" not in err


def test_help_imports_nothing_heavy():
    code = """
import sys
from hf_warmstart.cli import main
for command in ([], *([name] for name in sys.argv[1:])):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        sys.stderr.write(f"{end.code} ")
sys.stderr.write(str(sorted({"torch", "transformers", "huggingface_hub", "numpy", "rich"} & set(sys.modules))))
"""
    names = list(subparsers(make_parser()))
    run = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert "--growth-factor" in run.stdout and "--max-memory" in run.stdout and "--blocks" in run.stdout
    assert run.stderr == "0 " * (1 + len(names)) + "[]"


def test_the_console_script_is_declared():
    text = (Path(__file__).parents[2] / "setup.cfg").read_text()
    assert "hf-warmstart = hf_warmstart.cli:main" in text
