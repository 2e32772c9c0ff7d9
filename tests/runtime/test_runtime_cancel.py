"""Taking a request back: it ends soon, keeps what there was, and the session goes on."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_models import random_ids
from tiny_runtime import answer, assert_same, eventually, greedy_by_hand, sampling

from edgekv.errors import RequestCancelled, RequestTimeout, RuntimeClosed

ENDLESS = sampling(900)


def assert_cancelled(session, num_tokens_min=1):
    reply = session.last_reply
    assert reply.finish_reason == "cancelled"
    assert num_tokens_min <= len(reply.token_ids) < 900
    if not reply.token_ids:  # taken back before its first token: the turn was not made
        assert session.messages == []
        return
    assert [m.role for m in session.messages] == ["user", "assistant"]
    assert session.messages[-1].content == reply.text


def test_leaving_the_loop_and_closing_keeps_the_partial_answer(app):
    session = app.session()
    with session.stream("Tell me", sampling=ENDLESS) as stream:
        for i, _ in enumerate(stream):
            if i == 5:
                break
    assert stream.done
    assert stream.reply is session.last_reply
    assert_cancelled(session, num_tokens_min=6)


@pytest.mark.parametrize("how", ["respond", "arespond"])
@pytest.mark.parametrize("what", ["session", "app", "name"])
def test_who_waits_for_a_whole_answer_is_told_that_another_thread_has_closed_it(
    runtime, request, what, how
):
    app = runtime.app(request.node.name)
    session = app.session("inbox")
    close = {"session": session.close, "app": app.close, "name": lambda: app.remove("inbox")}[what]

    def close_meanwhile():
        eventually(lambda: session._running is not None and session._running.text)
        close()

    async def arespond():
        waiting = asyncio.ensure_future(session.arespond("Tell me", sampling=ENDLESS))
        await asyncio.to_thread(close_meanwhile)
        return await waiting

    def respond():
        thread = threading.Thread(target=close_meanwhile)
        thread.start()
        try:
            return session.respond("Tell me", sampling=ENDLESS)
        finally:
            thread.join()

    with pytest.raises(RuntimeClosed, match="'inbox' was closed") as caught:
        respond() if how == "respond" else asyncio.run(arespond())
    assert caught.value.hint
    assert_cancelled(session)


def test_who_warms_a_session_is_told_that_another_thread_has_closed_it(app):
    session = app.session()
    resume = app._runtime._engine.rest(60.0)  # so that it is closed before it is done
    with ThreadPoolExecutor(2) as pool:
        try:
            warming = pool.submit(session.prewarm, "Tell me")
            eventually(lambda: session._running is not None)
            pool.submit(session.close)
            eventually(lambda: session._running.taken_back)
        finally:
            resume()
        with pytest.raises(RuntimeClosed, match="was closed"):
            warming.result()


def test_closing_twice_or_after_the_end_is_nothing(app):
    session = app.session()
    stream = session.stream("Tell me", sampling=sampling(3))
    text = "".join(delta.text for delta in stream)
    stream.close()
    stream.close()
    assert (stream.reply.text, stream.reply.finish_reason) == (text, "length")
    assert list(stream) == []


def test_an_interrupt_while_the_end_is_taken_in_leaves_a_stream_that_closes(app, monkeypatch):
    session = app.session()
    stream = session.stream("Tell me", sampling=sampling(3))
    record, interrupts = stream._running._record, [KeyboardInterrupt()]

    def interrupted(reply):
        if interrupts:
            raise interrupts.pop()
        record(reply)

    monkeypatch.setattr(stream._running, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt), stream:
        list(stream)
    assert stream.reply is session.last_reply
    assert session.respond("Again", sampling=sampling(2)).finish_reason == "length"


def test_a_stream_that_is_dropped_is_cancelled(runtime, app):
    session = app.session()
    stream = session.stream("Tell me", sampling=ENDLESS)
    next(stream)
    del stream
    gc.collect()
    eventually(lambda: not runtime._engine.inbox.num_unfinished)
    assert session.respond("Again", sampling=sampling(2)).finish_reason == "length"


def test_kv_stays_valid_after_a_cancellation(runtime, app):
    session = app.session()
    with session.stream("Tell me", sampling=ENDLESS) as stream:
        for _ in range(5):
            next(stream)
    cancelled = session.last_reply
    follow = session.respond("And then?", sampling=sampling(12))
    # All of the cancelled turn is cached but perhaps its last token, which no step computed.
    spoken = cancelled.stats.num_prompt_tokens + len(cancelled.token_ids)
    assert follow.stats.num_cached_tokens >= spoken - 1
    [*prompt] = prompt_of(session, cancelled, runtime)
    assert_same(runtime, prompt, follow.token_ids, greedy_by_hand(runtime, prompt, 12))


def prompt_of(session, cancelled, runtime):
    """The tokens that the second turn must have seen: the first as it was, then the new text."""
    first = runtime.tokenizer.encode(
        "<|im_start|>user\nTell me<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
    )
    second = runtime.tokenizer.encode(
        "<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n",
        add_special_tokens=False,
    )
    assert cancelled.stats.num_prompt_tokens == len(first)
    return [*first, *cancelled.token_ids, *second]


def test_cancelling_a_prefill_leaves_an_empty_answer(open_runtime):
    runtime = open_runtime(tbt_target_ms=1.0)
    # Somebody who decodes keeps the prefill's chunks small, so that it lasts.
    with runtime.app().session().stream("Hi", sampling=ENDLESS) as other:
        next(other)
        session = runtime.app().session()
        stream = session.submit_ids(random_ids(300), sampling(5))
        eventually(lambda: stream.prefill_progress[0] > 0)
        stream.close()
        done, total = stream.prefill_progress
        assert 0 < done < total == 300
        assert stream.reply.token_ids == ()
        assert stream.reply.finish_reason == "cancelled"
        assert stream.reply.stats.ttft_ms is None
        again = answer(session, random_ids(300), sampling(5))
        assert again.stats.num_cached_tokens >= done
    prompt = random_ids(300)
    assert_same(runtime, prompt, again.token_ids, greedy_by_hand(runtime, prompt, 5))


def test_a_turn_taken_back_before_its_first_token_was_not_made(open_runtime):
    runtime = open_runtime(tbt_target_ms=1.0)
    with runtime.app().session().stream("Hi", sampling=ENDLESS) as other:
        next(other)
        session = runtime.app().session()
        stream = session.stream("word " * 150, sampling=ENDLESS)
        eventually(lambda: stream.prefill_progress[0] > 0)
        stream.close()
    assert session.last_reply.finish_reason == "cancelled"
    assert session.last_reply.token_ids == ()
    assert session.messages == []


def test_a_timeout_ends_the_request(app):
    session = app.session()
    with pytest.raises(RequestTimeout) as caught:
        session.respond("Tell me", sampling=ENDLESS, timeout_s=0.05)
    assert isinstance(caught.value, RequestCancelled)
    assert caught.value.hint
    assert_cancelled(session, num_tokens_min=0)
    assert session.respond("Again", sampling=sampling(2), timeout_s=300).finish_reason == "length"


def test_a_streams_timeout_counts_from_its_start(app):
    session = app.session()
    stream = session.stream("Tell me", sampling=ENDLESS, timeout_s=0.05)
    with pytest.raises(RequestTimeout):
        for _ in stream:
            pass
    assert stream.done
    assert_cancelled(session, num_tokens_min=0)


def test_wait_returns_without_a_delta_when_its_time_is_over(app):
    with app.session().stream("Tell me", sampling=ENDLESS) as stream:
        stream.wait()
        threading.Event().wait(0.02)
        while stream.wait(0) is not None:
            pass
        assert not stream.done


# --- asyncio ---


def test_cancelling_a_task_cancels_the_request(runtime, app):
    session = app.session()

    async def main():
        task = asyncio.create_task(session.arespond("Tell me", sampling=ENDLESS))
        while not runtime._engine.inbox.num_unfinished:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert not runtime._engine.inbox.num_unfinished
    assert_cancelled(session, num_tokens_min=0)


def test_cancelling_a_task_while_it_submits_cancels_what_it_submitted(runtime, app, monkeypatch):
    session, submitted = app.session(), []
    submit = runtime._engine.submit

    def spy(request):
        submit(request)
        submitted.append(request)

    monkeypatch.setattr(runtime._engine, "submit", spy)

    async def main():
        for _ in range(20):
            task = asyncio.create_task(session.arespond("Tell me", sampling=ENDLESS))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    eventually(lambda: not runtime._engine.inbox.num_unfinished)
    assert {request.finish_reason for request in submitted} <= {"cancelled"}
    assert session.respond("Again", sampling=sampling(2)).finish_reason == "length"


def test_who_asks_again_after_an_async_timeout_is_not_told_that_the_session_is_busy(app):
    session = app.session()

    async def main():
        for _ in range(20):
            with pytest.raises(RequestTimeout):
                await session.arespond("Tell me", sampling=ENDLESS, timeout_s=0.0)
            assert (await session.arespond("Hi", sampling=sampling(1))).finish_reason == "length"

    asyncio.run(main())


def test_an_async_timeout_ends_the_request(app):
    session = app.session()
    with pytest.raises(RequestTimeout):
        asyncio.run(session.arespond("Tell me", sampling=ENDLESS, timeout_s=0.2))
    if session.last_reply is not None:  # else the time was over before it was even submitted
        assert_cancelled(session, num_tokens_min=0)
    assert session.respond("Again", sampling=sampling(2)).finish_reason == "length"


def test_leaving_an_async_stream_cancels_it(app):
    session = app.session()

    async def main():
        async with await session.astream("Tell me", sampling=ENDLESS) as stream:
            async for _ in stream:
                break
        assert stream.done

    asyncio.run(main())
    assert_cancelled(session)


def test_the_sync_stream_of_another_session_is_not_touched(app):
    expected = app.session().respond("Tell me", sampling=sampling(60)).text
    with app.session().stream("Tell me", sampling=sampling(60)) as stream:
        text = next(stream).text
        for _ in range(3):
            with app.session().stream("Noise", sampling=ENDLESS) as noise:
                next(noise)
        text += "".join(delta.text for delta in stream)
    assert text == expected


def test_who_asks_again_after_a_task_was_cancelled_twice_is_not_told_that_the_session_is_busy(app):
    session = app.session()

    async def main():
        for pause_s in (0.0, 0.0, 0.001, 0.01, 0.05, 0.1) * 3:
            task = asyncio.create_task(session.arespond("Tell me", sampling=ENDLESS))
            await asyncio.sleep(pause_s)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await session.arespond("Hi", sampling=sampling(1))).finish_reason == "length"

    asyncio.run(main())


def test_a_request_that_was_taken_back_by_whoever_waits_no_more_keeps_no_session_busy(app):
    session = app.session()
    stream = session.stream("Tell me", sampling=ENDLESS)
    next(stream)
    stream._running.take_back()  # as an asyncio task does that is gone before the engine says so
    assert session.respond("Hi", sampling=sampling(1)).finish_reason == "length"
    assert stream.reply.finish_reason == "cancelled"


def test_who_closes_a_stream_beside_its_reader_mixes_nothing_up(app):
    whole = app.session().respond("Tell me", sampling=sampling(300)).token_ids
    for _ in range(10):
        stream, read = app.session().stream("Tell me", sampling=ENDLESS), []
        reader = threading.Thread(
            target=lambda stream=stream, read=read: read.extend(d.token_ids for d in stream)
        )
        reader.start()
        eventually(lambda read=read: len(read) > 3)
        closers = [threading.Thread(target=stream.close) for _ in range(3)]
        for thread in closers:
            thread.start()
        for thread in (*closers, reader):
            thread.join()
        tokens = stream.reply.token_ids
        assert tokens[:300] == whole[: len(tokens)]


def test_a_stream_can_be_read_in_another_loop_than_it_began_in(app):
    session = app.session()
    stream = asyncio.run(session.astream("Tell me", sampling=sampling(60)))

    async def read(num_deltas):
        deltas = []
        async for delta in stream:
            deltas.append(delta)
            if len(deltas) == num_deltas:
                break
        return deltas

    tokens = [t for n in (1, 2, 900) for d in asyncio.run(read(n)) for t in d.token_ids]
    assert len(tokens) == 60
