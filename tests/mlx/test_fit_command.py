"""`edgekv fit`, from the command line, on a tiny model."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from edgekv.cli.fit import _shown_ahead
from edgekv.cli.main import main
from edgekv.errors import ConfigError
from edgekv.predict.artifact import load_predictor, read_info, save_predictor
from edgekv.predict.fit import thin
from edgekv.predict.fit.checkpoint import load_partial, remove_partial, save_partial
from edgekv.predict.fit.closed_form import Fit
from edgekv.predict.fit.corpus import Corpus
from edgekv.predict.fit.finetune import Finetune
from edgekv.predict.fit.passes import MemoryPlan, Part
from edgekv.predict.fit.run import PARTIAL, TRAINING, FitOptions, run_fit
from edgekv.predict.tensor_file import check_writable, load_safetensors, write_safetensors

pytestmark = pytest.mark.slow


def test_what_is_told_of_a_calibration(predictors):
    info = read_info(Path(predictors["self"]))
    for num_answers, told in ((0, "not calibrated"), (9, "too few"), (99, "a certainty of 2.0 on")):
        calibrated = replace(info, num_answers=num_answers, critical=[[2.0] * 9] * 3)
        assert told in _shown_ahead(calibrated)


@pytest.mark.faults
def test_fit_from_the_command_line(deep, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog and asks why " * 800)
    out = tmp_path / "fitted.safetensors"
    arguments = ["--base", str(deep), "--text", str(text), "--tokens", "16384", "--rank", "8"]
    arguments += ["--calibrate", "8"]
    assert main(["fit", *arguments, "--self-depth", "2", "-o", str(out), "--finetune", "2"]) == 0
    told = capsys.readouterr().out
    assert "depth 2" in told
    assert "8 answers are too few to tell when 3% would be corrected, so nothing is shown" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fitted.safetensors", "text.txt"]
    assert main(["fit", *arguments, "--prune", "0.5", "-o", str(out), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["kind"], info["aux"], info["depth"]) == ("aux", "prune:0.5", 2)
    assert info["num_answers"] == 8 >= len(info["critical"])
    sizes = ["--context", "200", "--continuation", "16", "--window", "8", "--samples", "1"]
    quality = ["bench", "quality", "--base", str(deep), "--predictor", str(out), *sizes]
    assert main(quality) == 0  # the auxiliary is cut out of the base again
    assert "auxiliary alone" in capsys.readouterr().out
    for wrong in (
        ["--self-depth", "4"],
        [],
        ["--prune", "0.3"],
        ["--self-depth", "1", "--aux", "x"],
    ):
        assert main(["fit", *arguments, *wrong, "-o", str(out)]) == 2
        assert "error:" in capsys.readouterr().err


@pytest.mark.faults
def test_training_further_from_the_command_line(deep, predictors, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "further.safetensors"
    text.write_text("the quick brown fox jumps over a lazy dog and asks why " * 800)
    start = predictors["self"]
    before = read_info(Path(start))

    def fit(*arguments, text=text):
        base = ["--base", str(deep), "--text", str(text), "-o", str(out), "--calibrate", "4"]
        return main(["fit", *base, *arguments])

    unfinished = tmp_path / f"{out.name}.partial.safetensors"
    unfinished.write_bytes(b"sums of another fit")
    assert fit("--from", start, "--finetune", "3", "--json") == 0
    assert unfinished.exists()
    info = json.loads(capsys.readouterr().out)
    assert info["finetune_steps"] == before.finetune_steps + 3
    assert info["corpus"] == f"{before.corpus}; then text.txt"
    for name in ("kind", "depth", "rank", "num_tokens", "base_fingerprint"):
        assert info[name] == getattr(before, name)
    assert {"text_kl", "text_kl_before_training"} <= set(info["quality"])
    assert out.read_bytes() != Path(start).read_bytes()
    assert info["num_answers"] == 4
    assert fit("--from", start, "--json") == 0  # calibrated alone
    again = json.loads(capsys.readouterr().out)
    assert (again["num_answers"], again["finetune_steps"]) == (4, before.finetune_steps)
    ours, theirs = (load_predictor(Path(path), mx.float32)[0] for path in (out, start))
    assert mx.array_equal(ours.blocks[0].up, theirs.blocks[0].up)
    # What was calibrated is not what it was trained to.
    calibrated = tmp_path / "calibrated.safetensors"
    save_predictor(calibrated, theirs, replace(before, num_answers=2, critical=[[2.0]] * 3))
    assert fit("--from", str(calibrated), "--finetune", "1", "--calibrate", "0", "--json") == 0
    trained = json.loads(capsys.readouterr().out)
    assert (trained["num_answers"], trained["critical"]) == (0, [[]] * 3)
    for wrong in (
        ["--calibrate", "0"],
        ["--finetune", "1", "--self-depth", "1"],
        ["--finetune", "1", "--rank", "8"],
        ["--finetune", "1", "--features", "paper"],
        ["--finetune", "1", "--from-corenet", str(text)],
    ):
        assert fit("--from", start, *wrong) == 2
        assert "error:" in capsys.readouterr().err
    assert fit("--from", "nobody", "--finetune", "1") == 1
    assert "no KV predictor 'nobody'" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("too short to hold a piece out " * 80)
    assert fit("--from", start, "--finetune", "1000000", text=short) == 2
    assert "short.txt" in capsys.readouterr().err  # at once, not behind the training


@pytest.mark.faults
@pytest.mark.parametrize("moment", [3])
def test_stopped_between_two_pieces_it_goes_on_there(deep, tmp_path, capsys, monkeypatch, moment):
    text, out = tmp_path / "text.txt", tmp_path / "fitted.safetensors"
    text.write_text("the quick brown fox jumps over a lazy dog and asks why " * 800)
    arguments = ["fit", "--base", str(deep), "--text", str(text), "--tokens", "16384"]
    arguments += ["--self-depth", "2", "--rank", "8", "--finetune", "4", "--calibrate", "2"]
    once = tmp_path / "once.safetensors"
    assert main([*arguments, "-o", str(once)]) == 0
    for owner, name in ((Fit, "add"), (Finetune, "learn")):
        whole, calls = getattr(owner, name), []

        def interrupted(self, ids, whole=whole, calls=calls):
            calls.append(ids)
            if len(calls) == moment:
                signal.raise_signal(signal.SIGINT)
            return whole(self, ids)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            assert main([*arguments, "-o", str(out)]) == 130
        assert len(calls) == moment
        assert "goes on from here" in capsys.readouterr().err
        assert not out.exists()
    assert main([*arguments, "-o", str(out)]) == 0
    ours, theirs = (load_predictor(path, mx.float32)[0] for path in (out, once))
    assert mx.array_equal(ours.blocks[0].up, theirs.blocks[0].up)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [out.name, once.name]


@pytest.mark.faults
def test_thin_layers_that_are_stopped_begin_anew(deep, tmp_path, capsys, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "fitted.safetensors"
    text.write_text("the quick brown fox jumps over a lazy dog and asks why " * 800)
    arguments = ["fit", "--base", str(deep), "--text", str(text), "--tokens", "16384"]
    arguments += ["--self-depth", "2", "--thin", "1", "--neurons", "8", "--calibrate", "0"]
    arguments += ["-o", str(out)]
    solved = thin._solved

    def interrupted(base, index, layer, groups):
        if index == 3:
            signal.raise_signal(signal.SIGINT)
        return solved(base, index, layer, groups)

    with monkeypatch.context() as patch:
        patch.setattr(thin, "_solved", interrupted)
        assert main(arguments) == 130
    assert "the same command fits thin layers anew" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [text]
    assert main(arguments) == 0
    assert out.exists()


@pytest.mark.faults
@pytest.mark.parametrize("moment", [5, 33, 90])
def test_stopped_in_any_of_several_passes_it_goes_on_there(
    deep, tmp_path, capsys, monkeypatch, moment
):
    text, out = tmp_path / "text.txt", tmp_path / "fitted.safetensors"
    text.write_text("the quick brown fox jumps over a lazy dog and asks why " * 800)
    arguments = ["fit", "--base", str(deep), "--text", str(text), "--tokens", "16384"]
    arguments += ["--self-depth", "1", "--rank", "8", "--calibrate", "2"]
    whole, calls, add = MemoryPlan.passes, [], Fit.add

    def narrow(self, _num_bytes):
        return whole(self, self.num_bytes((Part(0, 0, 2),)))  # a layer in each of three passes

    def interrupted(self, ids):
        calls.append(self.pass_index)
        if len(calls) == moment:
            signal.raise_signal(signal.SIGINT)
        return add(self, ids)

    once = tmp_path / "once.safetensors"
    assert main([*arguments, "-o", str(once)]) == 0
    monkeypatch.setattr(MemoryPlan, "passes", narrow)
    monkeypatch.setattr(Fit, "add", interrupted)
    capsys.readouterr()
    assert main([*arguments, "-o", str(out)]) == 130
    told = capsys.readouterr().err
    assert told.startswith(f"loading {deep} …\nrunning text ")
    assert "goes on from here" in told
    assert main([*arguments, "-o", str(out)]) == 0
    assert calls == [0] * 32 + [1] * 32 + [2] * 32
    (ours,), (theirs,) = (load_predictor(path, mx.float32)[0].blocks for path in (out, once))
    maps = [np.array(block.down @ block.up) for block in (ours, theirs)]
    assert np.abs(maps[0] - maps[1]).max() < 0.01 * np.abs(maps[1]).max()  # f16 files
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [out.name, once.name]


def test_where_not_even_one_layer_fits_nothing_is_begun(deep, tmp_path, capsys):
    arguments = ["fit", "--base", str(deep), "--self-depth", "1", "--memory-gib", "0.25"]
    assert main([*arguments, "-o", str(tmp_path / "x")]) == 2
    assert "larger --memory-gib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_that_it_loads_is_said_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "edgekv.predict.fit.run", None)  # refuses to be imported
    with pytest.raises(ImportError):
        main(["fit", "--base", "somebody", "--self-depth", "1", "-o", str(tmp_path / "x")])
    assert capsys.readouterr().err == "loading somebody …\n"


@pytest.mark.faults
def test_what_another_call_left_unfinished_stays(deep, tmp_path, capsys, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "fitted.safetensors"
    text.write_text("the quick brown fox jumps over a lazy dog and asks why " * 800)
    unfinished = tmp_path / f"{out.name}.training.safetensors"
    unfinished.write_bytes(b"hours of work")
    arguments = ["--base", str(deep), "--text", str(text), "--tokens", "16384", "-o", str(out)]
    end_pass, sums = Fit.end_pass, tmp_path / f"{out.name}.partial.safetensors"

    def while_another_saves(self, *args):
        save_partial(sums, "of another", {"a": mx.zeros(2)})
        return end_pass(self, *args)

    monkeypatch.setattr(Fit, "end_pass", while_another_saves)
    short = ["--self-depth", "2", "--rank", "8", "--calibrate", "2"]
    assert main(["fit", *arguments, *short]) == 0
    assert unfinished.read_bytes() == b"hours of work"
    assert load_partial(sums, "of another") is not None
    capsys.readouterr()


def test_where_nothing_can_be_written_nothing_is_begun(deep, tmp_path, capsys):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for out in (fifo, tmp_path, tmp_path / "none" / "x", tmp_path / ("x" * 230)):
        for more in (["--self-depth", "2"], ["--from-corenet", __file__, "--aux", str(deep)]):
            assert main(["fit", "--base", str(deep), *more, "-o", str(out)]) == 2
            assert "error:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [fifo]


def test_an_import_takes_no_options_of_a_fit(deep, tmp_path, capsys):
    arguments = ["--from-corenet", __file__, "--aux", str(deep), "-o", str(tmp_path / "o")]
    for more in (["--finetune", "3"], ["--tokens", "20000"], ["--from", "x"], ["--rank", "0"]):
        assert main(["fit", *arguments, *more]) == 2
        assert f"so {more[0]} cannot apply" in capsys.readouterr().err


def test_options_are_values_that_look_at_no_file(tmp_path):
    out = tmp_path / "out.safetensors"
    halves = [tmp_path / f".{out.name}{what}.half.safetensors" for what in ("", TRAINING, PARTIAL)]
    for half in halves:
        half.write_bytes(b"being written by another fit")
    corpus = Corpus(texts=(tmp_path / "nothing.txt",))
    options = FitOptions(base="nobody", out=out, self_depth=2, corpus=corpus)
    assert options.beside(PARTIAL).parent == options.beside(TRAINING).parent == tmp_path
    FitOptions(base="nobody", out=tmp_path / "none" / "x", self_depth=2)
    assert sorted(tmp_path.iterdir()) == sorted(halves)
    with pytest.raises(ConfigError, match=r"nothing\.txt"):
        run_fit(options, lambda *_: None)
    assert sorted(tmp_path.iterdir()) == sorted(halves)


def test_two_who_write_one_file_have_a_half_each(tmp_path, monkeypatch):
    path, save, halves = tmp_path / "x.safetensors", mx.save_safetensors, []

    def while_another_writes(name, tensors, metadata):
        save(name, tensors, metadata)
        halves.append(Path(name))
        if len(halves) == 1:
            check_writable(path)
            write_safetensors(path, {"a": mx.ones(2)}, {"by": "second"})
            assert halves[0].exists()
            assert load_safetensors(path)[1] == {"by": "second"}

    monkeypatch.setattr(mx, "save_safetensors", while_another_writes)
    write_safetensors(path, {"a": mx.zeros(2)}, {"by": "first"})
    assert len(set(halves)) == 2
    assert load_safetensors(path)[1] == {"by": "first"}  # who ended last
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_removed_by_whom_it_is_of(tmp_path):
    path = tmp_path / "x.partial.safetensors"
    save_partial(path, "theirs", {"a": mx.zeros(2)})
    remove_partial(path, "ours")
    assert path.exists()
    remove_partial(path, "theirs")
    assert not path.exists()
    path.write_bytes(b"cut off")
    remove_partial(path, "ours")
    remove_partial(path, "ours")
    assert not path.exists()
