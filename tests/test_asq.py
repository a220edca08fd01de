"""ASQ: its factor, its two gradients, its guards, and where it falls back to LSQ."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qexp.quant.asq import ASQ, MIN_FACTOR
from qexp.quant.functional import MIN_SCALE, compile_kernels
from qexp.quant.lsq import LSQ
from qexp.quant.modules import QuantConv2d
from qexp.quant.power import POST

FIELD = (8, 3, 3)


def inputs(seed: int = 0, signed: bool = False) -> Tensor:
    x = torch.randn(6, 8, 5, 5, generator=torch.Generator().manual_seed(seed))
    x = x * torch.linspace(0.3, 2, 6).view(-1, 1, 1, 1)
    return x if signed else x.relu()


def dyadic(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and gradients in sixteenths: sums are exact in float32, whatever their order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 64, (4, 8, 5, 5), generator=generator) / 16
    e = torch.randint(-8, 9, (4, 8, 5, 5), generator=generator) / 16
    return x, e


def trained(bits: int = 3, signed: bool = False, **own: object) -> ASQ:
    """An ASQ whose adapter says something: factors well away from 1."""
    torch.manual_seed(0)
    q = ASQ(bits, signed=signed, shape=FIELD, **own)  # type: ignore[arg-type]
    q.calibrate(inputs(signed=signed))
    if q.adapter is not None:
        with torch.no_grad():
            q.adapter[0].bias.fill_(0.5)  # type: ignore[operator, union-attr]  # else dead
            q.adapter[-1].weight.fill_(0.7)  # type: ignore[operator, union-attr]
    return q


def composed(q: ASQ, x: Tensor, g: float) -> Tensor:
    """The equations in plain autograd, in the dtype of x. `g` multiplies dL/dscale alone."""
    assert q.adapter is not None
    h = q.adapter(x.mean((2, 3)))[:, 0]
    beta = {
        "relu": lambda: h.relu(),
        "softplus": lambda: nn.functional.softplus(h),
        "exp": lambda: h.clamp(-1, 1).exp(),
    }[q.factor]()
    beta = beta.clamp_min(MIN_FACTOR).view(-1, 1, 1, 1)
    scale = q.scale * g + (q.scale - q.scale * g).detach()
    if q.scale_factor_grad:
        beta = beta * g + (beta - beta * g).detach()
    z = x / (scale * beta)
    # Tensor.clamp gives no gradient on the border itself; here qmin <= z <= qmax is inside.
    z = torch.where(z < q.qmin, float(q.qmin), torch.where(z > q.qmax, float(q.qmax), z))
    x_int = z + (z.round() - z).detach()
    return x_int * scale * (beta if q.dequantize == "scaled" else 1)


@pytest.mark.parametrize("dequantize", ["scaled", "plain"])
@pytest.mark.parametrize("factor", ["relu", "softplus", "exp"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale_factor_grad", [False, True])
def test_gradients_equal_autograd_of_the_composed_form_in_float64(
    factor: str, dequantize: str, signed: bool, scale_factor_grad: bool
) -> None:
    q = trained(
        signed=signed, factor=factor, dequantize=dequantize, scale_factor_grad=scale_factor_grad
    )
    x = inputs(1, signed)
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    g = 1 / (x[0].numel() * q.qmax) ** 0.5
    reference = copy.deepcopy(q).double()
    v, v64 = x.clone().requires_grad_(), x.double().requires_grad_()
    y, y64 = q(v), composed(reference, v64, g)
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-6)
    y.backward(e)
    y64.backward(e.double())
    assert v.grad is not None
    assert v64.grad is not None
    torch.testing.assert_close(v.grad.double(), v64.grad, rtol=1e-4, atol=1e-5)
    for (name, p), r in zip(q.named_parameters(), reference.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad.double(), r.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_gradients_match_the_closed_form_on_clipped_values_and_ties() -> None:
    # scale 0.5 and beta = 2: step 1, codes 0..3. Linear input [N, C], one Linear in the adapter.
    q = ASQ(2, signed=False, shape=(4,))
    assert q.adapter is not None
    q.scale.data.fill_(0.5)
    q.adapter[0].weight.data.zero_()  # type: ignore[operator, union-attr]
    q.adapter[0].bias.data.fill_(2.0)  # type: ignore[operator, union-attr]
    x = torch.tensor([[-1.0, 0.5, 1.5, 9.0], [0.2, 0.8, 3.0, 2.5]], requires_grad=True)
    y = q(x)
    assert y.tolist() == [[0.0, 0.0, 2.0, 3.0], [0.0, 1.0, 3.0, 2.0]]  # 0.5 -> 0, 1.5 -> 2
    y.sum().backward()
    G = [0 + (0 - 0.5) + (2 - 1.5) + 3, (0 - 0.2) + (1 - 0.8) + 0 + (2 - 2.5)]
    g = 1 / (4 * 3) ** 0.5
    assert x.grad is not None
    assert q.scale.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert q.scale.grad.item() == pytest.approx(g * 2 * sum(G), rel=1e-5)  # g * sum G * beta
    bias_grad = q.adapter[0].bias.grad  # type: ignore[union-attr]
    assert bias_grad.item() == pytest.approx(0.5 * sum(G), rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("signed", [False, True])
def test_factor_one_equals_lsq_bit_for_bit(signed: bool) -> None:
    x, e = dyadic()
    x = x - 2 if signed else x
    q = ASQ(3, signed=signed, shape=FIELD)
    lsq = LSQ(3, signed=signed, shape=FIELD, count="sample")
    assert q.adapter is not None
    q.adapter[-1].weight.data.zero_()  # type: ignore[operator, union-attr]
    for scale in (q.scale, lsq.scale):
        scale.data.fill_(0.25)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = q(a), lsq(b)
    assert (q.factors(x) == 1).all()
    assert torch.equal(y, expected)
    y.backward(e)
    expected.backward(e)
    assert torch.equal(q.scale.grad, lsq.scale.grad)  # type: ignore[arg-type]
    assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_frozen_factor_is_lsq_on_any_data() -> None:
    x = inputs()
    q = ASQ(4, signed=False, shape=FIELD, factor="frozen")
    lsq = LSQ(4, signed=False, shape=FIELD, count="sample")
    q.calibrate(x)
    lsq.calibrate(x)
    y, expected = q(x), lsq(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(q.scale.grad, lsq.scale.grad)  # type: ignore[arg-type]
    assert sum(p.numel() for p in q.parameters()) == 1


@pytest.mark.parametrize("factor", ["relu", "softplus", "exp"])
def test_the_factor_starts_near_one(factor: str) -> None:
    torch.manual_seed(0)
    for channels in (3, 8, 64):  # one Linear below 2 * reduction channels, two above
        q = ASQ(4, signed=False, shape=(channels, 3, 3), factor=factor)  # type: ignore[arg-type]
        with torch.no_grad():
            beta = q.factors(torch.rand(5, channels, 4, 4))
        assert beta.shape == (5, 1, 1, 1)
        torch.testing.assert_close(beta, torch.ones_like(beta), rtol=0, atol=0.1)


def test_adapter_size_follows_the_released_rule() -> None:
    assert [tuple(p.shape) for p in ASQ(4, shape=(3, 3, 3)).adapter.parameters()] == [(1, 3), (1,)]  # type: ignore[union-attr]
    seven, eight = (ASQ(4, shape=(channels, 3, 3)).adapter for channels in (7, 8))
    assert [tuple(p.shape) for p in seven.parameters()] == [(1, 7), (1,)]  # type: ignore[union-attr]
    assert [tuple(p.shape) for p in eight.parameters()] == [(2, 8), (2,), (1, 2), (1,)]  # type: ignore[union-attr]
    q = ASQ(4, shape=(64, 3, 3))
    assert [tuple(p.shape) for p in q.adapter.parameters()] == [(16, 64), (16,), (1, 16), (1,)]  # type: ignore[union-attr]
    assert q.extra_bytes() == 4 * (16 * 64 + 16 + 16 + 1 + 1)


@pytest.mark.parametrize("dequantize", ["scaled", "plain"])
def test_decoded_codes_equal_forward_where_the_factors_differ(dequantize: str) -> None:
    q, x = trained(dequantize=dequantize).eval(), inputs(3)
    with torch.no_grad():
        assert q.factors(x).unique().numel() == 6  # the contract's fresh adapters give 1
        assert torch.equal(q.decode(q.codes(x), q.context(x)), q(x))


def test_each_sample_is_quantized_on_its_own() -> None:
    q = trained().eval()
    x = inputs(2)
    with torch.no_grad():
        whole = q(x)
        for n in range(len(x)):
            torch.testing.assert_close(q(x[n : n + 1])[0], whole[n], rtol=1e-5, atol=1e-6)


def test_linear_and_token_inputs_share_one_factor_per_sample() -> None:
    torch.manual_seed(0)
    q = ASQ(4, shape=(8,)).eval()
    tokens = torch.randn(3, 7, 8)
    q.calibrate(tokens)
    assert q.factors(tokens).shape == (3, 1, 1)
    assert q.factors(tokens[:, 0]).shape == (3, 1)
    grid = tokens[:, :6].reshape(3, 2, 3, 8)  # Swin: channels last, two axes of positions
    assert q.factors(grid).shape == (3, 1, 1, 1)
    torch.testing.assert_close(q.factors(grid).flatten(), q.factors(tokens[:, :6]).flatten())
    torch.testing.assert_close(q.factors(tokens).view(3, 1), q.factors(tokens.mean(1)))


def test_dead_samples_are_counted_per_batch_and_a_dead_layer_is_named() -> None:
    q = ASQ(4, signed=False, shape=(4,))
    assert q.adapter is not None
    q.adapter[0].weight.data.fill_(-1.0)  # type: ignore[operator, union-attr]
    x = torch.tensor([[0.0] * 4, [0.1] * 4, [1.0] * 4, [2.0] * 4])  # pre-activation 1, .6, -3, -7
    q(x)
    assert q.health()["dead_samples"].item() == 2
    assert q.health()["dead_layers"].item() == 0
    q(x[2:])
    assert q.health()["dead_layers"].item() == 1
    assert q.health()["constant_factors"].item() == 0  # the other death
    q.eval()(x)  # evaluation counts nothing
    assert q.health()["dead_samples"].item() == 2
    assert {"dead_samples", "dead_layer", "mean_abs"} <= set(q.state_dict())


def test_a_hidden_layer_that_is_dead_is_named_and_a_leak_revives_it() -> None:
    x = torch.rand(5, 16, 3, 3)
    for leak in (0.0, 0.01):
        torch.manual_seed(0)
        q = ASQ(4, signed=False, shape=(16, 3, 3), leak=leak)
        assert q.adapter is not None
        q(x)
        assert q.health()["constant_factors"].item() == 0
        q(x[:1])  # one sample has one factor, which says nothing
        assert q.health()["constant_factors"].item() == 0
        q.adapter[0].bias.data.fill_(-100.0)  # type: ignore[operator, union-attr]
        q(x).square().sum().backward()
        dead = leak == 0
        assert q.health()["constant_factors"].item() == dead
        assert q.health()["dead_layers"].item() == 0  # its samples are not saturated
        grad = q.adapter[0].weight.grad  # type: ignore[union-attr]
        assert bool((grad == 0).all()) == dead  # type: ignore[union-attr, operator]
    q.eval()(x[:1].expand(4, -1, -1, -1))  # evaluation counts nothing
    assert q.health()["constant_factors"].item() == 0
    with pytest.raises(ValueError, match=r"leak must be in \[0, 1\)"):
        ASQ(4, shape=(16, 3, 3), leak=1.0)


@pytest.mark.parametrize("factor", ["softplus", "exp"])
def test_guarded_factors_keep_their_gradient_where_relu_dies(factor: str) -> None:
    gradients = []
    for name in (factor, "relu"):
        q = trained(factor=name)
        q.adapter[-1].bias.data.fill_(-0.9)  # type: ignore[operator, union-attr]
        q.adapter[-1].weight.data.zero_()  # type: ignore[operator, union-attr]
        q(inputs()).square().sum().backward()
        gradients.append(q.adapter[-1].bias.grad.item())  # type: ignore[operator, union-attr]
    assert gradients[0] != 0
    assert gradients[1] == 0


@pytest.mark.parametrize("factor", ["relu", "statistics"])
def test_the_count_of_the_gradient_scale_is_of_a_sample_or_of_the_batch(factor: str) -> None:
    grads = []
    for count in ("sample", "tensor"):
        q = trained(factor=factor, count=count).eval()
        q(inputs()).square().sum().backward()
        assert q.scale.grad is not None
        grads.append(q.scale.grad.item())
    assert grads[0] == pytest.approx(6**0.5 * grads[1], rel=1e-5)  # of six samples


def test_the_exp_factor_stays_between_1_over_e_and_e() -> None:
    q = trained(factor="exp").eval()
    for bias in (-9.0, 9.0):
        q.adapter[-1].bias.data.fill_(bias)  # type: ignore[operator, union-attr]
        expected = torch.full((6,), bias / 9).exp()
        torch.testing.assert_close(q.factors(inputs()).flatten(), expected)


def test_statistics_factor_is_the_sample_mean_over_the_running_mean() -> None:
    x = inputs()
    q = ASQ(4, signed=False, shape=FIELD, factor="statistics")
    q.calibrate(x)
    means = x.abs().mean((1, 2, 3))
    torch.testing.assert_close(q.factors(x).flatten(), means / means.mean())
    q(3 * x)  # a training batch moves the running mean a tenth of the way
    torch.testing.assert_close(q.mean_abs, means.mean() * (1 + 0.1 * 2))
    assert q.extra_bytes() == 4 * 2  # the step and the running mean


def test_saved_memory_is_that_of_lsq_plus_a_number_per_sample() -> None:
    x = torch.rand(16, 8, 12, 12, requires_grad=True)

    def saved(q: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            q(x)
        return sum(sizes.values())

    q = ASQ(4, signed=False, shape=FIELD)
    adapter = 4 * sum(p.numel() for p in q.parameters())
    per_sample = saved(q) - saved(LSQ(4, signed=False, shape=FIELD)) - adapter
    assert per_sample <= 4 * 16 * (8 + 2 + 8)  # means, hidden, and a few scalars of each sample


def test_autocast_leaves_the_adapter_in_float32() -> None:
    q = trained().eval()
    x = inputs(3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = q.factors(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, q.factors(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_means_is_the_same_in_either_memory_order(dtype: torch.dtype) -> None:
    quantizer = ASQ(4, signed=False, shape=(16, 3, 3)).train()
    x = torch.randn(4, 16, 5, 5).relu().to(dtype)
    upstream = torch.randn(4, 16, 5, 5).to(dtype)
    quantizer.calibrate(x)
    assert quantizer.adapter is not None
    nn.init.normal_(quantizer.adapter[-1].weight)
    gradients = []
    for order in (torch.contiguous_format, torch.channels_last):
        leaf = x.clone(memory_format=order).requires_grad_()
        quantizer(leaf).backward(upstream.clone(memory_format=order))
        assert leaf.grad is not None
        assert leaf.grad.is_contiguous(memory_format=order)
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    clipped = quantizer.codes(x) == 15
    assert gradients[0][clipped].abs().max() > 0  # where only the adapter's path is left


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"factor": "rleu"}, "factor must be one of relu, softplus, exp, .* got 'rleu'"),
        ({"dequantize": "none"}, "dequantize must be scaled or plain, got 'none'"),
        ({"reduction": 0}, "reduction must be at least 1, got 0"),
        ({"shape": ()}, "ASQ needs the shape"),
        ({"bits": 1, "signed": True}, "ASQ needs at least 2 bits for signed values, got 1"),
    ],
)
def test_wrong_options_are_named(own: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ASQ(**{"bits": 4, "shape": FIELD, **own})  # type: ignore[arg-type]


def test_all_zero_sample_meets_the_smallest_factor_and_step() -> None:
    q = ASQ(4, signed=False, shape=FIELD, factor="statistics").eval()
    x = inputs()
    x[0] = 0
    q.calibrate(x)
    x.requires_grad_()
    y = q(x)
    y.sum().backward()
    factors = q.factors(x).flatten()
    assert factors[0] == MIN_FACTOR < factors[1:].min()
    assert (y[0] == 0).all()
    assert x.grad is not None
    assert q.scale.grad is not None
    assert x.grad.isfinite().all()
    assert q.scale.grad.isfinite()
    with torch.no_grad():
        q.scale.fill_(MIN_SCALE)
        assert torch.equal(q(x), q.decode(q.codes(x), q.context(x)))
        assert q.decode(q.codes(x + 1), q.context(x))[0].max() == pytest.approx(15 * MIN_SCALE)


def step(layer: nn.Module, fn: nn.Module, x: Tensor) -> list[Tensor]:
    layer.zero_grad()
    v = x.clone().requires_grad_()
    fn(v).square().sum().backward()
    assert v.grad is not None
    return [v.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def quantized_layer() -> QuantConv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 4, 3, padding=1)
    weight = POST(4, shape=conv.weight.shape)
    weight.calibrate(conv.weight)
    return QuantConv2d.from_float(conv, weight, trained(bits=4))


def test_layer_of_asq_and_post_is_one_graph_and_equals_eager() -> None:
    layer, x = quantized_layer(), inputs(4)
    torch._dynamo.reset()
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")  # traced, not built: fast
    for a, b in zip(step(layer, graph, x), step(layer, layer, x), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["model", "kernels"])
def test_layer_of_asq_and_post_equals_eager_when_compiled(mode: str) -> None:
    layer, x = quantized_layer(), inputs(4)
    expected = step(layer, layer, x)
    torch._dynamo.reset()
    compile_kernels(mode == "kernels")
    try:
        fn = torch.compile(layer, fullgraph=True) if mode == "model" else layer
        got = step(layer, fn, x)  # type: ignore[arg-type]
    finally:
        compile_kernels(False)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_running_mean_starts_at_the_mean_magnitude_of_signed_inputs() -> None:
    x = torch.randn(16, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    q = ASQ(4, shape=(4, 3, 3), factor="statistics")
    q.calibrate(x)
    torch.testing.assert_close(q.mean_abs, x.abs().mean())
