"""No benchmark opens the user's own store."""

import pytest

from edgekv.bench.selftest.checks import plan_checks
from edgekv.cli.main import main
from edgekv.device import profile
from edgekv.runtime import Runtime

pytestmark = pytest.mark.slow


@pytest.fixture
def own_store(tmp_path, monkeypatch):
    """Where the user's own would be; nothing may be there."""
    monkeypatch.setenv("EDGEKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EDGEKV_KV_DIR", str(tmp_path / "own"))
    return tmp_path / "own"


SHORT = {
    "ttft": "--prompt-tokens 16 --reps 1",
    "ttft --prefill predict": "--prompt-tokens 200 --reps 1",
    "decode": "--sessions 2 --prompt-tokens 16 --new-tokens 4 --reps 1",
    "quality": "--context 200 --continuation 16 --samples 1 --window 8",
    "quality --chat": "--context 200 --samples 1",
    "repair": "--prompt-tokens 100 --new-tokens 20 --reps 1",
    "restore": "--tokens 128 --reps 1",
    "switch": "--minutes 0.05 --policy recompute,reuse",
    "switch --arrivals-per-s 9": "--sessions 3 --session-tokens 64 --think-scale 0 --policy async",
    "fairness": "--seconds 0.2 --policy fair",
    "disturb": "--reps 1 --new-tokens 30 --evaluated-tokens 50 --waiting 20",
}
PREDICTED = ("ttft --prefill predict", "quality", "quality --chat", "repair")


@pytest.mark.parametrize("bench", SHORT)
def test_a_bench_leaves_the_users_store_alone(bench, deep, predictors, own_store, capsys):
    arguments = [*bench.split(), "-m", str(deep), *SHORT[bench].split()]
    if bench in PREDICTED:
        arguments += ["--predictor", predictors["self"]]
    code = main(["bench", *arguments])
    said = capsys.readouterr()
    assert code == 0 or bench == "disturb", said.err  # how long a gap is depends on the machine
    assert said.out
    assert not own_store.exists()


def test_the_self_test_leaves_the_users_store_alone(own_store, tmp_path):
    checks = dict(plan_checks(profile(), tmp_path, None))
    assert checks["decode step"]().status == "pass"
    assert not own_store.exists()


def test_who_says_nothing_opens_the_users_store(deep, own_store):
    """That is what the tests above would see."""
    Runtime.open(str(deep)).close()
    assert own_store.exists()
