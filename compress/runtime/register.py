"""Teaches transformers to load a compressed folder: `import compress`, then `from_pretrained(OUT)`.

The weight file has a name of its own. A loader that does not know this plug-in would otherwise warn, build the plain
model and run on random weights; so it finds no weights and stops.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.checkpoint.coded import decoded, forms_of
from compress.checkpoint.matching import RUNNING, Spelling, ignored
from compress.encodings import Spec
from compress.encodings.cache import SCALES, CacheForm
from compress.encodings.format import METHOD, WEIGHTS
from compress.errors import CheckpointError
from compress.io.heap import align
from compress.io.manifest import MANIFEST, verify_folder
from compress.io.safetensors_file import read_header, refuse_other_tensors
from compress.models.architecture import predicts_next
from compress.models.convolutions import is_convolution, is_transposed_convolution
from compress.models.experts import fused_parameters, run_one_by_one
from compress.models.turned_inputs import turn_inputs
from compress.runtime.cache import cached_layers, round_cache
from compress.runtime.conv import PackedConvolution, PackedTransposedConvolution
from compress.runtime.embedding import PackedEmbedding, SharedLinear, packed_embedding
from compress.runtime.experts import PackedExperts
from compress.runtime.linear import PackedLinear
from compress.runtime.members import is_member, pack_member
from compress.runtime.packed import PackedModule
from compress.runtime.tied import TiedLinear

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compress.encodings.rans import CodedForm
    from compress.models.experts import Fused


class CompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder.

    Args:
        modules: module name -> the spec of its packed weight.
        version: of the package that wrote it, for people.
        added_biases: modules with a bias that their class of model has not.
        verify: compare the folder's files with its manifest before any is read.
        shared: module -> the packed embedding or layer whose weight it uses.
        coded: tensor of a packed module -> how it is entropy-coded.
        caches: attention layer -> how it rounds the keys and values that it keeps.
    """

    verify = False

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        version: str = "",
        added_biases: list[str] | None = None,
        verify: bool = False,
        shared: dict[str, str] | None = None,
        coded: dict[str, dict[str, int]] | None = None,
        caches: dict[str, dict[str, Any]] | None = None,
        **_: Any,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.modules = modules or {}
        self.version = version
        self.added_biases = added_biases or []
        self.shared = shared or {}
        self.coded = coded or {}
        self.caches = caches or {}
        if verify:  # a wish of whoever loads, which is not saved otherwise
            self.verify = True

    def specs(self) -> dict[str, Spec]:
        """The specs, parsed.

        Raises:
            ValueError: says which module is not described as this version knows it.
        """
        if not isinstance(self.modules, dict) or not all(isinstance(spec, dict) for spec in self.modules.values()):
            raise ValueError("`modules` must map names to descriptions of packed weights")
        biases = self.added_biases
        if not isinstance(biases, list) or not all(isinstance(name, str) for name in biases):
            raise ValueError("`added_biases` must be a list of names")
        if not isinstance(self.shared, dict) or not set(self.shared.values()) <= self.modules.keys():
            raise ValueError("`shared` must map names to names of packed layers")
        found = {}
        for name, spec in self.modules.items():
            try:
                found[name] = Spec.from_json(spec)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return found

    def cache_forms(self) -> dict[str, CacheForm]:
        """How attention layers round what they keep, parsed.

        Raises:
            ValueError: says which layer is not described as this version knows it.
        """
        if not isinstance(self.caches, dict):
            raise ValueError("`caches` must map names of attention layers to descriptions")
        found = {}
        for name, form in self.caches.items():
            try:
                found[name] = CacheForm.from_json(form)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return found

    def forms(self) -> dict[str, dict[str, CodedForm]]:
        """Module -> its entropy-coded tensors, parsed.

        Raises:
            ValueError: says which is not described as this version knows it.
        """
        return forms_of(self.coded, self.specs())


class CompressQuantizer(HfQuantizer):
    """Swaps packed modules in before the weights are read into them."""

    requires_calibration = True
    has_kernels = False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        assert isinstance(config, CompressConfig)
        add_biases(model, config.added_biases)
        replace_modules(model, config.specs(), config.shared)
        round_caches(model, config.cache_forms())
        for name, forms in config.forms().items():
            _expect_coded(model.get_submodule(name), forms)
        try:
            if checkpoint_files and config.verify:
                _refuse_changed(Path(checkpoint_files[0]).parent)
            if checkpoint_files:
                _refuse_other_tensors(model, checkpoint_files, config.added_biases)
        except CheckpointError as error:
            raise ValueError(str(error)) from error

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        assert isinstance(config, CompressConfig)
        for name, forms in config.forms().items():
            _decode(model.get_submodule(name), name, forms)
        config.coded = {}  # what is saved from here on is not
        align(model, convolutions=predicts_next(model))
        turn_inputs(model)
        layers = []
        for module in model.modules():
            if isinstance(module, PackedEmbedding):
                module.described = False
            if isinstance(module, PackedLinear):
                layers.append(module)
                if next(iter(module.stored().values())).is_cuda:
                    module.choose_kernel()  # now: a compiler that traces the first call could not
        self.has_kernels = bool(layers) and all(layer.kernel is not None for layer in layers)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Every tensor takes the type its own module was made with."""
        return dtype

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module | None = None) -> list[Any]:
        """Packed tensors are not put together: their names are those of the model, and only old spellings change."""
        from transformers.core_model_loading import WeightConverter

        return [each for each in weight_conversions if not isinstance(each, WeightConverter)]

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the weight files are looked up: point at ours."""
        folder = getattr(config, "name_or_path", "") or ""
        if not os.path.isdir(folder) or os.path.exists(os.path.join(folder, WEIGHTS)):
            config.transformers_weights = WEIGHTS
        return config

    def update_ep_plan(self, config: Any) -> Any:
        """What older versions of transformers call at that moment."""
        return self.update_attn_implementation(config)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes the packed tensors as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model where its cache is static: each layer is then one operator."""
        return self.has_kernels

    @property
    def is_trainable(self) -> bool:
        """Codes do not train."""
        return False


def _expect_coded(module: nn.Module, forms: Mapping[str, CodedForm]) -> None:
    """Make room for the bytes of entropy-coded tensors where a packed module has the tensors."""
    for leaf, form in forms.items():
        place = getattr(module, leaf)
        setattr(module, leaf, torch.empty(form.size, dtype=torch.uint8, device=place.device))


def _decode(module: nn.Module, name: str, forms: Mapping[str, CodedForm]) -> None:
    """Put the packed tensors in the place of their bytes, one at a time.

    Raises:
        ValueError: they are damaged.
    """
    assert isinstance(module, PackedModule)
    shapes = module.spec.tensors()
    for leaf, form in forms.items():
        try:
            setattr(module, leaf, decoded(form, getattr(module, leaf), shapes[leaf][0], f"{name}.{leaf}"))
        except CheckpointError as error:
            raise ValueError(str(error)) from error


def _refuse_changed(folder: Path) -> None:
    if verify_folder(folder) is None:
        raise CheckpointError(f"{folder} has no {MANIFEST}, which verify=True needs; write or fetch the folder again")


def add_biases(model: nn.Module, names: list[str]) -> None:
    """Give layers that have none a bias, to be read."""
    for name in names:
        module = model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        rows = weight.shape[0] if isinstance(module, nn.Linear) else weight.shape[1]
        if is_convolution(module) or is_transposed_convolution(module):
            rows = module.out_channels
        bias = torch.empty(rows, dtype=weight.dtype, device=weight.device)
        module.register_parameter("bias", nn.Parameter(bias, requires_grad=False))


def round_caches(model: nn.Module, forms: Mapping[str, CacheForm]) -> None:
    """Make attention layers round what they keep, with scales that are read later.

    Raises:
        ValueError: one of them is no attention layer with a cache.
    """
    there = cached_layers(model) if forms else {}
    for name, form in forms.items():
        if name not in there:
            raise ValueError(f"{name} is named among `caches`, and is no attention layer that keeps keys and values")
        round_cache(there[name], form)


def replace_modules(model: nn.Module, specs: dict[str, Spec], shared: Mapping[str, str] | None = None) -> None:
    """Put an empty packed module (on the device of what it replaces) in the place of every named module.

    Experts of a fused parameter are named by their numbers; all of them then take the place of the parameter.

    Args:
        model: whose modules are replaced.
        specs: module -> how its weight is packed.
        shared: module -> the packed embedding or layer whose weight it uses.

    Raises:
        ValueError: some experts of a parameter are named, and others are not; or what is shared is neither an embedding
            nor a linear layer.
    """
    ties = _ties(model) if shared else {}
    fused = _replace_experts(model, specs)
    replaced: dict[nn.Module, nn.Module] = {}
    for name, spec in specs.items():
        if name.rpartition(".")[0] in fused:
            continue
        if is_member(model, name):
            pack_member(model, name, spec)
            continue
        old_module = model.get_submodule(name)
        weight = old_module.weight
        assert isinstance(weight, Tensor)
        with torch.device(weight.device):
            replaced[old_module] = _packed_module(old_module, spec, weight.dtype)
        model.set_submodule(name, replaced[old_module])
        _say_it_is_made(model, name)
    for name, of in (shared or {}).items():
        old, owner = model.get_submodule(name), model.get_submodule(of)
        if not isinstance(owner, PackedEmbedding | PackedLinear):
            raise ValueError(f"{name} shares the weight of {of}, which is no embedding and no linear layer")
        if old not in replaced:  # one module may have several names
            replaced[old] = _sharing(old, owner)
        model.set_submodule(name, replaced[old])
        _say_it_is_made(model, name)
    _untie(model, ties)


def _say_it_is_made(model: nn.Module, name: str) -> None:
    """Some models (GPT-2) initialise `child.weight` from the parent while loading; the packed child has none."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if not parent._buffers:
        parent._is_hf_initialized = True  # type: ignore[assignment]


def _replace_experts(model: nn.Module, specs: dict[str, Spec]) -> dict[str, list[Spec]]:
    """Put packed experts in the place of fused parameters; these parameters, with the specs of their experts."""
    fused = _fused(model, specs)
    for parameter, (found, experts) in fused.items():
        module = model.get_submodule(parameter.rpartition(".")[0])
        del module._parameters[found.leaf]
        with torch.device(found.value.device):
            made = PackedExperts(experts, transposed=found.transposed, joined=found.joined, dtype=found.value.dtype)
        module.add_module(found.leaf, made)
        module._is_hf_initialized = True  # type: ignore[assignment]  # its class would fill the parameter
    if fused:
        run_one_by_one(model)
    return {parameter: experts for parameter, (_, experts) in fused.items()}


def _sharing(old: nn.Module, owner: PackedEmbedding | PackedLinear) -> nn.Module:
    """What uses the weight of a packed embedding or layer in the place of a module."""
    weight = old.weight
    assert isinstance(weight, Tensor)
    with torch.device(weight.device):
        if isinstance(owner, PackedLinear):
            return TiedLinear(owner, bias=getattr(old, "bias", None) is not None, dtype=weight.dtype)
        if isinstance(old, nn.Embedding):
            made = packed_embedding(old, owner.spec, owner)
            made.described = True
            return made
        return SharedLinear(owner, bias=getattr(old, "bias", None) is not None, dtype=weight.dtype)


def _ties(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Part of a model -> the names that transformers ties in it, each with that of what it is tied to."""
    found = ((part, getattr(part, "get_expanded_tied_weights_keys", None)) for part in model.modules())
    return {part: named() for part, named in found if named is not None}


def _untie(model: nn.Module, ties: Mapping[nn.Module, dict[str, str]]) -> None:
    """What is packed has no parameter left that transformers could tie."""
    for part, named in ties.items():
        there = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        part._tied_weights_keys = {a: b for a, b in named.items() if {a, b} <= there}  # type: ignore[assignment]
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known = getattr(model, "all_tied_weights_keys", None) or {}
    for name in [name for name, other in known.items() if not {name, other} <= there]:
        known.pop(name)


def _fused(model: nn.Module, specs: dict[str, Spec]) -> dict[str, tuple[Fused, list[Spec]]]:
    """Fused parameter -> what it is, and the specs of its experts in their order; of those parameters that have any."""
    every = {
        f"{owner}.{fused.leaf}" if owner else fused.leaf: fused
        for owner, module in model.named_modules()
        for fused in fused_parameters(module)
    }
    found: dict[str, tuple[Fused, list[Spec]]] = {}
    for parameter in dict.fromkeys(name.rpartition(".")[0] for name in specs):
        if parameter not in every:
            continue
        names = [f"{parameter}.{number}" for number in range(every[parameter].count)]
        missing = [name for name in names if name not in specs]
        if missing:
            raise ValueError(f"{missing[0]} is not described among the packed experts of {parameter}")
        found[parameter] = every[parameter], [specs[name] for name in names]
    return found


def _packed_module(old: nn.Module, spec: Spec, dtype: torch.dtype) -> PackedModule:
    if is_convolution(old):
        return PackedConvolution(spec, old)
    if is_transposed_convolution(old):
        return PackedTransposedConvolution(spec, old)
    if isinstance(old, nn.Embedding):
        made = packed_embedding(old, spec)
        made.described = True  # until its tensors are read
        return made
    has_bias = getattr(old, "bias", None) is not None
    return PackedLinear(spec, bias=has_bias, transposed=not isinstance(old, nn.Linear), dtype=dtype)


def _refuse_other_tensors(model: nn.Module, files: list[str], biases: list[str]) -> None:
    """Transformers only warns about missing tensors, older versions about wrong shapes too, and go on without them.

    What is tied is there once. Buffers that are not in the file are as the model computes them, except statistics.
    """
    there: dict[str, tuple[int, ...]] = {}
    for file in files:
        there.update((name, tuple(entry.shape)) for name, entry in read_header(Path(file)).tensors.items())
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    needed = {f"{name}.{leaf}" for name, module in packed.items() for leaf in module.spec.tensors()} & wanted.keys()
    buffers = {name for name, _ in model.named_buffers() if not name.endswith(RUNNING)} - needed
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [*ties.items(), *((source, target) for target, source in ties.items())]
    tied = {name for name, other in pairs if other in there}
    if there.keys() - wanted.keys():
        spelling = Spelling(model)  # the names that this version of transformers gives them while loading
        there = {spelling.renamed(name): shape for name, shape in there.items()}
    for name in ignored(model, there.keys() - wanted.keys()):
        del there[name]
    scales = {f"{name}.{leaf}" for name in cached_layers(model) for leaf in SCALES}
    optional = (buffers | tied) - {f"{module}.bias" for module in biases} - scales
    refuse_other_tensors(there, wanted, optional, ", ".join(files))


def register() -> None:
    """Idempotent."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, CompressConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, CompressQuantizer)


register()
