"""Many callers at once: threads and an asyncio loop share a runtime and do not disturb anybody."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, sampling

from edgekv.engine.inbox import Call
from edgekv.engine.runner import Runner
from edgekv.errors import RuntimeClosed, SessionBusy

NUM_CALLERS = 8


def text_of(session, seed):
    params = sampling(24, temperature=0.8, seed=seed, top_p=0.95)
    return session.respond(f"Question {seed}", sampling=params).text


@pytest.mark.slow
def test_threads_and_a_loop_get_what_they_would_get_alone(app):
    alone = [text_of(app.session(), seed) for seed in range(2 * NUM_CALLERS)]

    async def ask(seed):
        params = sampling(24, temperature=0.8, seed=seed, top_p=0.95)
        return (await app.session().arespond(f"Question {seed}", sampling=params)).text

    async def ask_all():
        return await asyncio.gather(*map(ask, range(NUM_CALLERS)))

    with ThreadPoolExecutor(NUM_CALLERS + 1) as pool:
        loop = pool.submit(asyncio.run, ask_all())
        threads = [
            pool.submit(text_of, app.session(), seed)
            for seed in range(NUM_CALLERS, 2 * NUM_CALLERS)
        ]
        together = loop.result() + [future.result() for future in threads]
    assert together == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.7, "seed": 12, "top_k": 20, "min_p": 0.02},
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 13, "repetition_penalty": 1.2, "top_p": 0.8},
    ],
)
def test_the_same_seed_gives_the_same_text_whatever_else_runs(app, options):
    prompt, params = random_ids(50), sampling(40, **options)
    alone = answer(app.session(), prompt, params).token_ids
    others = [
        app.session().submit_ids(random_ids(20 * i + 5, seed=i), sampling(60, temperature=1.0))
        for i in range(5)
    ]
    together = answer(app.session(), prompt, params).token_ids
    for stream in others:
        stream.close()
    assert together == alone


def test_an_asyncio_loop_goes_on_while_a_long_prompt_is_encoded_and_computed(app):
    async def main():
        beats, done = 0, asyncio.Event()

        async def ask():
            await app.session().arespond("word " * 180, sampling=sampling(20))
            done.set()

        task = asyncio.create_task(ask())
        while not done.is_set():
            await asyncio.sleep(0)
            beats += 1
        await task
        return beats

    assert asyncio.run(main()) > 50


@pytest.mark.slow
def test_one_session_hit_by_many_threads_answers_one_at_a_time(app):
    session, outcomes, start = app.session(), [], threading.Barrier(NUM_CALLERS)

    def call():
        start.wait()
        try:
            session.respond("Hi", sampling=sampling(10))
        except SessionBusy:
            outcomes.append("busy")
        else:
            outcomes.append("answered")

    threads = [threading.Thread(target=call) for _ in range(NUM_CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == NUM_CALLERS
    assert outcomes.count("answered") * 2 == len(session.messages) >= 2


@pytest.mark.slow
def test_opening_closing_and_asking_from_everywhere_leaves_nothing_behind(runtime, app):
    """Names are few, so threads meet on sessions that others are closing."""

    def caller(seed):
        chance = random.Random(seed)
        for _ in range(12):
            session = app.session(chance.choice("abc"))
            try:
                with session.stream("Hi", sampling=sampling(12)) as stream:
                    for _ in range(chance.randrange(8)):
                        stream.wait()
                if chance.random() < 0.5:
                    session.close()
            except (SessionBusy, RuntimeClosed):
                pass

    with ThreadPoolExecutor(NUM_CALLERS) as pool:
        list(pool.map(caller, range(NUM_CALLERS)))
    runtime.check_integrity()
    assert not runtime._engine.inbox.num_unfinished
    assert app.session("z").respond("Hi", sampling=sampling(3)).text


def test_prefill_progress_can_be_watched_from_another_thread(app):
    stream = app.session().submit_ids(random_ids(800), sampling(3))
    seen, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            seen.append(stream.prefill_progress)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in stream:
        pass
    stop.set()
    watcher.join()
    assert stream.prefill_progress == (800, 800)
    assert seen == sorted(seen)


def test_a_question_with_every_step_keeps_no_step_from_running(runtime, app, monkeypatch):
    prepare, asked = Runner.prepare, []

    def prepare_and_ask(self, *arguments):
        runtime._engine.inbox.post(Call(lambda: asked.append(1)))
        return prepare(self, *arguments)

    monkeypatch.setattr(Runner, "prepare", prepare_and_ask)
    reply = app.session().respond("Hi", sampling=sampling(10), timeout_s=300)
    assert len(reply.token_ids) == 10
    assert len(asked) >= 10


def test_questions_that_ask_questions_end(runtime, app, monkeypatch):
    """Each answer posts the next question, so the inbox is never empty."""
    inbox = runtime._engine.inbox
    stop = threading.Event()

    def ask_again():
        if not stop.is_set():
            inbox.post(Call(ask_again))

    ask_again()
    try:
        reply = app.session().respond("Hi", sampling=sampling(10), timeout_s=300)
    finally:
        stop.set()
    assert len(reply.token_ids) == 10
