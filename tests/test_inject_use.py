"""`inject` leaves no trace, lets gradients through, and fits into other ways of use; its mistakes are one line."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from faulty import never_waits
from injected import ADSAF, FIXED, MIBB, MODELS, Spying, create, drawn, gen, images, rounded, run, snapshot
from torch import nn
from torch.nn.utils import parametrizations

from ftnas import FixedPoint, inject
from ftnas.faults import FAULTS, MiBB, NeuronCrash, Site


@pytest.fixture(params=MODELS)
def model(request):
    return create(request.param)


@pytest.fixture
def spy():
    Spying.seen.clear()
    return Spying(mac_error_rate=0.002)


# Gradients


@pytest.mark.parametrize("mask", [False, True])
def test_gradients_of_features_flow_through_faults_unless_masked(spy, mask):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    reached: list[torch.Tensor] = []
    features: list[torch.Tensor] = []

    def watch(module, args, output=None):
        feature = args[0] if output is None else output
        if feature.requires_grad:  # not while the feature points are found
            features.append(feature.detach().clone())
            if output is not None:
                output.register_hook(reached.append)

    model[0].register_forward_hook(watch)
    model[1].register_forward_pre_hook(watch)
    with inject(model, spy, quantization=FIXED, mask_gradients=mask):
        model(images()).sum().backward()
    raw, faulty = features
    hit = torch.zeros(raw.numel(), dtype=torch.bool)
    hit[spy.seen["0"][0].sites] = True
    hit = hit.view_as(raw)
    # 1 where the stored value is active and its quantization did not clamp it
    passes = (faulty > 0) & ((raw / FIXED.grid(raw).lsb).round() <= 127)
    assert bool((passes & hit).any()) and bool((faulty != rounded(raw)).any())
    assert torch.equal(reached[0] != 0, passes & ~hit if mask else passes)


@pytest.mark.parametrize("mask", [False, True])
def test_gradients_of_weights_flow_through_stuck_cells_unless_masked(mask):
    model, x = create("root"), images()
    form = FixedPoint(encoding="sign_magnitude")
    _, plan = drawn(ADSAF, form.quantize(model.weight.detach()), "", 27, when="device", form=form)
    stuck = torch.zeros(model.weight.numel(), dtype=torch.bool)
    stuck[plan.sites] = True
    with inject(model, ADSAF, quantization=FIXED, mask_gradients=mask):
        out = model(x)
        (out * torch.randn(out.shape, generator=gen(8))).sum().backward()
    zero = model.weight.grad.reshape(-1) == 0
    assert stuck.any() and not stuck.all()
    clamped = FIXED.encode(model.weight.detach()).abs().reshape(-1) > 127
    assert torch.equal(zero, (stuck if mask else torch.zeros_like(stuck)) | clamped)


def test_gradients_are_those_of_the_faulty_forward():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2)), images()
    upstream = torch.tensor([[1.0, -2.0]]).expand(4, 2)
    seen = {}
    model[3].register_forward_pre_hook(lambda module, args: seen.update(a=args[0]))
    with inject(model, ADSAF, quantization=FIXED):
        out = model(x)
        weight = model[3].weight.detach()
        seen["a"].retain_grad()
        out.backward(upstream)
    stored = nn.functional.linear(seen["a"], weight, model[3].bias).detach()  # before it is rounded
    grid = FIXED.grid(stored)
    unclamped = (stored / grid.lsb).round() <= grid.hi
    assert torch.allclose(seen["a"].grad, (upstream * unclamped) @ weight)


# Leaving no trace


@pytest.mark.parametrize("errors", ["soft", "hard"])
def test_the_model_is_as_before(model, errors):
    before, out = snapshot(model), model(images())
    run(model, images(), MIBB, ADSAF, errors=errors)
    assert snapshot(model) == before
    assert torch.equal(model(images()), out)


def test_after_an_exception_in_the_body(model):
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), inject(model, MIBB, ADSAF, quantization=FIXED):
        model(images())
        1 / 0  # noqa: B018
    assert snapshot(model) == before


def test_after_an_exception_in_the_forward(model):
    before = snapshot(model)
    with pytest.raises(RuntimeError), inject(model, MIBB, ADSAF, quantization=FIXED):
        model(torch.randn(2, 5))
    assert snapshot(model) == before
    with torch.no_grad(), inject(model, MIBB, ADSAF, quantization=FIXED):
        expected = model(images())
    with torch.no_grad(), inject(model, MIBB, ADSAF, quantization=FIXED) as injection:
        model(images())
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5))
        injection.draw = 0
        assert torch.equal(model(images()), expected)  # and it goes on


def test_after_an_exception_while_entering(model, monkeypatch):
    before = snapshot(model)
    last = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]

    def fail(module, name, parametrization, *, unsafe):
        if module is last:
            raise MemoryError
        return register(module, name, parametrization, unsafe=unsafe)

    register = nn.utils.parametrize.register_parametrization
    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", fail)
    with pytest.raises(MemoryError), inject(model, MIBB, quantization=FIXED):
        pass
    assert snapshot(model) == before


def test_batch_norm_statistics_move_by_the_real_forward_only():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    x = images()
    with torch.no_grad(), inject(model, quantization=FIXED):
        model(x)
    assert int(model[0].num_batches_tracked) == int(model[2].num_batches_tracked) == 1
    assert torch.allclose(model[0].running_mean, 0.1 * x.mean((0, 2, 3)))
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    run(model, x, MIBB)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_batch_and_the_global_random_state_are_untouched(model):
    x = images()
    before = x.clone()
    state = torch.get_rng_state()
    run(model, x, MIBB, ADSAF)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    model.train()
    torch.manual_seed(0)
    model(x)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    run(model, x, MIBB, ADSAF)
    assert torch.equal(torch.get_rng_state(), after)  # of dropout: the real forward's numbers alone


def test_a_model_that_writes_to_its_batch_writes_once():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.conv(x.add_(1.0))

    x = images()
    run(Adding().eval(), x, MIBB)
    assert torch.equal(x, images() + 1.0)


# Other ways of use


def test_channels_last_gives_the_same_result():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)).eval()
    with torch.no_grad():  # small integers: sums are exact in any order
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-7, 8, parameter.shape, generator=gen(2)))
    x = torch.randint(-7, 8, (4, 3, 8, 8), generator=gen(3)).float()
    expected = run(model, x, MIBB, ADSAF)
    model.to(memory_format=torch.channels_last)
    assert torch.equal(run(model, x.contiguous(memory_format=torch.channels_last), MIBB, ADSAF), expected)


def test_new_values_of_a_weight_are_seen_inside_the_block():
    model, x = create("root"), images()
    with inject(model, ADSAF, quantization=FIXED):
        with torch.no_grad():
            model(x)
        model(x).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.5 * parameter.grad)
            stepped = model(x)
            model.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
            loaded = model(x)
    assert torch.equal(loaded, run(model, x, ADSAF))
    model.load_state_dict({name: value * 2.0 for name, value in model.state_dict().items()})
    assert torch.equal(stepped, run(model, x, ADSAF)) and not torch.equal(loaded, stepped)


def test_a_models_own_parametrization_stays_and_its_values_are_seen():
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 4)), torch.randn(5, 6)
    before, out = snapshot(model), model(x)
    with torch.no_grad(), inject(model, quantization=FIXED):
        first = model(x)
        for _ in range(3):
            model[0].parametrizations.weight.original0.mul_(1.7)
            assert torch.equal(model[0].weight, rounded(model[0].parametrizations.weight[0](
                model[0].parametrizations.weight.original0, model[0].parametrizations.weight.original1)))  # fmt: skip
    with torch.no_grad():
        model[0].parametrizations.weight.original0.div_(1.7**3)
    assert {**snapshot(model), "values": None} == {**before, "values": None}
    assert torch.allclose(model(x), out, atol=1e-5) and torch.allclose(run(model, x), first, atol=1e-2)


def test_layers_that_share_a_parameter_keep_sharing_it():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    before = snapshot(model)
    run(model, torch.randn(3, 4), ADSAF)
    assert model[1].weight is model[0].weight and snapshot(model) == before


def test_inference_mode_and_then_gradients(model):
    with inject(model, MIBB, ADSAF, quantization=FIXED) as injection:
        with torch.inference_mode():
            expected = model(images())
        injection.draw = 0
        out = model(images())
        out.sum().backward()
    assert torch.equal(out, expected)


def test_double_precision(model):
    out = run(model.double(), images().double(), MIBB, ADSAF)
    assert out.dtype == torch.float64


def test_the_documented_examples_run(monkeypatch, capsys):
    monkeypatch.setattr(FAULTS, "_entries", dict(FAULTS._entries))  # the example registers a fault model
    text = (Path(__file__).parents[1] / "docs" / "faults.md").read_text()
    names = {"__name__": "documented"}
    for example in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(example, "docs/faults.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{names['record'].hits} of {16 * (8 * 30 * 30 + 10)} feature values hit")
    assert [line.split(":")[0].strip() for line in printed[1:3]] == ["0", "5"]
    assert re.fullmatch(r"weight_bit_flip: \d+ of 486 bits at risk flipped, 4.9 expected", printed[3])
    assert re.fullmatch(r"feature_bit_flip: \d+ of 1280 bits at risk flipped, 1.3 expected", printed[4])
    assert printed[5] == "the same output: True"
    assert re.fullmatch(r"mibb in layer 0, index \(0, .*\), bit \d: \S+ -> \S+", printed[6])
    assert re.fullmatch(r"28 stuck cells; gradient \d+\.\d+", printed[7])
    assert re.fullmatch(r"\d+ of 296 weights swapped", printed[8])
    swap, values = names["SignSwap"](swap_rate=1.0), torch.randn(4, 3, 2, 2)
    plan = swap.sample(Site("", (4, 3, 2, 2), 12, 8), generator=gen())
    last = values.contiguous(memory_format=torch.channels_last)
    assert torch.equal(swap.apply(last, plan), -values) and "sign_swap" in FAULTS


# Mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda m: inject(m, 0.1, quantization=FIXED), r"inject takes fault models such as MiBB\(.*\), got 0.1"),
        (lambda m: inject(m, MiBB, quantization=FIXED), "inject takes fault models"),
        (lambda m: inject(m, MIBB), "mibb needs fixed point: give quantization="),
        (lambda m: inject(m, MIBB, quantization=8), "quantization must be .* got 8"),
        (lambda m: inject(m, MIBB, quantization=FIXED, layers="conv1"), "matches no layer; did you mean 'conv'"),
        (lambda m: inject(m, MIBB, quantization=FIXED, layers="conv2"), "matches no layer; did you mean 'conv"),
        (lambda m: inject(m, MIBB, quantization=FIXED, layers=["conv", "haed"]), "did you mean 'head'"),
        (lambda m: inject(m, MIBB, quantization=FIXED, layers=[]), "selects no layer"),
        (lambda m: inject(m, MIBB, quantization=FIXED, layers=3), "layers must be"),
        (lambda m: inject(m, MIBB, quantization=FIXED, layers=[3]), "layers must be"),
        (lambda m: inject(m, MIBB, quantization=FIXED, errors="firm"), "errors must be 'soft', 'hard' or None"),
        (lambda m: inject(m, MIBB, quantization=FIXED, draw_on="gpu"), "draw_on must be 'cpu' or 'device'"),
        (lambda m: inject(nn.ReLU(), MIBB, quantization=FIXED), "no Conv2d or Linear"),
        (lambda m: inject("resnet18", MIBB, quantization=FIXED), "model must be a torch.nn.Module, got 'resnet18'"),
    ],
)
def test_a_mistake_is_one_line(mistake, message):
    with pytest.raises(ValueError, match=message) as error:
        mistake(create("twice"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("inner", [lambda m: m, lambda m: m[1], lambda m: nn.Sequential(m)])
@pytest.mark.parametrize(("fault", "formats"), [(MIBB, FIXED), (NeuronCrash(rate=0.5), None)])
def test_one_injection_at_a_time(inner, fault, formats):
    model = create("residual")
    before = snapshot(model)
    with inject(model, fault, quantization=formats) as injection:
        model(images())
        sites = injection.record.sites
        with (
            pytest.raises(ValueError, match="the model has an injection already"),
            inject(inner(model), NeuronCrash(rate=0.5)),
        ):
            pass
        model(images())
        assert injection.record.sites == 2 * sites
    assert snapshot(model) == before
    part = inner(model)
    with inject(part, fault, quantization=formats):  # afterwards it may be
        part(model[0](images()) if part is model[1] else images())


def test_an_injection_is_entered_once_at_a_time():
    model = create("root")
    injection = inject(model, MIBB, quantization=FIXED)
    with injection:
        with pytest.raises(ValueError, match="entered already"), injection:
            pass
        model(images())
    with injection:  # afterwards it may be, and goes on counting
        model(images())
    assert injection.record.sites == 2 * 576


def test_a_part_called_by_itself_is_an_error():
    model = create("plain")
    with torch.no_grad(), inject(model, MIBB, quantization=FIXED):
        model(images())
        for before in (lambda: model(images()), lambda: model(torch.randn(2, 5))):  # a forward that fails ends, too
            with contextlib.suppress(RuntimeError):
                before()
            with pytest.raises(
                RuntimeError, match=r"'0' was called by itself: inside inject\(model, ...\) call the model"
            ):
                model[0](images())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fault", [MIBB, ADSAF])
def test_a_training_step_on_a_gpu_never_waits(fault):
    model, x = create("plain").cuda().train(), images().cuda()
    with inject(model, fault, quantization=FIXED, errors="soft", draw_on="device") as injection:
        model(x).sum().backward()  # the first step finds the feature points
        with never_waits():
            model(x).sum().backward()
    assert injection.record.hits > 0
