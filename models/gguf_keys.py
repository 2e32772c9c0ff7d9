"""The metadata of one GGUF file under its architecture: checked access, and what is refused.

Sources: the GGUF specification, and llama.cpp's `llama_model_base::load_hparams`.
"""

from collections.abc import Collection, Mapping

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.config import Fields, brief

# Would silently be something else where they are missing.
REQUIRED = (
    "embedding_length",
    "block_count",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "context_length",
)
# Keys that change the result with any other value than these, where the architecture does not read
# them; of a list each value. A mixture's weights add up to one where nothing else is said, and so
# do those of `expert_gating_func` 1 (softmax) and 3 (softmax of those chosen).
_HARMLESS: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "expert_gating_func": (0, 1, 3),
    "expert_group_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "moe_every_n_layers": (0, 1),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.recurrent_layers": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "embedding_length_per_layer_input": (0,),
    "deepstack_mapping": (-1,),
    "use_parallel_residual": (False,),
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_ext_factor": (1, -1),  # -1: not set
    "rope.scaling.yarn_log_multiplier": (0,),
}
# Where the architecture does not read them they must be what another key is.
_EQUAL = {
    "attention.key_length_swa": "attention.key_length",
    "attention.value_length": "attention.key_length",
    "attention.value_length_swa": "attention.value_length",
    "rope.dimension_count_swa": "rope.dimension_count",
    "rope.freq_base_swa": "rope.freq_base",
}

# Named here: inside the class, these are methods.
_Int = int
_Float = float
_OptionalInt = int | None


class Keys:
    """An architecture's keys, each named here without the architecture.

    Args:
        metadata: Of the whole file; null counts as absent.
        arch: What the keys begin with.
        source: What errors call the file.
        tensors: Names of the file's tensors, which say what some keys do not.
        rope_factors: What the file's tensors of factors for rotary pairs hold, by their names.

    Raises:
        CheckpointCorrupt: A key that must be there is missing, or the number of layers garbled.
    """

    def __init__(
        self,
        metadata: Mapping[str, object],
        arch: str,
        source: str,
        tensors: Collection[str] = (),
        rope_factors: Mapping[str, list[_Float]] | None = None,
    ) -> None:
        self.arch, self.source, self.tensors = arch, source, tensors
        self.rope_factors = rope_factors or {}
        own = {k: v for k, v in metadata.items() if k.startswith(f"{arch}.") and v is not None}
        tokens = metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, list):  # right where the key contradicts it
            own[self.name("vocab_size")] = len(tokens)
        own.setdefault(self.name("rope.freq_base"), 10_000.0)
        self._own = own
        self._fields = Fields(own, source)
        for key in (*REQUIRED, "vocab_size"):
            if not self.has(key):
                raise CheckpointCorrupt(f"{source}: field '{self.name(key)}' is missing")
        # Blocks that guess tokens further ahead (MTP) come last and are not run.
        self.num_layers = self.int("block_count") - self.int("nextn_predict_layers", 0, low=0)
        if self.num_layers < 1:
            raise self.garbled("nextn_predict_layers", "the file has no other blocks")

    def name(self, key: str) -> str:
        """The key as the file has it."""
        return f"{self.arch}.{key}"

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.name(key) in self._own

    def get(self, key: str, default: object = None) -> object:
        """A value as it stands there."""
        return self._own.get(self.name(key), default)

    @property
    def head_dim(self) -> _Int:
        """Of a key, which is the width by the heads where nothing else is said."""
        if self.has("attention.key_length"):
            return self.int("attention.key_length")
        return max(1, self.int("embedding_length") // self.int("attention.head_count"))

    def layer_ints(self, key: str) -> list[_Int]:
        """A whole number for each layer: one for all, or a list."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * self.num_layers
        whole = [v for v in values[: self.num_layers] if type(v) is int and v >= 0]
        if len(whole) < self.num_layers:
            raise self.garbled(key, f"it must be a whole number, or {self.num_layers} of them")
        return whole

    def sliding(self, usual: _Int) -> list[bool]:
        """Which layers have a window: all but every n-th, or as a list says."""
        key = "attention.sliding_window_pattern"
        if isinstance(self.get(key), list):
            return [bool(flag) for flag in self.layer_flags(key)]
        every = self.int(key, usual)
        return [(index + 1) % every != 0 for index in range(self.num_layers)]

    def layer_flags(self, key: str) -> list[bool]:
        """True or false for each layer."""
        value = self.get(key)
        flags = value[: self.num_layers] if isinstance(value, list) else []
        if len(flags) < self.num_layers or not all(flag in (0, 1) for flag in flags):
            raise self.garbled(key, f"it must list {self.num_layers} of true and false")
        return [bool(flag) for flag in flags]

    def garbled(self, key: str, hint: str) -> CheckpointCorrupt:
        """What is raised for a value that cannot be."""
        value = brief(self.get(key))
        return CheckpointCorrupt(f"{self.source}: field {self.name(key)!r} is {value}", hint=hint)

    def unsupported(self, key: str, default: object = None) -> UnsupportedModel:
        """What is raised for a value that edgekv does not run."""
        return UnsupportedModel(
            f"{self.source}: {self.name(key)} {brief(self.get(key, default))} is not supported",
            hint="use another model, or an export without it",
        )

    def refuse_unread(self, read: Collection[str]) -> None:
        """Nothing that is not `read` says what edgekv does not run.

        Raises:
            UnsupportedModel: With the key and its value.
        """
        for key, harmless in _HARMLESS.items():
            value = self.get(key, harmless[0])
            values = value if isinstance(value, list) else [value]
            if key not in read and not all(one in harmless for one in values):
                raise self.unsupported(key)
        for key, other in _EQUAL.items():
            there = key not in read and self.has(key) and self.has(other)
            if there and self.get(key) != self.get(other):
                raise self.unsupported(key)

    # Last, for below these names mean the methods also to whoever reads an annotation.

    def int(self, key: str, default: _OptionalInt = None, *, low: _Int = 1) -> _Int:
        """A whole number from `low`."""
        return self._fields.int(self.name(key), default, low=low)

    def float(self, key: str, default: _Float) -> _Float:
        """A number that is not negative."""
        return self._fields.float(self.name(key), default, low=0.0)
