"""Teaches transformers to load a compressed folder: `import compress`, then `from_pretrained(OUT)`.

The weight file has a name of its own. A loader that does not know this plug-in would otherwise warn, build the plain
model and run on random weights; so it finds no weights and stops.
"""

import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.encodings import Spec
from compress.runtime.linear import PackedLinear, replace_modules

METHOD = "compress"
WEIGHTS = "compress.safetensors"


class CompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder.

    Args:
        modules: module name -> the spec of its packed weight.
        version: of the package that wrote it, for people.
    """

    def __init__(self, modules: dict[str, dict[str, Any]] | None = None, version: str = "", **_: Any):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.modules = modules or {}
        self.version = version

    def specs(self) -> dict[str, Spec]:
        """The specs, parsed."""
        return {name: Spec.from_json(spec) for name, spec in self.modules.items()}


class CompressQuantizer(HfQuantizer):
    """Swaps packed modules in before the weights are read into them."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        assert isinstance(config, CompressConfig)
        specs = config.specs()
        if checkpoint_files:
            _refuse_incomplete(checkpoint_files, specs)
        replace_modules(model, specs)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        """Transformers turns gradients on for every floating parameter it loads; packed ones have none."""
        for module in model.modules():
            if isinstance(module, PackedLinear):
                for name in module.spec.tensors():
                    getattr(module, name).requires_grad_(False)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Every tensor takes the type its own module was made with."""
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before the weight files are looked up: point at ours."""
        folder = getattr(config, "name_or_path", "") or ""
        if not os.path.isdir(folder) or os.path.exists(os.path.join(folder, WEIGHTS)):
            config.transformers_weights = WEIGHTS
        return config

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes the packed tensors as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes do not train."""
        return False


def _refuse_incomplete(files: list[str], specs: dict[str, Spec]) -> None:
    """Transformers only warns about missing tensors and goes on with random memory."""
    there: set[str] = set()
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                there.update(opened.keys())
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupt: {error}") from error
    for module, spec in specs.items():
        for leaf in spec.tensors():
            if f"{module}.{leaf}" not in there:
                raise ValueError(
                    f"{', '.join(files)}: {module}.{leaf} is missing; the folder is damaged: write it again"
                )


def register() -> None:
    """Idempotent."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, CompressConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, CompressQuantizer)
