import itertools
import json
import math
import pickle
import re
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from ftnas import rng
from ftnas.settings import parse
from ftnas.shipped import shipped_folder
from ftnas.space.genotype import Edge, Genotype, genotype_names
from ftnas.space.space import Space, load_space, space_names

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "version": 1,
    "name": "tiny",
    "nodes": 4,
    "primitives": ["none", "skip", "sep_conv_3x3"],
    "cells": 3,
    "reductions": [1],
    "channels": 4,
    "preprocess": "relu_conv_bn_1x1",
}


def tiny(**changes) -> Space:
    return parse(Space, {**SMALL, **changes})


def genotypes(space: Space, count: int, *labels) -> list[Genotype]:
    stream = rng.generator(0, "test-genotype", *labels)
    return [Genotype.random(space, generator=stream) for _ in range(count)]


# Spaces


@pytest.mark.parametrize(
    ("name", "nodes", "num_primitives", "cells", "reductions", "channels", "stem", "preprocess"),
    [
        ("ftt-features", 6, 11, 8, (2, 5), 20, 3, "relu_conv_bn_1x1"),
        ("ftt-features-4", 6, 4, 8, (2, 5), 20, 3, "relu_conv_bn_1x1"),
        ("ftt-weights", 6, 11, 8, (2, 5), 20, 3, "relu_conv_bn_3x3"),
        ("small-16x16", 4, 6, 3, (1,), 12, 1, "relu_conv_bn_1x1"),
        ("small-16x16-saturated", 4, 6, 3, (1,), 12, 1, "relu_conv_bn_1x1"),
        ("small-8x8", 4, 6, 3, (1,), 8, 1, "relu_conv_bn_1x1"),
    ],
)
def test_shipped_spaces(name, nodes, num_primitives, cells, reductions, channels, stem, preprocess):
    space = load_space(name)
    assert space.name == name
    assert (space.nodes, len(space.primitives), space.cells) == (nodes, num_primitives, cells)
    assert (space.reductions, space.channels, space.preprocess) == (reductions, channels, preprocess)
    assert (space.stem.multiplier, space.channel_growth) == (stem, 2)


def test_every_shipped_space_and_genotype_loads():
    small = ["small-16x16", "small-16x16-saturated", "small-8x8"]
    assert space_names() == ["ftt-features", "ftt-features-4", "ftt-weights", *small]
    for name in space_names():
        assert load_space(name) == load_space(shipped_folder("search_spaces") / f"{name}.yaml")
    for name in genotype_names():
        genotype = Genotype.load(name)
        assert genotype.space is not None
        genotype.validate(load_space(genotype.space))


def test_layout_of_the_paper():
    plans = load_space("ftt-weights").layout()
    assert [plan.cell_type for plan in plans] == [*["normal"] * 2, "reduce", *["normal"] * 2, "reduce", *["normal"] * 2]
    assert [plan.channels for plan in plans] == [20, 20, 40, 40, 40, 80, 80, 80]
    assert [plan.in_strides for plan in plans] == [(2, 1) if i in (3, 6) else (1, 1) for i in range(8)]
    assert [plan.in_channels for plan in plans[:4]] == [(60, 60), (60, 80), (80, 80), (80, 160)]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"version": 2}, "version 1, got 2"),
        ({"nodes": 2}, "greater than or equal to 3, got 2"),
        ({"nodes": 11}, "less than or equal to 10, got 11"),
        ({"primitives": ["sep_conv_3x2"]}, "did you mean 'sep_conv_3x3'"),
        ({"primitives": ["skip", "conv_1x1", "skip"]}, "'skip' is there twice"),
        ({"primitives": ["a.b:C", "a_b:C"]}, "differ in punctuation only"),
        ({"primitives": ["none"]}, "no cell would compute anything"),
        ({"primitives": ["none", "skip"]}, "no cell would compute anything"),
        ({"primitives": []}, "no cell would compute anything"),
        ({"primitives": "none"}, "valid tuple"),
        ({"cells": 0}, "greater than or equal to 1, got 0"),
        ({"reductions": [3]}, "indices lie in 0..2, got [3]"),
        ({"reductions": [-1]}, "indices lie in 0..2, got [-1]"),
        ({"reductions": [1, 1]}, "each index once, in increasing order, got [1, 1]"),
        ({"channels": 1}, "greater than or equal to 2, got 1"),
        ({"channel_growth": 0}, "greater than or equal to 1, got 0"),
        ({"stem": {"multipler": 3}}, "did you mean 'multiplier'"),
        ({"preprocess": "sep_conv_3x3"}, "'relu_conv_bn_1x1' or 'relu_conv_bn_3x3'"),
        ({"node": 4}, "did you mean 'nodes'"),
        ({"name": ""}, "at least 1 character"),
    ],
)
def test_rules_of_a_space_file(tmp_path, changes, rule):
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(ValueError, match=re.escape(rule)) as error:
        load_space(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ("ftt-wieghts", "did you mean 'ftt-weights'"),
        ("missing.yaml", "no such file"),
        ("no/such/folder", "no such file"),
    ],
)
def test_missing_space(given, rule):
    with pytest.raises(ValueError, match=rule) as error:
        load_space(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["nodes: [1\nb: 2", "just text", "", "a: \xff"])
def test_space_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError) as error:
        load_space(path)
    assert "\n" not in str(error.value)


def test_resized_spreads_reductions():
    space = load_space("ftt-features")
    assert space.resized(cells=8) == space
    assert space.resized(cells=20, channels=36).reductions == (6, 13)
    assert space.resized(cells=20, channels=36).channels == 36
    with pytest.raises(ValueError, match="each index once"):
        space.resized(cells=1)


def test_cell_types_that_occur():
    assert tiny().cell_types == ("normal", "reduce")
    assert tiny(reductions=[]).cell_types == ("normal",)
    assert tiny(reductions=[0, 1, 2]).cell_types == ("reduce",)
    for genotype in genotypes(tiny(reductions=[]), 3):
        assert list(genotype.cells) == ["normal"]


# Genotypes: value and file


def test_round_trips(tmp_path):
    for name in space_names():
        space = load_space(name)
        for genotype in genotypes(space, 2):
            genotype.validate(space)
            path = tmp_path / "g.json"
            genotype.save(path)
            for copy in (
                Genotype.load(path),
                Genotype.from_dict(genotype.to_dict()),
                Genotype.from_dict(json.loads(json.dumps(genotype.to_dict()))),
                Genotype.from_decisions(space, genotype.to_decisions(space)),
                pickle.loads(pickle.dumps(genotype)),
            ):
                assert copy == genotype and hash(copy) == hash(genotype) and copy.space == name
    assert [path.name for path in tmp_path.iterdir()] == ["g.json"]


def test_immutable_and_equal_by_cells():
    genotype = genotypes(tiny(), 1)[0]
    with pytest.raises(AttributeError):
        genotype.name = "other"
    renamed = Genotype(items=genotype.items, name="other", space="elsewhere")
    assert renamed == genotype and len({renamed, genotype}) == 1
    assert genotypes(tiny(), 2)[1] != genotype


def test_decisions_are_source_source_op_op():
    space = tiny()
    genotype = Genotype.from_decisions(space, {"normal": [[0, 1, 2, 0], [2, 0, 1, 2]], "reduce": [[1, 1, 2, 2]] * 2})
    assert genotype.cells["normal"] == (
        (Edge("sep_conv_3x3", 0), Edge("none", 1)),
        (Edge("skip", 2), Edge("sep_conv_3x3", 0)),
    )
    assert genotype.describe().splitlines()[:2] == [
        "normal n2 = sep_conv_3x3(0) + none(1)",
        "normal n3 = skip(2) + sep_conv_3x3(0)",
    ]


@pytest.mark.parametrize(
    "decisions",
    [
        {"normal": [[0, 0, 0, 0]] * 2},
        {"normal": [[0, 0, 0, 0]] * 2, "reduce": [[0, 0, 0, 0]]},
        {"normal": [[0, 0, 0, 0]] * 2, "reduce": [[0, 0, 0]] * 2},
        {"normal": [[0, 2, 0, 0]] * 2, "reduce": [[0, 0, 0, 0]] * 2},
        {"normal": [[0, 0, 0, 3]] * 2, "reduce": [[0, 0, 0, 0]] * 2},
        {"normal": [[0, -1, 0, 0]] * 2, "reduce": [[0, 0, 0, 0]] * 2},
    ],
)
def test_decisions_out_of_range(decisions):
    with pytest.raises(ValueError, match="decisions: ") as error:
        Genotype.from_decisions(tiny(), decisions)
    assert "\n" not in str(error.value)


NODE = [["skip", 0], ["none", 1]]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"version": 2}, "version 1, got 2"),
        ({"version": True}, "version 1, got True"),
        ({"version": None}, "version 1, got None"),
        ({"nromal": {"2": NODE}}, "did you mean 'normal'"),
        ({"name": 3}, "name: a text, got 3"),
        ({"normal": []}, "nodes by number"),
        ({"normal": {}}, "nodes by number"),
        ({"normal": {"3": NODE}}, "nodes 2, got 3"),
        ({"normal": {"2": [["skip", 0]]}}, "node 2: two edges"),
        ({"normal": {"2": [["skip", 0], ["skip"]]}}, r"an edge is \[primitive, source\]"),
        ({"normal": {"2": [["skip", 0], ["skip", 2]]}}, r"0\.\.1, got 2"),
        ({"normal": {"2": [["skip", 0], ["skip", -1]]}}, r"0\.\.1, got -1"),
        ({"normal": {"2": [["skip", 0], ["skip", True]]}}, r"0\.\.1, got True"),
        ({"normal": {"2": [["skip", 0], ["skip", 0.0]]}}, r"0\.\.1, got 0\.0"),
    ],
)
def test_rules_of_a_genotype_file(tmp_path, changes, rule):
    path = tmp_path / "g.json"
    path.write_text(json.dumps({"version": 1, "normal": {"2": NODE}, **changes}))
    with pytest.raises(ValueError, match=rule) as error:
        Genotype.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", '{"version": 1}', '{"version": 1, "normal": {"2": [["sk'])
def test_broken_genotype_file(tmp_path, text):
    path = tmp_path / "g.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        Genotype.load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ValueError, match="did you mean 'w-ftt-net'"):
        Genotype.load("w-ftt-nte")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"nodes": 5}, "has 5 nodes in a cell, got 4"),
        ({"reductions": []}, r"has cells \['normal'\], got \['normal', 'reduce'\]"),
        ({"primitives": ["skip", "sep_conv_5x5"]}, "has no primitive 'sep_conv_3x3'; did you mean 'sep_conv_5x5'"),
    ],
)
def test_genotype_of_another_space(changes, rule):
    genotype = Genotype.from_decisions(tiny(), {key: [[0, 0, 2, 2]] * 2 for key in ("normal", "reduce")})
    with pytest.raises(ValueError, match=rule) as error:
        genotype.validate(tiny(**changes))
    assert "\n" not in str(error.value)


def test_only_skips_and_nones():
    space = tiny()
    for rows, names in (
        ([[0, 0, 0, 1]] * 2, ["normal", "reduce"]),
        ([[0, 0, 0, 1], [0, 0, 0, 2]], []),
    ):
        genotype = Genotype.from_decisions(space, {"normal": rows, "reduce": rows})
        assert genotype.only_skips_and_nones() == names
    mixed = Genotype.from_decisions(space, {"normal": [[0, 0, 2, 2]] * 2, "reduce": [[0, 0, 1, 1]] * 2})
    assert mixed.only_skips_and_nones() == ["reduce"]


# Randomness


def test_random_is_uniform_over_decisions():
    # Each value's count is binomial; the last line bounds the false-alarm rate of all looks together.
    space, draws, z = tiny(), 1500, 6.0
    counts: dict[tuple, int] = {}
    for genotype in genotypes(space, draws, "uniform"):
        for cell_type, rows in genotype.to_decisions(space).items():
            for node, row in enumerate(rows):
                for slot, value in enumerate(row):
                    counts[cell_type, node, slot, value] = counts.get((cell_type, node, slot, value), 0) + 1
    looks = 0
    for cell_type, node, slot in itertools.product(space.cell_types, range(2), range(4)):
        size = node + 2 if slot < 2 else 3
        for value in range(size):
            p = 1 / size
            assert abs(counts[cell_type, node, slot, value] - draws * p) < z * math.sqrt(draws * p * (1 - p))
            looks += 1
    assert looks == len(counts) and looks * math.erfc(z / math.sqrt(2)) < 1e-6


def test_random_follows_its_generator_alone():
    before = torch.get_rng_state()
    assert genotypes(tiny(), 5) == genotypes(tiny(), 5)
    assert genotypes(tiny(), 5) != genotypes(tiny(), 5, "other")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{}, {"primitives": ["skip", "none", "conv_1x1"]}, {"primitives": ["conv_1x1"]}])
def test_mutation_changes_one_decision(changes):
    space = tiny(**changes)
    stream = rng.generator(0, "mutate")
    changed = set()
    for parent in genotypes(space, 150):
        child = parent.mutate(space, generator=stream)
        child.validate(space)
        old, new = parent.to_decisions(space), child.to_decisions(space)
        differing = [
            (cell_type, node, slot)
            for cell_type in space.cell_types
            for node in range(2)
            for slot in range(4)
            if old[cell_type][node][slot] != new[cell_type][node][slot]
        ]
        assert len(differing) == 1
        assert child != parent and child.canonical_key() != parent.canonical_key()
        changed.add(differing[0])
    assert len(changed) == 2 * 2 * (4 if len(space.primitives) > 1 else 2)  # every decision gets its turn


# Canonical key


def brute_force_isomorphic(a: Genotype, b: Genotype) -> bool:
    """Whether, for each cell, some bijection of inner nodes maps one's edges to the other's."""
    return all(cells_isomorphic(a.cells[key], b.cells[key]) for key in a.cells)


def cells_isomorphic(a, b) -> bool:
    def edges(cell, names):
        return {
            names[i + 2]: sorted((e.op, -1 if e.op == "none" else names[e.source]) for e in node)
            for i, node in enumerate(cell)
        }

    identity = {i: i for i in range(len(a) + 2)}
    wanted = edges(b, identity)
    return any(
        edges(a, {0: 0, 1: 1, **dict(zip(range(2, len(a) + 2), order, strict=True))}) == wanted
        for order in itertools.permutations(range(2, len(a) + 2))
    )


def relabelled(genotype: Genotype, stream: torch.Generator) -> Genotype:
    """A random isomorphic copy: inner nodes in another valid order, edges swapped, sources of `none` moved."""
    items = []
    for cell_type, cell in genotype.items:
        orders = [
            order
            for order in itertools.permutations(range(len(cell)))
            if all(
                edge.op == "none" or edge.source < 2 or order.index(edge.source - 2) < place
                for place, old in enumerate(order)
                for edge in cell[old]
            )
        ]
        order = orders[int(torch.randint(len(orders), (), generator=stream))]
        names = {0: 0, 1: 1, **{old + 2: place + 2 for place, old in enumerate(order)}}
        nodes = []
        for place, old in enumerate(order):
            edges = [
                Edge("none", int(torch.randint(place + 2, (), generator=stream)))
                if edge.op == "none"
                else Edge(edge.op, names[edge.source])
                for edge in cell[old]
            ]
            nodes.append(tuple(edges[::-1] if torch.rand((), generator=stream) < 0.5 else edges))
        items.append((cell_type, tuple(nodes)))
    return Genotype(items=tuple(items))


def test_canonical_key_is_shared_by_isomorphic_genotypes():
    space, stream = tiny(nodes=6), rng.generator(0, "relabel")
    moved = 0
    for genotype in genotypes(space, 100):
        copy = relabelled(genotype, stream)
        moved += copy != genotype
        assert copy.canonical_key() == genotype.canonical_key()
    assert moved > 75


def test_canonical_key_agrees_with_brute_force():
    space = tiny(nodes=5, primitives=["none", "conv_1x1"], reductions=[])
    pool = genotypes(space, 80)
    same = 0
    for a, b in itertools.combinations(pool, 2):
        equal = a.canonical_key() == b.canonical_key()
        assert equal == brute_force_isomorphic(a, b)
        same += equal
    assert 0 < same < len(pool) * (len(pool) - 1) / 2


def test_equal_expressions_stay_two_nodes():
    def genotype(second_source):
        rows = [[0, 1, 2, 2], [0, 1, 2, 2], [2, second_source, 2, 2]]
        return Genotype.from_decisions(tiny(nodes=5, reductions=[]), {"normal": rows})

    assert genotype(2).canonical_key() != genotype(3).canonical_key()


# The files inside a wheel


def test_packages_are_listed_in_full():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "ftnas").rglob("__init__.py")}
    for package, folder in setup["package-dir"].items():
        subfolders = {p.parent.relative_to(ROOT / folder).parts for p in (ROOT / folder).rglob("*") if p.is_file()}
        found |= {".".join((package, *parts)) for parts in subfolders}
    assert set(setup["packages"]) | set(setup["package-dir"]) == found


@pytest.mark.slow
def test_wheel_holds_spaces_and_genotypes(tmp_path):
    import shutil
    import subprocess
    import sys

    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("ftnas", "search_spaces", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    zipfile.ZipFile(next(source.glob("*.whl"))).extractall(site)
    code = (
        "from ftnas.space.space import space_names; from ftnas.space.genotype import genotype_names; import ftnas; "
        "print(ftnas.__file__); print(*space_names()); print(*genotype_names())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, check=True, capture_output=True
    )
    where, spaces, nets = done.stdout.decode().splitlines()
    assert where.startswith(str(site))
    assert spaces.split() == space_names() and nets.split() == genotype_names()
