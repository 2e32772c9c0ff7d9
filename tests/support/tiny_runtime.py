"""A runtime over a tiny random model, and what its answers are compared with."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from edgekv.config import SamplingParams
from edgekv.runtime import Reply, Runtime, Session

TIE = 1e-4  # logits closer than this may change places with the shape of a step


def sampling(max_tokens: int, **options: object) -> SamplingParams:
    """Greedy unless told otherwise, and of exactly `max_tokens` tokens: EOS is no end."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)  # type: ignore[arg-type]


def answer(session: Session, token_ids: Sequence[int], params: SamplingParams) -> Reply:
    """Continue token ids, to the end."""
    with session.submit_ids(list(token_ids), params) as stream:
        for _ in stream:
            pass
    assert stream.reply is not None
    return stream.reply


def greedy_by_hand(runtime: Runtime, token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The slow twin of decoding: all logits anew for each token, nothing kept between them."""
    ids = list(token_ids)
    for _ in range(num_tokens):
        ids.append(int(runtime.logits(ids)[-1].argmax()))
    return ids[len(token_ids) :]


def assert_same(
    runtime: Runtime, prompt: Sequence[int], tokens: Sequence[int], expected: Sequence[int]
) -> None:
    """Assert equality, or that the first difference is a tie; greedy answers only."""
    for i, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)):
        if ours != theirs:
            logits = runtime.logits([*prompt, *expected[:i]])[-1]
            assert abs(float(logits[ours]) - float(logits[theirs])) <= TIE, f"at token {i}"
            return


def num_again(reply: Reply, num_known: int) -> int:
    """Tokens that were known and were computed all the same."""
    return num_known - reply.stats.num_cached_tokens


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log-probabilities of `(T, vocab)` logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def eventually(condition: Callable[[], bool], timeout_s: float = 300.0) -> None:
    """Wait until something holds that another thread brings about."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.001)


def arrays_of(session, num_tokens):
    """Keys, then values, of a session's first tokens, by layer."""
    buffers = session._talk.kv.kv.buffers
    return [np.array(array[:, :num_tokens]) for array in (*buffers.keys, *buffers.values)]
