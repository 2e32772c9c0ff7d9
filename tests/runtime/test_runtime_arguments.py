"""Whatever is given to the public API: it works, or a typed error says what is wrong with it.

Never an error from the inside, never the end of the engine, never a wait without end; and nobody
else's answer is another. Fuzzed: see `fuzz`.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from fuzz import fuzz
from hypothesis import strategies as st
from public_methods import ARGUMENTS
from tiny_models import VOCAB_SIZE, random_ids
from tiny_runtime import sampling

from edgekv.chat.values import ChatMessage, Completion, Tool
from edgekv.config import (
    PredictionOptions,
    RuntimeConfig,
    SamplingParams,
    StoreOptions,
    SwapOptions,
)
from edgekv.errors import ConfigError, EdgeKVError, EngineFailed
from edgekv.runtime import App, AsyncReplyStream, ReplyStream, Runtime, Session
from edgekv.runtime.answers import AnswerStream, AsyncAnswerStream
from edgekv.runtime.completions import AsyncCompletionStream, CompletionStream
from edgekv.tokenizer.grammar import Grammar

HANGS_AFTER_S = 300


class Unspeakable:
    """Something whose every special method fails."""

    def __repr__(self):
        raise RuntimeError("no words")

    def __eq__(self, other):
        raise RuntimeError("not comparable")

    def __bool__(self):
        raise RuntimeError("neither")

    __hash__ = None


def endless():
    return itertools.repeat(5)


ODD_VALUES = [
    *(None, True, False, 0, 1, -1, 7, 1 << 31, 1 << 64, -(1 << 70), 10**5000),
    *(0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, float("nan"), float("inf"), -1e400, 1j),
    *("", " ", "x", "\0", "\ud800", "a\nb", "é" * 300, "exact", "background", "../x", "\x1b[0m"),
    *(b"", b"x", b"\xff", bytearray(b"x"), memoryview(b"x"), (), [], {}, set(), [[]], [None]),
    *([1], [1, 2.0], ["x"], ("x", 5), {"x": 1}, {1}, range(3), range(1 << 40), object(), type, len),
    *(np.int64(3), np.uint8(3), np.float32(0.5), np.array(3), np.array([1, 2]), np.zeros((2, 2))),
    *(np.array([], dtype=int), np.array(["x"]), np.bool_(True), Path("x"), Unspeakable()),
    *(SamplingParams(max_tokens=2), RuntimeConfig(), SwapOptions(), ValueError("x"), ...),
]
odd = st.one_of(
    st.sampled_from(ODD_VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, VOCAB_SIZE + 2), max_size=5),
    st.builds(endless),
    st.builds(lambda ids: iter(ids), st.just([1, 2, 3])),
)
samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100) | st.sampled_from([0.0, 1e-300, 5e-324, 1e-38]),
    top_k=st.integers(0, 1 << 30) | st.integers(0, 5),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    seed=st.none() | st.integers(0, (1 << 64) - 1),
    max_tokens=st.integers(1, 4),
    stop=st.lists(st.text(min_size=1, max_size=3) | st.just("\ud800"), max_size=16),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 100),
)


def look_up(city: str, days: int = 1) -> str:
    """A tool."""
    return city * days


SPOKEN = [
    *("Hi", "x" * 5000, "<|im_end|>", "\u202e", "a\0b", "🙂\u0301"),
    [ChatMessage(role="tool", content="5", call_id="call_1")],
    [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}],
]
# By name: what is allowed, so that not all ends at the first argument.
PLAUSIBLE = {
    "text": st.sampled_from(SPOKEN),
    "asked": st.sampled_from([*SPOKEN, Completion(prompt="Hi")]),
    "schema": st.sampled_from([None, bool, {"enum": [1, 2]}, Literal["a", "b"]]),
    "tools": st.sampled_from([None, [], [look_up], [Tool(name="look_up")]]),
    "tool_rounds_max": st.integers(0, 2),
    "confirmed": st.booleans(),
    "aside": st.booleans(),
    "timeout_s": st.sampled_from([None, 0, 0.0, 1e-9, 5, 1e6]),
    "sampling": samplings,
    "raw": st.booleans(),
    "prefill": st.sampled_from([None, "exact", "predict", "auto"]),
    "token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=8),
    "system": st.sampled_from([None, "Be brief.", ""]),
    "name": st.sampled_from([None, "inbox", "outbox"]),
    "weight": st.sampled_from([None, 0.001, 1000]),
    "priority": st.sampled_from([None, "interactive", "background"]),
    "pinned_bytes": st.sampled_from([None, 0, 1 << 50]),
    "num_waiting_max": st.sampled_from([None, 1, 1 << 20]),
    "num_sessions_max": st.sampled_from([None, 1, 1 << 20]),
    "grammar": st.sampled_from(
        [None, Grammar(kind="regex", text="a{1,3}"), Grammar(kind="json_schema", text="{")]
    ),
}
TERMS = ["weight", "priority", "pinned_bytes", "num_waiting_max", "num_sessions_max", "prefill"]
ASKING = [
    "sampling",
    "raw",
    "prefill",
    "grammar",
    "schema",
    "tools",
    "tool_rounds_max",
    "confirmed",
]
COMPLETING = ["sampling", "tools", "tool_rounds_max"]
OPTIONS = {"app": TERMS, "update": TERMS, "complete": COMPLETING, "acomplete": COMPLETING}
METHODS = {
    Runtime: ["app", "logits", "score", "count_tokens"],
    App: ["session", "remove", "update", "knows", "complete", "acomplete", "stream", "astream"],
    Session: [
        "respond",
        "stream",
        "arespond",
        "astream",
        "submit_ids",
        "prewarm",
        "aprewarm",
        "clear",
    ],
}


def outcome(call):
    """Call, read a little of a stream, and see to it that an error is one that is allowed."""
    try:
        result = call()
        if inspect.isawaitable(result):
            return asyncio.run(read_async(result))
        if isinstance(result, ReplyStream):
            with result:
                result.wait(0.05)
        if isinstance(result, AnswerStream | CompletionStream):
            with result:
                next(result)
        return result
    except EdgeKVError as error:
        caught = error
    assert not isinstance(caught, EngineFailed), caught
    assert str(caught), "an error says something"
    assert "\n" not in str(caught) + caught.hint
    assert len(str(caught)) < 1000
    return caught


async def read_async(result):
    stream = await result
    if isinstance(stream, AsyncReplyStream | AsyncAnswerStream | AsyncCompletionStream):
        async with stream:
            async for _ in stream:
                break
    return stream


def in_time(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result(HANGS_AFTER_S)


@st.composite
def calls(draw):
    """A method and its arguments: some plausible, some odd."""
    kind = draw(st.sampled_from([Runtime, App, Session, Session, Session]))
    name = draw(st.sampled_from(METHODS[kind]))
    given = {}
    for parameter in inspect.signature(getattr(kind, name)).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            names = draw(st.sets(st.sampled_from(OPTIONS.get(name, ASKING))))
        else:
            needed = parameter.default is parameter.empty
            names = [parameter.name] if needed or draw(st.booleans()) else []
        for each in sorted(names):
            given[each] = draw(PLAUSIBLE[each] if draw(st.integers(0, 3)) else odd)
    return kind, name, given


@pytest.fixture
def stranger(runtime, request):
    """Somebody whose answer must stay what it was."""
    session = runtime.app(f"stranger of {request.node.name}").session()
    ids = random_ids(12)

    def ask():
        with session.submit_ids(ids, sampling(4)) as stream:
            tokens = [token for delta in stream for token in delta.token_ids]
        assert len(tokens) == 4
        return tokens

    expected = ask()
    return lambda: ask() == expected


@pytest.mark.slow
@fuzz(examples=60, call=calls())
def test_any_arguments_of_any_method(call, runtime, app, stranger):
    kind, name, given = call
    with app.session() as session:
        owner = {Runtime: runtime, App: app, Session: session}[kind]
        result = in_time(lambda: outcome(lambda: getattr(owner, name)(**given)))
        if isinstance(result, Session):
            result.close()
        if isinstance(result, App) and result is not app:
            result.close()
    app.update(weight=1, priority="interactive", num_sessions_max=1 << 20, num_waiting_max=1 << 20)
    app.update(pinned_bytes=0)
    app.prefill = None
    assert stranger()


@pytest.mark.slow
@fuzz(
    examples=150,
    kind=st.sampled_from(
        [SamplingParams, StoreOptions, SwapOptions, PredictionOptions, RuntimeConfig]
    ),
    data=st.data(),
)
def test_any_values_of_any_options(kind, data):
    names = [field.name for field in dataclasses.fields(kind)]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    given = {name: data.draw(odd) for name in chosen}
    result = outcome(lambda: kind(**given))
    assert isinstance(result, kind | ConfigError)
    if isinstance(result, ConfigError):
        assert any(name.split("_")[0] in str(result) + result.hint for name in chosen)


@pytest.mark.slow
@fuzz(examples=60, given=st.dictionaries(st.sampled_from(["model", "pool_gib", "config"]), odd))
def test_any_arguments_of_open(given):
    is_name = isinstance(given.get("model"), str) and given["model"].isprintable()
    if "model" not in given or is_name or isinstance(given["model"], Path):
        given["model"] = "/nowhere/at/all"  # no network
    result = in_time(lambda: outcome(lambda: Runtime.open(**given)))
    assert isinstance(result, EdgeKVError)


configs = st.builds(
    RuntimeConfig,
    pool_bytes=st.sampled_from([1 << 14, 1 << 20, 1 << 26, 1 << 50]),
    tbt_target_ms=st.none() | st.floats(1, 60_000),
    num_sessions_max=st.sampled_from([1, 2, 1 << 20]),
    num_waiting_max=st.sampled_from([1, 2, 1 << 20]),
    context_max=st.none() | st.sampled_from([2, 17, 1 << 24]),
    policy=st.sampled_from(["fair", "fcfs"]),
    swap=st.builds(
        SwapOptions,
        mode=st.sampled_from(["off", "async", "reuse"]),
        group_bytes=st.sampled_from([1 << 12, 1 << 30]),
        staging_bytes=st.sampled_from([0, 1 << 16, 1 << 40]),
        num_readers=st.sampled_from([1, 64]),
        num_writers=st.sampled_from([1, 64]),
    ),
    store=st.builds(
        StoreOptions,
        disk_bytes=st.sampled_from([0, 1, 1 << 20, 1 << 60]),
        free_reserve_bytes=st.sampled_from([0, 1 << 60]),
    ),
)


@pytest.mark.slow
@fuzz(examples=6, config=configs)
def test_any_options_that_are_allowed_open_or_say_why_not(config, tiny_folder):
    runtime = in_time(lambda: outcome(lambda: Runtime.open(str(tiny_folder), config=config)))
    if isinstance(runtime, EdgeKVError):
        return
    with contextlib.ExitStack() as ends:
        ends.callback(outcome, runtime.close)  # with no room on disk, what was said is not kept
        session = runtime.app().session("inbox")
        ask = {"sampling": sampling(3), "timeout_s": HANGS_AFTER_S}
        for _ in range(2):
            outcome(lambda: session.respond("Hi", raw=True, **ask))
        outcome(session.suspend)
        outcome(lambda: session.respond("Hi", **ask))
        runtime.check_integrity()


def test_every_method_with_arguments_is_fuzzed():
    for kind, names in METHODS.items():
        for name, function in inspect.getmembers(kind, inspect.isfunction):
            takes = list(inspect.signature(function).parameters)[1:]
            if takes and not name.startswith("_"):
                assert name in names, f"{kind.__name__}.{name}"
    assert set(ARGUMENTS) <= {name for names in METHODS.values() for name in names}


# --- what fuzzing found, or could have found ---


def takers_of_ids(runtime, app):
    return (
        runtime.logits,
        runtime.score,
        lambda ids: app.session().submit_ids(ids, sampling(1)),
    )


@pytest.mark.parametrize("token_ids", [None, 5, len, np.array(3), Unspeakable()])
def test_what_is_no_list_of_ids_is_refused_by_name(runtime, app, token_ids):
    for call in takers_of_ids(runtime, app):
        with pytest.raises(ConfigError, match="token_ids is"):
            call(token_ids)


def test_ids_without_end_are_too_many(runtime, app):
    for call in takers_of_ids(runtime, app):
        with pytest.raises(EdgeKVError, match=str(runtime.context_max)):
            call(endless())


@pytest.mark.parametrize("token", ["a", 1.5, None, True, -1, VOCAB_SIZE, 1 << 30, np.float32(1)])
def test_a_token_that_is_no_id_is_refused_by_name(runtime, app, token):
    for call in takers_of_ids(runtime, app):
        with pytest.raises(ConfigError, match="token id is"):
            call([1, token])
    assert app.session().respond("Hi", sampling=sampling(2)).text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampling", 5),
        ("sampling", {"max_tokens": 3}),
        ("raw", "yes"),
        ("raw", None),
        ("prefill", np.zeros(2)),
        ("prefill", ""),
        ("prefill", ["exact"]),
        ("timeout_s", 1e20),
    ],
)
def test_what_a_request_cannot_be_asked_with_is_named(app, field, value):
    with pytest.raises(ConfigError, match=f"{field} is"):
        app.session().respond("Hi", **{field: value})


def test_a_stream_is_not_waited_for_longer_than_can_be_waited(app):
    with app.session().stream("Hi", sampling=sampling(2)) as stream:
        for timeout_s in (-1, float("nan"), "1", 1e20):
            with pytest.raises(ConfigError, match="timeout_s"):
                stream.wait(timeout_s)


def test_a_value_that_has_no_words_is_refused_in_one_line():
    for value in (10**5000, Unspeakable(), np.zeros((9, 9)), "x\n" * 9999):
        with pytest.raises(ConfigError) as caught:
            SamplingParams(top_k=value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_naive_swapping_is_no_option_of_a_users():
    with pytest.raises(ConfigError, match="mode is 'naive'"):  # benches inject it
        SwapOptions(mode="naive")
