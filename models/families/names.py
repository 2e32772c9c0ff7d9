"""How tensors are called; the defaults are the names of Hugging Face checkpoints."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Tensor names of a block's mixture of experts; gate, up and down in this order."""

    router: str = "mlp.gate"
    choice_bias: str = "mlp.gate.e_score_correction_bias"  # in whole
    each: tuple[str, ...] = tuple(f"mlp.experts.{{}}.{p}_proj" for p in ("gate", "up", "down"))
    stacked: tuple[str, ...] = tuple(f"mlp.switch_mlp.{p}_proj" for p in ("gate", "up", "down"))
    # In whole: gate and up in one tensor `(experts, rows, in)`, and down.
    fused: tuple[str, str] = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    fused_in_first: bool = False  # they are `(experts, in, rows)`, if they are not quantised
    by_turns: bool = False  # their gate's and up's rows take turns
    shared: tuple[str, ...] = tuple(f"mlp.shared_expert.{p}_proj" for p in ("gate", "up", "down"))
    shared_gate: str = "mlp.shared_expert_gate"
    # Of experts that stand beside a dense MLP (Gemma 4): in whole the router's norm and each
    # expert's factor, and the norms of the experts' input, of the MLP's output and of theirs.
    router_norm: str = "router.scale"
    router_scales: str = "router.per_expert_scale"
    in_norm: str = "pre_feedforward_layernorm_2"
    beside_norms: tuple[str, str] = (
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
    )


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Tensor names of one block, without the block's prefix; tuples are stacked by rows."""

    attn_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    attn_post_norm: str = ""
    ffn_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    ffn_post_norm: str = ""
    experts: ExpertNames = ExpertNames()
    sinks: str = "self_attn.sinks"  # in whole
    # Latent attention; of its maps from the latent there is one tensor, or MLX's two.
    query_down: str = "self_attn.q_a_proj"
    query_norm: str = "self_attn.q_a_layernorm"
    query_up: str = "self_attn.q_b_proj"
    latent_down: str = "self_attn.kv_a_proj_with_mqa"
    latent_norm: str = "self_attn.kv_a_layernorm"
    latent_up: str = "self_attn.kv_b_proj"
    latent_keys: str = "self_attn.embed_q"
    latent_values: str = "self_attn.unembed_out"
    # Gated DeltaNet: queries, keys and values together, gate, write strength, decay; or two fused
    # ones by key head.
    delta_in: tuple[str, ...] = tuple(f"linear_attn.in_proj_{p}" for p in ("qkv", "z", "b", "a"))
    delta_conv: str = "linear_attn.conv1d"
    delta_decay: str = "linear_attn.A_log"  # in whole
    delta_decay_is_rate: bool = False  # it is minus the rate, not the rate's logarithm
    delta_bias: str = "linear_attn.dt_bias"  # in whole
    delta_norm: str = "linear_attn.norm"
    delta_out: str = "linear_attn.out_proj"
    # Short convolution.
    conv_in: str = "conv.in_proj"
    conv: str = "conv.conv"
    conv_out: str = "conv.out_proj"
    # What Gemma 4 has beside.
    per_layer_gate: str = "per_layer_input_gate"
    per_layer_out: str = "per_layer_projection"
    per_layer_norm: str = "post_per_layer_input_norm"
    layer_scale: str = "layer_scalar"  # in whole


@dataclass(frozen=True, kw_only=True)
class TensorNames(LayerNames):
    """Tensor names of a checkpoint; ".weight" and ".bias" are appended."""

    embedding: str = "model.embed_tokens"
    block: str = "model.layers.{}."
    final_norm: str = "model.norm"
    head: str = "lm_head"
    per_layer_table: str = "model.embed_tokens_per_layer"
    per_layer_projection: str = "model.per_layer_model_projection"
    per_layer_projection_norm: str = "model.per_layer_projection_norm"

    def under(self, prefix: str, head: str) -> "TensorNames":
        """The names of a text model that does not begin with "model." but with `prefix`."""

        def moved(name: str) -> str:
            return prefix + name.removeprefix("model.")

        return replace(
            self,
            embedding=moved(self.embedding),
            block=moved(self.block),
            final_norm=moved(self.final_norm),
            head=head,
            per_layer_table=moved(self.per_layer_table),
            per_layer_projection=moved(self.per_layer_projection),
            per_layer_projection_norm=moved(self.per_layer_projection_norm),
        )


HF_NAMES = TensorNames()
