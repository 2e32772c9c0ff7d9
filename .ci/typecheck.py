"""mypy over the whole package, and proof that it was the whole: `python .ci/typecheck.py`.

`models/`, `cli/` and `bench/` are `edgekv.models`, `edgekv.cli` and `edgekv.bench` once installed.
mypy knows nothing of that mapping, so it gets a tree of links that looks like the installed
package. It silently skips what it does not find: the number of files it checked must be ours.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".types" / "edgekv"
MAPPED = ("models", "cli", "bench")


def build_tree() -> int:
    """Link every source file's place in the installed package; return how many files there are."""
    shutil.rmtree(TREE.parent, ignore_errors=True)
    TREE.mkdir(parents=True)
    parts = [p for p in (ROOT / "edgekv").iterdir() if p.name != "__pycache__"]
    parts += [ROOT / name for name in MAPPED]
    for part in parts:
        (TREE / part.name).symlink_to(part, target_is_directory=part.is_dir())
    return sum(1 if part.suffix == ".py" else len([*part.rglob("*.py")]) for part in parts)


def main() -> int:
    """Exit code: mypy's, or 1 when it did not see all files."""
    num_files = build_tree()
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "-p", "edgekv"], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    print(done.stdout, end="")
    checked = re.search(r"(?:in|checked) (\d+) source files?", done.stdout)
    if checked is None or int(checked[1]) != num_files:
        print(f"error: mypy did not check all {num_files} files of the package", file=sys.stderr)
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
