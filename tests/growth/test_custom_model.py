"""A user's own model and config: grown exactly where its maths allows it, refused by name where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_warmstart import WarmstartError, certify, grow, plan_growth

from ..models import some_tokens, tiny_config


class QuillConfig(PreTrainedConfig):
    """A config with names of its own."""

    model_type = "quill"
    attribute_map = {
        "hidden_size": "model_width",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_pens",
        "intermediate_size": "ink",
        "max_position_embeddings": "page_length",
        "vocab_size": "n_glyphs",
    }

    def __init__(self, model_width=48, n_blocks=3, n_pens=6, ink=80, page_length=40, n_glyphs=61, eps=1e-5, **kwargs):
        self.model_width, self.n_blocks, self.n_pens, self.ink = model_width, n_blocks, n_pens, ink
        self.page_length, self.n_glyphs, self.eps = page_length, n_glyphs, eps
        super().__init__(**kwargs)


class QuillNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.gain * (x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + self.eps))


class QuillBlock(nn.Module):
    """Heads outermost in one fused matrix, and a fused [gate; up]."""

    def __init__(self, config: QuillConfig):
        super().__init__()
        width = config.model_width
        self.pens = config.n_pens
        self.before_look, self.before_think = QuillNorm(width, config.eps), QuillNorm(width, config.eps)
        self.look = nn.Linear(width, 3 * width)
        self.look_out = nn.Linear(width, width)
        self.think = nn.Linear(width, 2 * config.ink, bias=False)
        self.think_out = nn.Linear(config.ink, width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        fused = self.look(self.before_look(x)).view(batch, length, self.pens, -1).transpose(1, 2)
        q, k, v = fused.chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        seen = scores.masked_fill(future, torch.finfo(x.dtype).min).softmax(-1) @ v
        x = x + self.look_out(seen.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.think(self.before_think(x)).chunk(2, dim=-1)
        return x + self.think_out(F.gelu(gate) * up)


class QuillModel(PreTrainedModel):
    config_class = QuillConfig
    block_class: type[nn.Module] = QuillBlock

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.glyphs = nn.Embedding(config.n_glyphs, config.model_width)
        self.places = nn.Embedding(config.page_length, config.model_width)
        self.blocks = nn.ModuleList(self.block_class(config) for _ in range(config.n_blocks))
        self.last = QuillNorm(config.model_width, config.eps)
        self.read_out = nn.Linear(config.model_width, config.n_glyphs, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.glyphs

    def forward(self, input_ids=None, **kwargs):
        x = self.stream(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.answer(x)

    def answer(self, x):
        return CausalLMOutput(logits=self.read_out(self.last(x)))

    def stream(self, input_ids):
        return self.glyphs(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))


@pytest.mark.parametrize(
    "options",
    [
        {"width": 2},
        {"width": 2, "width_operator": "uneven_copy"},
        {"width": 1.5, "width_operator": "reference_slice"},
        {"depth": 2},
        {"width": 1.5, "depth": 4 / 3},
        {"ink": 100},
    ],
)
def test_a_users_own_decoder_is_certified_exact(options):
    certificate = certify(QuillModel(QuillConfig()), **options)
    assert certificate.exact, certificate
    assert certificate.unreached == [] and certificate.frozen == {} and certificate.reload_ok


def test_a_users_own_decoder_keeps_its_logits_at_its_true_sizes():
    model = QuillModel(QuillConfig()).eval()
    grown = grow(model, width=2, depth=4 / 3)
    tokens = some_tokens(vocabulary=61)
    torch.testing.assert_close(grown(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
    config = grown.config
    assert (config.model_width, config.n_blocks, config.n_pens, config.ink) == (96, 4, 12, 160)
    assert (config.page_length, config.n_glyphs) == (40, 61)


def test_sizes_of_a_users_own_config_go_by_its_own_names_and_by_the_standard_ones():
    model = QuillModel(QuillConfig())
    by_own = plan_growth(model, model_width=96, n_pens=12, n_blocks=6)
    by_standard = plan_growth(model, hidden_size=96, num_attention_heads=12, num_hidden_layers=6)
    assert by_own.changes == by_standard.changes
    assert by_own.changes == {"model_width": [48, 96], "n_pens": [6, 12], "n_blocks": [3, 6]}


class ClockModel(QuillModel):
    """Adds a constant table of sines to the stream: its channels differ and cannot be copied."""

    def stream(self, input_ids):
        width = self.config.model_width
        turns = torch.arange(input_ids.shape[1], dtype=self.dtype)[:, None] / 10 ** (torch.arange(width) / width)
        return self.glyphs(input_ids) + turns.sin()


class FourierBlock(QuillBlock):
    def forward(self, x):
        return super().forward(x) + torch.fft.fft(self.before_look(x), dim=-1).real


class FourierModel(QuillModel):
    """Mixes the channels of the stream by their place."""

    block_class = FourierBlock


class SortedBlock(QuillBlock):
    def forward(self, x):
        return super().forward(x) + self.before_look(x).sort(-1).values


class SortedModel(QuillModel):
    """Sorts the channels of the stream."""

    block_class = SortedBlock


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [(ClockModel, "constant at add"), (FourierModel, "fft"), (SortedModel, "ordered at sort")],
)
@pytest.mark.parametrize("width", [1.5, 2])
def test_a_width_that_the_maths_does_not_allow_is_refused_with_what_stands_in_the_way(model_class, reason, width):
    with pytest.raises(WarmstartError, match=f"(?s)quill cannot grow.*{reason}"):
        plan_growth(model_class(QuillConfig()), width=width)


def test_what_else_the_maths_allows_is_still_grown():
    for options in ({"depth": 2}, {"ink": 100}):
        assert certify(ClockModel(QuillConfig()), **options).exact


@pytest.mark.parametrize(("model_class", "reason"), [(FourierModel, "fft"), (SortedModel, "sort")])
def test_a_depth_that_the_maths_does_not_allow_is_refused_with_what_stands_in_the_way(model_class, reason):
    """A branch that ends in no tensor of its own cannot be silenced."""
    with pytest.raises(WarmstartError, match=rf"cannot be an identity: blocks\.\d: .*{reason}"):
        plan_growth(model_class(QuillConfig()), depth=2)


def test_a_users_own_class_is_never_taken_for_a_known_one_of_its_name():
    """Whatever is known of `LlamaForCausalLM`, this one's head reads sorted channels."""
    own = type("LlamaForCausalLM", (LlamaForCausalLM,), {})
    assert certify(own(tiny_config("llama")), width=2).exact

    def sort_inputs(model, config):
        LlamaForCausalLM.__init__(model, config)
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].sort(-1).values,))

    sorting = type("LlamaForCausalLM", (LlamaForCausalLM,), {"__init__": sort_inputs})
    with pytest.raises(WarmstartError, match="ordered at sort"):
        plan_growth(sorting(tiny_config("llama")), width=2)


class LoudBlock(QuillBlock):
    def forward(self, x):
        return super().forward(x) + 1.0


class LoudModel(QuillModel):
    """Every block adds one: the stream cannot carry factors."""

    block_class = LoudBlock


def test_a_number_that_is_added_to_the_stream_is_never_called_exact_in_depth():
    try:
        certificate = certify(LoudModel(QuillConfig()), depth=2)
    except WarmstartError as error:
        assert "identity" in str(error)
    else:
        assert not certificate.exact


class RestartedBlock(QuillBlock):
    """Every block goes on from a norm of the stream, twice what it was."""

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.start = QuillNorm(config.model_width, config.eps)

    def forward(self, x):
        return super().forward(2.0 * self.start(x))


class RestartedModel(QuillModel):
    block_class = RestartedBlock


class BareModel(RestartedModel):
    """The head reads the stream itself, and would see one more norm of it."""

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.last = nn.Identity()


@pytest.mark.parametrize(("eps", "change"), [(1e-5, 1e-3), (1e-12, 1e-9)])
def test_a_block_that_goes_on_from_a_norm_is_added_up_to_its_eps(eps, change):
    certificate = certify(RestartedModel(QuillConfig(eps=eps)), depth=2)
    assert not certificate.exact and "goes on from a norm of the stream" in certificate.reason
    assert 0 < certificate.max_relative_error < change and certificate.max_pullback_error < change


def test_one_more_norm_is_refused_where_the_stream_is_read_without():
    with pytest.raises(WarmstartError, match="cannot be an identity: new layers change the output"):
        plan_growth(BareModel(QuillConfig()), depth=2)


class StubbornModel(QuillModel):
    """Takes gradients in training alone, or never."""

    trains = True

    def forward(self, input_ids=None, **kwargs):
        if torch.is_grad_enabled() and not (self.trains and self.training):
            raise ValueError("no gradients here")
        return super().forward(input_ids, **kwargs)


def test_gradients_are_taken_in_training_mode_where_a_class_takes_none_in_another():
    assert certify(StubbornModel(QuillConfig()), width=2).exact
    never = type("NeverModel", (StubbornModel,), {"trains": False})
    certificate = certify(never(QuillConfig()), width=2)
    assert not certificate.exact and not certificate.ran and "the twins do not run" in certificate.reason


class TwoStreamsBlock(QuillBlock):
    """A reversible block: each of two streams is added to by what the other says; given by name in another order."""

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.ear, self.mouth = nn.Linear(config.model_width, config.ink), nn.Linear(config.ink, config.model_width)

    def forward(self, second, first):
        first = first + self.mouth(F.gelu(self.ear(self.before_look(second))))
        second = second + self.think_out(F.gelu(self.think(self.before_think(first)).chunk(2, dim=-1)[0]))
        return first, second


class TwoStreamsModel(QuillModel):
    block_class = TwoStreamsBlock

    def forward(self, input_ids=None, **kwargs):
        first = second = self.stream(input_ids)
        for block in self.blocks:
            first, second = block(second=second, first=first)
        return CausalLMOutput(logits=self.read_out(self.last(first + second)))


def test_a_block_of_several_streams_is_an_identity_when_each_is():
    plan = plan_growth(TwoStreamsModel(QuillConfig()), depth=2)
    ends = {"mouth.weight", "mouth.bias", "think_out.weight"}
    assert set(plan.layout.stacks[0].branch_ends) == {f"blocks.{{i}}.{name}" for name in ends}
    assert certify(TwoStreamsModel(QuillConfig()), depth=2).max_relative_error < 1e-10


class FactorisedModel(QuillModel):
    """One matrix makes the stream of a narrow table, and its transpose goes back: one for both cannot follow a norm."""

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.glyphs = nn.Embedding(config.n_glyphs, config.page_length)
        self.up = nn.Linear(config.page_length, config.model_width, bias=False)
        self.read_out = nn.Linear(config.page_length, config.n_glyphs, bias=False)
        self.last.register_forward_hook(lambda module, inputs, output: output @ self.up.weight)

    def stream(self, input_ids):
        x = self.up(self.glyphs(input_ids))
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.config.eps)


class LateNormModel(QuillModel):
    """What the tied head reads is normed on the way: the norm would see it rescaled."""

    _tied_weights_keys = {"read_out.weight": "glyphs.weight"}

    def __init__(self, config: QuillConfig):
        config.tie_word_embeddings = True
        super().__init__(config)
        self.late = nn.Linear(config.model_width, config.model_width)
        self.think = nn.Linear(config.model_width, config.model_width)
        self.between = QuillNorm(config.model_width, config.eps)
        self.last.register_forward_hook(lambda module, inputs, output: self.finished(output))

    def finished(self, x):
        x = self.late(x)
        return x + self.think(self.between(x))


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [
        (FactorisedModel, r"one matrix, up\.weight, both writes it and reads it"),
        (LateNormModel, r"input of the tied head at mm@read_out cannot be rescaled: .*@between reads it as well"),
    ],
)
@pytest.mark.parametrize("width", [1.5, 2])
def test_a_stream_that_one_tensor_asks_two_scales_of_keeps_its_width(model_class, reason, width):
    with pytest.raises(WarmstartError, match=f"The width of quill cannot grow: .*{reason}"):
        plan_growth(model_class(QuillConfig()), width=width)


class PlacesModel(QuillModel):
    """Gives the glyphs of all places of a page, whatever it is given."""

    def forward(self, input_ids=None, **kwargs):
        seen = self.glyphs(input_ids).mean(1, keepdim=True)
        return CausalLMOutput(logits=self.read_out(self.last(self.places.weight + seen)))


def test_what_would_give_an_output_of_another_length_is_refused():
    with pytest.raises(WarmstartError, match="returned at output"):
        plan_growth(PlacesModel(QuillConfig()), page_length=80)


class SideModel(QuillModel):
    """Units, and a second normed stream, as wide as the first."""

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        width = config.model_width
        self.units, self.side, self.back = (nn.Linear(width, width) for _ in range(3))
        self.side_norm = QuillNorm(width, config.eps)

    def stream(self, input_ids):
        x = super().stream(input_ids)
        return x + self.back(self.side_norm(self.side(F.silu(self.units(x)))))


@pytest.mark.parametrize("operator", ["uneven_copy", "reference_slice"])
def test_units_never_share_the_factors_of_a_normed_stream_that_is_as_wide(operator):
    certificate = certify(SideModel(QuillConfig()), width=1.5, width_operator=operator)
    assert certificate.exact, certificate


class PostNormBlock(QuillBlock):
    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.after = nn.LayerNorm(config.model_width)

    def forward(self, x):
        return self.after(super().forward(x))


class MiddleModel(QuillModel):
    """Blocks that end in a norm of the stream; between them, in the middle, something else happens."""

    block_class = PostNormBlock

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.middle = nn.Linear(config.model_width, config.model_width)

    def forward(self, input_ids=None, **kwargs):
        x = self.stream(input_ids)
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k == len(self.blocks) // 2:
                x = self.middle(x).sin()
        return CausalLMOutput(logits=self.read_out(self.last(x)))


def test_new_post_norm_layers_that_change_more_than_a_second_norm_does_are_refused():
    with pytest.raises(WarmstartError, match="cannot be an identity: new layers change the output by"):
        plan_growth(MiddleModel(QuillConfig(n_blocks=4)), depth=2)


class NarrowModel(QuillModel):
    """Scales its embeddings, and fails in plain float64: float32, in which it makes a mask, cannot hold its lowest number."""

    def stream(self, input_ids):
        lowest = torch.zeros(1, dtype=self.dtype).float().fill_(torch.finfo(self.dtype).min)
        return self.glyphs(input_ids) * self.config.model_width**0.5 + 0.0 * lowest


def test_a_class_that_runs_in_true_float64_only_is_certified_there():
    assert certify(NarrowModel(QuillConfig()), width=2).exact
