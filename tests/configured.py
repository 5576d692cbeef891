"""Passes with every option that they have, to run claims over all of them."""

from compress.passes import PASSES, MergePass
from compress.passes.merge.schedules import Matched

# Options worth trying beside the defaults. A pass that is not named here is tested with its defaults.
OPTIONS: dict[str, list[dict[str, object]]] = {
    "rtn": [
        {"bits": 3, "group_size": 16, "symmetric": True},
        {"bits": 8, "granularity": "tensor", "scale_search": "mse"},
        {"bits": 2, "granularity": "channel"},
        {"bits": 8, "activation_bits": 8},
        {"activation_bits": 4, "activation_scale": "tensor", "activation_grid": "olive"},
        {"grid": "fp8", "bits": 8, "activation_bits": 8, "activation_grid": "fp8"},
        {"grid": "mxfp4", "bits": 4, "group_size": 32, "fallback": "channel", "scale_search": "mse"},
        {"grid": "q4_k", "bits": 4, "group_size": 32, "fallback": "channel", "scale_search": "mse"},
    ],
    "gptq": [
        {"bits": 3, "group_size": 16, "symmetric": True, "tile": 16},
        {"bits": 8, "granularity": "tensor", "damping": 0.1},
        {"act_order": True, "group_size": 16, "scale_search": "weighted", "rounds": 2},
        {"activation_bits": 8, "activation_scale": "tensor"},
        {"grid": "nvfp4", "bits": 4, "group_size": 16, "scale_search": "weighted", "rounds": 1},
    ],
    "olive": [
        {"normal": "flint4", "double_outlier": "even"},
        {"bits": 8, "lower": 1.0, "upper": 1.5, "step": 0.25},
        {"normal": "int4", "rescue_error": 0.05},
        {"activation_bits": 4, "activation_scale": "tensor", "activation_grid": "olive"},
    ],
    "powerquant": [
        {"bits": 3, "group_size": 16, "levels": "zero", "norm": 2.0},
        {"bits": 8, "granularity": "tensor", "scale_search": "minmax"},
        {"bits": 2, "levels": "half", "exponent": 0.8},
        {"activation_bits": 4, "activation_scale": "tensor", "activation_grid": "power"},
    ],
    "powerquant_shared": [
        {"bits": 3, "group_size": 16, "share": "block"},
        {"levels": "half", "scale_search": "minmax"},
    ],
    "codebook": [
        {"weighting": "none", "tables": 3},
        {"bits": 2, "scale": "row", "tables": 2, "iterations": 5},
        {"entries": 5, "scale": "row", "weighting": "none", "tolerance": 0.0},
        {"bits": 8},
        {"bits": 3, "scale": "group", "group_size": 16, "tables": 2},
    ],
    "flexround": [
        {"steps": 4, "bits": 2, "group_size": 16, "inputs": "mix"},
        {"steps": 4, "bits": 3, "objective": "layer", "symmetric": True},
        {"steps": 4, "granularity": "tensor", "rank": 2, "inputs": "original"},
    ],
    "nupes": [
        {"steps": 4, "bits": 2, "group_size": 16, "levels": "half"},
        {"steps": 4, "bits": 3, "granularity": "tensor", "objective": "layer", "learn_scale": False},
        {"steps": 4, "bits": 3, "learn_exponent": False, "scale_search": "minmax", "levels": "zero"},
        {"steps": 4, "bits": 3, "moves": "grid"},
    ],
    "jlcm": [
        {"steps": 4, "bits": 2, "mapping_rate": 0.5},
        {"steps": 4, "entries": 5, "tables": 2, "scale": "row", "mapping_gradient": "distance"},
        {"steps": 4, "bits": 3, "objective": "layer", "learn_mapping": False, "weighting": "none"},
        {"steps": 4, "bits": 2, "scale": "group", "group_size": 16},
    ],
    "reorder": [{"groups": 3}],
    "scale": [{"bits": 3, "group_size": 4, "symmetric": True, "steps": 5}, {"bits": 2, "group_size": 12, "clip": True}],
    "rotate": [{"matrix": "orthogonal", "values": False, "online": True}],
    "smooth": [{"strength": 0.8}, {"strength": 0.0}],
    "eora": [
        {"rank": None, "energy": 0.5},
        {"rank": 4, "adapter_bits": 8, "method": "activation"},
        {"rank": 2, "adapter_bits": 4, "method": "svd"},
    ],
    "low_rank": [
        {"ratio": 0.8, "method": "svd", "inputs": "mix"},
        {"ratio": 0.25, "perturbation": 0.1, "floor": 1e-4},
        {"allocate": "energy"},
    ],
    "oats": [
        {"iterations": 2, "sparsity": "2:4", "ratio": 0.3},
        {"iterations": 2, "scaling": "none", "floor": 1e-4, "ratio": 0.25},
    ],
    "perp": [
        {"train": ("scale_lora",), "rank": 2},
        {"train": ("lora_prune", "bias"), "rank": 2, "new_biases": True},
        {"train": ("full",), "batch_size": 2},
        {"train": ("principal",), "rank": 2, "share": 0.2},
        {"train": ("sensitive",), "rank": 2},
        {"train": ("lora",), "rank": 2, "alpha": 1.0},
    ],
    "qat": [
        {"bits": 2, "group_size": 16, "symmetric": True, "scale": "stats"},
        {"levels": "ternary", "scale": "mean", "granularity": "tensor"},
        {"levels": "ternary", "scale": "median", "group_size": 16},
        {"levels": "ternary", "train": ("lora",), "rank": 2},
        {"bits": 2, "anneal": 0.5},
        {"bits": 3, "scale": "fixed", "train": ("principal",), "rank": 2, "share": 0.5},
    ],
    "perp_reconstruct": [{"train": ("scale_lora", "mask_lora"), "rank": 2}, {"granularity": "matrix"}],
    "adaround": [{"steps": 4, "bits": 2, "group_size": 16}, {"steps": 4, "objective": "layer"}],
    "magnitude": [{"sparsity": "2:4"}, {"sparsity": 0.25}],
    "global_magnitude": [
        {"sparsity": 0.7, "min_keep": 0.01},
        {"sparsity": 0.0},
        {"sparsity": 0.95, "cuts": 2, "steps": 2, "regrow": True},
    ],
    "bip": [
        {"sparsity": 0.95, "mask_rate": 0.1},
        {"granularity": "filter", "steps": 2},
        {"granularity": "channel", "correction": True, "steps": 2},
    ],
    "kv_cache": [{"grid": "int", "per": "head"}, {"grid": "int", "bits": 4}],
    "recalibrate_norms": [{"batch_size": 4}],
    "sparse_soup": [{"models": 2, "soup": "greedy"}, {"sparsity": 0.95, "phases": 2, "models": 2}],
    "wanda": [
        {"sparsity": "2:4"},
        {"sparsity": 0.3, "free_rows": True},
        {"update": "obs", "damping": 0.1},
        {"sparsity": "2:4", "update": "exact"},
    ],
    "activation_sparsity": [{"skip": 0.25, "criterion": "teal"}],
    "layer_drop": [{"blocks": 2}, {"blocks": 3, "greedy": False}, {"blocks": 2, "criterion": "angular"}, {"blocks": 0}],
    "width_prune": [
        {"score": "magnitude", "repair": "none", "sparsity": 0.4},
        {"score": "activation", "parts": ("mlp",), "multiple_of": 64},
        {"score": "fluctuation", "repair": "bias"},
        {"score": "taylor", "damping": 0.1, "parts": ("heads",)},
    ],
    "expert_prune": [{"keep": 6}, {"keep": 0.25, "by": "frequency"}],
    "expert_merge": [
        {"keep": 6, "weigh": "router_weight", "router": "dominant"},
        {"keep": 0.25, "weigh": "equal", "align": False},
    ],
    "sparsegpt": [{"sparsity": "4:8", "damping": 0.1}, {"sparsity": 0.7, "tile": 16}],
    "average": [
        {"weights": (0.5, 1.0, 2.0), "normalize": False},
        {"weights": ((0.0, 1.0, 0.5), 1.0, (Matched("*.mlp.*", 0.25), Matched("*", (0.0, 1.0))))},
        {"vocabulary": "common"},
    ],
    "slerp": [{"t": 0.25}, {"t": (0.0, 0.5, 1.0)}, {"t": (Matched("*.mlp.*", 0.25), Matched("*.bias", (0.0, 1.0)))}],
    "interpolate": [
        {"alpha": 1.0},
        {"alpha": (0.0, 1.0)},
        {"alpha": (Matched("*.mlp.*", 0.25),)},
        {"importance": "fisher"},
    ],
    "task_arithmetic": [{"scale": -1.0, "weights": (Matched("a", 0.5),)}, {"weights": (1.0, -1.0), "combine": "mean"}],
    "ties": [
        {"scope": "model", "density": (0.3, 0.9), "combine": "sum"},
        {"density": ((0.1, 0.9),), "tie": "positive", "scale": (0.5, 1.0)},
    ],
    "dare": [
        {"density": 0.5, "rescale": "l1", "combine": "mean"},
        {"density": (0.5, 0.9), "merge": "ties", "rescale": "none", "tie": "positive"},
    ],
    "breadcrumbs": [{"merge": "ties", "combine": "mean", "tie": "positive", "density": (0.5, 0.9), "gamma": 0.1}],
    "della": [
        {"density": (0.5, 0.9), "epsilon": 0.05, "rescale": "l1", "combine": "mean"},
        {"merge": "linear", "rescale": "none", "density": ((0.3, 0.8),)},
    ],
    "greedy_soup": [{"base": False}],
    "adamerging": [{"level": "task"}, {"trim": 0.5, "diversity": 0.1}, {"steps": 0}],
    "compeft": [
        {"density": 0.3, "magnitude": "std", "alpha": 2.0},
        {"scope": "tensor", "density": ((0.1, 0.9),), "magnitude": "mean", "alpha": (Matched("*.mlp.*", 0.5),)},
    ],
    "bitdelta": [{"bits": 3}, {"steps": 0}],
    "pcb": [{"scope": "tensor", "density": (0.2, (0.1, 0.5))}, {"clip": 0.0, "weights": (1.0, 0.5), "scale": 1.2}],
    "weight_matching": [
        {"sweeps": 3, "residual": False, "weights": (0.5, 1.0, 2.0)},
        {"weights": ((0.0, 1.0), 1.0, 0.5)},
    ],
    "robust_signature": [
        {"alpha": 0.5, "layers": 2, "bits": 4},
        {"target": "base", "alpha": ((0.0, 1.0),)},
        {"target": "last", "models": ("./standard", "./robust", "./other"), "alpha": (Matched("*.mlp.*", 0.25),)},
    ],
}

LEARNED = (
    "bitdelta",
    "adamerging",
    "flexround",
    "adaround",
    "nupes",
    "jlcm",
    "low_rank",
    "perp",
    "perp_reconstruct",
    "qat",
    "sparse_soup",
    "bip",
)

QUICK: dict[str, dict[str, object]] = {key: {"steps": 4} for key in LEARNED}  # keeps a learned method quick

NEEDED: dict[str, dict[str, object]] = {  # what a pass cannot do without
    cls.key: {"models": ("./one",) if cls.pairwise else ("./one", "./two")}
    for cls in PASSES
    if issubclass(cls, MergePass)
}

CONFIGURED = [
    cls(**{**QUICK.get(cls.key, {}), **NEEDED.get(cls.key, {}), **options})
    for cls in PASSES
    for options in [{}, *OPTIONS.get(cls.key, [])]
]
# One of every method, for `make test`.
FIRST = list({p.key: p for p in reversed(CONFIGURED)}.values())
