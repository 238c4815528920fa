"""`hf-warmstart grow` and `verify` as their users meet them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_warmstart import GrowthConfig, GrowthRecord, WarmstartError, grow_checkpoint
from hf_warmstart.checkpoints import grow_checkpoint as grow_checkpoint_module
from hf_warmstart.checkpoints.fetch import HubPlace
from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth
from hf_warmstart.checkpoints.memory import Pieces
from hf_warmstart.checkpoints.records import last_record
from hf_warmstart.cli import grow, main, make_parser, progress, verify

from ..checkpoints.folders import bytes_of
from ..checkpoints.grown_folders import (
    SHARD,
    certify_once,
    change_config,
    change_facts,
    facts,
    flip,
    grow_folder,
    save_parent,
)

SHARDS = ["--max-shard-size", SHARD, "--threads", "1"]


@pytest.fixture(autouse=True)
def _certified_once(monkeypatch):
    certify_once(monkeypatch)


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grow")
    grow_folder(save_parent(folder / "parent"), folder / "grown")
    return folder


@pytest.fixture
def parent(once) -> str:
    return str(once / "parent")


@pytest.fixture
def grown(once) -> str:
    return str(once / "grown")


@pytest.fixture
def target(tmp_path) -> str:
    return str(tmp_path / "out" / "grown")


def weights_in(folder: str | Path) -> dict[str, bytes]:
    """Weights, their index and config: what is the same to the byte on every machine (rounding errors in a card are not)."""
    return {n: b for n, b in bytes_of(Path(folder)).items() if "safetensors" in n or n == "config.json"}


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("command", [grow, verify])
def test_the_examples_in_the_help_are_commands(command, capsys):
    name = command.__name__.rpartition(".")[2]
    with pytest.raises(SystemExit, match="^0$"):
        main([name, "--help"])
    shown = capsys.readouterr().out
    examples = [line for line in command.EXAMPLES.splitlines() if line.startswith("  ")]
    assert len(examples) >= 2
    for line in examples:
        assert line in shown
        program, *arguments = shlex.split(line)
        assert program == "hf-warmstart" and make_parser().parse_args(arguments).command == name


# -- grow -------------------------------------------------------------------------------------------------------------


def test_grow_writes_what_grow_checkpoint_writes_and_says_how_to_check_it(parent, grown, target, capsys):
    assert main(["grow", parent, target, "--width", "2", *SHARDS]) == 0
    assert weights_in(target) == weights_in(grown)
    out, err = capsys.readouterr()
    assert out.startswith(f"{target}: 74,176 -> 271,232 parameters in ") and out.count("\n") == 1 and err == ""
    command = out.partition("Check it with: ")[2].strip()
    assert command == shlex.join(["hf-warmstart", "verify", target, "--parent", parent])
    assert main(shlex.split(command)[1:]) == 0


def test_a_dry_run_says_what_it_takes_and_writes_nothing(parent, grown, target, tmp_path, capsys):
    command = ["grow", parent, target, "--width", "2", *SHARDS, "--dry-run"]
    assert main(command) == 0
    words = capsys.readouterr().out
    weights = sum(p.stat().st_size for p in Path(grown).iterdir() if "safetensors" in p.name)
    assert f"{target} takes {weights:,} bytes of disk, growing it " in words and "MiB of memory" in words
    assert "beside the parent" not in words
    assert main([*command, "--json"]) == 0
    (plan,) = lines(capsys.readouterr().out)
    assert (plan["event"], plan["output_bytes"], plan["exact"]) == ("plan", weights, True)
    assert plan["peak_memory_bytes"] > 50e6
    assert list(tmp_path.iterdir()) == []


def test_a_promise_of_memory_is_kept_in_the_plan_or_refused(parent, target, tmp_path, capsys):
    command = ["grow", parent, target, "--width", "2", "--threads", "2", "--dry-run", "--json"]
    assert main(command) == 0
    free = lines(capsys.readouterr().out)[0]["peak_memory_bytes"]
    limit = free - 20_000_000
    assert main([*command, "--max-memory", str(limit // 1000) + "KB"]) == 0
    assert lines(capsys.readouterr().out)[0]["peak_memory_bytes"] <= limit
    assert main([*command, "--max-memory", "10MB"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "max_memory='10MB' cannot be kept" in err and "Pass at least" in err
    assert list(tmp_path.iterdir()) == []


def test_json_lines_tell_progress_and_the_result(parent, target, capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert main(["grow", parent, target, "--width", "2", *SHARDS, "--json"]) == 0
    out, err = capsys.readouterr()
    *told, done = lines(out)
    assert err == "" and len(told) > 20
    for event in told:
        assert list(event) == ["event", "bytes", "of", "bytes_per_second", "seconds_left"]
        assert event["event"] == "progress" and 0 <= event["bytes"] <= event["of"] == told[-1]["of"]
    assert [event["bytes"] for event in told] == sorted(event["bytes"] for event in told)
    assert told[0]["bytes"] == 0 and told[0]["seconds_left"] is None
    assert told[-1]["bytes"] == told[-1]["of"] and told[-1]["seconds_left"] == 0
    assert all(event["bytes_per_second"] > 0 and event["seconds_left"] >= 0 for event in told[2:])
    assert (done["event"], done["target"]) == ("done", target) and done["seconds"] > 0
    assert GrowthRecord.from_dict(done["record"]).growth_config["width"] == 2


def stop_after(nbytes: int):
    @contextmanager
    def stopping(words):
        def report(done, total):
            if done > nbytes:
                raise KeyboardInterrupt

        yield report

    return stopping


def test_a_stopped_run_says_so_and_the_next_one_what_it_goes_on_from(parent, grown, target, capsys, monkeypatch):
    command = ["grow", parent, target, "--width", "2", *SHARDS]
    monkeypatch.setattr(grow, "bar", stop_after(600_000))
    assert main(command) == 130
    out, err = capsys.readouterr()
    assert out == "" and err == (
        "hf-warmstart grow: Stopped. The same command goes on after the last file that was finished.\n"
    )
    assert not Path(target).exists()
    monkeypatch.setattr(progress, "EVERY", 0.0)
    assert main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "hf-warmstart grow: Going on after 2 of 4 files, which an earlier run finished.\n"
    first, second = lines(out)[:2]
    kept = sorted(Path(target).glob("*.safetensors"))[:2]
    assert first["bytes"] == sum(path.stat().st_size for path in kept) and first["bytes_per_second"] == 0
    assert weights_in(target) == weights_in(grown)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["PARENT", "TARGET"], "Nothing to grow"),
        (["PARENT", "TARGET", "--width", "2", "--revision", "main"], "revision='main' is of a Hub id; "),
        (["PARENT", "TARGET", "--width", "2", "--threads", "0"], "threads=0 compute nothing"),
        (["PARENT", "TARGET", "--width", "2", "--max-memory", "much"], "max_memory='much' is no size"),
        (["PARENT", "TARGET", "--width", "2", "--max-shard-size", "5XB"], "max_shard_size='5XB' is no size"),
        (["PARENT", "TARGET", "--width", "1.3"], "width"),
        (["PARENT", "PARENT", "--width", "2"], "is not empty. Pass a new folder"),
        (["nowhere/at-all", "TARGET", "--width", "2"], "'nowhere/at-all' is no folder"),
        (["PARENT", "TARGET", "--record", "GROWN", "--width", "2", "--set", "seed=3"], "['seed', 'width'] cannot be"),
        (["PARENT", "TARGET", "--record", "PARENT"], "carries no growth record"),
        (["PARENT", "TARGET", "--record", "no/such-folder"], "'no/such-folder' is no folder"),
        (["PARENT", "TARGET", "--record", "OTHER"], "is not the parent that the record tells of"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(parent, grown, target, tmp_path, arguments, words, capsys):
    other = shutil.copytree(grown, tmp_path / "other")
    (record,) = json.loads((other / "config.json").read_text())["warmstart"]
    change_config(other, warmstart=[record | {"parent_digest": "0" * 64}])
    names = {"PARENT": parent, "TARGET": target, "GROWN": grown, "OTHER": str(other)}
    assert main(["grow", *(names.get(argument, argument) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-warmstart grow: ") and words in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


# -- growing again from a record --------------------------------------------------------------------------------------


def test_a_record_makes_the_same_bytes_with_other_threads_and_blocks(parent, grown, target, capsys, monkeypatch):
    assert last_record(grown).parent_digest is not None
    monkeypatch.setattr(grow_checkpoint_module, "pieces", lambda *asked, **named: Pieces(3, block=5000))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        command = ["grow", parent, target, "--record", grown, "--max-shard-size", SHARD, "--threads", "3"]
        assert main(command) == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert out.endswith(f" The files have the sha256 that {grown} lists.\n") and out.count("\n") == 1
    assert err == "" and "\x1b" not in out
    assert weights_in(target) == weights_in(grown)


@pytest.mark.slow
def test_a_record_makes_the_same_bytes_in_another_process_with_other_threads(parent, grown, target):
    """And what it prints is plain where nobody looks."""
    command = [sys.executable, "-m", "hf_warmstart.cli", "grow", parent, target, "--record", grown]
    command += ["--max-shard-size", SHARD, "--threads", "3", "--max-memory", "2GB"]
    environment = os.environ | {"OMP_NUM_THREADS": "3", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "\x1b" not in run.stdout and run.stdout.count("\n") == 1
    assert run.stdout.endswith(f" The files have the sha256 that {grown} lists.\n")
    assert weights_in(target) == weights_in(grown)


def test_the_config_alone_is_enough(parent, grown, tmp_path, capsys):
    (tmp_path / "config").mkdir()
    shutil.copy(Path(grown, "config.json"), tmp_path / "config")
    target = tmp_path / "again"
    assert main(["grow", parent, str(target), "--record", str(tmp_path / "config"), *SHARDS]) == 0
    assert "lists no checksums of files of these names" in capsys.readouterr().out
    assert weights_in(target) == weights_in(grown)
    record = last_record(tmp_path / "config")
    config = GrowthConfig.from_dict(record.growth_config)
    assert grow_checkpoint(parent, tmp_path / "third", config, max_shard_size=SHARD) == record
    assert weights_in(tmp_path / "third") == weights_in(grown)


def test_other_bytes_than_the_record_lists_are_exit_code_1(parent, grown, target, tmp_path, capsys):
    other = shutil.copytree(grown, tmp_path / "other")
    files = facts(other)["files"]
    files["model-00002-of-00004.safetensors"]["sha256"] = "0" * 64
    change_facts(other, files=files)
    (record,) = json.loads((other / "config.json").read_text())["warmstart"]
    change_config(other, warmstart=[record | {"library_version": "0.0.9"}])
    assert main(["grow", parent, target, "--record", str(other), *SHARDS]) == 1
    out, err = capsys.readouterr()
    assert f"The files do not have the sha256 that {other} lists." in out
    assert "was grown by hf_warmstart 0.0.9; this is " in err and err.count("\n") == 1


def test_a_dry_run_of_a_record_reads_the_parent(parent, grown, target, tmp_path, capsys):
    changed = shutil.copytree(parent, tmp_path / "changed")
    flip(changed, "model.norm.weight")
    assert main(["grow", parent, target, "--record", grown, "--dry-run"]) == 0
    assert main(["grow", str(changed), target, "--record", grown, "--dry-run"]) == 2
    assert "its tensors have the sha256" in capsys.readouterr().err
    assert not Path(target).parent.exists()


def test_without_a_digest_commits_are_compared(parent, grown, target, caplog):
    record = last_record(grown)
    growth = prepare_growth(parent, target, GrowthConfig.from_dict(record.growth_config))
    with contextlib.closing(growth):
        growth.check_parent(replace(record, parent_digest=None, revision="e" * 40))
        assert "is not known" in caplog.text
        growth.weights.place = HubPlace("e" * 40)
        caplog.clear()
        growth.check_parent(replace(record, parent_digest=None, revision="e" * 40))
        assert caplog.text == ""
        with pytest.raises(WarmstartError, match="its commit is e+, not f+. .*, revision f+"):
            growth.check_parent(replace(record, parent_digest=None, revision="f" * 40))


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_says_in_its_exit_code_what_it_found(parent, grown, tmp_path, capsys):
    assert main(["verify", grown, "--parent", parent, "--all"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{grown} ok: 4 files have their sha256; ") and out.count("\n") == 1 and err == ""
    spoiled = shutil.copytree(grown, tmp_path / "spoiled")
    file = flip(spoiled, "model.norm.weight")
    assert main(["verify", str(spoiled), "--parent", parent, "--blocks", "0"]) == 1
    assert capsys.readouterr().out == f"{spoiled} differs: 1 files are not those of growth.json: '{file}'\n"
    assert main(["verify", str(spoiled), "--parent", parent, "--all", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["differing"], found["files"][file]) == (False, ["model.norm.weight"], False)
    assert found["parent_unchanged"] is True and found["blocks"][0] == found["blocks"][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["GROWN"], "names the parent 'parent', which is no Hub id"),
        (["PARENT", "--parent", "PARENT"], "carries no growth record"),
        (["GROWN", "--parent", "nowhere/at-all"], "'nowhere/at-all' is no folder"),
        (["GROWN", "--parent", "PARENT", "--blocks", "-1"], "blocks=-1 cannot be made"),
    ],
)
def test_what_cannot_be_verified_is_one_message_and_exit_code_2(parent, grown, arguments, words, capsys):
    names = {"PARENT": parent, "GROWN": grown}
    assert main(["verify", *(names.get(argument, argument) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-warmstart verify: ") and words in err
    assert err.count("\n") == 1 and "Traceback" not in err
