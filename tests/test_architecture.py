"""The map in docs/architecture.md is true: every file has a rank, and imports go to strictly lower ranks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ftnas"
ROW = re.compile(r"^\| (\d+) \| `([a-z_]+)(?:\.py|/)` \|", re.MULTILINE)
RANKS = {name: int(rank) for rank, name in ROW.findall((ROOT / "docs" / "architecture.md").read_text())}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Yield (module below ftnas, is at the top level of the file) for every import of ours."""
    tree = ast.parse(path.read_text())
    top = set(tree.body)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ftnas":
            below = node.module.removeprefix("ftnas").removeprefix(".")
            names = [below] if below else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.removeprefix("ftnas.") for a in node.names if a.name.startswith("ftnas.")]
        for name in names:
            yield name, node in top


def test_every_file_has_a_place_on_the_map():
    assert {room(path) for path in FILES} == set(RANKS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_to_lower_ranks(path):
    own = room(path)
    for name, _ in imports(path):
        other = name.split(".")[0]
        if other == own or other not in RANKS:
            continue  # within a folder: see the test on cycles; __version__ and the like are in no room
        assert RANKS[other] < RANKS[own], f"{own} (rank {RANKS[own]}) imports {other} (rank {RANKS[other]})"


@pytest.mark.parametrize("folder", ["faults", "space", "controllers"])
def test_no_cycles_inside_a_folder(folder):
    edges = {
        path.stem: {name.split(".")[1] for name, _ in imports(path) if name.startswith(f"{folder}.")}
        for path in (PACKAGE / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    while edges:
        leaves = {name for name, below in edges.items() if not below & edges.keys()}
        assert leaves, f"cycle among {sorted(edges)}"
        edges = {name: below for name, below in edges.items() if name not in leaves}


def test_only_the_command_line_imports_inside_functions():
    late = {path.name for path in FILES for _, at_top in imports(path) if not at_top}
    assert late <= {"cli.py"}


def test_matplotlib_has_three_users():
    users = {path.name for path in FILES if re.search(r"^\s*(from|import) matplotlib", path.read_text(), re.MULTILINE)}
    assert users == {"plots.py", "heatmaps.py", "charts.py"}


def test_no_file_is_too_long():
    long = {str(path.relative_to(PACKAGE)) for path in FILES if len(path.read_text().splitlines()) > 400}
    assert not long
