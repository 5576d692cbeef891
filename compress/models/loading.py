"""The model that a configuration describes, built without weights; and a folder loaded."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from compress.errors import CheckpointError
from compress.io.heap import align
from compress.lazy import nn, torch, transformers
from compress.models.architecture import class_of, predicts_next
from compress.models.experts import run_one_by_one
from compress.models.refusals import read_settings
from compress.models.turned_inputs import turn_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

LARGE = 1 << 20  # numbers that are too many to be made and forgotten, parameter by parameter
MOST_WORDS = 300  # characters of another library's message
# Model type -> what its configuration has to say instead. RWKV divides weights in place at its first call, and hidden
# states between blocks, so that float16 does not overflow; packed weights stay what they are.
INSTEAD: dict[str, dict[str, Any]] = {"rwkv": {"rescale_every": 0}}


def read_config(folder: Path) -> transformers.PreTrainedConfig:
    """config.json of a folder; custom code is never run.

    Raises:
        CheckpointError: there is none, or no model of transformers can be made of it.
    """
    settings = read_settings(folder)
    try:
        read = transformers.AutoConfig.from_pretrained
        config: transformers.PreTrainedConfig = read(folder, trust_remote_code=False, local_files_only=True)
        for name, value in INSTEAD.get(config.model_type, {}).items():
            setattr(config, name, value)
        return config
    except Exception as error:  # each model's configuration class refuses in its own way
        file = folder / "config.json"
        raise CheckpointError(f"{file} cannot be used: {_reason(settings, error)}") from error


def _reason(settings: Mapping[str, Any], error: Exception) -> str:
    """Why transformers makes nothing of the content of a config.json."""
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        return "it does not say the model_type, by which transformers knows the kind of model; fetch it again"
    if kind in transformers.CONFIG_MAPPING:
        return one_line(error)
    if settings.get("auto_map"):
        return f"the code of a {kind!r} comes with the model (auto_map), and such code is never run here"
    return f"transformers {transformers.__version__} does not know a {kind!r}; a newer version may"


def one_line(error: Exception) -> str:
    """What another library says, as part of a sentence."""
    return " ".join(str(error).split())[:MOST_WORDS]


def computes_in(config: Any, stored: Iterable[torch.dtype]) -> torch.dtype:
    """The type that a model computes in: what its configuration says, else that of the first weights in the files."""
    configured = getattr(config, "dtype", None)
    if isinstance(configured, torch.dtype):
        return configured
    found = next((dtype for dtype in stored if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)
    return torch.float32 if found == torch.float64 else found  # which nothing computes in


def build(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """The model that a configuration names, parameters on the meta device, buffers real.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    try:
        return built(lambda: class_of(config)._from_config(config))
    except Exception as error:  # as above: a wrong value surfaces wherever the model's code first uses it
        raise CheckpointError(
            f"transformers cannot build the model that config.json describes: {one_line(error)}"
        ) from error


def sizes_of(config: transformers.PreTrainedConfig) -> tuple[int, int] | None:
    """How many numbers the parameters and the buffers of a model have; None where that takes memory to know."""
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            model = class_of(config)._from_config(config)
    except Exception:  # what is wrong is said where the model is built
        return None
    model.tie_weights()
    return sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers())


def built(make: Callable[[], transformers.PreTrainedModel]) -> transformers.PreTrainedModel:
    """What `make` makes, parameters on the meta device, buffers real."""
    from transformers.initialization import no_init_weights

    with no_init_weights(), _parameters_on_meta():
        model = make()
    _recompute_constants(model)
    _take_packed_branch(model)
    turn_inputs(model)
    model.tie_weights()
    model.eval()
    run_one_by_one(model)
    return model


def computed_parameters(model: transformers.PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters that no file need hold, as transformers makes them: such as the sinusoids of Marian's positions.

    Args:
        model: with its parameters on the meta device.
        names: of parameters that are in no file.

    Returns:
        Those of them that are the same whenever they are made.
    """
    declared = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    sinusoids = (n for n in names if any(re.search(pattern, n) for pattern in declared) or "embed_positions" in n)
    found = {}
    for name in sinusoids:
        owner, _, leaf = name.rpartition(".")
        made = [_made_anew(model, model.get_submodule(owner), leaf) for _ in range(2)]
        if torch.equal(*made) and bool(torch.isfinite(made[0]).all()):
            found[name] = made[0]
    return found


def _made_anew(model: transformers.PreTrainedModel, module: nn.Module, leaf: str) -> Tensor:
    """A parameter of a module, initialized from numbers that are no zeros."""
    kept = module._parameters[leaf]
    assert kept is not None
    module._parameters[leaf] = nn.Parameter(torch.rand(kept.shape), requires_grad=False)
    try:
        model._init_weights(module)
        return module._parameters[leaf].detach()  # type: ignore[union-attr]
    finally:
        module._parameters[leaf] = kept


def _take_packed_branch(model: nn.Module) -> None:
    """Let a model compute as its packed copy will: some code (FalconMamba, Jamba) asks, and calls `dt_proj` only then.

    As transformers marks what it loads with a quantizer; the mark is in no config.json.
    """
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel):
            module.config._is_quantized = True


def _recompute_constants(model: transformers.PreTrainedModel) -> None:
    """Make buffers that no file holds as `from_pretrained` makes them: anew at its end, in float32.

    While a model is constructed the type it computes in is torch's own, and constants are rounded on the way to what
    they are: sinusoids of GPT-J in half precision are off by up to a full turn.
    """
    kept = model.state_dict(keep_vars=True)
    for tensor in kept.values():
        tensor._is_hf_initialized = True  # what transformers then leaves as it is
    for module in model.modules():
        if not module._non_persistent_buffers_set:
            module._is_hf_initialized = True  # type: ignore[assignment]
    model.initialize_weights()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside keep real buffers (rotary frequencies are computed, not stored) but no parameter data."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with _large_on_meta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _large_on_meta() -> AbstractContextManager[None]:
    """While open, tensors that are made without numbers take no memory if they are large: they become parameters.

    The experts of a block of DeepSeek V3 would not even be allocated, in memory that holds less.
    """
    from torch.overrides import TorchFunctionMode

    class LargeOnMeta(TorchFunctionMode):  # made here: torch is imported when it is first needed
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is not torch.empty or kwargs.get("device") is not None:
                return func(*args, **kwargs)
            made = func(*args, **{**kwargs, "device": "meta"})
            return made if made.numel() > LARGE else func(*args, **kwargs)

    return LargeOnMeta()


def load_model(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A folder, packed or not, as a model in memory, without transformers' own progress bar.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = class_of(read_config(folder)).from_pretrained(folder, dtype=dtype or "auto").eval()
        align(model, convolutions=predicts_next(model))
        run_one_by_one(model)
        turn_inputs(model)
        return model
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, SafetensorError) as error:
        files = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "no safetensors"
        raise CheckpointError(f"{folder} ({files}) cannot be loaded: {one_line(error)}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
