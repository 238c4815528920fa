"""Every public name says what it takes, gives and refuses, and where it comes from."""

from __future__ import annotations

import inspect
import re

import pytest

import hf_warmstart
from hf_warmstart import hub, metrics, report, training

# Names that carry out what a paper says, in whole or in part; the paper is to be named.
FROM_PAPERS = {
    "WarmstartTrainingArguments", "advise_growth", "freeze_parent", "grow", "run_sweep", "select_warmstart", "upcycle",
    "LossLaw", "GrownAdamW", "HparamPredictor",
}  # fmt: skip
# Plain data and errors: made by the library, there is nothing to pass wrongly.
NEVER_RAISE = {
    "Certificate", "GrowthAdvice", "GrowthPlan", "GrowthRecord", "HparamRecommendation", "NewParts", "SelectionReport",
    "WarmstartError", "compute_metrics", "load_metric", "token_losses",
}  # fmt: skip
# What a number is of: units of training, shapes, or kinds of things.
UNITS = re.compile(
    r"nats|tokens|bytes|steps|FLOPs|parameters|`str`|`int`|`float`|`bool`|`dict|shape|\(rows|\(m,\)|\"5GB\"|entries|folder|model|factor"
)


def _public() -> dict[str, object]:
    found = {name: getattr(hf_warmstart, name) for name in hf_warmstart.__all__ if name != "__version__"}
    for module in (hub, metrics, report, training):
        found |= {name: getattr(module, name) for name in module.__all__ if callable(getattr(module, name))}
    return found


PUBLIC = _public()


def _doc(thing: object) -> str:
    own = inspect.getdoc(thing) or ""
    inherited = [inspect.getdoc(base) for base in getattr(thing, "__mro__", ())[1:]]
    return "" if own in inherited else own


def _parameters(thing: object) -> list[str]:
    given = inspect.signature(thing).parameters  # type: ignore[arg-type]
    return [name for name, p in given.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_a_docstring_of_its_own_with_units(name):
    doc = _doc(PUBLIC[name])
    assert len(doc) > 60, name
    assert name == "WarmstartError" or UNITS.search(doc), f"{name}: units or shapes of what it takes or gives"


@pytest.mark.parametrize("name", sorted(n for n, t in PUBLIC.items() if inspect.isfunction(t)))
def test_functions_name_all_their_arguments_and_what_they_give(name):
    doc = _doc(PUBLIC[name])
    missing = [parameter for parameter in _parameters(PUBLIC[name]) if not re.search(rf"\b{parameter}\b", doc)]
    assert missing == [], name
    gives = inspect.signature(PUBLIC[name]).return_annotation
    assert gives in (None, "None") or "Returns:" in doc or "Returns" in doc, name


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - NEVER_RAISE))
def test_what_can_be_refused_says_so(name):
    thing = PUBLIC[name]
    doc = _doc(thing)
    if inspect.isclass(thing):
        doc += "".join(_doc(member) for _, member in inspect.getmembers(thing, callable) if hasattr(member, "__doc__"))
    assert "Raises" in doc, name


@pytest.mark.parametrize("name", sorted(FROM_PAPERS))
def test_what_comes_from_a_paper_names_it(name):
    thing = PUBLIC[name]
    text = _doc(thing) + (inspect.getmodule(thing).__doc__ or "")
    assert re.search(r"arXiv \d{4}\.\d{5}", text), name


def test_names_in_the_tables_are_public():
    assert set(PUBLIC) >= FROM_PAPERS | NEVER_RAISE
