"""The layers: maths -> tuner -> comm -> federation -> edge, no upward import, no cycle."""

import ast
import functools
from graphlib import TopologicalSorter
from pathlib import Path

import fedpara_peft

ROOT = Path(fedpara_peft.__file__).parent
LAYERS = {
    "maths": 0,
    "tuner": 1,
    "comm": 2,
    "federation": 3,
    "testing": 3,
    "integrations": 4,
    "cli": 5,
}


@functools.cache
def modules():
    return {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def own_imports(path, parts):
    """Modules of this package that a file imports, type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    hidden = {id(n) for block in ast.walk(tree) if is_type_checking(block) for n in ast.walk(block)}
    package = parts[:-1]
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base = (*base, *(node.module.split(".") if node.module else ()))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedpara_peft"):
            base = tuple(node.module.split(".")[1:])
        else:
            assert not (
                isinstance(node, ast.Import)
                and any(a.name.startswith("fedpara_peft") for a in node.names)
            ), f"{path} imports the package absolutely"
            continue
        for alias in node.names:
            for target in ((*base, alias.name), base, (*base, "__init__")):
                if target in modules():
                    found.add(target)
                    break
    return found


def test_no_file_imports_from_a_layer_above_it():
    for parts, path in modules().items():
        if parts == ("__init__",):
            continue
        assert parts[0] in LAYERS, f"{path} is in no layer"
        for target in own_imports(path, parts):
            assert target != ("__init__",), f"{path} imports the package root"
            assert LAYERS[target[0]] <= LAYERS[parts[0]], f"{path} imports {'.'.join(target)}"


def test_files_import_each_other_in_no_circle():
    graph = {parts: own_imports(path, parts) - {parts} for parts, path in modules().items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules())


def test_no_import_inside_a_function():
    """All imports are at the top, but for PEFT's registry and what optional extras bring."""
    allowed = {
        ("tuner", "_peft"),
        ("comm", "secure", "primitives"),
        ("federation", "server", "privacy", "mechanism"),
        ("integrations", "figures"),
    }
    for parts, path in modules().items():
        if parts in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                assert not inner, f"{path}: {node.name} imports inside"


def test_a_file_holds_one_thought():
    """No longer than what a reader keeps in mind."""
    for path in modules().values():
        lines = path.read_text().count("\n")
        assert lines <= 350, f"{path} has {lines} lines: part it by thought"


def test_a_folder_is_a_room_and_not_a_corridor():
    """No more files than a newcomer takes in at a look."""
    for folder in {path.parent for path in modules().values()}:
        files = [path for path in folder.iterdir() if path.suffix == ".py"]
        assert len(files) <= 12, f"{folder} has {len(files)} files: give a thought its own room"
