"""The wheel, installed into an environment of its own and used from elsewhere."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import edgekv

ROOT = Path(__file__).parents[2]
FOLDERS = {"edgekv": "edgekv", "models": "edgekv/models", "cli": "edgekv/cli"} | {
    "bench": "edgekv/bench"
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside the sources and reuses what it finds there."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh interpreter with the wheel; its dependencies are borrowed from this one."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    options = ["--no-deps", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True, cwd=home)
    # Behind the environment's own packages, and its .pth files are not followed: the edgekv of
    # this environment, editable or not, cannot be taken for the wheel's.
    [site] = home.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(cwd: Path, *command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def packaged_files() -> list[str]:
    """Every source file, predictor and text, by its name in the wheel."""
    return sorted(
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in FOLDERS.items()
        for pattern in ("*.py", "*.txt", "shipped/*.safetensors", "page/*")
        for path in (ROOT / folder).rglob(pattern)
    )


def test_the_wheel_holds_one_package_with_all_its_files(wheel: Path) -> None:
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert sorted(names) == sorted([*packaged_files(), "edgekv/py.typed"])


def test_the_command_runs_from_another_directory(python: Path, tmp_path: Path) -> None:
    edgekv_command = python.parent / "edgekv"
    assert run(tmp_path, edgekv_command, "--version") == f"edgekv {edgekv.__version__}\n"
    assert "chat" in run(tmp_path, edgekv_command, "--help")


def test_every_module_imports_from_the_wheel(python: Path, tmp_path: Path) -> None:
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in packaged_files()
        if name.endswith(".py") and not name.endswith("__main__.py")
    ]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(sys.prefix), module.__file__\n"
        "    print(name)\n"
    )
    assert run(tmp_path, python, "-W", "error", "-c", code, *modules).split() == modules
