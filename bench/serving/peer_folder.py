"""A Hugging Face folder with edgekv's own numbers, for a server that reads nothing else.

Weights are written as edgekv computes with them (same dtype, same quantisation), so that a peer is
not slower for a dtype that this device has to emulate. The tokenizer is the folder's own; that of a
GGUF file is written as a `tokenizer.json`.
"""

import json
import pathlib
import shutil
from typing import Any

import mlx.core as mx

from edgekv.bench.speed.peer_mlx_lm import hf_checkpoint
from edgekv.device import profile
from edgekv.errors import UnsupportedModel
from edgekv.models.checkpoint import Quantised, Tensor
from edgekv.models.open_model import open_checkpoint, open_tokenizer
from edgekv.tokenizer import Tokenizer
from edgekv.tokenizer.backends import HuggingFaceBackend

# What is written anew, and the makers' sampling, which would say again what ends an answer.
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "generation_config.json"}
_SUFFIXES = {".json", ".jinja", ".model", ".txt"}


def write_peer_folder(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write the model at a path into a folder, which is made, and return it.

    Raises:
        UnsupportedModel: It is of a kind that cannot be written so.
        CheckpointCorrupt: A tensor is missing or malformed.
    """
    folder.mkdir(parents=True)
    checkpoint = open_checkpoint(model, profile())
    config, tensors = hf_checkpoint(checkpoint)
    tokenizer = open_tokenizer(model)
    if checkpoint.kind == "folder":
        _copy_tokenizer(model, folder)
    else:
        _write_tokenizer(tokenizer, model, folder)
    kept = {k: v for k, v in config.items() if not k.startswith("quantization")}
    ends = {"eos_token_id": sorted(tokenizer.eos_ids)}
    (folder / "config.json").write_text(json.dumps({**kept, **ends, **_quantisation(tensors)}))
    arrays = {name: a for key, tensor in tensors.items() for name, a in _arrays(key, tensor)}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    return folder


def _quantisation(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`quantization` of the configuration: mlx-lm wants one for all, and each module's own."""
    each = {
        name.removesuffix(".weight"): {
            "group_size": tensor.group_size,
            "bits": tensor.bits,
            "mode": tensor.mode,
        }
        for name, tensor in tensors.items()
        if isinstance(tensor, Quantised)
    }
    return {"quantization": {**next(iter(each.values())), **each}} if each else {}


def _arrays(name: str, tensor: Tensor) -> list[tuple[str, mx.array]]:
    if not isinstance(tensor, Quantised):
        return [(name, array) for array in tensor.arrays]
    module = name.removesuffix(".weight")
    parts = ("weight", "scales", "biases")
    return [(f"{module}.{part}", a) for part, a in zip(parts, tensor.arrays, strict=False)]


def _copy_tokenizer(model: pathlib.Path, folder: pathlib.Path) -> None:
    for path in model.iterdir():
        if path.is_file() and path.suffix in _SUFFIXES and path.name not in _NOT_COPIED:
            shutil.copy(path, folder / path.name)


def _write_tokenizer(tokenizer: Tokenizer, model: pathlib.Path, folder: pathlib.Path) -> None:
    """Of a GGUF file, with byte-level pieces, which is what most have."""
    import tokenizers

    if not isinstance(tokenizer.backend, HuggingFaceBackend):
        raise UnsupportedModel(
            f"{model}: a GGUF file with SentencePiece, which the peer cannot be given",
            hint="compare on the model's Hugging Face folder instead",
        )
    made = tokenizers.Tokenizer.from_str(tokenizer.backend.to_json())
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    ends = [tokenizer.vocabulary.tokens[i] for i in sorted(tokenizer.eos_ids)]
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": ends[0] if ends else None,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.bos_id is not None:
        settings["bos_token"] = tokenizer.vocabulary.tokens[tokenizer.bos_id]
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template.source
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
