"""Tape and analysis: what small modules do to their axes is found as it is, from one forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_warmstart.growth.layouts.analysis import Analysis
from hf_warmstart.growth.layouts.moves import tree
from hf_warmstart.growth.layouts.tape import Tape

BATCH, TIME, WIDTH, HEADS, DIM, INNER = 2, 7, 24, 4, 6, 10  # no two axes are of one length by chance

WHOLE_HEADS = {"batched", "unit"}  # a softmax stands between the two products


class Seen:
    """What is found in one forward pass of a module."""

    def __init__(self, module: nn.Module, given: Tensor | None = None):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(1.0, 0.3)
        self.tape = Tape(module, dict(module.named_parameters()))
        self.tape.run({"x": torch.randn(BATCH, TIME, WIDTH) if given is None else given})
        assert not self.tape.tangles
        self.analysis = Analysis(self.tape)

    def axis(self, name: str, k: int) -> tuple:
        return tree(self.tape.parameters[name].dims[k].term)

    def facts(self, *places: tuple[str, int]) -> set[str]:
        """The facts of axes that must be one atom each."""
        forms = [self.axis(*place) for place in places]
        assert all(form[0] == "atom" and form == forms[0] for form in forms)
        return self.analysis.facts[forms[0][1]]

    def roles(self, name: str) -> list[set[str]]:
        return [self.tape.roles.get((name, k), set()) for k in range(len(self.tape.parameters[name].dims))]


def sized(size: int, branch: tuple) -> bool:
    return branch[0] == "atom" and branch[1].size == size


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention over (batch, heads, time, dim), heads side by side in the end."""
    weights = (q @ k.transpose(-1, -2) / DIM**0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(BATCH, TIME, -1)


def heads(x: Tensor, number: int = HEADS) -> Tensor:
    return x.view(BATCH, TIME, number, -1).transpose(1, 2)


class Fused(nn.Module):
    """Attention whose q, k, v come from one matrix; `order` says how."""

    def __init__(self, order: str):
        super().__init__()
        self.order = order
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, x):
        made = self.qkv(x)
        if self.order == "blocks":
            q, k, v = (heads(part) for part in made.chunk(3, dim=-1))
        elif self.order == "slices":
            q, k, v = (heads(made[..., j * HEADS * DIM : (j + 1) * HEADS * DIM]) for j in range(3))
        elif self.order == "heads":
            q, k, v = heads(made).chunk(3, dim=-1)
        elif self.order == "heads, split in two views":
            q, k, v = heads(made).unflatten(-1, (3, DIM)).unbind(-2)
        else:
            q, k, v = made.view(BATCH, TIME, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v))


@pytest.mark.parametrize("order", ["blocks", "slices"])
def test_fused_blocks_are_a_concatenation_of_heads(order):
    seen = Seen(Fused(order))
    out = seen.axis("out.weight", 1)
    assert out[0] == "prod" and sized(HEADS, out[1]) and sized(DIM, out[2])
    fused = seen.axis("qkv.weight", 0)
    inside = fused[1][2]
    assert inside != out[2], "what is contracted is not what is carried"
    assert fused == ("cat", ("prod", out[1], inside), ("prod", out[1], inside), out)
    assert seen.axis("qkv.bias", 0) == fused
    assert seen.analysis.facts[inside[1]] == {"contracted"}
    assert seen.analysis.facts[out[1][1]] == WHOLE_HEADS
    assert seen.analysis.facts[out[2][1]] == set()


def test_fused_heads_are_a_product_of_heads_and_a_concatenation():
    seen = Seen(Fused("heads"))
    out, fused = seen.axis("out.weight", 1), seen.axis("qkv.weight", 0)
    inside = fused[2][1]
    assert fused == ("prod", out[1], ("cat", inside, inside, out[2]))
    assert seen.analysis.facts[inside[1]] == {"contracted"}
    assert seen.analysis.facts[out[1][1]] == WHOLE_HEADS


@pytest.mark.parametrize("order", ["heads, split in two views", "three outermost"])
def test_three_that_are_taken_apart_by_number_are_indexed(order):
    seen = Seen(Fused(order))
    out, fused = seen.axis("out.weight", 1), seen.axis("qkv.weight", 0)
    three = fused[1] if order == "three outermost" else fused[2]
    assert sized(3, three)
    assert fused == ("prod", *((three, *out[1:]) if order == "three outermost" else (out[1], three, out[2])))
    assert "indexed" in seen.analysis.facts[three[1]]
    assert seen.analysis.facts[out[2][1]] == {"contracted"}, "one axis for q, k and v"


def test_rows_write_and_columns_read():
    seen = Seen(Fused("blocks"))
    assert seen.roles("qkv.weight") == [{"write"}, {"read"}]
    assert seen.roles("qkv.bias") == [{"write"}]
    assert seen.roles("out.weight") == [{"write"}, {"read"}]


class Grouped(nn.Module):
    """Queries in groups for each head of keys and values."""

    def __init__(self, repeat: str):
        super().__init__()
        self.repeat = repeat
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k, self.v = nn.Linear(WIDTH, 2 * DIM), nn.Linear(WIDTH, 2 * DIM)
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x):
        k, v = (self._repeat(heads(part(x), 2)) for part in (self.k, self.v))
        return self.out(attend(heads(self.q(x)), k, v))

    def _repeat(self, x):
        if self.repeat == "expand":
            return x[:, :, None].expand(BATCH, 2, 2, TIME, DIM).reshape(BATCH, HEADS, TIME, DIM)
        return x.repeat_interleave(2, dim=1)


@pytest.mark.parametrize("repeat", ["expand", "repeat_interleave"])
def test_repeated_heads_are_a_product_of_key_heads_and_groups(repeat):
    seen = Seen(Grouped(repeat))
    out, k, v = seen.axis("out.weight", 1), seen.axis("k.weight", 0), seen.axis("v.weight", 0)
    assert out[0] == "prod" and [part[1].size for part in out[1:]] == [2, 2, DIM]
    assert out[1] != out[2]
    assert v == ("prod", out[1], out[3])
    assert k[:2] == v[:2] and k[2] != v[2]
    assert seen.axis("q.weight", 0) == ("prod", out[1], out[2], k[2])
    assert seen.analysis.facts[out[1][1]] == seen.analysis.facts[out[2][1]] == WHOLE_HEADS


class Gated(nn.Module):
    def __init__(self, order: str):
        super().__init__()
        self.order = order
        self.up = nn.Linear(WIDTH, 2 * INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        made = self.up(x)
        gate, up = (made[..., ::2], made[..., 1::2]) if self.order == "interleaved" else made.chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def test_interleaved_gates_are_pairs_for_each_unit():
    seen = Seen(Gated("interleaved"))
    inner = seen.axis("down.weight", 1)
    form, outer, pair = seen.axis("up.weight", 0)
    assert sized(INNER, inner)
    assert (form, outer) == ("prod", inner)
    assert pair[0] == "cat" and [part[1].size for part in pair[1:]] == [1, 1]
    assert seen.axis("up.bias", 0) == ("prod", outer, pair)
    assert seen.facts(("down.weight", 1)) == {"unit"}


def test_gates_in_blocks_are_two_copies_of_the_units():
    seen = Seen(Gated("blocks"))
    inner = seen.axis("down.weight", 1)
    assert seen.axis("up.weight", 0) == ("cat", inner, inner)
    assert seen.facts(("down.weight", 1)) == {"unit"}


def test_a_stream_that_is_only_added_to_is_free():
    seen = Seen(Gated("blocks"))
    assert seen.facts(("up.weight", 1), ("down.weight", 0), ("down.bias", 0)) == {"input"}  # what the module was given


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 5, bias=False)
        self.up = nn.Parameter(torch.zeros(5, 2 * INNER, WIDTH))
        self.down = nn.Parameter(torch.zeros(5, WIDTH, INNER))

    def forward(self, x):
        flat = x.view(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        made = torch.zeros_like(flat)
        for expert in range(5):
            token, place = torch.where(chosen == expert)
            gate, up = F.linear(flat[token], self.up[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, self.down[expert])
            made.index_add_(0, token, out * weights[token, place, None])
        return x + made.view(BATCH, TIME, WIDTH)


def test_stacked_experts_have_one_inner_width_and_are_indexed_by_number():
    seen = Seen(Experts())
    inner = seen.axis("down", 2)
    assert sized(INNER, inner)
    assert seen.axis("up", 1) == ("cat", inner, inner)
    assert seen.axis("up", 2) == seen.axis("down", 1) == seen.axis("router.weight", 1)
    assert seen.roles("up")[1:] == [{"write"}, {"read"}]
    assert seen.roles("down")[1:] == [{"write"}, {"read"}]
    assert seen.facts(("up", 0)) == {"indexed"}
    assert seen.facts(("router.weight", 0)) >= {"softmax", "ordered"}
    assert "unit" not in seen.facts(("up", 2))


class SideBySide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, DIM)
        self.out = nn.Linear(INNER + DIM, WIDTH)

    def forward(self, x):
        return self.out(torch.cat([self.first(x), self.second(x)], dim=-1))


def test_what_is_joined_is_a_concatenation_in_its_order():
    seen = Seen(SideBySide())
    first, second = seen.axis("first.weight", 0), seen.axis("second.weight", 0)
    assert sized(INNER, first) and sized(DIM, second)
    assert seen.axis("out.weight", 1) == ("cat", first, second)


class Depthwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.into = nn.Linear(WIDTH, INNER)
        self.conv = nn.Conv1d(INNER, INNER, 3, groups=INNER, padding=2)
        self.out = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.out(self.conv(self.into(x).transpose(1, 2))[..., :TIME].transpose(1, 2))


def test_a_depthwise_convolution_passes_channels_through():
    seen = Seen(Depthwise())
    channels = seen.axis("into.weight", 0)
    assert sized(INNER, channels)
    assert seen.axis("conv.weight", 0) == seen.axis("conv.bias", 0) == seen.axis("out.weight", 1) == channels
    assert seen.roles("conv.weight")[0] == {"write"}
    assert sized(3, seen.axis("conv.weight", 2))
    assert seen.facts(("into.weight", 0)) == set()


# -- norms ------------------------------------------------------------------------------------------------------------


def by_hand(form: str, x: Tensor) -> Tensor:
    """A norm over the last axis in one of the forms that classes write."""
    if form == "pow":
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    if form == "product":
        return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()
    if form == "square":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    if form == "sum":
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / WIDTH + 1e-6)
    if form == "upcast":
        wide = x.double()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    if form == "fused":
        return F.rms_norm(x, (WIDTH,))
    if form == "layer":
        return F.layer_norm(x, (WIDTH,))
    if form == "centred":
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
    if form == "var":
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    if form == "length":
        return x / x.norm(dim=-1, keepdim=True)
    raise ValueError(form)


class Normed(nn.Module):
    """A stream that is written, normed and read."""

    def __init__(self, form: str, offset: float = 0.0, bias: bool = False):
        super().__init__()
        self.form, self.offset = form, offset
        self.write = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.ones(WIDTH)) if bias else None
        self.read = nn.Linear(WIDTH, 5)

    def forward(self, x):
        made = by_hand(self.form, self.write(x))
        made = made * (self.offset + self.gain) if self.offset else made * self.gain
        return self.read(made if self.bias is None else made + self.bias)


STREAM = ("write.weight", 0), ("write.bias", 0), ("gain", 0), ("read.weight", 1)


@pytest.mark.parametrize("form", ["pow", "product", "square", "sum", "upcast", "fused"])
def test_a_mean_of_squares_is_an_rms_norm_however_it_is_written(form):
    seen = Seen(Normed(form))
    assert seen.facts(*STREAM) == {"rms"}
    assert seen.axis("write.weight", 1) != seen.axis("write.weight", 0)
    assert [offset for *_, offset in seen.analysis.gains["gain", 0]] == [0.0]
    assert ("gain", 0) not in seen.analysis.adds


@pytest.mark.parametrize("form", ["layer", "centred", "var"])
def test_a_centred_norm_is_a_layer_norm_however_it_is_written(form):
    seen = Seen(Normed(form, bias=True))
    assert seen.facts(*STREAM, ("bias", 0)) == {"layer"}
    assert ("gain", 0) in seen.analysis.gains
    assert ("bias", 0) in seen.analysis.adds
    assert seen.axis("gain", 0)[1] not in seen.analysis.broken()


def test_a_length_is_not_a_mean_of_squares():
    """A vector of length one is no longer so when its entries are copied."""
    facts = Seen(Normed("length")).facts(*STREAM)
    assert "l2" in facts and "rms" not in facts


def test_one_plus_a_gain_has_an_offset():
    seen = Seen(Normed("pow", offset=1.0))
    assert seen.facts(*STREAM) == {"rms"}
    assert [offset for *_, offset in seen.analysis.gains["gain", 0]] == [1.0]


def test_a_reader_behind_a_layer_norm_reads_its_image_and_one_before_it_the_raw_stream():
    class Both(Normed):
        def forward(self, x):
            raw = self.write(x)
            return self.read(by_hand("layer", raw) * self.gain) + F.linear(raw, self.other)

    module = Both("layer")
    module.other = nn.Parameter(torch.ones(5, WIDTH))
    seen = Seen(module)
    stream = seen.axis("write.weight", 0)[1]
    phases = {
        name: seen.analysis.phase(seen.analysis.reads[name, 1][0][1], stream) for name in ("read.weight", "other")
    }
    assert phases == {"read.weight": "normed", "other": "raw"}
    assert stream not in seen.analysis.broken()


def test_a_layer_norm_that_meets_the_raw_stream_breaks_it():
    class Post(Normed):
        def forward(self, x):
            raw = self.write(x)
            return self.read(raw + by_hand("layer", raw) * self.gain)

    seen = Seen(Post("layer"))
    assert seen.axis("write.weight", 0)[1] in seen.analysis.broken()


# -- constants, ties, other facts -------------------------------------------------------------------------------------


class Biased(Fused):
    """Attention with constants on its scores, a number for each head or one for all; or with rotated heads."""

    def __init__(self, what: str):
        super().__init__("blocks")
        self.what = what

    def forward(self, x):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        bias = 0.0
        if self.what == "alibi":
            slopes = torch.tensor([2.0 ** -(k + 1) for k in range(HEADS)])
            bias = slopes.view(1, HEADS, 1, 1) * torch.arange(float(TIME))
        elif self.what == "mask":
            bias = torch.full((TIME, TIME), -1e9).triu(1)
        elif self.what == "rotary":
            angles = torch.arange(float(TIME))[:, None] * torch.cat([torch.tensor([1.0, 0.1, 0.01])] * 2)
            q, k = (self._rotated(part, angles) for part in (q, k))
        return self.out(attend(q, k, v, bias))

    @staticmethod
    def _rotated(x, angles):
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def test_constants_that_differ_between_heads_hold_the_heads():
    seen = Seen(Biased("alibi"))
    held, inside = seen.axis("out.weight", 1)[1:]
    assert "constant" in seen.analysis.facts[held[1]]
    assert "constant" not in seen.analysis.facts[inside[1]]


def test_constants_that_are_one_number_for_all_heads_hold_nothing():
    seen = Seen(Biased("mask"))
    for part in seen.axis("out.weight", 1)[1:]:
        assert "constant" not in seen.analysis.facts[part[1]]


@pytest.mark.parametrize("held", [True, False])
def test_constants_that_heads_are_multiplied_by_hold_the_heads_where_they_differ(held):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.write = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            turn = torch.randn(HEADS if held else 1, DIM, DIM)
            return heads(self.write(x)) @ turn.expand(HEADS, DIM, DIM)

    seen = Seen(Turned())
    number, inside = seen.axis("write.weight", 0)[1:]
    assert ("constant" in seen.analysis.facts[number[1]]) == held
    assert "constant" in seen.analysis.facts[inside[1]]


def test_room_that_is_filled_in_place_is_no_constant():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.write, self.read = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)

        def forward(self, x):
            room = torch.zeros(BATCH, TIME, INNER)
            for k in range(TIME):
                room[:, k] = self.write(x[:, k])
            return self.read(x) @ room.transpose(1, 2)

    assert Seen(Filled()).facts(("write.weight", 0), ("read.weight", 0)) == {"contracted"}


def test_rotated_halves_are_held_by_their_constants_and_values_are_not():
    seen = Seen(Biased("rotary"))
    _, q, k, v = seen.axis("qkv.weight", 0)
    half = q[2][1]
    assert sized(DIM // 2, half)
    assert q == k == ("prod", v[1], ("cat", half, half))
    assert "constant" in seen.analysis.facts[half[1]]
    assert seen.analysis.facts[v[2][1]] == set()


class Tied(nn.Module):
    def __init__(self, gained: bool):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH)) if gained else None

    def forward(self, x):
        made = by_hand("pow", self.embed(x))
        return F.linear(made if self.gain is None else made * self.gain, self.embed.weight)


@pytest.mark.parametrize("gained", [True, False])
def test_a_tied_table_writes_and_reads_and_what_its_head_reads_is_found(gained):
    seen = Seen(Tied(gained), torch.randint(11, (BATCH, TIME)))
    assert seen.roles("embed.weight") == [{"read", "write"}, {"write", "read"}]
    ((_, read),) = seen.analysis.reads["embed.weight", 1]
    stream = seen.axis("embed.weight", 1)[1]
    (writer,) = seen.analysis.writers(read, {stream})
    assert (writer.kind, writer.places) == (("gain", (("gain", 0),)) if gained else ("blocked", ()))


@pytest.mark.parametrize(
    ("function", "fact"),
    [
        (F.gelu, "unit"),
        (F.logsigmoid, "unit"),
        (lambda x: x * x, "unit"),
        (lambda x: x + 1.0, "unit"),
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: x.cumsum(-1), "ordered"),
        (lambda x: x.sort(-1).values, "ordered"),
        (lambda x: x * torch.linspace(0, 1, WIDTH), "constant"),
        (lambda x: x + torch.linspace(0, 1, WIDTH), "constant"),
        (lambda x: x @ torch.linspace(0, 1, WIDTH**2).view(WIDTH, WIDTH), "constant"),
        (lambda x: x.sum(-1, keepdim=True) + x, "summed"),
        (lambda x: torch.fft.fft(x, dim=-1).real, "opaque"),
    ],
)
def test_what_acts_on_a_stream_is_told_by_its_name(function, fact):
    class Acted(nn.Module):
        def __init__(self):
            super().__init__()
            self.write = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return function(self.write(x))

    seen = Seen(Acted())
    assert fact in seen.facts(("write.weight", 0))
    assert bool(seen.tape.unknown) == (fact == "opaque"), "what no rule knows is said"


@pytest.mark.parametrize(
    "function", [lambda x: x * 2.0, lambda x: -x, lambda x: x + x, lambda x: x * torch.ones(WIDTH)]
)
def test_linear_steps_leave_a_stream_free(function):
    class Acted(nn.Module):
        def __init__(self):
            super().__init__()
            self.write = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return function(self.write(x))

    assert Seen(Acted()).facts(("write.weight", 0)) == set()


# -- streams of parameters alone --------------------------------------------------------------------------------------


class Latents(nn.Module):
    """Learned latents, normed or not, that a linear layer reads."""

    def __init__(self, normed: bool):
        super().__init__()
        self.latents = nn.Parameter(torch.ones(5, WIDTH))
        self.norm = nn.LayerNorm(WIDTH) if normed else nn.Identity()
        self.read = nn.Linear(WIDTH, DIM)

    def forward(self, x):
        return x[..., :DIM].mean() + self.read(self.norm(self.latents))


@pytest.mark.parametrize("normed", [True, False])
def test_learned_latents_write_and_what_reads_them_reads(normed):
    """Else the latents would be grown as a reader's columns, and the reader behind the norm as one of the raw stream."""
    seen = Seen(Latents(normed))
    assert "read" not in seen.roles("latents")[1]
    assert seen.roles("read.weight") == [{"write"}, {"read"}]
    ((_, value),) = seen.analysis.reads["read.weight", 1]
    assert seen.analysis.phase(value, seen.axis("latents", 1)[1]) == ("normed" if normed else "raw")


class Relative(Fused):
    """Attention with a table of relative positions, which the queries of each head meet."""

    def __init__(self):
        super().__init__("blocks")
        self.table = nn.Embedding(2 * TIME, DIM)

    def forward(self, x):
        q, k, v = (heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        places = torch.arange(TIME)[:, None] - torch.arange(TIME) + TIME
        met = q.permute(2, 0, 1, 3).reshape(TIME, -1, DIM) @ self.table(places).transpose(1, 2)
        return self.out(attend(q, k, v, met.view(TIME, BATCH, HEADS, TIME).permute(1, 2, 0, 3)))


def test_a_table_that_queries_meet_is_one_side_of_their_product_and_no_tied_head():
    seen = Seen(Relative())
    assert ("table.weight", 1) not in seen.analysis.reads
    assert "read" not in seen.roles("table.weight")[1]
    assert "contracted" in seen.facts(("table.weight", 1))
