"""The licence of a card is the caller's, or what the parent's own card says; never a guess."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi, ModelCard

from hf_warmstart import push_to_hub
from hf_warmstart.hub import render_card

from .card_rules import broken_rules


def _parents_card(hub, text: str) -> None:
    api = HfApi(endpoint=hub.url)
    api.create_repo("org/tiny", exist_ok=True)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="org/tiny")


def _pushed(hub) -> ModelCard:
    return ModelCard(hub.repos["user/big"].branches["main"][-1].files["README.md"].decode())


def test_the_parents_licence_goes_along(hub, grown, certificate):
    _parents_card(hub, "---\nlicense: gemma\ntags:\n- x\n---\n# Tiny\n")
    push_to_hub(grown, "user/big", certificate=certificate)
    assert _pushed(hub).data.license == "gemma" and "the parent's, as its own card says" in _pushed(hub).text
    push_to_hub(grown, "user/big", certificate=certificate, license="mit")
    assert _pushed(hub).data.license == "mit" and "as stated by whoever published" in _pushed(hub).text


def test_a_licence_of_the_parents_own_keeps_name_and_link(hub, grown, certificate):
    _parents_card(hub, "---\nlicense: other\nlicense_name: tiny-1.0\nlicense_link: LICENSE\n---\n# Tiny\n")
    push_to_hub(grown, "user/big", certificate=certificate)
    data = _pushed(hub).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "tiny-1.0", "LICENSE")
    assert broken_rules(data) == []


@pytest.mark.parametrize("text", [None, "# no metadata\n", "---\ntags: []\n---\n", "---\nlicense:\n- a\n- b\n---\n"])
def test_where_the_parent_says_nothing_the_card_says_nothing(hub, grown, certificate, text):
    if text is not None:
        _parents_card(hub, text)
    push_to_hub(grown, "user/big", certificate=certificate)
    assert _pushed(hub).data.license is None and "No licence was stated" in _pushed(hub).text


def test_a_parent_that_is_no_repository_is_not_asked_for(parent, certificate):
    from hf_warmstart import grow

    parent.config._name_or_path = "folder"
    card = render_card(grow(parent, depth=2), certificate=certificate, license="parent")
    assert card.data.license is None and "No licence was stated" in card.text
