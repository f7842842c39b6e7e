"""Dynamic fixed point against closed forms and a naive NumPy version."""

from __future__ import annotations

import math
import shutil
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from ftnas import devices, quantize, rounding
from ftnas.quantize import Bounded, FixedPoint, Frozen, Quantization

ENCODINGS = ["twos_complement", "sign_magnitude"]


def naive_fraction_length(largest: float, bits: int) -> int:
    """The definition, by search: the smallest s with 2^s >= m."""
    m, s = max(largest, 1e-5), -40
    while math.ldexp(1.0, s) < m:
        s += 1
    return bits - 1 - s


def naive_quantize(x: np.ndarray, bits: int, encoding: str, fraction_length: int | None = None) -> np.ndarray:
    x = x.astype(np.float64)
    if fraction_length is None:
        fraction_length = naive_fraction_length(float(np.abs(x).max()), bits)
    hi = 2 ** (bits - 1) - 1
    lo = -hi - 1 if encoding == "twos_complement" else -hi
    out = np.empty_like(x)
    for index, value in np.ndenumerate(x):
        out[index] = min(max(round(value * 2.0**fraction_length), lo), hi) * 2.0**-fraction_length
    return out


@pytest.mark.parametrize("exponent", [-16, -10, -3, -1, 0, 1, 2, 7, 13, 30])
def test_fraction_length_is_exact_around_powers_of_two(exponent):
    power = torch.tensor(2.0**exponent)
    above = torch.nextafter(power, torch.tensor(torch.inf))
    below = torch.nextafter(power, torch.tensor(0.0))
    form = FixedPoint(bits=8)
    assert form.fraction_length(power) == 7 - exponent
    assert form.fraction_length(-power) == 7 - exponent
    assert form.fraction_length(above) == 7 - (exponent + 1)
    assert form.fraction_length(below) == 7 - exponent


def test_fraction_length_of_float64_and_of_a_bound_sees_what_float32_cannot():
    just_above = 1.0 + 1e-12
    assert FixedPoint().fraction_length(torch.tensor([just_above], dtype=torch.float64)) == 6
    assert FixedPoint(range=Bounded(bound=just_above)).fraction_length(torch.zeros(1)) == 6
    assert FixedPoint(range=Bounded(bound=1.0)).fraction_length(torch.zeros(1)) == 7


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_agrees_with_the_naive_version(bits, encoding):
    generator = torch.Generator().manual_seed(bits)
    form = FixedPoint(bits=bits, encoding=encoding)
    for scale in (3e-6, 0.02, 1.0, 700.0):
        x = torch.randn(5, 7, generator=generator) * scale
        expected = naive_quantize(x.numpy(), bits, encoding)
        assert form.fraction_length(x) == naive_fraction_length(float(x.abs().max()), bits)
        np.testing.assert_array_equal(form.quantize(x).numpy(), expected)


def test_exact_values_by_hand():
    # max 0.9 -> s = 0, LSB = 1/8: integers -8 .. 7
    x = torch.tensor([0.3, -0.9, 0.9, 0.0625, 0.1875, -0.0624])
    expected = torch.tensor([0.25, -0.875, 0.875, 0.0, 0.25, 0.0])
    assert torch.equal(FixedPoint(bits=4).quantize(x), expected)


def test_halves_go_to_even():
    form = FixedPoint(bits=8, range=Frozen(fraction_length=0))
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5])
    assert form.quantize(x).tolist() == [0.0, 2.0, 2.0, 4.0, 0.0, -2.0, -2.0]


def test_limits_of_both_encodings():
    x = torch.tensor([-1.0, 1.0])  # the power of two itself does not fit on the positive side
    assert FixedPoint().quantize(x).tolist() == [-1.0, 127 / 128]
    assert FixedPoint(encoding="sign_magnitude").quantize(x).tolist() == [-127 / 128, 127 / 128]
    grid = FixedPoint(encoding="sign_magnitude").grid(x)
    assert (grid.lo, grid.hi, float(grid.bound)) == (-127, 127, 127 / 128)
    grid = FixedPoint(bits=4).grid(x)
    assert (grid.lo, grid.hi, float(grid.lsb)) == (-8, 7, 0.125)


def test_zeros_tiny_and_empty_tensors_use_the_floor():
    # 2^-17 < 1e-5 < 2^-16
    for x in (torch.zeros(3), torch.full((3,), 1e-7), torch.full((3,), -1e-9), torch.empty(0)):
        assert FixedPoint().fraction_length(x) == 23
        assert torch.equal(FixedPoint().quantize(x), (x * 2.0**23).round() * 2.0**-23)
    assert torch.equal(FixedPoint().quantize(torch.zeros(3)), torch.zeros(3))
    assert FixedPoint().fraction_length(torch.full((3,), 1.6e-5)) == 22


def test_negative_only_tensor_sets_the_range_by_its_magnitude():
    x = torch.tensor([-3.0, -0.51])
    assert FixedPoint().fraction_length(x) == 5
    assert FixedPoint().quantize(x).tolist() == [-3.0, -0.5]


def test_bounded_range_clips_and_frozen_range_is_the_given_one():
    x = torch.tensor([5.0, -5.0, 0.3, 0.004])
    bounded = FixedPoint(range=Bounded(bound=1.5))  # rounded up to the power of two: LSB = 2^-6
    np.testing.assert_array_equal(bounded.quantize(x).numpy(), naive_quantize(x.numpy(), 8, "twos_complement", 6))
    assert bounded.quantize(x).tolist()[:2] == [127 / 64, -2.0]
    frozen = FixedPoint(range=Frozen(fraction_length=3))
    np.testing.assert_array_equal(frozen.quantize(x).numpy(), naive_quantize(x.numpy(), 8, "twos_complement", 3))
    assert frozen.fraction_length(x) == 3


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_encode_and_decode_are_the_two_halves_of_quantize(bits, encoding):
    form = FixedPoint(bits=bits, encoding=encoding)
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3
    integers = form.encode(x)
    hi = 2 ** (bits - 1) - 1
    assert integers.dtype == torch.int32 and int(integers.abs().max()) <= hi + 1
    assert torch.equal(form.decode(integers, form.fraction_length(x)), form.quantize(x))
    every = torch.arange(-hi, hi + 1)
    frozen = FixedPoint(bits=bits, encoding=encoding, range=Frozen(fraction_length=5))
    assert torch.equal(frozen.encode(frozen.decode(every, 5)), every.int())


def test_encode_of_float64_rounds_once():
    form = FixedPoint(range=Frozen(fraction_length=0))
    x = torch.tensor([0.5 + 1e-12, 0.5, 1.5 - 1e-12], dtype=torch.float64)
    assert form.encode(x).tolist() == [1, 0, 1]


def test_gradient_is_one_inside_and_zero_where_clamped():
    form = FixedPoint(bits=4, range=Frozen(fraction_length=0))  # integers -8 .. 7
    x = torch.tensor([7.0, 7.4, 7.6, 9.0, -8.0, -8.4, -8.6, 0.2, -0.2], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, torch.inf, 5.0, 6.0, 7.0, 8.0, 9.0])
    form.quantize(x).backward(upstream)
    assert x.grad.tolist() == [1.0, 2.0, 0.0, 0.0, 5.0, 6.0, 0.0, 8.0, 9.0]


def test_gradient_of_a_dynamic_range_passes_everywhere_but_at_the_top():
    x = torch.tensor([1.0, -1.0, 0.3, 127 / 128], requires_grad=True)  # 1.0 would be 128 LSB, which is clamped
    FixedPoint().quantize(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_keep_their_type_and_are_computed_exactly(dtype):
    x = (torch.randn(64, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
    result = FixedPoint().quantize(x)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.double().numpy(), naive_quantize(x.double().numpy(), 8, "twos_complement"))
    y = x.clone().requires_grad_()
    FixedPoint().quantize(y).sum().backward()
    assert y.grad.dtype == dtype


def test_largest_half_does_not_overflow():
    x = torch.tensor([65504.0, -65504.0], dtype=torch.float16)
    assert FixedPoint(encoding="sign_magnitude").quantize(x).tolist() == [127 * 512.0, -127 * 512.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_visible(bad):
    x = torch.tensor([0.5, bad, 1.0])
    assert not bool(torch.isfinite(FixedPoint().quantize(x)).any())
    assert bool(torch.isnan(FixedPoint(range=Frozen(fraction_length=7)).quantize(torch.tensor([torch.nan]))).all())


def test_the_argument_is_untouched_and_its_memory_format_kept():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    result = FixedPoint().quantize(x)
    assert torch.equal(x, before) and result.data_ptr() != x.data_ptr()
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, FixedPoint().quantize(x.contiguous()))


class _NoReadBack(TorchFunctionMode):
    """Fails on the functions that wait for a device: reading a number, or a shape that depends on values."""

    waiting = ("item", "tolist", "numpy", "cpu", "equal", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in self.waiting, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limits", [None, Bounded(bound=2.0), Frozen(fraction_length=4)])
def test_no_number_is_read_back_from_the_device(limits, monkeypatch):
    monkeypatch.setattr("ftnas.quantize._extremes", lambda x: None)  # as on a device: on a CPU nothing waits for it
    x = torch.randn(50, requires_grad=True)
    with _NoReadBack():
        FixedPoint(range=limits).quantize(x).sum().backward()
        with torch.no_grad():
            FixedPoint(range=limits).quantize(x)
    for read in (lambda: x.sum().item(), lambda: float(x.sum()), lambda: bool(x.sum() > 0), lambda: x.nonzero()):
        with pytest.raises(AssertionError), _NoReadBack():  # the guard itself works
            read()


@pytest.mark.parametrize("limits", [None, Bounded(bound=1.7), Frozen(fraction_length=5)])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("largest", [0.9, 1.0, 127.4 / 128, 127.5 / 128, 1e-7, 3e30])
def test_what_is_read_on_a_cpu_changes_nothing(limits, encoding, dtype, largest, monkeypatch):
    form = FixedPoint(encoding=encoding, range=limits)
    base = torch.randn(60, generator=torch.Generator().manual_seed(3)).clamp(-1.5, 1.5) / 1.5
    x = (torch.cat([base, torch.tensor([-1.0, 0.0, -0.0, 1.0])]) * largest).to(dtype).requires_grad_()
    found = []
    for reads in (True, False):
        with monkeypatch.context() as patch:
            if not reads:
                patch.setattr("ftnas.quantize._extremes", lambda x: None)
            y = form.quantize(x)
            found.append((y.detach(), *torch.autograd.grad(y, x, torch.arange(1.0, 65.0, dtype=dtype))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)  # the sign of a zero may differ


@pytest.mark.parametrize("bits", [2, 8, 22, 23])
@pytest.mark.parametrize("exponent", [-40, -5, 0, 60])
def test_rounding_by_a_shift_is_rounding_half_to_even(bits, exponent):
    lsb, top = 2.0**exponent, 2 ** (bits - 1) - 1
    wholes = torch.cat([torch.arange(-min(top, 500), min(top, 500) + 1), torch.tensor([-top - 1, -top, top - 1, top])])
    near = torch.tensor([-0.5, -0.49999997, -0.25, 0.0, 0.25, 0.49999997, 0.5])
    integers = (wholes.double()[:, None] + near.double()).flatten().clamp(-top - 1, top)
    x = (integers * lsb).float()
    rounded = FixedPoint(bits=bits, range=Frozen(fraction_length=-exponent)).quantize(x)
    assert torch.equal(rounded.double(), (x.double() / lsb).round() * lsb)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_in_place_writes_to_the_tensor_where_its_dtype_allows(dtype):
    x = torch.tensor([0.3, -0.9, 1.0], dtype=dtype)
    expected = FixedPoint().quantize(x)
    values, inside, _ = FixedPoint().round(x, need_inside=True, in_place=True)
    assert torch.equal(values, expected.float()) and inside.tolist() == [True, True, False]
    assert (values.data_ptr() == x.data_ptr()) == (dtype == torch.float32)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: FixedPoint(bits=1), "bits"),
        (lambda: FixedPoint(bits=25), "bits"),
        (lambda: FixedPoint(encoding="offset"), "encoding"),
        (lambda: FixedPoint(width=8), "width"),
        (lambda: Bounded(bound=0.0), "bound"),
        (lambda: Bounded(bound=float("nan")), "bound"),
        (lambda: Frozen(fraction_length=3000), "fraction_length"),
        (lambda: Quantization.of(8), "quantization must be a FixedPoint"),
    ],
)
def test_bad_formats_are_refused(make, rule):
    with pytest.raises(ValueError, match=rule):
        make()


def test_one_format_serves_weights_and_features():
    form = FixedPoint(bits=6)
    assert Quantization.of(form) == Quantization(weights=form, features=form)
    assert Quantization.of(None) is None
    assert Quantization() == Quantization(weights=FixedPoint(bits=8), features=FixedPoint(bits=8))


LAYOUTS = {
    "map": torch.randn(4, 3, 5, 5),
    "channels last": torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
    "part": torch.randn(4, 6, 5, 5)[:, ::2],
    "transposed": torch.randn(7, 9).t(),
    "zeros": torch.zeros(3, 2),
    "one": torch.tensor([0.3]),
    "none": torch.zeros(0, 3),
    "nan": torch.tensor([1.0, torch.nan]),
    "powers of two": 2.0 ** torch.arange(-30.0, 30.0),
}
FORMS = [FixedPoint(), FixedPoint(bits=5, encoding="sign_magnitude"), FixedPoint(range=Bounded(bound=0.7))]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_fused_rounding_gives_the_same_values_for_every_layout():
    for form in FORMS:
        for name, x in LAYOUTS.items():
            for need in (True, False):
                expected = form.round(x, need_inside=need)
                with rounding.fused():
                    found = form.round(x, need_inside=need)
                assert torch.equal(found.values.nan_to_num(7.0), expected.values.nan_to_num(7.0)), (form, name)
                assert torch.equal(found.grid.lsb.nan_to_num(7.0), expected.grid.lsb.nan_to_num(7.0)), (form, name)
                assert not found.values._is_view(), (form, name)
                if need:
                    inside = True if expected.inside is None else expected.inside
                    assert found.inside is None or bool((found.inside == inside).all()), (form, name)
    assert not rounding._fused.get()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("bits", [8, 9])
def test_fused_rounding_of_bfloat16_leaves_it_as_such_where_it_holds_every_word(bits):
    form, x = FixedPoint(bits=bits), LAYOUTS["channels last"].to(torch.bfloat16)
    expected = form.round(x, need_inside=True)
    assert expected.values.dtype == torch.float32
    for narrow in (True, False):
        with rounding.fused():
            found = form.round(x, need_inside=True, narrow=narrow)
        assert found.values.dtype == (torch.bfloat16 if narrow and bits == 8 else torch.float32)
        assert torch.equal(found.values.float(), expected.values) and torch.equal(found.grid.lsb, expected.grid.lsb)
        assert found.inside.all() == (expected.inside is None or expected.inside.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_alike_where_a_device_is_not_waited_for(dtype, monkeypatch):
    gradient = torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    inside = torch.rand(gradient.shape).contiguous(memory_format=torch.channels_last) < 0.7
    expected = quantize.let_pass(gradient, inside)
    monkeypatch.setattr(devices, "is_readable", lambda _device: False)
    found = quantize.let_pass(gradient, inside)
    assert found.dtype == dtype and found.stride() == gradient.stride() and (expected == 0).any()
    assert torch.equal(found, expected) and torch.equal(found[inside], gradient[inside])


def test_rounding_at_once_is_rounding_in_passes(monkeypatch):
    for form in FORMS[:2]:
        for name, x in LAYOUTS.items():
            found = []
            for _ in range(2):
                found.append(form.round(x, need_inside=True))
                monkeypatch.setattr("ftnas.quantize._extremes", lambda x: None)
            (values, inside, grid), (others, inside_once, grid_once) = found
            monkeypatch.undo()
            assert torch.equal(values.nan_to_num(7.0), others.nan_to_num(7.0)) and others.stride() == values.stride(), (
                name
            )
            if name != "nan":
                assert torch.equal(torch.ones_like(x).bool() if inside is None else inside, inside_once), name
            assert torch.equal(grid.lsb.nan_to_num(7.0), grid_once.lsb.nan_to_num(7.0)), name


@pytest.mark.parametrize("bits", [2, 8, 24])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_a_step_is_looked_up_for_every_magnitude(bits, device):
    powers = torch.tensor([2.0**k for k in range(-149, 128)], dtype=torch.float32)
    random = torch.randint(0, 0x7F80_0000, (20_000,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    random = random.view(torch.float32)
    ends = torch.tensor([0.0, rounding.SMALLEST_RANGE, torch.finfo(torch.float32).max])
    magnitudes = torch.cat([powers, powers.nextafter(ends[0]), powers.nextafter(ends[2]), random, ends])
    expected = [
        math.ldexp(1.0, e - (m == 0.5) + 1 - bits)
        for m, e in (math.frexp(max(x, rounding.SMALLEST_RANGE)) for x in magnitudes.tolist())
    ]
    found = rounding.step_of(magnitudes.to(device), bits).cpu()
    assert found.tolist() == expected
    assert torch.equal(found, rounding.power_step(magnitudes, rounding.scale_of(bits, torch.float32)))
    assert rounding.step_of(torch.tensor([math.nan, math.inf], device=device), bits).isnan().all()
    assert rounding.step_of(torch.tensor(3.0, device=device), bits).shape == ()


@pytest.mark.parametrize("bits", [2, 8, 16, 24])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rounding_with_its_own_gradient_is_rounding(bits, encoding, monkeypatch):
    form = FixedPoint(bits=bits, encoding=encoding)
    monkeypatch.setattr(devices, "is_readable", lambda _device: False)
    for make in (rounding._fake_quantization, rounding._powers):
        make.cache_clear()
    with torch.inference_mode():  # what is made here serves forwards with gradients too
        form.at_once(torch.ones(3))
    for name, x in LAYOUTS.items():
        found, gradient = [], torch.randn(x.shape)
        for function in (form.at_once, form.quantize):
            leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            values = function(leaf)
            if values is None:
                assert name == "none"
                break
            values = values.values if function == form.at_once else values
            values.backward(gradient)
            found.append((values.detach().nan_to_num(7.0), leaf.grad))
        if found:
            assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1]), name
    assert form.at_once(torch.ones(3, dtype=torch.float64)) is None
    assert FixedPoint(range=Bounded(bound=1.0)).at_once(torch.ones(3)) is None
    with rounding.fused():
        assert form.at_once(torch.ones(3)) is None
    monkeypatch.undo()
    assert form.at_once(torch.ones(3)) is None  # here values can be read


def test_all_formats_and_shapes_share_the_kernels_of_fused_rounding(monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()  # what other tests have compiled counts towards a limit
    compile_ = cache(partial(torch.compile, dynamic=True, backend=backend))
    monkeypatch.setattr(rounding, "_compiled", compile_)
    with rounding.fused():
        for form in FORMS:
            for x in LAYOUTS.values():
                for need in (True, False):
                    form.round(x, need_inside=need)
    assert len(compiled) == 3  # the step, and values with and without mask


def test_nothing_that_fused_rounding_compiles_depends_on_the_size_that_is_met_first(monkeypatch):
    targets = []

    def backend(graph, inputs):
        targets.extend(str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compile_ = cache(partial(torch.compile, dynamic=True, backend=backend))
    monkeypatch.setattr(rounding, "_compiled", compile_)
    with rounding.fused():
        for form in FORMS:
            form.round(LAYOUTS["channels last"], need_inside=True)
    assert "round" in targets
    reductions = ("amax", "amin", "max", "min", "aminmax", "sum", "any", "all", "norm", "vector_norm")
    assert not [target for target in targets if target.removeprefix("linalg_") in reductions], targets
