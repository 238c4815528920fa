"""`hf-warmstart advise`: the advice of `advise_growth`, from numbers with units."""

from __future__ import annotations

import json

import pandas
import pytest

from hf_warmstart import advise_growth
from hf_warmstart.cli import main
from tests.models import tiny_config
from tests.scaling.studies import study


def test_the_command_prints_the_advice(capsys):
    assert (
        main(["advise", "--params", "134.6M", "--tokens", "2.7B", "--base-params", "67m", "--base-tokens", "1.34e9"])
        == 0
    )
    advice = advise_growth(134.6e6, 2.7e9, base_params=67e6, base_tokens=1.34e9)
    assert capsys.readouterr().out == f"{advice}\n"


def test_json_is_the_advice_as_data(capsys):
    base = ["--base", "half=67M", "--base", "20M"]
    assert main(["advise", "--params", "134.6M", "--tokens", "2.7B", *base, "--count-base-cost", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    advice = advise_growth(134.6e6, 2.7e9, family={"half": 67e6, "20M": 20e6}, count_base_cost=True)
    assert data == json.loads(json.dumps(advice.to_dict()))
    assert [row["name"] for row in data["bases"]] == ["half", "20M"]


def test_laws_are_fitted_to_a_table_and_bases_read_off_folders(tmp_path, capsys):
    pandas.DataFrame(study(seeds=1)).to_csv(tmp_path / "runs.csv", index=False)
    folder = tmp_path / "small"
    tiny_config("llama", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    runs = ["--runs", str(tmp_path / "runs.csv"), "--method", "grown"]
    assert main(["advise", "--params", "150K", "--tokens", "3M", "--base", f"small={folder}", *runs]) == 0
    words = capsys.readouterr().out
    assert "small" in words and "serves: factor 2.0" in words and "own runs" in words
    assert main(["advise", "--tokens", "3M", "--checkpoint", str(folder)]) == 0
    assert "does not say how many tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--params", "12Q", "--tokens", "many"],
            "--params '12Q' is no number; pass one such as 134.6M or 2.7e9; --tokens 'many'",
        ),
        (["--params", "7B", "--tokens", "2"], "tokens=2 cannot be a count of tokens"),
        (["--params", "7B", "--tokens", "1B"], "below one token per parameter"),
        (["--tokens", "1B"], "params is missing"),
        (
            ["--params", "7B", "--tokens", "20B", "--base", "x=nowhere"],
            "neither a size such as 67M nor a folder or Hub id",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(capsys, arguments, words):
    assert main(["advise", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-warmstart advise: ") and words in err and "Traceback" not in err
