"""pyproject.toml against the tree: what it forgets works in an editable install only."""

import tomllib
from pathlib import Path

import edgekv

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = {"edgekv": "edgekv", "models": "edgekv.models", "cli": "edgekv.cli"} | {
    "bench": "edgekv.bench"
}


def packages_in_the_tree() -> list[str]:
    return sorted(
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    )


def test_all_packages_are_listed_and_no_others():
    assert sorted(SETUPTOOLS["packages"]) == packages_in_the_tree()


def test_every_source_file_is_in_a_package():
    strays = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    ]
    assert strays == []


def test_the_folders_are_mapped_and_not_shadowed():
    assert SETUPTOOLS["package-dir"] == {package: folder for folder, package in FOLDERS.items()}
    for name in FOLDERS:
        assert not (ROOT / "edgekv" / name).exists(), "it would hide the mapped folder"


def test_types_are_published():
    assert (ROOT / "edgekv" / "py.typed").is_file()
    assert SETUPTOOLS["package-data"]["edgekv"] == ["py.typed"]


def test_predictors_are_in_the_wheel():
    assert SETUPTOOLS["package-data"]["edgekv.predict"] == ["shipped/*.safetensors"]
    assert list((ROOT / "edgekv" / "predict" / "shipped").glob("*.safetensors"))


def test_the_page_is_in_the_wheel():
    assert SETUPTOOLS["package-data"]["edgekv.server"] == ["page/*"]
    assert (ROOT / "edgekv" / "server" / "page" / "page.html").is_file()


def test_there_is_one_version():
    assert PYPROJECT["project"]["version"] == edgekv.__version__


def test_the_command_is_declared():
    assert PYPROJECT["project"]["scripts"] == {"edgekv": "edgekv.cli.main:main"}


def test_all_public_names_can_be_had():
    for name in edgekv.__all__:
        if name not in {"App", "Reply", "Runtime", "Session"}:  # these load MLX
            assert getattr(edgekv, name) is not None
    assert set(dir(edgekv)) == set(edgekv.__all__)
