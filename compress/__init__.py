"""Post-training compression in one file: merge, prune, retrain, quantize, compensate, measure, export.

Importing this package teaches transformers to load what it writes:

    import compress
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("OUT")  # weights stay packed
"""

from compress import demo
from compress.api.apply import Result, apply
from compress.api.apply_delta import apply_delta
from compress.api.export import export_to
from compress.api.run import run
from compress.calibration.data import load_tokens
from compress.calibration.metrics import Quality, evaluate
from compress.config.pipeline import Pipeline
from compress.encodings.format import version
from compress.errors import (
    CheckpointError,
    CompressError,
    ConfigError,
    DataError,
    GateError,
    NonFiniteError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from compress.export import CompressedTensors, Genai, Gguf, Hf, Onnx, Peft
from compress.passes import (
    AdaMerging,
    AdaRound,
    Average,
    Bip,
    BitDelta,
    Codebook,
    Compeft,
    Dare,
    Eora,
    FlexRound,
    GlobalMagnitude,
    Gptq,
    GreedySoup,
    Interpolate,
    Jlcm,
    LayerDrop,
    LowRank,
    Magnitude,
    Nupes,
    Olive,
    Override,
    Pcb,
    Perp,
    PerpReconstruct,
    PowerQuant,
    PowerQuantShared,
    Reorder,
    RobustSignature,
    Rtn,
    Slerp,
    SparseGpt,
    SparseSoup,
    TaskArithmetic,
    Ties,
    Wanda,
    WeightMatching,
)
from compress.report.report import Report, Row
from compress.runtime.register import register
from compress.runtime.speed import Speedup, speed_up

__version__ = version()
register()

__all__ = [
    "AdaMerging",
    "AdaRound",
    "Average",
    "Bip",
    "BitDelta",
    "CheckpointError",
    "Codebook",
    "Compeft",
    "CompressError",
    "CompressedTensors",
    "ConfigError",
    "Dare",
    "DataError",
    "Eora",
    "FlexRound",
    "GateError",
    "Genai",
    "Gguf",
    "GlobalMagnitude",
    "Gptq",
    "GreedySoup",
    "Hf",
    "Interpolate",
    "Jlcm",
    "LayerDrop",
    "LowRank",
    "Magnitude",
    "NonFiniteError",
    "Nupes",
    "Olive",
    "Onnx",
    "Override",
    "Pcb",
    "Peft",
    "Perp",
    "PerpReconstruct",
    "Pipeline",
    "PowerQuant",
    "PowerQuantShared",
    "Quality",
    "Reorder",
    "Report",
    "ResourceError",
    "Result",
    "RobustSignature",
    "Row",
    "Rtn",
    "Slerp",
    "SparseGpt",
    "SparseSoup",
    "Speedup",
    "TaskArithmetic",
    "Ties",
    "UnsupportedModelError",
    "UsageError",
    "Wanda",
    "WeightMatching",
    "apply",
    "apply_delta",
    "demo",
    "evaluate",
    "export_to",
    "load_tokens",
    "register",
    "run",
    "speed_up",
]
