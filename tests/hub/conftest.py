"""Fixtures: a tiny grown model, and a Hub in memory that the client in this process talks to."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http, _runtime
from transformers import LlamaForCausalLM

from hf_warmstart import Certificate, grow

from ..models import tiny_model
from .minihub import MiniHub


@pytest.fixture(scope="session")
def _parent() -> LlamaForCausalLM:
    return tiny_model("llama", randomised=False, hidden_size=32, head_dim=8, intermediate_size=48, vocab_size=99)


@pytest.fixture
def parent(_parent: LlamaForCausalLM) -> LlamaForCausalLM:
    """A tiny Llama as if loaded from `org/tiny`."""
    model = copy.deepcopy(_parent)
    model.config._name_or_path = "org/tiny"
    return model


@pytest.fixture
def grown(parent: LlamaForCausalLM) -> LlamaForCausalLM:
    """The parent, widened and deepened."""
    return grow(parent, width=1.5, depth=2)


@pytest.fixture
def certificate() -> Certificate:
    """A certificate with numbers that can be found again."""
    return Certificate(True, 1.25e-15, 2.5e-15, [], {}, True, "because the test says so")


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Point the client of this process at a `MiniHub`.

    `huggingface_hub` reads its endpoint, its cache and whether to use Xet from the environment when it is imported, so
    the constants are replaced, with the two clients that keep an endpoint of their own.
    """

    def use(hub: MiniHub, xet: str = "on", cache: str = "hub-cache") -> MiniHub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", xet == "off")
        if xet == "absent":
            monkeypatch.setitem(_runtime._package_versions, "hf_xet", "N/A")
            monkeypatch.setitem(sys.modules, "hf_xet", None)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between repetitions
        monkeypatch.setenv("HF_TOKEN", hub.token)
        return hub

    return use


@pytest.fixture
def hub(use_hub) -> Iterator[MiniHub]:
    """A Hub that takes uploads inside the commit, for a client with `hf_xet` on."""
    with MiniHub() as server:
        yield use_hub(server)
