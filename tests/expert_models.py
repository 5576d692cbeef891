"""Tiny random mixtures of experts, and a replica of one whose experts are separate linear layers."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
NARROW = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL: dict[str, object] = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Kind of model -> what its configuration has beside SMALL.
KINDS: dict[str, dict[str, object]] = {
    "Mixtral": LOCAL,
    "Qwen2Moe": {**NARROW, "shared_expert_intermediate_size": 48},
    "Qwen3Moe": {**NARROW, "head_dim": 16},
    "GptOss": {
        **LOCAL, "head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    },
    "DeepseekV3": {**GROUPED, **LATENT, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "Glm4Moe": {**GROUPED, "n_group": 1, "topk_group": 1, "head_dim": 16},
    "GraniteMoe": LOCAL,
    "Phimoe": LOCAL,
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0},
    "NemotronH": {
        "layers_block_type": ["attention", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "moe_intermediate_size": 32, "topk_group": 1, "head_dim": 16, "moe_shared_expert_intermediate_size": 32,
    },
    "LongcatFlash": {
        **LATENT, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "ffn_hidden_size": 96, "num_layers": 2,
        "expert_ffn_hidden_size": 32, "head_dim": 16,
    },
    "JetMoe": {**LOCAL, "kv_channels": 16, "num_key_value_heads": 4},
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "Dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "Llama4": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 32, "intermediate_size_mlp": 96,
        "head_dim": 16, "interleave_moe_layer_step": 1, "attention_chunk_size": 64,
    },
}  # fmt: skip
# Of each way to weigh experts: softmax over all, then normalised over the chosen (Mixtral, HunYuan) or not (Qwen2,
# OLMoE, and Qwen3 by default); softmax over the chosen (gpt-oss, Granite); sigmoid with a bias, in groups (DeepSeek V3)
# or not (GLM 4, Nemotron); softmax with a bias (Ernie); sparse mixer (Phi); experts that only pass on (LongCat).
KINDS_OF_ROUTERS = (
    "Mixtral", "Qwen3Moe", "Qwen2Moe", "Olmoe", "GptOss", "GraniteMoe", "DeepseekV3", "Glm4Moe", "Ernie4_5_Moe",
    "Phimoe", "HunYuanMoEV1", "NemotronH", "LongcatFlash",
)  # fmt: skip
COMMON = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss", "DeepseekV3", "Olmoe", "Glm4Moe", "GraniteMoe", "Phimoe")

TOKENS = torch.randint(3, 256, (8, 32), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def make_mixture(kind: str, **changes: object) -> transformers.PreTrainedModel:
    """A random model of two blocks with weights large enough that they matter."""
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Llama4" else f"{kind}Config")
    usual = SMALL if kind != "Dbrx" else {name: SMALL[name] for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**{**usual, **KINDS[kind], **changes})).eval()
    assert isinstance(model, transformers.PreTrainedModel)
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of fused experts that transformers marks."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_transposed")}


def redundant(
    kind: str = "Mixtral", noise: float = 0.0, permuted: bool = False, **changes: Any
) -> transformers.PreTrainedModel:
    """A mixture of four experts, each there twice: experts i and i + 4.

    The router sends even tokens to the first ones of pairs and odd tokens to the second ones, so that all are of use,
    and to one pair or another by what rows of the router have in common. Pairs differ in the length of what they put
    out: by REAP both of the long ones are worth more than either of the short ones.
    """
    model = make_mixture(kind, num_local_experts=8, **changes)
    made = torch.Generator().manual_seed(11)
    for module in experts_of(model).values():
        width = module.down_proj.shape[-1]
        for first in range(4):
            order = torch.randperm(width, generator=made) if permuted else torch.arange(width)
            with torch.no_grad():
                module.down_proj[first] *= 1 + first / 2
                module.down_proj[first + 4] = module.down_proj[first][:, order]
                module.gate_up_proj[first + 4] = module.gate_up_proj[first][torch.cat([order, width + order])]
                for value in (module.down_proj[first + 4], module.gate_up_proj[first + 4]):
                    value += noise * value.std() * torch.randn(value.shape, generator=made)
    words = model.model.embed_tokens.weight.data
    side = nn.functional.normalize(torch.randn(words.shape[1], generator=made), dim=0)
    words += 4 * side * (1 - 2 * (torch.arange(len(words)) % 2))[:, None]
    for name in experts_of(model):
        rows = model.get_submodule(name.rpartition(".")[0]).gate.weight.data
        common = 4 * (rows[:4] - rows[:4] @ side[:, None] * side)
        rows[:] = torch.cat([common + side, common - side])
    return model


def unfused(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The same model with a linear layer for each matrix of an expert: what passes have always worked on."""
    replica = copy.deepcopy(model)
    for name, module in experts_of(replica).items():
        replica.set_submodule(name, Unfused(module))
    return replica


class Unfused(nn.Module):
    """Experts as lists of linear layers, run one after the other as transformers' own code does."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.gated = fused.has_gate
        activation: Any = fused._apply_gate if self.gated else fused.act_fn
        self.activation = activation
        first = "gate_up_proj" if self.gated else "up_proj"
        for leaf in (first, "down_proj"):
            bias = getattr(fused, f"{leaf}_bias", None)
            layers = nn.ModuleList()
            for number, matrix in enumerate(getattr(fused, leaf)):
                weight = matrix.T if fused.is_transposed else matrix
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
                if bias is not None:
                    layer.bias = nn.Parameter(bias[number].detach().clone(), requires_grad=False)
                layers.append(layer)
            setattr(self, leaf, layers)
        self.first: nn.ModuleList = getattr(self, first)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(T, in), (T, k), (T, k) -> (T, in)."""
        found = torch.zeros_like(hidden)
        for number in range(len(self.first)):
            # By place among the choices first, as transformers' mask has it: sums over tokens run in its order.
            place, token = torch.where((chosen.T - number).logical_not())
            if not len(token):
                continue
            made = self.down_proj[number](self.activation(self.first[number](hidden[token])))
            found.index_add_(0, token, (made * weights[token, place, None]).to(found.dtype))
        return found
