"""Which layers a new layer may copy, and where it goes: classes whose layers are not all alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, MllamaForCausalLM, XmodForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_warmstart import WarmstartError, certify, grow, plan_growth
from hf_warmstart.growth.layouts.probe import probe_config
from hf_warmstart.growth.twin import build, randomise

from .test_custom_model import QuillBlock, QuillConfig, QuillModel


class SignedModel(QuillModel):
    """Only the last block has a tensor of its own."""

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.blocks[-1].signature = nn.Parameter(torch.zeros(config.model_width))

    def forward(self, input_ids=None, **kwargs):
        x = self.stream(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.answer(x + self.blocks[-1].signature)


def test_a_layer_that_loses_tensors_when_others_follow_it_stays_the_last():
    certificate = certify(SignedModel(QuillConfig()), depth=2)
    assert certificate.exact, certificate
    plan = plan_growth(SignedModel(QuillConfig()), depth=2)
    assert plan.layer_map.source == (0, 0, 1, 1, 1, 2)
    assert plan.layer_map.gated == (False, True, False, True, True, False)


def test_a_single_layer_that_must_stay_the_last_has_nothing_to_copy():
    with pytest.raises(WarmstartError, match="each of its layers must stay where it is"):
        plan_growth(SignedModel(QuillConfig(n_blocks=1)), depth=2)


class SleepyConfig(QuillConfig):
    """Some blocks wait for what the model is not given."""

    def __init__(self, sleeping_layers=(2,), **kwargs):
        self.sleeping_layers = list(sleeping_layers)
        super().__init__(**kwargs)


class SleepyBlock(QuillBlock):
    def __init__(self, config: QuillConfig):
        super().__init__(config)
        self.dream = nn.Linear(config.model_width, config.model_width)


class SleepyModel(QuillModel):
    config_class = SleepyConfig

    def __init__(self, config: SleepyConfig):
        super().__init__(config)
        for k in config.sleeping_layers:
            self.blocks[k] = SleepyBlock(config)

    def forward(self, input_ids=None, **kwargs):
        x = self.stream(input_ids)
        for k, block in enumerate(self.blocks):
            x = x if k in self.config.sleeping_layers else block(x)
        return self.answer(x)


def test_new_layers_copy_layers_that_the_probe_ran():
    model = SleepyModel(SleepyConfig())
    certificate = certify(model, depth=2)
    assert certificate.exact, certificate
    plan = plan_growth(model, depth=2)
    assert plan.layer_map.source == (0, 0, 1, 1, 1, 2)
    assert plan.target_config.sleeping_layers == [5]


def test_layers_that_wait_for_an_image_read_the_same_stream_when_it_comes():
    config = probe_config(CONFIG_MAPPING["mllama_text_model"]())
    model = build(MllamaForCausalLM, config)
    randomise(model, 0)
    grown = grow(model, depth=2)
    assert len(grown.config.cross_attention_layers) == len(config.cross_attention_layers)
    tokens = torch.randint(0, config.vocab_size, (2, 9))
    states = torch.randn(2, 5, config.hidden_size)
    plain, seen = model(tokens).logits, model(tokens, cross_attention_states=states).logits
    assert not torch.allclose(plain, seen)
    torch.testing.assert_close(grown(tokens, cross_attention_states=states).logits, seen, rtol=1e-4, atol=1e-4)


class ChoirConfig(QuillConfig):
    """Some blocks sing in a voice that lies in the first of them, one for each use."""

    def __init__(self, singing_layers=(1, 2), **kwargs):
        self.singing_layers = list(singing_layers)
        super().__init__(**kwargs)


class ChoirModel(QuillModel):
    config_class = ChoirConfig

    def __init__(self, config: ChoirConfig):
        super().__init__(config)
        width, singing = config.model_width, config.singing_layers
        for k in singing:
            self.blocks[k].voice_out = nn.Linear(width, width)
        self.blocks[singing[0]].voices = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in singing)

    def forward(self, input_ids=None, **kwargs):
        x = self.stream(input_ids)
        singing = self.config.singing_layers
        for k, block in enumerate(self.blocks):
            if k in singing:
                voice = self.blocks[singing[0]].voices[singing.index(k)]
                x = x + block.voice_out(voice(block.before_look(x)))
            x = block(x)
        return self.answer(x)


def test_layers_whose_use_of_shared_tensors_is_counted_are_not_copied():
    model = ChoirModel(ChoirConfig())
    certificate = certify(model, depth=2)
    assert certificate.exact, certificate
    plan = plan_growth(model, depth=2)
    assert plan.layer_map.source == (0, 0, 0, 0, 1, 2)
    assert plan.target_config.singing_layers == [4, 5]


def adapted(**switches):
    """A layer with adapters, by language: what they make is put in the places of one language."""
    config = probe_config(CONFIG_MAPPING["xmod"](default_language="en_XX", is_decoder=True, **switches))
    return build(XmodForCausalLM, config)


def test_what_is_put_in_place_ends_a_branch_by_what_is_put_and_not_by_where():
    certificate = certify(adapted(pre_norm=True, ln_before_adapter=False), depth=2)
    assert certificate.exact, certificate


def test_a_norm_of_the_stream_that_serves_once_is_applied_once_more():
    certificate = certify(adapted(adapter_reuse_layer_norm=False), depth=2)
    assert not certificate.exact
    assert certificate.max_relative_error < 1e-10


def test_a_norm_of_the_stream_that_serves_again_inside_its_layer_is_refused():
    with pytest.raises(WarmstartError, match="of the stream is used more than once"):
        plan_growth(adapted(ln_before_adapter=False), depth=2)


class Look(QuillBlock):
    """What a block adds."""

    def forward(self, x):
        return super().forward(x) - x


class ListedModel(QuillModel):
    """What makes a layer lies in three lists."""

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        width, numbers = config.model_width, range(config.n_blocks)
        self.first = nn.LayerNorm(width, config.eps)
        self.blocks = nn.ModuleList(Look(config) for _ in numbers)
        self.mixers = nn.ModuleList(nn.Linear(width, width) for _ in numbers)
        self.norms = nn.ModuleList(nn.LayerNorm(width, config.eps) for _ in numbers)

    def forward(self, input_ids=None, **kwargs):
        x = self.first(self.stream(input_ids))
        for look, mixer, norm in zip(self.blocks, self.mixers, self.norms, strict=True):
            x = x + look(x)
            x = norm(x + mixer(x))
        return self.answer(x)


def test_lists_side_by_side_make_layers_together():
    model = ListedModel(QuillConfig(eps=1e-12))
    certificate = certify(model, depth=2)
    assert certificate.reason == "blocks.{i} ends in a norm of the stream, which a new layer applies once more"
    assert not certificate.exact and certificate.max_relative_error < 1e-10
    prefixes = {stack.prefix: stack for stack in plan_growth(model, depth=2).layout.stacks}
    assert set(prefixes) == {"blocks.{i}", "mixers.{i}", "norms.{i}"}
    assert len({(stack.branch_ends, stack.post_norms) for stack in prefixes.values()}) == 1


class DimBlock(QuillBlock):
    """Keeps the size of the stream by scaling it, the more the fewer blocks lie below."""

    number = 0

    def forward(self, x):
        below = self.number + 1
        return x * (below / (below + 1)) ** 0.5 + (super().forward(x) - x) * (1 / (below + 1)) ** 0.5


class DimModel(QuillModel):
    block_class = DimBlock

    def __init__(self, config: QuillConfig):
        super().__init__(config)
        for k, block in enumerate(self.blocks):
            block.number = k


class UnnormedDimModel(DimModel):
    def answer(self, x):
        return CausalLMOutput(logits=self.read_out(x))


def test_layers_that_scale_the_stream_go_to_the_end_and_are_not_called_exact():
    model = DimModel(QuillConfig(eps=1e-9))
    certificate = certify(model, depth=2)
    assert certificate.reason == "blocks.{i} scales the stream, which the norm behind takes back but for its eps"
    assert not certificate.exact and 0 < certificate.max_relative_error < 1e-6
    assert plan_growth(model, depth=2).layer_map.source == (0, 1, 2, 0, 1, 2)


def test_a_scale_that_no_norm_takes_back_is_refused():
    with pytest.raises(WarmstartError, match="new layers change the output"):
        plan_growth(UnnormedDimModel(QuillConfig()), depth=2)
