"""`bench quality --chat` on a tiny model: its prompts, and what it finds in a runtime's answers."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_predictors import load

from edgekv.bench.prediction import chat as bench_chat
from edgekv.bench.prediction.chat import ChatOptions, chats_about
from edgekv.cli.main import main
from edgekv.config import PredictionOptions
from edgekv.engine.request import Request
from edgekv.errors import ConfigError
from edgekv.models.open_model import open_tokenizer
from edgekv.predict.artifact import load_predictor, save_predictor
from edgekv.predict.fit.calibrate import answer_ahead

WINDOW = 8


def words(seed, num_words=1500):
    """Text of which every word is another."""
    dice = random.Random(seed)
    return " ".join(f"{dice.choice('bcdfgklm')}{seed}a{number}z" for number in range(num_words))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "one.txt", folder / "two.txt"]
    for seed, path in enumerate(paths):
        path.write_text(words(seed))
    return paths


@pytest.fixture(scope="module")
def sure(predictors, tmp_path_factory):
    """Predictors whose gate lets everything pass, if as much may be corrected."""
    root = tmp_path_factory.mktemp("calibrated")

    def calibrated(name):
        predictor, info = load_predictor(Path(predictors[name]), mx.float32)
        save_predictor(root / f"{name}.safetensors", predictor, replace(info, num_answers=999))
        return str(root / f"{name}.safetensors")

    return {name: calibrated(name) for name in ("self", "identity")}


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench_chat, "NEW_TOKENS", 20)


def measure(folder, predictor, texts, target, *more):
    arguments = ["bench", "quality", "--chat", "-m", str(folder), "--predictor", predictor]
    arguments += [part for path in texts for part in ("--text", str(path))]
    arguments += ["--context", "100,150", "--samples", "1", "--window", str(WINDOW)]
    code = main([*arguments, "--corrected-max", "1", "--json", str(target), *more])
    rows = json.loads(target.read_text())["rows"]
    return code, rows


class TestPrompts:
    def chats(self, folder, **options):
        return chats_about(open_tokenizer(folder), ChatOptions(**options))

    def test_kinds_and_lengths_take_turns_and_share_no_text(self, deep, texts):
        found = self.chats(deep, texts=tuple(texts), contexts=(100, 150), samples=3)
        expected = [(kind, n) for kind in ("one.txt", "two.txt") for n in (100, 150)] * 3
        assert [(chat.kind, chat.context) for chat in found] == expected
        tokenizer = open_tokenizer(deep)
        seen = [set(re.findall(r"\w\d+a\d+z", tokenizer.decode(c.token_ids))) for c in found]
        assert all(seen)
        assert len(set.union(*seen)) == sum(map(len, seen))
        for chat in found:
            assert chat.context < len(chat.token_ids) < chat.context + 200

    def test_as_many_as_the_text_holds(self, deep, texts, tmp_path):
        less = tmp_path / "less.txt"
        less.write_text(words(0, 60))
        found = self.chats(deep, texts=(less, texts[1]), contexts=(100, 150), samples=2)
        num_tokens = len(open_tokenizer(deep).encode(words(0, 60)))
        assert num_tokens // 250 == 1
        assert [chat.kind for chat in found].count("less.txt") == 2
        assert [chat.kind for chat in found].count("two.txt") == 4
        less.write_text("short")
        with pytest.raises(ConfigError, match=r"less\.txt"):
            self.chats(deep, texts=(less, texts[1]), contexts=(100, 150))

    def test_files_of_one_name_are_two_kinds(self, deep, texts, tmp_path):
        (tmp_path / "other").mkdir()
        other = tmp_path / "other" / "one.txt"
        other.write_text(words(5))
        found = self.chats(deep, texts=(texts[0], other), contexts=(100,), samples=1)
        assert [chat.kind for chat in found] == [str(texts[0]), str(other)]

    def test_without_files_it_is_about_sources(self, deep):
        found = self.chats(deep, contexts=(100,), samples=2)
        assert len(found) == 2
        assert len({chat.kind for chat in found}) == 1


def test_what_is_absurd_is_refused():
    for wrong in ({"contexts": (71,)}, {"samples": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong)).rstrip("s")):
            ChatOptions(**wrong)
    ChatOptions(contexts=(20,), prediction=PredictionOptions(sinks=2, window=8))


@pytest.mark.slow
class TestAnswers:
    def test_confirmed_answers_are_exact(self, deep, sure, texts, tmp_path, capsys):
        code, rows = measure(deep, sure["self"], texts, tmp_path / "c.json")
        said = capsys.readouterr()
        assert (code, said.err) == (0, "")
        assert "self.safetensors · at most 100.0% corrected" in said.out
        abouts = [(row["context"], row["kind"], row["num_prompts"]) for row in rows]
        assert abouts == [
            (None, None, 4),
            (100, None, 2),
            (150, None, 2),
            (None, "one.txt", 2),
            (None, "two.txt", 2),
        ]
        whole = rows[0]
        assert whole["num_differing"] == whole["num_ties"]
        assert whole["early_share"] == 1.0
        assert whole["num_corrected"] > 0 < whole["erasure"]
        assert {row["scenario"] for row in rows} == {"quality chat"}
        for sample in whole["samples"]:
            exact, predicted = sample["exact"]["stats"], sample["predicted"]["stats"]
            assert exact["num_prompt_tokens"] == predicted["num_prompt_tokens"]
            assert exact["num_predicted_tokens"] == 0
            expected = predicted["num_prompt_tokens"] - 4 - WINDOW
            assert predicted["num_predicted_tokens"] == expected
            assert sample["exact"]["began_early"] is False
            assert sample["exact"]["num_retracted_chars"] == 0
            assert len(sample["exact"]["token_ids"]) <= 20
        self.assert_agreement(deep, sure["self"], texts, whole["samples"])

    def assert_agreement(self, folder, file, texts, samples):
        """It is that of `answer_ahead`, and what the runtime showed before exact KV the same."""
        tokenizer, decoder = open_tokenizer(folder), load(folder)
        options = ChatOptions(
            texts=tuple(texts),
            contexts=(100, 150),
            samples=1,
            prediction=PredictionOptions(window=WINDOW),
        )
        predictor, _ = load_predictor(Path(file), mx.float32)
        for chat, sample in zip(chats_about(tokenizer, options), samples, strict=True):
            expected = answer_ahead(
                decoder,
                decoder,
                predictor,
                chat.token_ids,
                sinks=4,
                window=WINDOW,
                look=PredictionOptions.look,
                num_tokens=16,
                eos_ids=tokenizer.eos_ids,
            )
            at_first = expected.askings[0]
            assert sample["agreed"] == list(at_first.agreed)
            assert sample["certain"] == pytest.approx(at_first.certain, abs=1e-3)
            stats = sample["predicted"]["stats"]
            num_shown, is_wrong = expected.shown(0.0)  # all that it would say
            assert stats["num_confirmed_tokens"] == num_shown - is_wrong
            assert bool(stats["num_retracted_tokens"]) == is_wrong

    def test_what_is_exact_is_never_corrected(self, deep, sure, texts, tmp_path, capsys):
        more = ["--aux", str(deep)]
        code, rows = measure(deep, sure["identity"], texts, tmp_path / "c.json", *more)
        assert code == 0
        assert rows[0]["agreement"] == rows[0]["first_agreement"] == 1.0
        assert rows[0]["num_corrected"] == rows[0]["erasure"] == 0
        assert rows[0]["early_share"] == 1.0
        assert rows[0]["tokens_ahead"] > 3
        capsys.readouterr()

    def test_nothing_begins_early_where_nothing_was_calibrated(
        self, deep, predictors, texts, tmp_path, capsys
    ):
        code, rows = measure(deep, predictors["self"], texts[:1], tmp_path / "c.json")
        assert code == 0
        assert rows[0]["early_share"] == rows[0]["tokens_ahead"] == 0
        assert rows[0]["certain_min"] is rows[0]["ttft_ratio_early"] is None
        assert "not calibrated" in capsys.readouterr().out

    @pytest.mark.parametrize("ties", [False, True])
    def test_an_answer_that_is_not_exact_is_told(
        self, deep, sure, texts, tmp_path, capsys, monkeypatch, ties
    ):
        def lax(self, index, token):
            del token
            self.num_confirmed = index + 1
            return True

        monkeypatch.setattr(Request, "confirm", lax)
        if ties:
            monkeypatch.setattr(bench_chat, "TIE", float("inf"))
            monkeypatch.setattr(bench_chat, "_LIKELY", 100)  # else some are beyond these
        code, rows = measure(deep, sure["self"], texts, tmp_path / "c.json")
        err = capsys.readouterr().err
        assert rows[0]["num_differing"] > 0
        if ties:
            assert rows[0]["num_ties"] == rows[0]["num_differing"]
            assert (code, err) == (0, "")
        else:
            assert rows[0]["num_ties"] == 0
            assert code == 1
            assert "confirmed answers are not what exact KV says" in err

    def test_several_predictors_have_a_table_each(self, deep, sure, texts, tmp_path, capsys):
        more = ["--predictor", sure["identity"], "--aux", str(deep)]
        _, rows = measure(deep, sure["self"], texts[:1], tmp_path / "c.json", *more)
        names = [row["predictor"] for row in rows]
        assert names == ["self.safetensors"] * 3 + ["identity.safetensors"] * 3
        told = " ".join(capsys.readouterr().out.split())  # a long path wraps the title
        assert told.count("corrected, from a certainty of") == 2


def test_options_of_the_other_part_are_refused(deep, capsys):
    arguments = ["bench", "quality", "-m", str(deep)]
    for more, said in (
        (["--chat", "--continuation", "9"], "--continuation cannot apply with --chat"),
        (["--chat", "--plot", "x.png"], "--plot cannot apply with --chat"),
        (["--corrected-max", "0.1"], "--corrected-max cannot apply without --chat"),
        (["--context", "300,400"], "context is '300,400'"),
        (["--context", "long"], "context is 'long'"),
        (["--chat", "--context", "9"], "context is 9"),
        (["--chat", "--corrected-max", "2"], "corrected_max is 2"),
    ):
        assert main([*arguments, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_prompt_beyond_the_models_context(deep, predictors, capsys, monkeypatch):
    monkeypatch.setattr(bench_chat, "answer_ahead", pytest.fail)
    arguments = ["bench", "quality", "--chat", "-m", str(deep), "--context", "1000"]
    assert main([*arguments, "--predictor", predictors["self"], "--samples", "1"]) == 2
    assert "model's context of 1024 tokens" in capsys.readouterr().err
