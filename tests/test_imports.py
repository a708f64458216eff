"""The rule of the house: imports go only to the left and in no circle; tests never import each other."""

import ast
from pathlib import Path

import pytest

from places import ROOT

ROOMS = (
    "leaves",
    "settings",
    "hub",
    "parquet",
    "documents",
    "data",
    "prepare",
    "cuda",
    "cpu",
    "ops",
    "recurrence",
    "model",
    "adapters",
    "formats",
    "optimizers",
    "plan",
    "distributed",
    "evaluate",
    "report",
    "figures",
    "pages",
    "train",
    "commands",
    "entrances",
)
"""From left to right, as docs/architecture.md draws them.  Leaves are the files at the top, but the entrances."""
ENTRANCES = ("infctx", "infctx.__main__")

MOST_FILES, MOST_LINES = 14, 2200


def module_of(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    if module in ENTRANCES:
        return "entrances"
    parts = module.split(".")
    return parts[1] if parts[1] in ROOMS else "leaves"


def imported_by(path, known):
    """Yields our modules that a file imports, anywhere in it: (module, line)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in known:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if name in known else node.module), node.lineno


def arrows_of(root):
    """Yields (file, line, importing module, imported module) of a tree."""
    files = {module_of(path, root): path for path in sorted((root / "infctx").rglob("*.py"))}
    return [
        (path.relative_to(root), line, module, other)
        for module, path in files.items()
        for other, line in imported_by(path, files)
        if other != module
    ]


def wrong_arrows(arrows):
    place = {room: number for number, room in enumerate(ROOMS)}
    return [
        f"{path}:{line}: {module} imports {other}, and {room_of(module)} is left of {room_of(other)}"
        for path, line, module, other in arrows
        if place[room_of(other)] > place[room_of(module)]
    ]


def circles(arrows):
    """Returns modules that import themselves through others, each with the path."""
    graph = {}
    for _, _, module, other in arrows:
        graph.setdefault(module, set()).add(other)
    found, done = [], set()

    def walk(module, way):
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                walk(other, [*way, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return found


def test_imports_go_only_to_the_left():
    arrows = arrows_of(ROOT)
    assert len(arrows) > 200
    assert wrong_arrows(arrows) == []


def test_no_module_imports_itself_by_way_of_others():
    assert circles(arrows_of(ROOT)) == []


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        ("data/lanes", "from infctx.model.rwkv import RWKV", "data is left of model"),
        ("errors", "    import infctx.documents.read", "leaves is left of documents"),
        ("model/rwkv", "from infctx.train import loop", "model is left of train"),
        ("train/loop", "import infctx.__main__", "train is left of entrances"),
        ("cuda/compile", "if True:\n    from infctx.ops import wkv", "cuda is left of ops"),
    ],
)
def test_an_arrow_that_breaks_the_rule_is_named(tmp_path, module, line, said):
    for path in (ROOT / "infctx").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    broken = tmp_path / "infctx" / f"{module}.py"
    text = f"def later():\n{line}\n" if line.startswith(" ") else f"{line}\n"
    broken.write_text(broken.read_text(encoding="utf-8") + text, encoding="utf-8")
    (wrong,) = wrong_arrows(arrows_of(tmp_path))
    assert wrong.startswith(f"infctx/{module}.py:") and wrong.endswith(said)


def test_a_circle_is_named():
    arrows = [(None, 0, *pair) for pair in (("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"))]
    assert circles(arrows) == ["a -> b -> c -> a"]


def test_no_room_is_crowded():
    for folder in [ROOT / "infctx", *(path for path in (ROOT / "infctx").iterdir() if path.name in ROOMS)]:
        files = list(folder.glob("*.py"))
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        assert folder.name == "cuda" or (len(files) <= MOST_FILES and lines <= MOST_LINES), (folder, len(files), lines)


def test_tests_import_what_they_share_and_never_each_other():
    files = sorted((ROOT / "tests").rglob("*.py"))
    names = {path.stem: path for path in files}
    assert len(names) == len(files)  # pytest and processes of ranks know test files only by name
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert not module.split(".")[-1].startswith("test_"), f"{path.relative_to(Path(ROOT))} imports {module}"


def test_every_room_of_the_house_has_its_tests_in_a_folder_of_its_name():
    rooms = {path.name for path in (ROOT / "infctx").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ROOMS) - {"leaves", "entrances"}
    assert rooms <= {path.name for path in (ROOT / "tests").iterdir()}
