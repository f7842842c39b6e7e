import copy
import sys
import textwrap

import pytest
import torch
from torch import nn

from ftnas import rng
from ftnas.settings import parse
from ftnas.space.genotype import Genotype
from ftnas.space.network import build_network
from ftnas.space.ops import PRIMITIVES, FactorizedReduction, make_primitive
from ftnas.space.space import Space, load_space
from ftnas.space.supernet import Supernet, copy_path


def all_of(space: Space, *rows) -> Genotype:
    """The genotype with the same rows [source, source, primitive, primitive] in every cell."""
    ops = space.primitives
    decided = [[a, b, ops.index(op_a), ops.index(op_b)] for a, b, op_a, op_b in rows]
    return Genotype.from_decisions(space, {cell_type: decided for cell_type in space.cell_types})


def small(**changes) -> Space:
    """A space of 8x8 images, narrow, with the paper's ten feature-fault primitives that fit such maps."""
    primitives = [name for name in load_space("ftt-features").primitives if name != "dil_conv_5x5"]
    own = {"name": "small", "nodes": 5, "primitives": primitives, "stem": {"multiplier": 3}, "channels": 4}
    return parse(Space, {**load_space("small-8x8").model_dump(), **own, **changes})


def make_supernet(space: Space, *, dropout: float = 0.0, in_channels: int = 1) -> Supernet:
    with rng.isolated(0, "supernet"):
        return Supernet(space, num_classes=5, in_channels=in_channels, dropout=dropout)


def images(batch: int = 6, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=rng.generator(0, "images"))


def naive_complexity(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters and 2 x MAC of convolutions and Linear, by hooks, written apart from ftnas.models.count."""
    flops = 0

    def add(module, _inputs, output):
        nonlocal flops
        flops += 2 * output[0].numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return sum(p.numel() for p in model.parameters()), flops


# Sizes


@pytest.mark.parametrize(("channels", "params", "mflops"), [(None, 2.7126, 919.37), (40, 10.7908, 3655.73)])
def test_w_ftt_net_has_the_published_size(channels, params, mflops):
    network = build_network(Genotype.load("w-ftt-net"), load_space("ftt-weights"), num_classes=10, channels=channels)
    counted = naive_complexity(network, (3, 32, 32))
    assert counted[0] / 1e6 == pytest.approx(params, abs=5e-5)
    assert counted[1] / 1e6 == pytest.approx(mflops, abs=5e-3)


def test_floor_of_the_feature_space():
    space = load_space("ftt-features")
    network = build_network(all_of(space, *[(0, 1, "none", "none")] * 4), space, num_classes=10)
    params, flops = naive_complexity(network, (3, 32, 32))
    assert (round(params / 1e6, 2), round(flops / 1e6)) == (0.16, 63)


# Primitives


@pytest.mark.parametrize("size", [8, 7, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES.names())
def test_primitives_keep_their_contract(name, stride, size):
    for affine in (False, True):
        module = make_primitive(name, in_channels=4, out_channels=4, stride=stride, affine=affine)
        x = images(channels=4, size=size)
        before = x.clone()
        out = module(x)
        assert out.shape == (6, 4, -(-size // stride), -(-size // stride))
        assert torch.equal(x, before)
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.affine == affine for norm in norms)


def test_structure_of_primitives():
    def layers(name, stride=1):
        module = make_primitive(name, in_channels=4, out_channels=4, stride=stride)
        found = []
        for m in module.modules():
            if isinstance(m, nn.Conv2d):
                found.append((m.kernel_size[0], m.stride[0], m.dilation[0], m.groups, m.bias is not None))
            elif isinstance(m, (nn.ReLU, nn.BatchNorm2d)):
                found.append(type(m).__name__)
        return found

    def depthwise(kernel, stride=1, dilation=1):
        return ["ReLU", (kernel, stride, dilation, 4, False), (1, 1, 1, 1, False), "BatchNorm2d"]

    for k in (3, 5):
        assert layers(f"relu_conv_bn_{k}x{k}", 2) == ["ReLU", (k, 2, 1, 1, False), "BatchNorm2d"]
        assert layers(f"sep_conv_{k}x{k}", 2) == depthwise(k, 2) + depthwise(k)
        assert layers(f"dil_conv_{k}x{k}", 2) == depthwise(k, 2, 2)
    assert layers("conv_1x1", 2) == [(1, 2, 1, 1, True)]
    assert layers("skip", 2) == ["ReLU", (1, 2, 1, 1, False), (1, 2, 1, 1, False), "BatchNorm2d"]
    assert [layers(name) for name in ("skip", "none", "avg_pool_3x3", "max_pool_3x3")] == [[], [], [], []]


def test_primitive_values():
    x = images(channels=4)
    assert make_primitive("skip", in_channels=4, out_channels=4)(x) is x
    assert not make_primitive("none", in_channels=4, out_channels=4, stride=2)(x).any()
    ones = make_primitive("avg_pool_3x3", in_channels=4, out_channels=4)(torch.ones(1, 4, 5, 5))
    assert torch.equal(ones, torch.ones(1, 4, 5, 5))  # padding does not count
    with pytest.raises(ValueError, match="cannot change the number of channels, got 4 and 8"):
        make_primitive("skip", in_channels=4, out_channels=8)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (3, 8, 7, 5), (2, 3, 8, 8), (1, 8, 1, 1), (2, 9, 1, 4)])
def test_pooling_gives_what_torch_gives(shape, stride):
    torch_own = {
        "max_pool_3x3": torch.nn.MaxPool2d(3, stride=stride, padding=1),
        "avg_pool_3x3": torch.nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False),
    }
    maps = torch.randn(shape, generator=rng.generator(0, "pool")).mul(4).round().div(4)  # with ties
    maps[0, 0, 0, 0] = torch.nan
    for name, own in torch_own.items():
        pool = make_primitive(name, in_channels=shape[1], out_channels=shape[1], stride=stride)
        assert isinstance(pool, type(own))
        for x in (maps, maps.contiguous(memory_format=torch.channels_last), maps.transpose(2, 3)):
            with torch.no_grad():
                assert torch.equal(pool(x).nan_to_num(9.0), own(x).nan_to_num(9.0))
            mine, theirs = (x.nan_to_num(0.5).clone(memory_format=torch.preserve_format) for _ in range(2))
            up = torch.randn(own(x).shape, generator=rng.generator(1, "pool"))
            results = [module(y.requires_grad_()) for module, y in ((pool, mine), (own, theirs))]
            for result in results:
                result.backward(up)
            assert torch.equal(*results) and torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("size", [6, 7])
def test_factorized_reduction_reads_every_pixel(size):
    module = FactorizedReduction(in_channels=1, out_channels=2, affine=False).eval()
    nn.init.ones_(module.conv_even.weight)
    nn.init.ones_(module.conv_odd.weight)
    x = torch.rand(1, 1, size, size, generator=rng.generator(0, "pixels")) + 0.1
    out = module(x) * (1 + module.bn.eps) ** 0.5
    half = -(-size // 2)
    expected = torch.zeros(1, 2, half, half)
    expected[0, 0] = x[0, 0, ::2, ::2]
    odd = x[0, 0, 1::2, 1::2]
    expected[0, 1, : odd.shape[0], : odd.shape[1]] = odd
    assert torch.allclose(out, expected)


# Supernet = discrete network


def spaces_to_compare():
    return [
        pytest.param(small(), 8, id="small"),
        pytest.param(small(preprocess="relu_conv_bn_3x3"), 7, id="odd map, 3x3"),
        pytest.param(small(reductions=[0, 1]), 9, id="reductions in a row"),
        pytest.param(small(reductions=[], cells=2), 8, id="no reduction"),
    ]


def genotypes_to_compare(space: Space) -> list[Genotype]:
    stream = rng.generator(0, "compare")
    drawn = [Genotype.random(space, generator=stream) for _ in range(2)]
    conv, sep = "relu_conv_bn_3x3", "sep_conv_3x3"
    return [
        *drawn,
        all_of(space, (0, 0, conv, conv), (1, 2, sep, sep), (2, 2, sep, sep)),  # shared modules run twice
        all_of(space, (0, 0, conv, "none"), (0, 1, "none", "none"), (3, 3, "skip", sep)),  # reads a node of zeros
        all_of(space, *[(1, 1, "none", "none")] * 3),
    ]


@pytest.mark.parametrize(("space", "size"), spaces_to_compare())
def test_copied_path_is_the_same_function_and_gradient(space, size):
    supernet = make_supernet(space).double()
    x = images(size=size).double()
    target = torch.arange(len(x)) % 5
    for genotype in genotypes_to_compare(space):
        network = build_network(genotype, space, num_classes=5, in_channels=1).double()
        with torch.no_grad():
            for p in network.parameters():
                p.fill_(0.3)  # whatever is not copied would show
        copy_path(supernet, genotype, network)
        supernet.zero_grad()
        logits, own = supernet(x, genotype), network(x)
        assert torch.allclose(own, logits, rtol=1e-9, atol=1e-9)
        nn.functional.cross_entropy(logits, target).backward()
        nn.functional.cross_entropy(own, target).backward()
        compare_gradients(supernet, network, genotype)


def compare_gradients(supernet, network, genotype):
    """A shared weight's gradient is the sum over the edges that share it; all other weights have none."""
    expected: dict[str, torch.Tensor] = {}
    norms = {name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, p in network.named_parameters():
        if name.rpartition(".")[0] in norms or p.grad is None:
            continue
        parts = name.split(".")
        if "nodes" in parts:
            node, index = int(parts[3]), int(parts[4])
            cell_type = supernet.cells[int(parts[1])].plan.cell_type
            op, source = genotype.cells[cell_type][node - 2][index]
            name = ".".join([*parts[:2], "edges", f"{node}_{source}_{op}", *parts[5:]])
        expected[name] = expected.get(name, 0) + p.grad
    have = {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None}
    assert have.keys() == expected.keys()
    for name, grad in have.items():
        assert torch.allclose(grad, expected[name], rtol=1e-7, atol=1e-9), name


def test_copy_refuses_another_genotype():
    space = small()
    conv = all_of(space, *[(0, 1, "conv_1x1", "conv_1x1")] * 3)
    other = all_of(space, *[(0, 1, "conv_1x1", "relu_conv_bn_3x3")] * 3)
    supernet = make_supernet(space)
    for network, rule in (
        (build_network(other, space, num_classes=5, in_channels=1), "does not fit"),
        (build_network(conv, space, num_classes=4, in_channels=1), "classifier"),
        (build_network(conv, space, num_classes=5, in_channels=1, channels=8), "stem"),
        (build_network(conv, space, num_classes=5, in_channels=1, cells=4), "both need 3 cells, got 4"),
    ):
        with pytest.raises(ValueError, match=rule) as error:
            copy_path(supernet, conv, network)
        assert "\n" not in str(error.value)


# Supernet


def test_supernet_normalises_by_the_batch_and_keeps_no_state():
    supernet = make_supernet(small())
    genotype = genotypes_to_compare(small())[0]
    before = copy.deepcopy(supernet.state_dict())
    assert not list(supernet.buffers())
    trained = supernet.train()(images(), genotype)
    evaluated = supernet.eval()(images(), genotype)
    assert torch.equal(trained, evaluated)
    assert all(torch.equal(before[key], value) for key, value in supernet.state_dict().items())
    assert all(not m.affine for m in supernet.modules() if isinstance(m, nn.BatchNorm2d))


def test_supernet_builds_nothing_anew():
    supernet = make_supernet(small())
    modules = [id(m) for m in supernet.modules()]
    for genotype in genotypes_to_compare(small()):
        supernet(images(), genotype)
    assert [id(m) for m in supernet.modules()] == modules


def test_supernet_refuses_another_space():
    supernet = make_supernet(small())
    foreign = all_of(small(nodes=4), *[(0, 1, "skip", "conv_1x1")] * 2)
    with pytest.raises(ValueError, match="has 5 nodes in a cell, got 4"):
        supernet(images(), foreign)
    foreign = all_of(small(primitives=["dil_conv_5x5"]), *[(0, 1, "dil_conv_5x5", "dil_conv_5x5")] * 3)
    with pytest.raises(ValueError, match="has no primitive 'dil_conv_5x5'"):
        supernet(images(), foreign)


def test_module_names():
    space = small()
    supernet = make_supernet(space)
    network = build_network(genotypes_to_compare(space)[2], space, num_classes=5, in_channels=1)
    assert isinstance(supernet.get_submodule("cells.2.edges.4_1_sep_conv_3x3.1"), nn.Conv2d)
    assert isinstance(network.get_submodule("cells.2.nodes.3.0.1"), nn.Conv2d)
    num_edges = sum(node for node in range(2, space.nodes))
    assert len(supernet.cells[0].edges) == num_edges * (len(space.primitives) - 1)  # without `none`


def test_feature_points():
    space = small()
    rows = (0, 1, "sep_conv_3x3", "conv_1x1"), (0, 2, "skip", "skip"), (0, 3, "dil_conv_3x3", "relu_conv_bn_3x3")
    points = build_network(all_of(space, *rows), space, num_classes=5, in_channels=1).feature_points()
    assert points["stem.0"] == "stem.1"
    assert points["cells.0.preprocess.0.1"] == "cells.0.preprocess.0.2"
    node = {key.removeprefix("cells.1.nodes."): value for key, value in points.items() if "cells.1.nodes." in key}
    assert node == {
        "2.0.2": "cells.1.nodes.2.0.3",  # the pointwise convolutions; depthwise ones feed these
        "2.0.6": "cells.1.nodes.2.0.7",
        "4.0.2": "cells.1.nodes.4.0.3",
        "4.1.1": "cells.1.nodes.4.1.2",
    }
    supernet_points = make_supernet(space).feature_points()
    assert supernet_points["cells.1.edges.2_0_sep_conv_3x3.2"] == "cells.1.edges.2_0_sep_conv_3x3.3"
    assert not any("skip" in key or "conv_1x1" in key for key in supernet_points)


# Dropout


@pytest.mark.parametrize("kind", ["supernet", "network"])
def test_dropout_draws_from_the_given_generator(kind):
    space = small()
    genotype = genotypes_to_compare(space)[0]
    if kind == "supernet":
        model = make_supernet(space, dropout=0.5)
        arguments = (images(), genotype)
    else:
        model = build_network(genotype, space, num_classes=5, in_channels=1, dropout=0.5)
        arguments = (images(),)
    before = torch.get_rng_state()
    first, again, other = (model(*arguments, dropout_generator=rng.generator(seed, "drop")) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="pass dropout_generator="):
        model(*arguments)
    model.eval()
    assert torch.equal(model(*arguments), model(*arguments))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"a rate in \[0, 1\), got 1.0"):
        build_network(genotype, space, num_classes=5, dropout=1.0)


def test_dropout_keeps_the_mean():
    from ftnas.space.ops import dropout

    x = torch.ones(200, 500)
    dropped = dropout(x, 0.2, generator=rng.generator(0, "mean"))
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    # The share kept is binomial; 6 standard deviations: false alarms under 1e-8.
    assert abs(float((dropped > 0).float().mean()) - 0.8) < 6 * (0.2 * 0.8 / x.numel()) ** 0.5


# The user's own primitives


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_primitives.py").write_text(
        textwrap.dedent(
            """
            from torch import nn

            class Wide(nn.Sequential):
                def __init__(self, in_channels, out_channels, stride, affine):
                    super().__init__(
                        nn.Conv2d(in_channels, out_channels, (1, 7), stride, (0, 3), bias=False),
                        nn.BatchNorm2d(out_channels, affine=affine),
                    )

            def flat(*, in_channels, out_channels, stride, affine):
                return nn.Conv2d(in_channels, out_channels, 1)

            def number(**_):
                return 3
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_primitives", None)


def test_own_primitive_in_both_networks(own_module):
    import yaml

    name = "own_primitives:Wide"
    path = own_module / "own.yaml"
    path.write_text(yaml.safe_dump({**small().model_dump(mode="json"), "primitives": [name, "none"]}))
    before = torch.get_rng_state()
    space = load_space(path)
    assert torch.equal(torch.get_rng_state(), before)
    genotype = all_of(space, (0, 1, name, name), (2, 2, name, name), (0, 1, name, "none"))
    supernet = make_supernet(space)
    network = build_network(genotype, space, num_classes=5, in_channels=1)
    copy_path(supernet, genotype, network)
    assert torch.allclose(network(images()), supernet(images(), genotype), atol=1e-5)
    key = "cells.0.edges.2_0_own_primitives_Wide"
    assert supernet.feature_points()[f"{key}.0"] == f"{key}.1"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("own_primitives:flat", "at stride 2 the shape"),
        ("own_primitives:number", "must make a torch.nn.Module, got int"),
        ("own_primitives:missing", "has no 'missing'"),
        ("no_such_module:x", "cannot import module 'no_such_module'"),
        ("torch.nn:ReLU", "fails at stride 1"),
    ],
)
def test_own_primitive_that_does_not_fit(own_module, name, rule):
    import yaml

    path = own_module / "own.yaml"
    path.write_text(yaml.safe_dump({**small().model_dump(mode="json"), "primitives": [name]}))
    with pytest.raises(ValueError, match=rule) as error:
        load_space(path)
    assert "\n" not in str(error.value)


def test_unread_cells_are_those_that_no_gradient_reaches():
    space = small(nodes=3, cells=4, reductions=[1, 2])
    found = set()
    for seed in range(40):
        genotype = Genotype.random(space, generator=rng.generator(seed, "unread"))
        network = build_network(genotype, space, num_classes=10, in_channels=1)
        outputs: list[torch.Tensor] = []
        for cell in network.cells:
            cell.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
        needed = torch.autograd.grad(network(images()).sum(), outputs, allow_unused=True)
        unread = [number for number, gradient in enumerate(needed) if gradient is None]
        assert genotype.unread_cells(space) == unread
        found |= set(unread)
    assert found == {0, 1, 2}, "the genotypes drawn are too much alike"
