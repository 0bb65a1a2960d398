"""Families of decoders with RMSNorm, rotary embedding, grouped-query attention and a gated feed-forward layer.

A record names the modules of the model as its checkpoint does. What a family computes is the same for all of them:
``x += attention(norm(x)); x += down(act(gate(norm(x))) · up(norm(x)))`` in each layer, a norm, and the head.

Source: the modelling files of transformers 5 for each ``model_type``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderFamily:
    """Names of the modules: of the model by full name, of a layer relative to it.

    ``architecture`` is the class in transformers that has this structure. ``query_norm`` and ``key_norm`` are norms of
    single heads between the projection and the rotation, where the family has them.
    """

    architecture: str
    embedding: str = "model.embed_tokens"
    rotary: str = "model.rotary_emb"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    input_norm: str = "input_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers of a layer."""
        return (self.query, self.key, self.value, self.output, self.gate, self.up, self.down)

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a layer."""
        heads = (name for name in (self.query_norm, self.key_norm) if name is not None)
        return (self.input_norm, *heads, self.mlp_norm)


DECODER_FAMILIES = {
    "llama": DecoderFamily(architecture="LlamaForCausalLM"),
    "mistral": DecoderFamily(architecture="MistralForCausalLM"),
    "qwen2": DecoderFamily(architecture="Qwen2ForCausalLM"),
    "qwen3": DecoderFamily(architecture="Qwen3ForCausalLM", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"),
}
"""By ``model_type``."""
