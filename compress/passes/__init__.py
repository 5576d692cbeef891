"""The passes, listed by hand. A new method is one file, one line here and one test file."""

from __future__ import annotations

from compress.passes.base import BlockPass, LinearPass, ModelPass, Override, Pass
from compress.passes.compensate.eora import Eora
from compress.passes.depth import DepthPass
from compress.passes.experts import ExpertsPass
from compress.passes.factorize.low_rank import LowRank
from compress.passes.factorize.oats import Oats
from compress.passes.merge.adamerging import AdaMerging
from compress.passes.merge.average import Average
from compress.passes.merge.base import MergePass
from compress.passes.merge.bitdelta import BitDelta
from compress.passes.merge.breadcrumbs import Breadcrumbs
from compress.passes.merge.compeft import Compeft
from compress.passes.merge.dare import Dare
from compress.passes.merge.della import Della
from compress.passes.merge.delta_pass import DeltaPass
from compress.passes.merge.greedy_soup import GreedySoup
from compress.passes.merge.interpolate import Interpolate
from compress.passes.merge.model_stock import ModelStock
from compress.passes.merge.nuslerp import Nuslerp
from compress.passes.merge.pcb import Pcb
from compress.passes.merge.robust_signature import RobustSignature
from compress.passes.merge.slerp import Slerp
from compress.passes.merge.task_arithmetic import TaskArithmetic
from compress.passes.merge.ties import Ties
from compress.passes.merge.weight_matching import WeightMatching
from compress.passes.prune.activation_sparsity import ActivationSparsity
from compress.passes.prune.bip import Bip
from compress.passes.prune.expert_merge import ExpertMerge
from compress.passes.prune.expert_prune import ExpertPrune
from compress.passes.prune.global_magnitude import GlobalMagnitude
from compress.passes.prune.layer_drop import LayerDrop
from compress.passes.prune.magnitude import Magnitude
from compress.passes.prune.sparsegpt import SparseGpt
from compress.passes.prune.wanda import Wanda
from compress.passes.prune.width_prune import WidthPrune
from compress.passes.quantize.adaround import AdaRound
from compress.passes.quantize.codebook import Codebook
from compress.passes.quantize.flexround import FlexRound
from compress.passes.quantize.gptq import Gptq
from compress.passes.quantize.jlcm import Jlcm
from compress.passes.quantize.kv_cache import KvCache
from compress.passes.quantize.nupes import Nupes
from compress.passes.quantize.olive import Olive
from compress.passes.quantize.powerquant import PowerQuant
from compress.passes.quantize.powerquant_shared import PowerQuantShared
from compress.passes.quantize.reorder import Reorder
from compress.passes.quantize.rtn import Rtn
from compress.passes.retrain.perp import Perp
from compress.passes.retrain.perp_reconstruct import PerpReconstruct
from compress.passes.retrain.qat import Qat
from compress.passes.retrain.recalibrate_norms import RecalibrateNorms
from compress.passes.retrain.sparse_soup import SparseSoup
from compress.passes.transform.rotate import Rotate
from compress.passes.transform.scale import Scale
from compress.passes.transform.scaling import ScalingPass
from compress.passes.transform.smooth import Smooth
from compress.passes.width import WidthPass

PASSES: tuple[type[Pass], ...] = (
    Rtn,
    Gptq,
    AdaRound,
    FlexRound,
    Olive,
    PowerQuant,
    PowerQuantShared,
    Nupes,
    Codebook,
    Jlcm,
    KvCache,
    Reorder,
    Scale,
    Smooth,
    Rotate,
    Magnitude,
    GlobalMagnitude,
    Wanda,
    SparseGpt,
    Bip,
    ActivationSparsity,
    LayerDrop,
    ExpertPrune,
    ExpertMerge,
    WidthPrune,
    Perp,
    PerpReconstruct,
    Qat,
    SparseSoup,
    RecalibrateNorms,
    Eora,
    LowRank,
    Oats,
    Average,
    GreedySoup,
    ModelStock,
    Slerp,
    Nuslerp,
    Interpolate,
    TaskArithmetic,
    Ties,
    Breadcrumbs,
    Dare,
    Della,
    Pcb,
    AdaMerging,
    WeightMatching,
    RobustSignature,
    Compeft,
    BitDelta,
)

__all__ = [
    "PASSES",
    "ActivationSparsity",
    "AdaMerging",
    "AdaRound",
    "Average",
    "Bip",
    "BitDelta",
    "BlockPass",
    "Breadcrumbs",
    "Codebook",
    "Compeft",
    "Dare",
    "Della",
    "DeltaPass",
    "DepthPass",
    "Eora",
    "ExpertMerge",
    "ExpertPrune",
    "ExpertsPass",
    "FlexRound",
    "GlobalMagnitude",
    "Gptq",
    "GreedySoup",
    "Interpolate",
    "Jlcm",
    "KvCache",
    "LayerDrop",
    "LinearPass",
    "LowRank",
    "Magnitude",
    "MergePass",
    "ModelPass",
    "ModelStock",
    "Nupes",
    "Nuslerp",
    "Oats",
    "Olive",
    "Override",
    "Pass",
    "Pcb",
    "Perp",
    "PerpReconstruct",
    "PowerQuant",
    "PowerQuantShared",
    "Qat",
    "RecalibrateNorms",
    "Reorder",
    "RobustSignature",
    "Rotate",
    "Rtn",
    "Scale",
    "ScalingPass",
    "Slerp",
    "Smooth",
    "SparseGpt",
    "SparseSoup",
    "TaskArithmetic",
    "Ties",
    "Wanda",
    "WeightMatching",
    "WidthPass",
    "WidthPrune",
]
