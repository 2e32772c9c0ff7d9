"""A predictor: activations of an auxiliary → keys and values of the base model's layers.

One or several blocks, each a linear map from the features that it taps to the targets that it
predicts, through a low rank where that is cheaper:

    features (N, F) ─down (F, r)─▶ (N, r) ─up (r, out)─▶ + bias (out) ─▶ targets side by side

Or, of kind "self", thin layers in place of the base's own (`thin`).

Keys are predicted before k-norm and RoPE; the base's own are applied afterwards (KV Prediction,
arXiv 2410.08391). The paper's own form has one block for each layer's keys and one for its values,
of full rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import mlx.core as mx

from edgekv.models.attention import KVView, Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.config import DecoderConfig
from edgekv.models.decoder import Decoder
from edgekv.models.parts import Part
from edgekv.predict.features import Place, Tap, Trail, gather, place_width
from edgekv.predict.thin import Rows, ThinLayer, run_thin

Kind = Literal["self", "aux"]
TargetPart = Literal["key", "value"]
PARTS: tuple[TargetPart, ...] = ("key", "value")


class Target(NamedTuple):
    """Keys or values of one layer of the base, heads side by side."""

    layer: int
    part: TargetPart

    @property
    def place(self) -> Place:
        """The same of a pass that is recorded."""
        return (self.part, self.layer)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One linear map."""

    taps: tuple[Tap, ...]  # its features, in order
    targets: tuple[Target, ...]  # what it predicts, in order
    down: mx.array | None  # `(F, r)`, or None for full rank
    up: mx.array  # `(r, out)`, or `(F, out)`
    bias: mx.array  # `(out,)`

    def __call__(self, features: mx.array) -> mx.array:
        """`(N, F)` → `(N, out)`."""
        if self.down is not None:
            features = features @ self.down
        return mx.addmm(self.bias, features, self.up)


@dataclass(frozen=True)
class Predictor:
    """Predicts KV of the layers that its targets name. Holds arrays only, no state."""

    kind: Kind  # "self": the auxiliary is the base's own first `depth` layers. "aux": another model
    depth: int  # layers of the auxiliary that run
    blocks: tuple[Block, ...]  # the maps; none where there are thin layers
    thin: tuple[ThinLayer, ...] = ()  # in place of the base's own from `depth` on

    @property
    def arrays(self) -> dict[str, mx.array]:
        """All arrays by name: `0.down`, `0.up`, `0.bias` and so on; `thin.0.weight`."""
        maps = {
            f"{index}.{name}": array
            for index, block in enumerate(self.blocks)
            for name, array in (("down", block.down), ("up", block.up), ("bias", block.bias))
            if array is not None
        }
        layers = {
            f"thin.{index}.{name}": array
            for index, layer in enumerate(self.thin)
            for name, array in (("weight", layer.weight), ("bias", layer.bias))
        }
        return maps | layers

    def mapped(self, change: Callable[[str, mx.array], mx.array]) -> "Predictor":
        """The same with other arrays: of each, by its name, what `change` makes of it."""
        new = {name: change(name, array) for name, array in self.arrays.items()}
        blocks = tuple(
            replace(block, down=new.get(f"{i}.down"), up=new[f"{i}.up"], bias=new[f"{i}.bias"])
            for i, block in enumerate(self.blocks)
        )
        thin = tuple(
            replace(layer, weight=new[f"thin.{i}.weight"], bias=new[f"thin.{i}.bias"])
            for i, layer in enumerate(self.thin)
        )
        return replace(self, blocks=blocks, thin=thin)

    def part_for(self, base: Decoder) -> "Predictor":
        """What predicts the key-value heads that a rank has of a base; all features are read.

        Thin layers take what they need of the base itself.
        """
        base.group.begin()
        layers = enumerate(self.thin, self.depth)
        made = replace(self, thin=tuple(layer.made_for(base, index) for index, layer in layers))
        if base.group.size == 1:
            return made
        part = Part(base.group.rank, base.group.size)
        return replace(made, blocks=tuple(_cut(block, base.whole, part) for block in self.blocks))

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Taps of all blocks."""
        return tuple(tap for block in self.blocks for tap in block.taps)

    @property
    def places(self) -> frozenset[Place]:
        """What the auxiliary's pass must record."""
        if self.thin:
            return frozenset({("raw", self.depth)})
        return frozenset(tap.place for tap in self.taps)

    @property
    def first_layer(self) -> int:
        """First layer of the base whose KV is predicted."""
        return self.depth if self.kind == "self" else 0

    def num_macs(self, base: DecoderConfig, start: int, end: int) -> float:
        """Multiplications of a prompt's rows `[start, end)`, the auxiliary's not counted."""
        matrices = (
            block.up.size + (0 if block.down is None else block.down.size) for block in self.blocks
        )
        layers = enumerate(self.thin, self.depth)
        thin = (layer.num_macs(base, index, start, end) for index, layer in layers)
        return (end - start) * float(sum(matrices)) + sum(thin)

    def trail(self) -> Trail:
        """The trail of a sequence that begins."""
        return Trail.start(self.taps)

    def predict(
        self,
        base: Decoder,
        seen: dict[Place, mx.array],
        span: tuple[int, int],
        skip: int,
        trail: Trail,
        view: KVView,
    ) -> None:
        """Write keys and values of one segment's rows into a view, where it stands.

        Of `seen`, `span`, `skip` and `trail` see `gather`. What stands in front of the rows thin
        layers read.
        """
        segment = Segment(view, span[1] - span[0] - skip)
        if self.thin:
            rows = Rows(seen["raw", self.depth][span[0] + skip : span[1]], [segment])
            run_thin(base, self.thin, self.depth, None, rows)
            return
        found: dict[Target, mx.array] = {}
        for block in self.blocks:
            out = block(gather(block.taps, seen, span, skip, trail))
            at = 0
            for target in block.targets:
                heads = base.config.layers[target.layer]
                end = at + place_width(target.place, base.config)
                found[target] = out[:, at:end].reshape(-1, heads.num_kv_heads, heads.head_dim)
                at = end
            assert at == out.shape[1]
        batch = PackedBatch([segment])
        for layer in sorted({target.layer for target in found}):
            keys = base.attention(layer).finish_keys(found[Target(layer, "key")], batch)
            batch.write(layer, keys, found[Target(layer, "value")])


def _cut(block: Block, whole: DecoderConfig, part: Part) -> Block:
    """A block with some of its outputs."""
    columns: list[int] = []
    at = 0
    for target in block.targets:
        layer = whole.layers[target.layer]
        kv_heads, dim = part.layer(layer).kv_heads, layer.head_dim
        columns += range(at + kv_heads.start * dim, at + kv_heads.stop * dim)
        at += place_width(target.place, whole)
    index = mx.array(columns)
    up, bias = mx.contiguous(block.up[:, index]), block.bias[index]
    mx.eval(up, bias)
    return replace(block, up=up, bias=bias)
