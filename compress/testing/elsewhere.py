"""A device that is not there: its tensors lie in this machine's memory, but do not mix with the processor's.

What a machine without an accelerator can say about code that is to run on one: nothing computes with tensors of two
devices, draws random numbers on the wrong one, or reads memory that is not the processor's.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

NAME = "elsewhere"
CPU = torch.device("cpu")
LARGE = 1 << 12  # numbers: a longer list is read from a copy on the processor, explicitly


class MixedDevicesError(AssertionError):
    """Tensors of two devices met: an accelerator would have refused."""


class Elsewhere(Tensor):
    """A tensor of the pretended device.

    Attributes:
        here: its values in the processor's memory; for this file only.
    """

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=torch.device(NAME, 0),
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(op, tuple(args), dict(kwargs or {}))

    def tolist(self) -> Any:
        if self.numel() > LARGE:
            raise MixedDevicesError(f"a list of {self.numel()} numbers is read from a device; copy it explicitly")
        return self.here.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"elsewhere({self.here!r})"


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations that have no tensor to tell the device by."""

    def __torch_dispatch__(
        self, op: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(op, tuple(args), dict(kwargs or {}))


def _computed(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the device that its tensors, or its `device=`, say."""
    given: list[Tensor] = []

    def here(tensor: Tensor) -> Tensor:
        given.append(tensor)
        return tensor.here if isinstance(tensor, Elsewhere) else tensor

    inner, named = _each(args, here), {name: _each(value, here) for name, value in kwargs.items()}
    there = any(isinstance(t, Elsewhere) for t in given)
    if there and any(t.dim() for t in given if not isinstance(t, Elsewhere)):
        raise MixedDevicesError(f"{op} is given tensors of two devices")
    asked = kwargs.get("device")
    result_there = there if asked is None else torch.device(asked).type == NAME
    if result_there and kwargs.get("generator") is not None:
        raise MixedDevicesError(f"{op} draws on a device with the processor's generator")
    made = op(*inner, **(named if asked is None else {**named, "device": CPU}))
    if not result_there:
        return made
    wrapped = _each(made, lambda tensor: tensor if isinstance(tensor, Elsewhere) else Elsewhere(tensor))
    if asked is not None or not there:
        return wrapped
    return return_and_correct_aliasing(op, args, kwargs, wrapped)  # type: ignore[no-untyped-call]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(part, change) for part in value) if type(value) in (list, tuple) else value


class _Backend(backend_registration._DummyBackendModule):
    """`torch.elsewhere`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: object = None) -> Tensor:
        """Nothing is drawn there; `torch.random.fork_rng` asks every device of the process."""
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        """Nothing is drawn there."""


# Before anything is differentiated: autograd counts the devices once a process.
backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """While open, there is another device."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor([...], device=...)` is moved by an operation of its own
    try:
        with _Factories():  # type: ignore[no-untyped-call]
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
