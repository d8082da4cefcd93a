"""Every pass: one verb, one file, one test file. The order they run in is the list in ``fxcompress/pipeline.py``."""

from .absorb_high_bias import AbsorbHighBias
from .assign_ranges import AssignRanges
from .canonicalize_affine import CanonicalizeAffine
from .check_dialect import CheckDialect
from .convolve_in_tiles import ConvolveInTiles
from .correct_bias import CorrectBias
from .eliminate_dead_code import EliminateDeadCode
from .equalize_cross_layer import EqualizeCrossLayer
from .expand_batch_norm import ExpandBatchNorm
from .expand_inputs import ExpandInputs
from .expand_residuals import ExpandResiduals
from .fold_batch_norm import FoldBatchNorm
from .fold_constants import FoldConstants
from .fuse_activation import FuseActivation
from .fuse_padding import FusePadding
from .group_kernels import GroupKernels
from .harvest_statistics import HarvestStatistics
from .lower_to_integer import LowerToInteger
from .multiply_in_blocks import MultiplyInBlocks
from .normalize import Normalize
from .prune_branches import PruneBranches
from .prune_channels import PruneChannels
from .prune_products import PruneProducts
from .prune_weights import PruneWeights
from .quantize import Quantize
from .spiq import Spiq

__all__ = [
    "AbsorbHighBias",
    "AssignRanges",
    "CanonicalizeAffine",
    "CheckDialect",
    "ConvolveInTiles",
    "CorrectBias",
    "EliminateDeadCode",
    "EqualizeCrossLayer",
    "ExpandBatchNorm",
    "ExpandInputs",
    "ExpandResiduals",
    "FoldBatchNorm",
    "FoldConstants",
    "FuseActivation",
    "FusePadding",
    "GroupKernels",
    "HarvestStatistics",
    "LowerToInteger",
    "MultiplyInBlocks",
    "Normalize",
    "PruneBranches",
    "PruneChannels",
    "PruneProducts",
    "PruneWeights",
    "Quantize",
    "Spiq",
]
