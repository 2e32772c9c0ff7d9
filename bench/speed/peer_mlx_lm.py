"""mlx-lm, the peer: the same weights, dtype and BLAS, in the same process, with its own defaults.

One session runs through `generate_step`, several through `BatchGenerator`, both as mlx-lm ships
them (prefill in steps of 2048 tokens, eight prompts at a time) and with its greedy sampler. No text
is decoded on that side, which is in its favour. All of it runs on the calling thread; mlx-lm's
streams live there.
"""

import dataclasses
import importlib
import importlib.metadata
import itertools
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from edgekv.bench.figures import Stopwatch
from edgekv.bench.speed.measure import SideRun
from edgekv.errors import ConfigError, EdgeKVError, UnsupportedModel
from edgekv.models.checkpoint import Checkpoint, Dense, Quantised, Tensor, concat_rows
from edgekv.models.config import DecoderConfig
from edgekv.models.families import FAMILIES
from edgekv.models.families.names import LayerNames, TensorNames
from edgekv.models.gguf_config import ROPE_FREQS, ROPE_LONG, row_order, to_hf_fields
from edgekv.models.weights import parse_checkpoint

BATCH_MAX = 32  # sessions that BatchGenerator decodes together by default
_VERSION = "0.32."  # the interface of its generators changes between minor versions
_HINT = "pip install 'edgekv[bench]'"
_MODULES = {"mistral": "llama"}  # model types that mlx-lm runs with another's module


class PeerFailed(EdgeKVError):
    """mlx-lm did not finish a run."""


@contextmanager
def _keep_file_limit() -> Iterator[None]:
    """Importing mlx-lm lowers the process's limit of open files, hard limit included.

    Only root could raise that again, so the call is not let through.
    """
    setrlimit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = setrlimit


def check_installed() -> None:
    """Make sure that mlx-lm is there, without the second that importing it takes.

    Raises:
        ConfigError: It is missing, or of a version whose generators work differently.
    """
    try:
        version = importlib.metadata.version("mlx-lm")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("mlx-lm is not installed", hint=_HINT) from None
    if not version.startswith(_VERSION):
        raise ConfigError(f"mlx-lm {version} is not {_VERSION}x", hint=_HINT)


def _import(name: str) -> Any:
    """A module of mlx-lm's."""
    with _keep_file_limit():
        return importlib.import_module(f"mlx_lm.{name}")


class MlxLmSide:
    """Runs workloads on mlx-lm.

    Args:
        checkpoint: The model; its tensors are loaded a second time.

    Raises:
        ConfigError: See `check_installed`.
        UnsupportedModel: mlx-lm cannot run this model.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        check_installed()
        self._mlx_lm = _import("generate")
        before_bytes = mx.get_active_memory()
        self.model = build_model(checkpoint)
        self.weights_bytes = mx.get_active_memory() - before_bytes

    @property
    def name(self) -> str:
        """Name and version."""
        return f"mlx-lm {importlib.metadata.version('mlx-lm')}"

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> SideRun:
        """Both phases; the decode phase goes on where the cold one ended.

        Raises:
            PeerFailed: MLX ran out of memory, or mlx-lm stopped by itself.
        """
        mx.clear_cache()
        mx.reset_peak_memory()
        foreign_bytes = mx.get_active_memory() - self.weights_bytes
        try:
            if len(prompts) == 1:
                tokens, times_ms = self._generate(prompts[0], 2 * new_tokens)
            else:
                tokens, times_ms = self._generate_batch(prompts, 2 * new_tokens)
        except (RuntimeError, ValueError) as error:
            raise PeerFailed(f"mlx-lm: {error}") from error
        finally:
            # It computes a token ahead; that must not run on into our turn.
            mx.synchronize(self._mlx_lm.generation_stream)
        return SideRun(
            num_prompt_tokens=sum(map(len, prompts)),
            ttft_ms=tuple(times[0] for times in times_ms),
            warm_ttft_ms=(),
            cold_ms=tuple(tuple(times[:new_tokens]) for times in times_ms),
            # Sessions in a batch go in step: everybody's last tokens are those since the last one
            # began. Others may have got some ahead of it during its prefill.
            decode_ms=tuple(tuple(times[-new_tokens:]) for times in times_ms),
            peak_memory_bytes=max(0, mx.get_peak_memory() - foreign_bytes),
            tokens=tuple(tuple(ids[: 2 * new_tokens]) for ids in tokens),
        )

    def _generate(
        self, prompt: Sequence[int], num_tokens: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """One session: its tokens, and when each came."""
        mlx_lm = self._mlx_lm
        tokens: list[int] = []
        times_ms: list[float] = []
        watch = Stopwatch()
        with mlx_lm.wired_limit(self.model, [mlx_lm.generation_stream]):
            steps = mlx_lm.generate_step(mx.array(list(prompt)), self.model, max_tokens=num_tokens)
            for token, _ in steps:
                times_ms.append(watch.ms())
                tokens.append(int(token))
        return [tokens], [times_ms]

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], num_tokens: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Several sessions, until the slowest has its tokens and all have been in step since."""
        assert len(prompts) <= BATCH_MAX, "the others would wait for ever"
        tokens: list[list[int]] = [[] for _ in prompts]
        times_ms: list[list[float]] = [[] for _ in prompts]
        generator = self._mlx_lm.BatchGenerator(self.model)
        try:
            watch = Stopwatch()
            # Nobody finishes by itself: a batch that shrinks would be another workload.
            uids = generator.insert([list(p) for p in prompts], [1 << 30] * len(prompts))
            index = {uid: i for i, uid in enumerate(uids)}
            while min(map(len, tokens)) < num_tokens:
                responses = generator.next_generated()
                now_ms = watch.ms()
                for response in responses:
                    tokens[index[response.uid]].append(int(response.token))
                    times_ms[index[response.uid]].append(now_ms)
        finally:
            generator.close()
        return tokens, times_ms


def build_model(checkpoint: Checkpoint) -> Any:
    """An mlx-lm model that holds this checkpoint's values, evaluated.

    Raises:
        UnsupportedModel: mlx-lm cannot run it.
    """
    from mlx import nn

    fields, tensors = hf_checkpoint(checkpoint)
    model_type = str(fields["model_type"])
    name = _MODULES.get(model_type, model_type)
    try:
        module = _import(f"models.{name}")
        model = module.Model(module.ModelArgs.from_dict(fields))
        weights = _arrays(tensors)
        if hasattr(model, "sanitize"):  # not every family has something to put right
            weights = model.sanitize(weights)
        nn.quantize(model, class_predicate=lambda path, _: _spec(tensors.get(f"{path}.weight")))
        model.load_weights(list(weights.items()))
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise UnsupportedModel(
            f"mlx-lm cannot run {checkpoint.path}: {error}", hint="leave out --peer"
        ) from error
    model.eval()
    mx.eval(model.parameters())
    return model


def _spec(tensor: Tensor | None) -> dict[str, int | str] | bool:
    if not isinstance(tensor, Quantised):
        return False
    return {"group_size": tensor.group_size, "bits": tensor.bits, "mode": tensor.mode}


def _arrays(tensors: dict[str, Tensor]) -> dict[str, mx.array]:
    """Tensors under mlx-lm's names: a quantised one is three arrays, or two."""
    arrays = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        parts = ("weight", "scales", "biases") if isinstance(tensor, Quantised) else ("",)
        for part, array in zip(parts, tensor.arrays, strict=False):
            arrays[f"{module}.{part}" if part else name] = array
    return arrays


def hf_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The `config.json` and the tensors that a Hugging Face folder of this model would hold.

    Their values are those that edgekv computes with (same dtype, same quantisation), but arrays of
    their own: edgekv fuses some of them, and neither side may profit from the other's memory.

    Raises:
        UnsupportedModel: A GGUF file says something that a `config.json` cannot say.
        CheckpointCorrupt: A tensor is missing or malformed.
    """
    if checkpoint.kind == "folder":
        return dict(checkpoint.config), {n: checkpoint.take(n) for n in checkpoint.names}
    if {ROPE_FREQS, ROPE_LONG} & checkpoint.names:
        raise UnsupportedModel(
            f"{checkpoint.path}: mlx-lm cannot be given rope factors from a GGUF file",
            hint="compare on the model's Hugging Face folder instead",
        )
    source = str(checkpoint.path)
    fields = {k: v for k, v in to_hf_fields(checkpoint.config, source).items() if v is not None}
    config, names = parse_checkpoint(checkpoint)
    # GGUF leaves it to the reader, and mlx-lm's default is the published models' 256.
    fields["query_pre_attn_scalar"] = config.attention_scale**-2
    fields["tie_word_embeddings"] = f"{names.head}.weight" not in checkpoint.names
    tensors = dict(_renamed(checkpoint, config, names, str(fields["model_type"])))
    return fields, tensors


def _renamed(
    checkpoint: Checkpoint, config: DecoderConfig, names: TensorNames, model_type: str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a GGUF file by Hugging Face's names."""
    theirs = FAMILIES[model_type].names
    # Hugging Face's Gemma stores norm weights less 1; the GGUF converter has added it.
    norm_offset = 1.0 if config.family == "gemma3" else 0.0

    for slot in ("embedding", "final_norm", "head"):
        name = f"{getattr(names, slot)}.weight"
        if name in checkpoint.names:
            yield (
                f"{getattr(theirs, slot)}.weight",
                _shifted(checkpoint.take(name), slot, norm_offset),
            )
    slots = [field.name for field in dataclasses.fields(LayerNames)]
    for layer, slot, suffix in itertools.product(
        range(config.num_layers), slots, (".weight", ".bias")
    ):
        targets = _as_tuple(getattr(theirs, slot))
        found = _parts(checkpoint, config, names, (layer, slot, suffix))
        found = _as_many_as(found, len(targets), checkpoint)
        for target, tensor in zip(targets, found, strict=False):
            yield (
                f"{theirs.block.format(layer)}{target}{suffix}",
                _shifted(tensor, slot, norm_offset),
            )


def _parts(
    checkpoint: Checkpoint, config: DecoderConfig, names: TensorNames, at: tuple[int, str, str]
) -> list[Tensor]:
    """What the file has for a layer's slot and suffix, rows in Hugging Face's order."""
    (layer, slot, suffix), found = at, []
    for part in _as_tuple(getattr(names, slot)):
        name = f"{names.block.format(layer)}{part}{suffix}"
        if name in checkpoint.names:
            arch = str(checkpoint.config["general.architecture"])
            order = row_order(arch, part, config.layers[layer])
            tensor = checkpoint.take(name)
            found.append(tensor if order is None else tensor.rows(mx.array(order)))
    return found


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(names, tuple):
        return names
    return (names,) if names else ()


def _as_many_as(parts: list[Tensor], num_targets: int, checkpoint: Checkpoint) -> list[Tensor]:
    """Parts for which the target has a single name are stacked."""
    if len(parts) <= num_targets:
        return parts
    fused = concat_rows(parts)
    if fused is None:
        raise UnsupportedModel(
            f"{checkpoint.path}: parts of unlike quantisation, which mlx-lm has as one matrix",
            hint="compare on another file of this model",
        )
    return [fused]


def _shifted(tensor: Tensor, slot: str, norm_offset: float) -> Tensor:
    if not norm_offset or not slot.endswith("norm"):
        return tensor
    assert isinstance(tensor, Dense)
    return Dense(tensor.array - norm_offset)
