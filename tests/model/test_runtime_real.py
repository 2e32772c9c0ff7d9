"""Eight sessions on the default model that join, leave and cancel say what each says alone."""

import random

import pytest
from tiny_runtime import answer, assert_same, sampling

from edgekv.config import RuntimeConfig
from edgekv.runtime import Runtime

pytestmark = [pytest.mark.model, pytest.mark.slow]

NUM_TOKENS = 12
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village at the foot of a mountain, " * 3,
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox jumps over the lazy dog. " * 9,
    "Die Hauptstadt von Deutschland ist",
    "SELECT name, price FROM products WHERE",
)


@pytest.fixture(scope="module")
def runtime():
    with Runtime.open(config=RuntimeConfig(pool_bytes=1 << 28)) as opened:
        yield opened
        opened.check_integrity()


@pytest.fixture(scope="module")
def prompts(runtime):
    return [runtime.tokenizer.encode(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def alone(runtime, prompts):
    """Each answer by itself, in an app that has nothing cached."""
    answers = []
    for i, prompt in enumerate(prompts):
        with runtime.app(f"alone-{i}").session() as session:
            answers.append(answer(session, prompt, sampling(NUM_TOKENS)).token_ids)
    return answers


def test_joining_leaving_and_cancelling_changes_no_answer(runtime, prompts, alone):
    chance = random.Random(0)
    app, waiting, running = runtime.app("together"), list(range(8)) * 2, {}
    while waiting or running:
        if waiting and (len(running) < 3 or chance.random() < 0.3):
            index = waiting.pop(0)
            if index in running:  # its first turn still runs: it is cancelled, and starts anew
                finish(running, index, runtime, prompts, alone, cancel=True)
            session = app.session(f"session-of-{index}")
            running[index] = session.submit_ids(prompts[index], sampling(NUM_TOKENS))
            continue
        index = chance.choice(list(running))
        if running[index].wait() is None:
            finish(running, index, runtime, prompts, alone, cancel=False)
        elif chance.random() < 0.02:
            finish(running, index, runtime, prompts, alone, cancel=True)
    runtime.check_integrity()


def test_a_seed_draws_the_same_whatever_else_runs(runtime, prompts):
    def params(seed):
        return sampling(10, temperature=1.0, top_p=0.95, seed=seed)

    app = runtime.app("seeds")
    alone = [answer(app.session(), prompts[i], params(i)).token_ids for i in range(4)]
    streams = [app.session().submit_ids(prompts[i], params(i)) for i in range(4)]
    others = [app.session().submit_ids(prompts[i], params(None)) for i in range(4, 8)]
    together = [tuple(t for delta in stream for t in delta.token_ids) for stream in streams]
    for stream in others:
        stream.close()
    assert together == alone


def finish(running, index, runtime, prompts, alone, *, cancel):
    """End a stream, at once or when it is done, and compare what it said."""
    stream = running.pop(index)
    if cancel:
        stream.close()
    tokens = stream.reply.token_ids
    assert cancel or len(tokens) == NUM_TOKENS
    assert_same(runtime, prompts[index], tokens, alone[index][: len(tokens)])
