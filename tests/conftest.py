"""Fixtures every test may use. Nothing here reads the network or the bundled model."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import compress  # noqa: F401  (teaches transformers to read what the package writes)

VOCABULARY = 256


@pytest.fixture(scope="session", autouse=True)
def two_cores() -> None:
    """Two processes share the tests with one thread each; one process alone has two, where OMP_NUM_THREADS is not 1."""
    alone = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1"
    torch.set_num_threads(min(2 if alone else 1, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Shells let what they start in the background ignore Ctrl-C, and so would all commands that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For a module of many steps on tiny tensors, its fixtures included: a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from one seed and leaves no global setting behind."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_default_dtype(dtype)
    for number, handler in handlers.items():  # a command ignores signals when it has ended
        signal.signal(number, handler)


def make_llama(**changes: object) -> LlamaForCausalLM:
    """A random two-block Llama with weights large enough that its blocks matter."""
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        **changes,
    }
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


@pytest.fixture
def llama_maker() -> Callable[..., LlamaForCausalLM]:
    """`make_llama`, for a test that needs other dimensions: `llama_maker(num_hidden_layers=3)`."""
    return make_llama


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A fresh model in memory; a test may change it."""
    return make_llama()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as `save_pretrained` writes it: to be read only, shared by all tests."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    make_llama().save_pretrained(folder)
    return folder


@pytest.fixture
def tokens() -> Tensor:
    """(8, 32) token ids to calibrate with."""
    return torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def evaluation_tokens() -> Tensor:
    """(4, 32) other token ids to measure with."""
    return torch.randint(VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(2))


TRACED: dict[tuple[object, ...], Any] = {}


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing a model for ONNX takes seconds; what it gives does not depend on how a layer is packed."""
    from compress.export.onnx import build

    original = build.traced

    def cached(graph: Any, specs: Any, opset: int) -> Any:
        rounded = frozenset(name for name, spec in specs.items() if spec.inputs)
        shapes = frozenset((name, tuple(value.shape)) for name, value in graph.model.state_dict().items())
        # Where a model lies and how its layers are packed changes no trace.
        config = {**graph.model.config.to_dict(), "_name_or_path": "", "quantization_config": None}
        key = (type(graph.model), repr(config), shapes, frozenset(specs), rounded, opset)
        if key not in TRACED:
            TRACED[key] = original(graph, specs, opset)
        return TRACED[key].clone()

    monkeypatch.setattr(build, "traced", cached)
