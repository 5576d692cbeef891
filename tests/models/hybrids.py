"""State-space models, linear attention, and mixtures of these with attention."""

from __future__ import annotations

from entry import Entry
from mixtures import ROUTERS

LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SHARED = {  # one attention, of the hidden state beside the embeddings, for all blocks that have one
    "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
}  # fmt: skip
STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}

HYBRIDS = (
    Entry("MambaForCausalLM", {"time_step_rank": 16}, quick=True),
    Entry("Mamba2ForCausalLM", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}),
    Entry("FalconMambaForCausalLM", {"time_step_rank": 16}),
    Entry("BambaForCausalLM", {"attn_layer_indices": [1], **STATE}),
    Entry("FalconH1ForCausalLM", {"mamba_d_ssm": 128, **STATE}),
    Entry("GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention"], **STATE}, apart=ROUTERS),
    Entry("GraniteMoeHybridForCausalLM", {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0, "num_experts_per_tok": 0, **STATE,
    }, label="dense"),
    Entry("JambaForCausalLM", {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_dt_rank": 16,
    }, apart=ROUTERS),
    Entry("KimiLinearForCausalLM", {**LINEAR, "num_key_value_heads": 4}, apart=ROUTERS),
    Entry("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    Entry("NemotronHForCausalLM", {
        "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 8,
        "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1,
    }),
    Entry("OlmoHybridForCausalLM", LINEAR),
    Entry("Qwen3NextForCausalLM", LINEAR, apart=(*ROUTERS, "*.shared_expert_gate.weight")),
    Entry("Qwen3_5ForCausalLM", LINEAR),
    Entry("RecurrentGemmaForCausalLM", {
        "num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"],
    }),
    Entry("RwkvForCausalLM", {"num_hidden_layers": 4, "rescale_every": 2}),
    Entry("ZambaForCausalLM", {**SHARED, "n_mamba_heads": 2}, share=0.84),  # parameters of Mamba that lie in no layer
    Entry("Zamba2ForCausalLM", {
        **SHARED, "mamba_d_state": 16, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1,
    }),
)  # fmt: skip
