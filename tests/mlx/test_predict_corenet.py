"""corenet's KV-prediction checkpoints, written by hand with its names and shapes."""

import io
import json
import pickle
import shutil
import struct
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_config, write_folder
from tiny_predictors import load, random_ids

from edgekv.errors import CheckpointCorrupt, ConfigError, UnsupportedModel
from edgekv.predict.artifact import load_predictor
from edgekv.predict.features import Recorder
from edgekv.predict.fit.corenet import import_corenet
from edgekv.predict.fit.torch_file import read_torch
from edgekv.predict.forward import ArrayView, run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    base = write_folder(root / "base", tiny_config("openelm"))
    aux = write_folder(
        root / "aux",
        tiny_config(
            "openelm",
            num_transformer_layers=2,
            num_query_heads=[4, 2],
            num_kv_heads=[2, 1],
            ffn_multipliers=[0.5, 1.0],
        ),
    )
    return base, aux


def maps(num_base, num_aux_of, base_config, aux_config, rng):
    tensors = {}
    for layer in range(num_base):
        source = num_aux_of(layer)
        wide = base_config.layers[layer]
        narrow = aux_config.layers[source]
        shape = (wide.num_kv_heads * wide.head_dim, narrow.num_kv_heads * narrow.head_dim)
        for part in ("key", "value"):
            name = f"predicter.auxkv_to_basekv.{part}_transforms.{layer}"
            tensors[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)
            tensors[f"{name}.bias"] = rng.normal(size=shape[:1]).astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def checkpoint(pair, tmp_path_factory):
    base, aux = pair
    rng = np.random.default_rng(0)
    loaded, _ = mx.load(str(aux / "model.safetensors"), return_metadata=True)
    tensors = {
        f"auxiliary.{name.removeprefix('transformer.')}": np.array(array)
        for name, array in loaded.items()
    }
    # Three base layers from two: the first feeds two.
    tensors |= maps(3, lambda i: (0, 0, 1)[i], load(base).config, load(aux).config, rng)
    path = tmp_path_factory.mktemp("checkpoint") / "kvp.safetensors"
    mx.save_safetensors(str(path), {name: mx.array(a) for name, a in tensors.items()})
    return path, tensors


def test_what_is_imported_predicts_as_corenet_does(pair, checkpoint, tmp_path):
    base, aux = pair
    path, tensors = checkpoint
    out = tmp_path / "kvp-out.safetensors"
    info = import_corenet(path, out, base=str(base), aux=str(aux))
    assert (info.kind, info.depth, info.features) == ("aux", 2, "paper")
    predictor, _ = load_predictor(out, mx.float32)
    trained = load(tmp_path / "kvp-out.safetensors.aux")
    recorder = Recorder(predictor.places)
    run(trained, random_ids(12, 0), ArrayView(), taps=recorder)
    for block in predictor.blocks:
        (target,), (tap,) = block.targets, block.taps
        name = f"predicter.auxkv_to_basekv.{target.part}_transforms.{target.layer}"
        seen = np.array(recorder.seen[tap.place])
        expected = seen @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
        assert tap.layer == (0, 0, 1)[target.layer]
        assert np.abs(np.array(block(mx.array(seen))) - expected).max() < 0.02


def test_a_missing_or_misshapen_map_is_named(pair, checkpoint, tmp_path):
    base, aux = pair
    _, tensors = checkpoint
    name = "predicter.auxkv_to_basekv.value_transforms.2.bias"
    for change, message in ((None, "missing"), (np.zeros(3, np.float32), r"\(3,\)")):
        changed = {n: mx.array(a) for n, a in tensors.items() if n != name}
        if change is not None:
            changed[name] = mx.array(change)
        path = tmp_path / "bad.safetensors"
        mx.save_safetensors(str(path), changed)
        with pytest.raises(CheckpointCorrupt, match=message) as caught:
            import_corenet(path, tmp_path / "out.safetensors", base=str(base), aux=str(aux))
        assert name in str(caught.value)
        assert not (tmp_path / "out.safetensors").exists()


def test_other_families_are_refused(pair, checkpoint, tmp_path):
    llama = write_folder(tmp_path / "llama", tiny_config("llama"))
    with pytest.raises(UnsupportedModel, match="OpenELM"):
        import_corenet(checkpoint[0], tmp_path / "o.safetensors", base=str(llama), aux=str(llama))


@pytest.mark.parametrize("damage", [False, True])
def test_nothing_of_the_users_is_overwritten(pair, checkpoint, tmp_path, damage):
    base, aux = pair
    mine = tmp_path / "kvp.aux"
    shutil.copytree(aux, mine)
    (mine / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    if damage:  # whatever else is wrong
        base = tmp_path
    with pytest.raises(ConfigError, match=r"kvp\.aux"):
        import_corenet(checkpoint[0], tmp_path / "kvp", base=str(base), aux=str(mine))
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    assert list(tmp_path.iterdir()) == [mine]


def test_a_full_disk_leaves_nothing_behind(pair, checkpoint, tmp_path, monkeypatch):
    def full_disk(*_args):
        raise RuntimeError("[write] Unable to write 100 bytes to file.")

    base, aux = pair
    monkeypatch.setattr(mx, "save_safetensors", full_disk)
    with pytest.raises(OSError, match="cannot be written"):
        import_corenet(checkpoint[0], tmp_path / "kvp", base=str(base), aux=str(aux))
    assert not list(tmp_path.iterdir())


# --- PyTorch's file format, written by hand ---


def torch_file(path, tensors, *, extra=b""):
    """Protocol 2 opcodes for a dict of tensors, as torch.save writes them."""
    out = io.BytesIO()
    out.write(b"\x80\x02}")
    data = {}
    for key, (name, array) in enumerate(tensors.items()):
        kind = {np.dtype("<f4"): "FloatStorage", np.dtype("<f2"): "HalfStorage"}[array.dtype]
        data[str(key)] = array.tobytes()
        text = name.encode()
        out.write(b"X" + struct.pack("<I", len(text)) + text)
        out.write(b"ctorch._utils\n_rebuild_tensor_v2\n(")
        out.write(b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\n")
        out.write(b"X" + struct.pack("<I", len(str(key))) + str(key).encode())
        out.write(b"X\x03\x00\x00\x00cpuJ" + struct.pack("<i", array.size) + b"tQ")
        out.write(b"J" + struct.pack("<i", 0) + b"(")
        for n in array.shape:
            out.write(b"J" + struct.pack("<i", n))
        out.write(b"t(")
        for stride in array.strides:
            out.write(b"J" + struct.pack("<i", stride // array.itemsize))
        out.write(b"t\x89}tRs")
    out.write(extra + b".")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", out.getvalue())
        for key, content in data.items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def test_a_pytorch_file_is_read_without_pytorch(tmp_path):
    tensors = {
        "a": np.arange(6, dtype="<f4").reshape(2, 3),
        "b.c": np.arange(4, dtype="<f2"),
    }
    found = read_torch(torch_file(tmp_path / "x.pt", tensors))
    assert set(found) == {"a", "b.c"}
    for name, array in tensors.items():
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], array)


def test_a_pytorch_file_runs_nothing(tmp_path):
    evil = pickle.dumps(json.loads, protocol=2)[2:-1]
    path = torch_file(tmp_path / "x.pt", {}, extra=evil)
    with pytest.raises(CheckpointCorrupt, match="json"):
        read_torch(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello" * 100])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointCorrupt):
        read_torch(path)


@pytest.mark.parametrize("step", [-1, -2])
def test_tensors_that_go_backwards_are_refused(tmp_path, step):
    """They would begin before their storage, in somebody else's memory."""
    array = np.arange(6, dtype="<f4")[::step]
    with pytest.raises(CheckpointCorrupt, match="negative"):
        read_torch(torch_file(tmp_path / "x.pt", {"a": array}))


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    path = torch_file(tmp_path / "x.pt", {"a": np.arange(6, dtype="<f4")})
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("archive/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", b"\0" * 8)
    with pytest.raises(CheckpointCorrupt):
        read_torch(path)
