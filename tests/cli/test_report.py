"""The report is one page that holds all it shows, says what is missing, and can be read with a keyboard."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from transformers import AutoModelForCausalLM

from hf_warmstart import WarmstartError, grow
from hf_warmstart.cli import main
from hf_warmstart.errors import CheckpointError
from hf_warmstart.report import write_report
from hf_warmstart.report.contents import read_contents
from hf_warmstart.report.measures import measure

from ..models import tiny_model
from ..training.conftest import blocks, stock_trainer, warmstart_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of `WarmstartTrainer` with two checkpoints, evaluations and a recommendation."""
    folder = tmp_path_factory.mktemp("runs")
    stock_trainer(tiny_model("llama", randomised=False), folder / "base", 4, blocks(0, 4)).train()
    child = grow(
        AutoModelForCausalLM.from_pretrained(folder / "base" / "checkpoint-4"),
        width=2,
        depth=2,
        width_operator="perturbed_copy",
    )
    trainer = warmstart_trainer(
        child, folder / "grown", 4, blocks(4, 4), warmstart_from=folder / "base" / "checkpoint-4",
        eval_dataset=blocks(8, 1), eval_strategy="steps", eval_steps=1, save_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    recommendation = {"law": "mine", "warnings": ["<b>mind</b>"], "training_arguments": {"learning_rate": 1e-3}}
    (folder / "grown" / "recommendation.json").write_text(json.dumps(recommendation))
    return folder / "grown"


@pytest.fixture(scope="module")
def text(run, tmp_path_factory) -> str:
    """The page of that run, measures included."""
    path = write_report(run, tmp_path_factory.mktemp("page") / "page.html")
    assert path.stat().st_size < 600_000
    return path.read_text()


class Page(HTMLParser):
    """What a page refers to, and its parts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.loaded += [
            v for k, v in attributes if k in ("src", "srcset", "data", "action") or (k == "href" and tag == "link")
        ]
        self.open += [tag] if tag not in ("meta", "link", "br", "path", "use") else []

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"{tag} closes out of order"


def test_the_page_holds_all_sections_and_nothing_is_fetched(run, text):
    page = Page(text)
    titles = re.findall(r'<h2 id="[^"]*">([^<]*)</h2>', text)
    assert titles == [
        "Growth", "Curves", "Schedule", "Gradient norm", "Spectrum", "Activation scale", "Escape", "Recommendation",
        "Not in this report",
    ]  # fmt: skip
    assert page.loaded == ["data:,"] and "<script" not in text and "@import" not in text
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, which nothing fetches
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids) and len(page.links) == 8
    assert page.open == []
    assert "&lt;b&gt;mind&lt;/b&gt;" in text and "<b>mind</b>" not in text
    assert str(run.parent) not in text


def test_pictures_are_well_formed_named_and_scale(text):
    pictures = re.findall(r"<svg .*?</svg>", text, flags=re.S)
    assert len(pictures) == 6
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img" and root.get("aria-label") and root.get("viewBox")
        assert root.get("width") is None and root.get("height") is None
        ids = {node.get("id") for node in root.iter() if node.get("id")}
        used = set(re.findall(r"url\(#([^)]*)\)|xlink:href=\"#([^\"]*)\"", picture))
        assert {one or other for one, other in used} <= ids
    assert '<meta name="viewport"' in text and 'lang="en"' in text


def _contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_have_the_contrast_that_wcag_asks_of_text():
    from hf_warmstart.report.charts import COLOURS
    from hf_warmstart.report.page import TEMPLATE

    style = TEMPLATE.read_text().split("<style>")[1].split("</style>")[0]
    colours = re.findall(r"(?<![-\w])color: (#\w{6})", style)
    assert len(colours) == 3
    assert all(_contrast(colour, "#ffffff") >= 4.5 for colour in (*colours, *COLOURS))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desk"])
def test_in_a_browser_the_page_fits_can_be_read_and_needs_no_mouse(size, run, chromium, tmp_path):
    chromium.open(write_report(run, tmp_path / "page.html").as_uri(), *size)
    for opened in (False, True):
        if opened:
            chromium.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        found = chromium.look()
        assert found.texts > 60 and found.controls > 8
        assert found.width <= size[0]
        assert (found.errors, found.faint, found.unreached, found.unseen, found.lost) == ([], [], [], [], [])


def test_one_checkpoint_gives_a_number_and_no_line(run, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run / "checkpoint-4" / name, folder)
    text = write_report(folder).read_text()
    section = text.split('<section id="escape"')[1].split("</section>")[0]
    assert "<svg" not in section and "<details open>" in section and section.count("<td>") == 2


def test_measures_say_what_they_are_of(run):
    found = measure(read_contents(run))
    assert list(found.activations) == ["step 2", "step 4", "end"] and len(found.activations["end"]) == 5
    assert list(found.spectrum) == ["step 2", "end"]
    assert all(0 < share <= 1.0001 for share in found.spectrum["end"].values())
    assert 0 < found.escape["step 2"] < 1 and found.escape["step 4"] == found.escape["end"]
    assert found.skipped == []


def test_numbers_are_those_of_the_run(run, tmp_path):
    text = write_report(run, tmp_path / "page.html", measured=False).read_text()
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    losses = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    assert len(losses) == 4 and all(f"<td>{loss:.4f}</td>" in text for loss in losses)
    assert "Weights were not looked at." in text and "Spectrum" not in re.findall(r">(\w+)</h2>", text)


def test_what_a_folder_does_not_hold_is_said(tmp_path):
    grow(tiny_model("llama"), depth=2).save_pretrained(tmp_path / "model")
    text = write_report(tmp_path / "model").read_text()
    assert "no trainer_state.json" in text and "no selection.json" in text and ">Curves</h2>" not in text


def test_the_command_writes_beside_the_run_and_says_where(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    assert main(["report", str(folder), "--no-measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(folder / "report.html") and found["bytes"] == (folder / "report.html").stat().st_size


def test_bad_input_is_refused_and_nothing_is_written(tmp_path, run):
    (tmp_path / "empty").mkdir()
    with pytest.raises(WarmstartError, match="nothing to report"):
        write_report(tmp_path / "empty")
    with pytest.raises(WarmstartError, match="is no folder"):
        write_report(tmp_path / "none")
    with pytest.raises(WarmstartError, match="cannot be written"):
        write_report(run, tmp_path / "none" / "page.html")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match="trainer_state.json in broken is damaged"):
        write_report(tmp_path / "broken")
    assert not list(tmp_path.rglob("*.html"))
