"""What is known of kinds of models is found by what they contain; a matrix is read from and written to its place."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

import compress
from compress.models import graph
from compress.models.families import FAMILIES, family_of
from compress.models.families.bert import Bert
from compress.models.families.gpt2 import Gpt2
from compress.models.families.gpt_neox import GptNeoX
from compress.models.families.llama import GatedDecoder, Llama
from compress.models.families.opt import Opt
from compress.models.families.plain import Plain
from compress.models.families.resnet import ResNet
from compress.models.families.transformers_model import Images, Language
from compress.models.families.vit import Vit
from compress.models.site import Site, TensorRef

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
SMALL: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=2, n_positions=16)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "num_key_value_heads": None})),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=16)),
    "bert": lambda: BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2,
                                                     num_attention_heads=2)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1)),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8],
                                                                depths=[1], layer_type="basic")),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(num_stages=1, hidden_sizes=[8], depths=[1],
                                                                      num_channels=1)),
    "module": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
}  # fmt: skip
EXPECTED: dict[str, type] = {
    "llama": Llama, "mistral": Llama, "qwen3": GatedDecoder, "gpt2": Gpt2, "gpt_neox": GptNeoX, "opt": Opt,
    "bert": Bert, "falcon": Language, "vit": Vit, "resnet": ResNet, "convnext": Images, "module": Plain,
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_family_is_found_by_what_a_model_contains_and_not_by_its_name(name: str) -> None:
    model = SMALL[name]()
    assert type(family_of(model)) is EXPECTED[name]
    assert graph.find(model).family is family_of(model)
    if isinstance(model, PreTrainedModel):
        model.config.model_type = "something else"
        assert type(family_of(model)) is EXPECTED[name]


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_a_family_calls_a_model_as_it_wants_to_be_called(name: str) -> None:
    model = SMALL[name]().eval()
    batches = {Plain: torch.rand(2, 4), Vit: torch.rand(2, 1, 8, 8)}
    images, tokens = torch.rand(2, 1, 32, 32), torch.arange(12).view(2, 6)
    batch = batches.get(EXPECTED[name], images if issubclass(EXPECTED[name], Images) else tokens)
    before = batch.clone()
    found = family_of(model).forward(model, batch)
    assert len(found if isinstance(found, Tensor) else found.logits) == 2
    assert torch.equal(batch, before)


def test_a_module_with_a_forward_of_its_own_is_not_taken_for_one_that_is_known() -> None:
    class Sorted(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).sort().values * self.up_proj(x))

    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    neurons = "model.layers.0.mlp.down_proj.weight"
    assert neurons in {name for units in graph.find(model).units() for name in units.tensors()}
    model.model.layers[0].mlp = Sorted(model.config)
    found = {name for units in graph.find(model).units() for name in units.tensors()}
    assert neurons not in found
    assert neurons.replace("0", "1") in found


def test_the_last_family_takes_any_module_and_every_one_before_it_knows_more() -> None:
    assert isinstance(FAMILIES[-1], Plain)
    assert all(not family.matches(nn.Linear(2, 2)) for family in FAMILIES[:-1])
    assert len({type(family) for family in FAMILIES}) == len(FAMILIES)


def test_what_was_packed_and_loaded_is_still_of_its_family(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    compress.run({"passes": [{"rtn": {"bits": 4, "group_size": 64}}]}, "demo", tmp_path / "out")
    assert type(family_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))) is Llama


# --- where a matrix lies ----------------------------------------------------------------------------------------------


def test_one_expert_of_a_fused_tensor_is_read_and_written_without_touching_the_others() -> None:
    experts, rows, columns = 4, 3, 5
    for transposed in (False, True):
        stored = (columns, rows) if transposed else (rows, columns)
        fused = torch.randn(experts, *stored)
        before = fused.clone()
        ref = TensorRef("mlp.experts.down_proj", (2,), transposed)
        site = Site("mlp.experts.down_proj.2", (rows, columns), ref, block=0)
        matrix = site.matrix(fused)
        assert matrix.shape == site.shape
        assert torch.equal(matrix, before[2].T if transposed else before[2])
        changed = ref.write(2 * matrix, fused)
        assert torch.equal(fused, before)
        assert torch.equal(changed[2], 2 * before[2])
        assert torch.equal(changed[[0, 1, 3]], before[[0, 1, 3]])
        assert torch.equal(ref.read(changed), 2 * matrix)


def test_an_expert_of_two_leading_dimensions_is_found_by_both() -> None:
    fused = torch.randn(2, 3, 4, 5)
    ref = TensorRef("experts", (1, 2))
    assert torch.equal(ref.read(fused), fused[1, 2])
    assert torch.equal(ref.write(torch.zeros(4, 5), fused)[1], torch.cat([fused[1, :2], torch.zeros(1, 4, 5)]))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(5, 3), (3, 5)),
        (Conv1D(3, 5), (3, 5)),
        (nn.Conv2d(4, 6, (2, 3), groups=2), (6, 12)),
    ],
    ids=["linear", "conv1d", "conv2d"],
)
def test_a_matrix_is_read_from_its_parameter_and_written_back(module: nn.Module, shape: tuple[int, int]) -> None:
    (site,) = graph.find(nn.Sequential(module)).sites
    value = module.get_parameter("weight").detach()
    assert (site.shape, site.parameter) == (shape, "0.weight")
    matrix = site.matrix(value)
    assert matrix.shape == shape
    assert torch.equal(site.value(matrix), value)
    inputs = torch.randn(1, 5) if value.dim() == 2 else torch.randn(1, 4, 2, 3)
    if site.groups == 1:
        with torch.no_grad():
            assert torch.allclose(module(inputs), inputs @ matrix.T + module.get_parameter("bias"), atol=1e-6)
