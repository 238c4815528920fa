"""The two views of a model: the same tensors, bit for bit, as `from_pretrained` loads and `save_pretrained` writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from hf_warmstart.checkpoints.pieces import Assembled
from hf_warmstart.checkpoints.views import file_view, loaded_view
from hf_warmstart.errors import CheckpointError, UntraceableError, WarmstartError
from hf_warmstart.growth import zoo
from hf_warmstart.growth.grow import empty_model
from hf_warmstart.growth.layouts.probe import probe_config, set_dtype
from hf_warmstart.growth.twin import FAULTS, build, randomise

from ..models import FAMILIES, tiny_config, tiny_model

ACROSS = [
    ("image-classification", "vit"),
    ("seq2seq-lm", "t5"),  # tied, and bfloat16 keeps some of it in float32
    ("seq2seq-lm", "bart"),
    ("speech-seq2seq", "whisper"),
    ("masked-lm", "bert"),
    ("causal-lm", "deepseek_v3"),
    ("causal-lm", "gpt_oss"),
    ("causal-lm", "mamba2"),
]


def reader(tensors):
    """Gives boxes of tensors, and only boxes that lie inside of them."""

    def read(name, box):
        tensor = tensors[name]
        assert all(0 <= start < stop <= size for (start, stop), size in zip(box, tensor.shape, strict=False)), (name, box)
        return tensor[tuple(slice(*one) for one in box)]

    return read


def same(made: Assembled, expected: torch.Tensor, read) -> bool:
    """Whether a tensor is the expected one, whole and by blocks of an odd number of rows."""
    tensors = [made.whole(read)]
    if made.shape and made.shape[0]:
        size = made.shape[0]
        step = max(1, size // 3) | 1
        tensors.append(torch.cat([made.rows(k, min(k + step, size), read) for k in range(0, size, step)]))
    assert (made.shape, made.dtype) == (tuple(expected.shape), expected.dtype)
    return all(one.dtype == expected.dtype and torch.equal(one, expected) for one in tensors)


def headers(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def files_of(folder):
    return {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in load_file(path).items()}


def check_loaded(model_class, folder) -> None:
    """Every tensor of the loaded model, from the files'."""
    files = files_of(folder)
    model = model_class.from_pretrained(folder)
    state = model.state_dict()
    view = loaded_view(model_class, model_class.config_class.from_pretrained(folder), headers(files))
    assert list(view) == [name for name in state if name not in model.all_tied_weights_keys]
    assert [name for name, made in view.items() if not same(made, state[name], reader(files))] == []


def check_saved(loaded, folder) -> None:
    """Every tensor of the saved files, from the tensors of a model that was not loaded; and which file has which."""
    state = loaded.state_dict()
    model = empty_model(type(loaded), loaded.config, loaded.dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = state[name]
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="50KB")
    view = file_view(type(model), model.config, {name: tensor.dtype for name, tensor in state.items()})
    files = files_of(folder)
    assert set(view.tensors) == set(files)
    assert [name for name, made in view.tensors.items() if not same(made, files[name], reader(state))] == []
    written = {path.name: set(load_file(path)) for path in folder.glob("*.safetensors")}
    assert written == {name: set(names) for name, names in view.split("50KB").filename_to_tensors.items()}


def zoo_model(kind, model_type, dtype=torch.float32):
    model_class, config = zoo.source_of(kind, model_type)
    config = probe_config(config)
    set_dtype(config, dtype)
    model = build(model_class, config)
    randomise(model, 0)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_families_agree_in_both_directions(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    check_loaded(type(model), tmp_path)
    check_saved(model, tmp_path / "again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "model_type"), ACROSS, ids=[name for _, name in ACROSS])
def test_other_sorts_of_models_agree_in_both_directions(kind, model_type, dtype, tmp_path):
    model = zoo_model(kind, model_type, dtype)
    model.save_pretrained(tmp_path)
    check_loaded(type(model), tmp_path)
    check_saved(model.from_pretrained(tmp_path), tmp_path / "again")
