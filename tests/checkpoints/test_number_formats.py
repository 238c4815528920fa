"""What becomes of numbers: copies and powers of two are exact in every format, all else is rounded once."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_warmstart import grow_checkpoint, plan_growth
from hf_warmstart.checkpoints.grow_checkpoint import prepare_growth
from hf_warmstart.checkpoints.weights import whole as whole_weights
from hf_warmstart.cli import main
from hf_warmstart.errors import CheckpointError

from ..models import tiny_config, tiny_model
from .grown import CERTIFICATE, add_training_state, save_parent

MANTISSA = {torch.bfloat16: 8, torch.float16: 11}


def grown(tmp_path, monkeypatch, family, dtype, **options):
    """The parent's and the child's tensors in memory, and the plan between them."""
    monkeypatch.setattr(whole_weights, "certify_record", lambda config: CERTIFICATE)
    save_parent(tmp_path / "parent", family, dtype)
    grow_checkpoint(tmp_path / "parent", tmp_path / "made", **options)
    parent, child = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("parent", "made"))
    return parent, child, plan_growth(tmp_path / "parent", **options)


def carried(plan, name, tensor) -> torch.Tensor:
    """`W_out w R_in^T` in float64, by the maps alone."""
    growth = plan.tensor(name)
    wide = tensor.double()
    for axis, (axis_map, role) in enumerate(zip(growth.maps, growth.layout.roles, strict=True)):
        wide = axis_map.push(wide, axis, role)
    return wide * growth.factor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_and_powers_of_two_are_exact_in_half_precision(dtype, monkeypatch, tmp_path):
    parent, child, plan = grown(tmp_path, monkeypatch, "llama", dtype, width=2, width_operator="exact_copy")
    for name in plan.names:
        factors = torch.cat([axis.read[axis.read != 0] for axis in plan.tensor(name).maps])
        assert bool((torch.frexp(factors)[0].abs() == 0.5).all()), name  # the test is of powers of two
        assert child[name].dtype == dtype
        exact = carried(plan, name, parent[name])
        normal = exact.abs() >= torch.finfo(dtype).tiny
        assert float(normal.double().mean()) > 0.98, name
        assert torch.equal(child[name].double()[normal], exact[normal]), name
        # Halves of float16's smallest numbers lose their last bit.
        assert torch.equal(child[name][~normal], exact[~normal].to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_factors_are_rounded_once(dtype, monkeypatch, tmp_path):
    """As float64 arithmetic would be, rounded once; where that ends beside the middle of two numbers, float32 may take
    the other one."""
    parent, child, plan = grown(tmp_path, monkeypatch, "llama", dtype, width=1.5, width_operator="exact_copy")
    inexact = 0
    for name in plan.names:
        exact = carried(plan, name, parent[name])
        error = (child[name].double() - exact).abs()
        # Half a unit in the last place of a number of this size (or of the smallest normal one), but for float32's own.
        exponent = torch.frexp(exact)[1].clamp(min=torch.frexp(torch.tensor(torch.finfo(dtype).tiny))[1])
        half = torch.ldexp(torch.ones_like(exact), exponent - MANTISSA[dtype] - 1)
        assert bool((error <= half * (1 + 2.0**-10)).all()), name
        again = exact.to(dtype)
        assert float((again != child[name]).double().mean()) < 1e-3, name
        inexact += int((error > 0).sum())
    assert inexact > 0


def test_moments_keep_their_own_format_beside_half_precision_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(whole_weights, "certify_record", lambda config: CERTIFICATE)
    parent = save_parent(tmp_path / "parent", "llama", torch.bfloat16)
    add_training_state(parent, AutoModelForCausalLM.from_pretrained(parent), torch.float32)
    grow_checkpoint(parent, tmp_path / "made", width=1.5)
    state = torch.load(tmp_path / "made" / "optimizer.pt", weights_only=True)["state"]
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.float32}
    weights = [t for path in (tmp_path / "made").glob("*.safetensors") for t in load_file(path).values()]
    assert {tensor.dtype for tensor in weights} == {torch.bfloat16}


# -- quantised --------------------------------------------------------------------------------------------------------

QUANTISED = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def quantised_config(folder):
    """A folder whose config says that its weights are quantised."""
    tiny_model("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": QUANTISED}
    (folder / "config.json").write_text(json.dumps(config))


def eight_bit_files(folder):
    """A folder that says nothing, with tensors of eight-bit floats."""
    tiny_model("llama").save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("make", "words"), [(quantised_config, r"quantised \(fp8\)"), (eight_bit_files, "1 tensors are FP8")]
)
def test_quantised_weights_are_refused_with_the_way_out_and_nothing_is_written(make, words, tmp_path):
    make(tmp_path / "parent")
    with pytest.raises(CheckpointError, match=f"{words}.*unquantised.*dequantize"):
        prepare_growth(tmp_path / "parent", tmp_path / "made", width=2)
    assert main(["grow", str(tmp_path / "parent"), str(tmp_path / "made"), "--width", "2"]) != 0
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_the_plan_of_a_quantised_folder_is_that_of_the_plain_model_and_says_so(caplog, tmp_path):
    quantised_config(tmp_path)
    plan = plan_growth(tmp_path, width=2)
    assert "quantised (fp8)" in caplog.text and "dequantize" in caplog.text
    assert plan.output_bytes == plan_growth(tiny_config("llama"), width=2).output_bytes
    assert getattr(plan.target_config, "quantization_config", None) is None
    assert "quantization_config" not in plan.changes
