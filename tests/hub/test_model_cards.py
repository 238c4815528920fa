"""The cards in `model_cards/`: up to date, valid, read back without loss, and good for rebuilding the models."""

from __future__ import annotations

import copy
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_warmstart import grow
from hf_warmstart.cli import main
from hf_warmstart.growth.operators import DEPTH_OPERATORS, WIDTH_OPERATORS
from hf_warmstart.hub import render_card, save_grown
from hf_warmstart.hub.card import _dataset_id
from hf_warmstart.hub.citations import PAPERS

from .card_rules import broken_rules
from .test_hub_card import block

REPOSITORY = Path(__file__).parents[2]
CARDS = ("grown_by_command", "continued", "chain")
STEPS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The cards and models, made anew by the example, in a shorter run."""
    folder = tmp_path_factory.mktemp("cards")
    sys.path.insert(0, str(REPOSITORY / "examples"))
    try:
        import model_cards

        model_cards.make(folder / "cards", folder / "work", STEPS)
    finally:
        sys.path.remove(str(REPOSITORY / "examples"))
    return folder


def _without_numbers(text: str) -> str:
    """A card without what a shorter run or another machine changes: measured numbers, digests, numbers of steps."""
    text = re.sub(r"[0-9a-f]{64}", "#", text)
    text = re.sub(r"(?m)^\| \d+ \| \d\.\d{4} \|$\n?", "", text)  # rows of the history
    text = re.sub(r"checkpoint-\d+", "#", text)
    return re.sub(r"\d[\d.,]*(e[-+]?\d+)?", "#", text)


@pytest.mark.parametrize("name", CARDS)
def test_the_committed_cards_are_up_to_date(made, name):
    committed = (REPOSITORY / "model_cards" / name / "README.md").read_text()
    anew = (made / "cards" / name / "README.md").read_text()
    assert _without_numbers(committed) == _without_numbers(anew), "run: python examples/model_cards.py model_cards"
    assert (REPOSITORY / "model_cards" / name / "curves.png").exists() == ("](curves.png)" in committed)


@pytest.mark.parametrize("name", CARDS)
def test_metadata_is_valid_and_survives_the_hubs_own_parser(name):
    text = (REPOSITORY / "model_cards" / name / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    card = ModelCard(text)
    assert card.data.to_dict() == yaml.safe_load(head) | (
        {} if "model-index" not in yaml.safe_load(head) else {"model-index": card.data.to_dict()["model-index"]}
    )
    assert yaml.safe_load(card.data.to_yaml()) == yaml.safe_load(head)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() and ModelCard(str(card)).text == card.text
    assert body.strip() == card.text.strip()
    assert broken_rules(yaml.safe_load(head)) == []


def test_the_continued_cards_model_index_holds_the_held_out_loss_and_the_text_that_of_both():
    card = ModelCard.load(REPOSITORY / "model_cards" / "continued" / "README.md")
    loss = next(result for result in card.data.eval_results if result.metric_type == "loss")
    row = re.search(r"\| eval_loss \| ([\d.]+) \| ([\d.]+) \|", card.text)
    assert f"{loss.metric_value:.6g}" == row[2] and "tokens" in loss.metric_name
    assert 1 < float(row[2]) < float(row[1]) < 5.5  # a byte of 256, guessed, costs 5.545 nats
    assert "apache-2.0-license-text" in card.text


def test_recommended_arguments_are_training_arguments(made):
    from transformers import TrainingArguments

    card = ModelCard.load(made / "cards" / "continued" / "README.md")
    settings = yaml.safe_load(block(card.text, "yaml"))
    assert TrainingArguments(**settings, use_cpu=True).max_steps == settings["max_steps"]


def _source(made: Path) -> Path:
    return made / "work" / "parent" / f"checkpoint-{STEPS}"


@pytest.mark.parametrize("name", CARDS)
def test_the_python_in_a_card_rebuilds_the_model_bit_for_bit(made, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "parent").symlink_to(_source(made))
    told: dict = {}
    exec(block((made / "cards" / name / "README.md").read_text(), "python"), told)  # noqa: S102
    rebuilt = told["model"].state_dict()
    if name == "continued":  # the folder has what training made of it: the growth itself is compared
        parent = AutoModelForCausalLM.from_pretrained(_source(made))
        grown = grow(parent, width=2, depth=2, width_operator="uneven_copy")
    else:
        grown = AutoModelForCausalLM.from_pretrained(made / "work" / name)
    assert rebuilt.keys() == grown.state_dict().keys()
    assert all(torch.equal(rebuilt[n], tensor) for n, tensor in grown.state_dict().items())


def test_the_command_in_a_card_rebuilds_the_files_bit_for_bit(made, tmp_path, capsys):
    text = (made / "cards" / "grown_by_command" / "README.md").read_text()
    (command,) = re.findall(r"`(hf-warmstart grow [^`]+)`", text)
    places = {"path/to/parent": str(_source(made)), "grown": str(tmp_path / "again")}
    places["THIS"] = str(made / "work" / "grown_by_command")
    program, *arguments = [places.get(word, word) for word in shlex.split(command)]
    assert program == "hf-warmstart" and main(arguments) == 0, capsys.readouterr()
    again, first = (folder / "model.safetensors" for folder in (tmp_path / "again", Path(places["THIS"])))
    assert again.read_bytes() == first.read_bytes()


def test_a_dataset_with_a_free_name_gets_a_type_that_the_hub_takes(grown, certificate):
    metrics = {"eval_loss": 3.0}
    card = render_card(grown, certificate=certificate, metrics=metrics, dataset="uniform random tokens", license="mit")
    data = yaml.safe_load(card.data.to_yaml())
    assert broken_rules(data) == []
    assert data["model-index"][0]["results"][0]["dataset"] == {
        "name": "uniform random tokens",
        "type": "uniform-random-tokens",
    }
    assert [_dataset_id(name) for name in ("org/a.b", "a/b/c", "é", " x ")] == ["org/a.b", "a-b-c", "unnamed", "x"]


def test_the_rules_find_what_is_wrong():
    """They must be able to fail."""
    good = yaml.safe_load((REPOSITORY / "model_cards" / "continued" / "README.md").read_text().split("---\n")[1])
    spoiled = copy.deepcopy(good)
    spoiled["model-index"][0]["results"][0]["dataset"]["type"] = "two words"
    spoiled["model-index"][0]["results"][0]["metrics"][0]["value"] = float("nan")
    spoiled["license"] = "mine"
    spoiled["base_model"] = "a/b/c"
    assert len(broken_rules(spoiled)) == 5


def test_every_operator_has_its_papers_in_the_card(grown, certificate):
    assert set(PAPERS) == set(WIDTH_OPERATORS) | set(DEPTH_OPERATORS)
    text = block(render_card(grown, certificate=certificate).text, "bibtex")
    assert re.findall(r"eprint = \{([\d.]+)\}", text) == ["2308.06103", "2401.02415"]
    papers = (REPOSITORY / "docs" / "papers.md").read_text()
    sources = "".join(path.read_text() for path in (REPOSITORY / "hf_warmstart/growth/operators").glob("*.py"))
    for paper in (paper for found in PAPERS.values() for paper in found):
        assert paper.arxiv in papers and paper.arxiv in sources, paper.arxiv


def test_history_gives_a_table_and_a_picture(grown, certificate, tmp_path):
    history = [{"step": k, "loss": 3.0 - k / 10} for k in range(1, 11)]
    history += [{"step": k, "eval_loss": 3.0 - k / 10, "num_input_tokens_seen": 100 * k} for k in range(1, 21)]
    save_grown(grown, tmp_path, certificate=certificate, history=history)
    text = (tmp_path / "README.md").read_text()
    assert (
        "20 optimizer steps over 2,000 tokens" in text
        and "![Training and held-out loss over steps](curves.png)" in text
    )
    rows = re.findall(r"(?m)^\| (\d+) \| (\d\.\d{4}) \|$", text)
    assert len(rows) == 8 and rows[0] == ("1", "2.9000") and rows[-1] == ("20", "1.0000")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "has not been trained since it grew" not in text
    save_grown(grown, tmp_path / "untrained", certificate=certificate)
    assert "has not been trained since it grew" in (tmp_path / "untrained" / "README.md").read_text()
    assert not (tmp_path / "untrained" / "curves.png").exists()
