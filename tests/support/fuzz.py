"""Fuzzers: tests over random examples, a few fixed ones in every run, or as many as time allows.

    EDGEKV_FUZZ_SECONDS=600 pytest -s -n0 tests/pure/test_x.py      # each fuzzer for ten minutes
    EDGEKV_FUZZ_SEED=7 EDGEKV_FUZZ_SECONDS=1 pytest -s -n0 ...      # from this seed on

A finding names its seed; a run without one prints the seed to go on with. With hypothesis:

    @fuzz(examples=100, text=st.text())
    def test_it(text, a_fixture): ...

and without, where a test makes its own random numbers: `for_each_seed(play)`.
"""

import functools
import inspect
import os
import random
from collections.abc import Callable
from time import monotonic
from typing import Any

import hypothesis


def for_each_seed(run: Callable[[int], None], *, name: str = "") -> None:
    """Call `run` with seed 0; for EDGEKV_FUZZ_SECONDS with one seed after the other."""
    seconds = float(os.environ.get("EDGEKV_FUZZ_SECONDS") or 0)
    seed = first = int(os.environ.get("EDGEKV_FUZZ_SEED") or (_random_seed() if seconds else 0))
    end_s = monotonic() + seconds
    while True:
        try:
            run(seed)
        except BaseException as error:
            error.add_note(f"found with EDGEKV_FUZZ_SEED={seed}")
            raise
        seed += 1
        if monotonic() >= end_s:
            break
    if seconds:
        print(  # noqa: T201 - what a person must know to go on
            f"\n{name}: seeds {first} to {seed - 1}; go on with EDGEKV_FUZZ_SEED={seed}"
        )


def fuzz(*, examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """Run a test over `strategies`, by their names; its other parameters are fixtures.

    `examples` are those of one seed. A fixture is the same for all of them.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def all_seeds(*itself: Any, **fixtures: Any) -> None:  # a method's self
            def one_seed(seed: int) -> None:
                def example(**drawn: Any) -> None:
                    test(*itself, **drawn, **fixtures)

                random_examples = hypothesis.settings(
                    max_examples=examples,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(hypothesis.HealthCheck),
                )(hypothesis.given(**strategies)(example))
                hypothesis.seed(seed)(random_examples)()

            for_each_seed(one_seed, name=test.__name__)

        signature = inspect.signature(test)
        fixtures = [each for name, each in signature.parameters.items() if name not in strategies]
        all_seeds.__signature__ = signature.replace(parameters=fixtures)  # type: ignore[attr-defined]
        return all_seeds

    return decorate


def _random_seed() -> int:
    return random.SystemRandom().randrange(1 << 32)
