"""The two views of a model: the same tensors, bit for bit, as `from_pretrained` loads and `save_pretrained` writes."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from hf_warmstart.checkpoints.safetensors.layout import folder_layout
from hf_warmstart.checkpoints.weights.pieces import Assembled
from hf_warmstart.checkpoints.weights.views import file_view, loaded_view
from hf_warmstart.errors import CheckpointError, UntraceableError
from hf_warmstart.growth import zoo
from hf_warmstart.growth.grow import empty_model
from hf_warmstart.growth.layouts.probe import probe_config, set_dtype
from hf_warmstart.growth.twin import FAULTS, build, randomise

from ..models import FAMILIES, tiny_config, tiny_model

ACROSS = [
    ("image-classification", "vit", torch.float32),
    ("seq2seq-lm", "t5", torch.float16),  # tied, and some of it stays in float32
    ("seq2seq-lm", "bart", torch.bfloat16),
    ("masked-lm", "bert", torch.bfloat16),
    ("causal-lm", "deepseek_v3", torch.bfloat16),  # a bias of the router stays in float32
    ("causal-lm", "gpt_oss", torch.bfloat16),
    ("causal-lm", "mamba2", torch.bfloat16),
    ("causal-lm", "bailing_hybrid", torch.bfloat16),  # convolutions joined; arithmetic while it is initialised
]
OWN_WAY = "save_pretrained of its own"
REFUSED = {
    ("causal-lm", "zaya"): "aten.copy_",  # its initialisation writes to a weight that is loaded
    ("seq2seq-lm", "granite_speech"): OWN_WAY,
    ("seq2seq-lm", "granite_speech_plus"): OWN_WAY,
    ("seq2seq-lm", "marian"): "computes tensors that the files lack.*embed_positions",
    ("speech-seq2seq", "granite_speech"): OWN_WAY,
    ("speech-seq2seq", "granite_speech_plus"): OWN_WAY,
    ("speech-seq2seq", "kyutai_speech_to_text"): OWN_WAY,
}


def reader(tensors):
    """Gives boxes of tensors, and only boxes that lie inside of them."""

    def read(name, box):
        tensor = tensors[name]
        assert all(0 <= start < stop <= size for (start, stop), size in zip(box, tensor.shape, strict=False)), (
            name,
            box,
        )
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
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in view.tensors.items()}
    layout = folder_layout(specs, "50KB", storages=view.storages)
    assert written == {file.name: set(file.tensors) for file in layout.files}


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


@pytest.mark.parametrize(("kind", "model_type", "dtype"), ACROSS, ids=[name for _, name, _ in ACROSS])
def test_other_sorts_of_models_agree_in_both_directions(kind, model_type, dtype, tmp_path):
    model = zoo_model(kind, model_type, dtype)
    model.save_pretrained(tmp_path)
    check_loaded(type(model), tmp_path)
    check_saved(model.from_pretrained(tmp_path), tmp_path / "again")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the classes themselves
def test_every_type_agrees_in_both_directions_or_is_refused(tmp_path):
    agree, refused = 0, {}
    for kind, model_type in zoo.entries():
        folder = tmp_path / kind / model_type
        try:
            model = zoo_model(kind, model_type, torch.bfloat16)
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder)
        except FAULTS:
            continue  # the class itself cannot
        try:
            check_loaded(type(model), folder)
            check_saved(loaded, folder / "again")
            agree += 1
        except UntraceableError as error:
            refused[kind, model_type] = str(error)
        shutil.rmtree(folder)
    assert agree >= 341
    assert set(refused) == set(REFUSED)
    assert [key for key, words in refused.items() if not re.search(REFUSED[key], words)] == []


# -- files of other layouts -------------------------------------------------------------------------------------------


def save(tensors, folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_headless_checkpoint_loads_into_the_class_whose_head_is_tied(family, tmp_path):
    model = tiny_model(family)
    model.base_model.save_pretrained(tmp_path)
    assert not any(name.startswith(model.base_model_prefix) for name in files_of(tmp_path))
    check_loaded(type(model), tmp_path)


def test_a_checkpoint_with_a_head_loads_into_the_headless_class_with_a_warning(tmp_path, caplog):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    check_loaded(type(model.base_model), tmp_path)
    assert "has no place for: ['lm_head.weight']" in caplog.text


def test_old_names_of_norms_and_old_buffers_are_taken_as_they_always_were(tmp_path, caplog):
    model = zoo_model("masked-lm", "bert")
    model.save_pretrained(tmp_path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in files_of(tmp_path).items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(4)[None]
    save(old, tmp_path)
    check_loaded(type(model), tmp_path)
    assert caplog.text == ""


def test_the_head_alone_of_a_tied_pair_is_enough(tmp_path):
    model = tiny_model("gemma2")
    model.save_pretrained(tmp_path)
    files = files_of(tmp_path)
    files["lm_head.weight"] = files.pop("model.embed_tokens.weight")
    save(files, tmp_path)
    check_loaded(type(model), tmp_path)
    view = loaded_view(type(model), model.config, headers(files))
    assert view["model.embed_tokens.weight"].source == "lm_head.weight"


def test_both_of_a_tied_pair_are_refused_since_only_their_values_say_whether_they_are_tied():
    model = tiny_model("gemma2")
    files = headers(model.state_dict())
    with pytest.raises(UntraceableError, match="aten.equal"):
        loaded_view(type(model), model.config, files)


def test_files_in_another_dtype_are_cast_as_the_config_says(tmp_path):
    model = tiny_model("mixtral").half()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_loaded(type(model), tmp_path)


def test_a_config_without_a_dtype_takes_the_files_and_is_refused_where_they_differ(tmp_path):
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_loaded(type(model), tmp_path)
    files = headers(files_of(tmp_path)) | {"lm_head.weight": (torch.float32, (97, 64))}
    with pytest.raises(UntraceableError, match="files several"):
        loaded_view(type(model), type(model.config).from_pretrained(tmp_path), files)


# -- files that do not fit --------------------------------------------------------------------------------------------


def test_missing_tensors_are_all_named_in_order():
    model = tiny_model("llama")
    files = headers(model.state_dict())
    for name in ("model.norm.weight", "lm_head.weight"):
        del files[name]
    with pytest.raises(CheckpointError, match=r"lack 2 tensors .*: \['lm_head.weight', 'model.norm.weight'\]"):
        loaded_view(type(model), model.config, files)


def test_wholly_foreign_files_are_refused_without_memory_for_weights():
    config = tiny_config("llama", hidden_size=2**17, intermediate_size=2**19, num_hidden_layers=30)
    with pytest.raises(CheckpointError, match="lack 273 tensors"):
        loaded_view(type(tiny_model("llama")), config, {"other": (torch.float32, (3,))})


def test_tensors_of_other_shapes_are_named_with_both():
    model = tiny_model("llama")
    files = headers(model.state_dict()) | {"lm_head.weight": (torch.float32, (97, 32))}
    with pytest.raises(CheckpointError, match=r"lm_head.weight of \(97, 32\) for \(97, 64\)"):
        loaded_view(type(model), model.config, files)


@pytest.mark.parametrize("weight", ["w1", "w2", "w3"])
def test_a_missing_expert_is_named_as_in_the_files(weight, tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    files = headers(files_of(tmp_path))
    name = f"model.layers.1.block_sparse_moe.experts.2.{weight}.weight"
    del files[name]
    with pytest.raises(CheckpointError, match=f"lack 1: \\['{name}'\\]"):
        loaded_view(type(model), model.config, files)


def test_what_needs_the_model_itself_is_refused():
    model = tiny_model("llama")
    files = headers(model.state_dict())
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UntraceableError, match="quantization_config"):
        loaded_view(type(model), model.config, files)

    class Own(type(model)):
        def save_pretrained(self, *args, **kwargs):
            """Another way."""

    with pytest.raises(UntraceableError, match="save_pretrained of its own"):
        file_view(Own, tiny_config("llama"), torch.float32)


# -- what the views read ----------------------------------------------------------------------------------------------


def test_rows_of_one_expert_in_a_file_are_rows_of_the_stack_in_memory():
    model = tiny_model("mixtral")
    view = file_view(type(model), model.config, torch.bfloat16)
    made = view.tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    boxes = []

    def read(name, box):
        boxes.append((name, box))
        return torch.zeros([stop - start for start, stop in box] + [64])

    made.rows(10, 20, read)
    assert boxes == [("model.layers.1.mlp.experts.gate_up_proj", ((2, 3), (106, 116)))]
    assert made.dtype == torch.bfloat16 and view.tensors["lm_head.weight"].source == "lm_head.weight"


def test_views_are_quiet_and_leave_transformers_as_it_was(monkeypatch, capfd):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        model = tiny_model("mixtral")
        capfd.readouterr()
        view = file_view(type(model), model.config, torch.float32)
        loaded_view(type(model), model.config, {name: (made.dtype, made.shape) for name, made in view.tensors.items()})
        assert capfd.readouterr() == ("", "")
        assert logging.get_verbosity() == logging.INFO
        model.from_pretrained(None, config=model.config, state_dict=model.state_dict())
        assert "Loading weights" in capfd.readouterr().err
    finally:
        logging.set_verbosity(verbosity)
