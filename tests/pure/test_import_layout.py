"""The layers of the design, read from the import statements: nobody imports upwards."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each line imports only from lines above it.
LAYERS = [
    {"edgekv.errors", "edgekv.config", "edgekv.device", "edgekv.clock", "edgekv.ids"}
    | {"edgekv.metrics", "edgekv.pressure", "edgekv.process"},
    {"edgekv.tokenizer"},
    {"edgekv.chat"},
    {"edgekv.store"},
    {"edgekv.ranks"},
    {"edgekv.kv"},
    {"edgekv.models"},
    {"edgekv.predict"},
    {"edgekv.sched"},
    {"edgekv.engine"},
    {"edgekv.runtime"},
    {"edgekv.server"},
    {"edgekv.client"},
    {"edgekv.bench"},
    {"edgekv.cli"},
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# The front door: it hands out names of `edgekv.runtime`, so importing it for them counts as such.
FRONT = "edgekv"
FRONT_RANK = RANKS["edgekv.runtime"]
FRONT_LIGHT = {"__version__"}

MAPPED = {"models": "edgekv.models", "cli": "edgekv.cli", "bench": "edgekv.bench"}


@functools.cache
def modules() -> dict[str, Path]:
    """Module name → file, of the package as it is when installed."""
    found = {}
    for folder, package in {"edgekv": "edgekv", **MAPPED}.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT / folder).with_suffix("").parts)
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join([package, *parts])] = path
    return found


@functools.cache
def all_modules() -> dict[str, Path]:
    """Also the modules that tests share, which they import by their bare names."""
    return modules() | {path.stem: path for path in (ROOT / "tests" / "support").glob("*.py")}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree: ast.AST) -> list[str]:
    """Dotted names of all import statements below `tree`, those inside functions included."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def import_time_names(tree: ast.Module) -> list[str]:
    """Dotted names that are imported as soon as the module is."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Try | ast.With):
            names += imported_names(node)
    return names


def rank_of(name: str) -> int | None:
    """The layer that a dotted name of ours belongs to; None for other people's modules."""
    if name != FRONT and not name.startswith(FRONT + "."):
        return None
    for layer, rank in RANKS.items():
        if name == layer or name.startswith(layer + "."):
            return rank
    return -1 if name.removeprefix("edgekv.") in FRONT_LIGHT else FRONT_RANK


def test_every_module_has_a_place_in_the_layers():
    places = {
        name: {layer for layer in RANKS if name == layer or name.startswith(layer + ".")}
        for name in modules()
        if name != FRONT
    }
    assert [name for name, layers in places.items() if not layers] == []
    assert set().union(*places.values()) == {*RANKS}, "a layer without modules"


@pytest.mark.parametrize("name", sorted(set(modules()) - {FRONT}))
def test_a_module_imports_only_from_its_own_layer_and_those_above(name):
    own = rank_of(name)
    upwards = [n for n in imported_names(parsed(modules()[name])) if (rank_of(n) or 0) > own]
    assert upwards == []


def test_what_runs_a_predictor_does_not_import_what_fits_one():
    fit, lab = "edgekv.predict.fit", ("edgekv.bench", "edgekv.cli", "edgekv.predict.fit")
    found = [
        (name, imported)
        for name, path in modules().items()
        if not name.startswith(lab)
        for imported in imported_names(parsed(path))
        if imported.startswith(fit)
    ]
    assert found == []


def test_the_front_door_imports_only_values_when_it_opens():
    names = import_time_names(parsed(modules()[FRONT]))
    assert {rank_of(name) for name in names} <= {None, 0}


def test_the_layers_are_seen_as_they_are():
    assert rank_of("edgekv.kv.pool.KVPool") == RANKS["edgekv.kv"]
    assert rank_of("edgekv.errors") == rank_of("edgekv.device.profile") == 0
    assert rank_of("edgekv.Runtime") == rank_of("edgekv") == FRONT_RANK
    assert rank_of("edgekv.__version__") == -1
    assert rank_of("edgekvx") is rank_of("numpy") is None
    tree = ast.parse("def f():\n    from edgekv.cli import main\n    import edgekv.sched.plan")
    assert imported_names(tree) == ["edgekv.cli.main", "edgekv.sched.plan"]
    assert import_time_names(tree) == []


# --- where MLX must not be ---


def with_parents(name: str) -> list[str]:
    """`a.b.c` → a, a.b, a.b.c: importing a module imports the packages around it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def path_to_mlx(tree: ast.Module) -> list[str]:
    """A chain of imports from a source file to MLX, or an empty list.

    The file's own imports inside functions count; of what it imports, only those that run at once.
    """
    queue = [[part] for name in imported_names(tree) for part in with_parents(name)]
    seen = set()
    while queue:
        chain = queue.pop(0)
        if chain[-1] == "mlx":
            return chain
        if chain[-1] in seen or chain[-1] not in all_modules():
            continue
        seen.add(chain[-1])
        names = import_time_names(parsed(all_modules()[chain[-1]]))
        queue += [[*chain, part] for name in names for part in with_parents(name)]
    return []


@pytest.mark.parametrize(
    "path",
    [
        *(ROOT / "tests" / "pure").glob("*.py"),
        *(ROOT / "edgekv" / "sched").rglob("*.py"),
        *(ROOT / "edgekv" / "store").rglob("*.py"),
        *(ROOT / "edgekv" / "client").rglob("*.py"),
        ROOT / "edgekv" / "pressure.py",
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_pure_code_never_comes_near_mlx(path):
    assert path_to_mlx(parsed(path)) == []


def test_a_path_to_mlx_is_found():
    assert path_to_mlx(ast.parse("import mlx.core as mx")) == ["mlx"]
    assert path_to_mlx(ast.parse("def f():\n    import edgekv.kv.pool")) == [
        "edgekv.kv.pool",
        "mlx",
    ]
    assert path_to_mlx(ast.parse("import tiny_models")) == ["tiny_models", "mlx"]
    assert path_to_mlx(ast.parse("from edgekv.device import profile")) == []


@pytest.mark.slow
def test_the_scheduler_and_the_store_run_without_mlx():
    code = (
        "import sys, edgekv.sched.scheduler, edgekv.sched.memory, edgekv.sched.cost\n"
        "import edgekv.store.store, edgekv.store.disk_io\n"
        "assert not {name for name in sys.modules if name.split('.')[0] == 'mlx'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- one place each ---


QUESTIONS = {"mx.metal.is_available", "mx.default_device", "mx.device_info", "os.uname"} | {
    *("mx.cuda.is_available", "mx.is_available"),
    *("sys.platform", "platform.system", "platform.machine", "platform.processor"),
    *("platform.platform", "platform.uname", "platform.mac_ver"),
}


def device_questions(tree: ast.AST) -> list[str]:
    """Expressions that ask which device or system this is."""
    attributes = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    compared = {
        ast.unparse(side)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
    }
    return sorted((attributes & QUESTIONS) | (compared & {"mx.gpu", "mx.cpu"}))


@pytest.mark.parametrize("name", sorted(set(modules()) - {"edgekv.device"}))
def test_only_the_device_module_asks_where_it_runs(name):
    tree = parsed(modules()[name])
    assert device_questions(tree) == []
    assert not {"sys.platform", "mlx.core.metal"} & set(imported_names(tree))


def test_questions_about_the_device_are_seen():
    asked = "mx.metal.is_available(); mx.default_device().type == mx.gpu; sys.platform == 'linux'"
    assert device_questions(ast.parse(asked)) == [
        "mx.default_device",
        "mx.gpu",
        "mx.metal.is_available",
        "sys.platform",
    ]
    assert device_questions(ast.parse("mx.new_stream(mx.cpu)")) == []
    assert device_questions(parsed(modules()["edgekv.device"]))


def test_nobody_imports_a_mapped_folder_by_its_bare_name():
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py")]
    bare = [
        (str(path.relative_to(ROOT)), name)
        for path in files
        for name in imported_names(parsed(path))
        if name.split(".")[0] in MAPPED
    ]
    assert bare == []
