"""Laws pushed to a Hub in memory, and loaded from it."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from hf_warmstart import HparamPredictor, WarmstartError

from ..scaling.planted import Planted


def test_laws_are_pushed_in_one_commit_and_loaded_again(hub):
    predictor = HparamPredictor.fit(Planted().runs(), draws=20, name="tiny law")
    predictor.push_to_hub("user/law", license="mit")
    (commit,) = hub.commits("user/law")
    assert set(commit.files) >= {
        "README.md",
        "config.json",
        "draws.parquet",
        "laws.png",
        "runs.parquet",
        "set_aside.parquet",
    }
    again = HparamPredictor.from_pretrained("user/law")
    assert str(again) == str(predictor) and len(again.runs) == 150
    card = ModelCard.load("user/law")
    assert (
        card.data.license == "mit"
        and card.data.library_name == "hf_warmstart"
        and 'from_pretrained("user/law")' in card.text
    )


def test_a_repository_that_is_not_there_is_said(hub):
    with pytest.raises(WarmstartError, match="'user/nothing' is no law .* Published laws are"):
        HparamPredictor.from_pretrained("user/nothing")
