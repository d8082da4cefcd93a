"""THE list of passes, in order, with one line of why per entry. Never solved for, only checked (``check_order``)."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import PipelineError, nearest
from .options import Target
from .pass_manager import as_pass, check_order
from .passes.absorb_high_bias import AbsorbHighBias
from .passes.assign_ranges import AssignRanges
from .passes.canonicalize_affine import CanonicalizeAffine
from .passes.check_dialect import CheckDialect
from .passes.convolve_in_tiles import ConvolveInTiles
from .passes.correct_bias import CorrectBias
from .passes.eliminate_dead_code import EliminateDeadCode
from .passes.equalize_cross_layer import EqualizeCrossLayer
from .passes.expand_batch_norm import ExpandBatchNorm
from .passes.expand_inputs import ExpandInputs
from .passes.expand_residuals import ExpandResiduals
from .passes.fold_batch_norm import FoldBatchNorm
from .passes.fold_constants import FoldConstants
from .passes.fuse_activation import FuseActivation
from .passes.fuse_padding import FusePadding
from .passes.group_kernels import GroupKernels
from .passes.harvest_statistics import HarvestStatistics
from .passes.lower_to_integer import LowerToInteger
from .passes.multiply_in_blocks import MultiplyInBlocks
from .passes.normalize import Normalize
from .passes.prune_channels import PruneChannels
from .passes.prune_weights import PruneWeights
from .passes.quantize import Quantize
from .passes.spiq import Spiq
from .rewrite import Level, Pass


class PassList(list):
    """An editable list of passes: ordinary list methods, and insertion by name. A name in place of a new pass is that of one which an
    installed package publishes.

    >>> passes = default_passes("int8")                                             # doctest: +SKIP
    >>> passes.insert_after("fold_batch_norm", MyPass())                            # doctest: +SKIP
    """

    def index_of(self, name: str) -> int:
        """Position of the pass called ``name``. Raises ``PipelineError`` with the nearest name when there is none."""
        for i, p in enumerate(self):
            if p.name == name:
                return i
        raise PipelineError(f"no pass named {name!r}", stage="passes", remedy=nearest(name, [p.name for p in self]))

    def insert_before(self, name: str, new) -> PassList:
        """Put ``new`` (a pass, a pass class, a published pass's name, a callable written for torch) before ``name``. Returns the list."""
        self.insert(self.index_of(name), as_pass(new))
        return self

    def insert_after(self, name: str, new) -> PassList:
        """Put ``new`` behind ``name``. Returns the list."""
        self.insert(self.index_of(name) + 1, as_pass(new))
        return self

    def replace(self, name: str, new) -> PassList:
        """Put ``new`` in the place of ``name``. Returns the list."""
        self[self.index_of(name)] = as_pass(new)
        return self

    def without(self, *names: str) -> PassList:
        """A copy without the named passes."""
        drop = {self.index_of(name) for name in names}
        return PassList(p for i, p in enumerate(self) if i not in drop)

    @property
    def names(self) -> list[str]:
        """Of the passes, in order."""
        return [p.name for p in self]


#: THE list: each pass, and why it stands where it stands.
_ORDER: tuple[tuple[type[Pass], str], ...] = (
    (Normalize, "first: every later pattern is written for one spelling per operation"),
    (FoldConstants, "parameters computed from parameters (weight norm) become weights the next passes can read"),
    (EliminateDeadCode, "unused branches would otherwise count as consumers and block folding"),
    (CheckDialect, "what no pass below understands is refused now, by name, before any work on it"),
    (PruneChannels, "on effective weights, yet before batch norm folds: its statistics follow the cut"),
    (GroupKernels, "where kernels are removed instead of channels; before folding for the same reason"),
    (PruneWeights, "where single weights are; zeros stay zero in every pass that follows"),
    (HarvestStatistics, "before folding, which destroys beta and gamma, the data-free ranges"),
    (CanonicalizeAffine, "scales and shifts by constants fold by the same rules as batch norm"),
    (FoldBatchNorm, "before anything that looks at weights: they must be the effective ones"),
    (ExpandBatchNorm, "what could not fold is a depthwise 1x1 convolution: nothing after knows batch norm"),
    (FuseActivation, "after folding: clamps now sit right behind the sums they can be fused into"),
    (EqualizeCrossLayer, "after folding, on effective weights; before ranges, which it divides"),
    (AbsorbHighBias, "after equalizing, which makes small rows' biases high"),
    (AssignRanges, "last at float level: every rewrite that moves values is done"),
    (Spiq, "from ranges to qparams per channel; before weights are rounded, which absorb the scales"),
    (Quantize, "cuts the graph into codes; accumulators keep flowing into clamps, additions and outputs"),
    (ExpandResiduals, "what rounding the weights lost, before the biases answer for what remains"),
    (CorrectBias, "needs the final weights as they were rounded, and float biases to write into"),
    (ExpandInputs, "after correcting, which compares layers with the float network one for one"),
    (LowerToInteger, "scales become dyadic numbers, zero points move into biases"),
    (FusePadding, "explicit pads in front of a convolution are that convolution's padding"),
    (ConvolveInTiles, "after fusing padding, which it reads; it replaces convolutions that every pass above knows"),
    (MultiplyInBlocks, "last: it replaces the products that every pass above knows"),
)


def default_passes(target: str | Target = "int8") -> PassList:
    """The passes ``compile`` runs for ``target``, as a fresh, editable list."""
    Target.parse(target)
    return PassList(kind() for kind, _ in _ORDER)


def reasons() -> dict[str, str]:
    """Why each default pass stands where it stands, by name, in order."""
    return {kind.name: reason for kind, reason in _ORDER}


def build_passes(passes: Sequence | None, target: Target) -> PassList:
    """``compile``'s ``passes=`` argument as a list: None is the default; callables written for torch are wrapped.

    Raises ``PipelineError`` for an illegal order, and for a list that does not end at the integer level.
    """
    default = default_passes(target)
    if passes is None:
        return default
    if isinstance(passes, str) or not isinstance(passes, Sequence):
        raise PipelineError(f"passes is a {type(passes).__name__}", stage="compile", expected="a list of passes",
                            remedy="Edit the list that default_passes(target) returns.")  # fmt: skip
    for name in passes:
        if isinstance(name, str):
            raise PipelineError(f"{name!r} is a name, not a pass", stage="compile", expected="a Pass or a callable(gm) -> PassResult",
                                remedy=f"{nearest(name, default.names)} Edit default_passes(target): insert_after, replace, without.")  # fmt: skip
    built = PassList(as_pass(p) for p in passes)
    if (level := check_order(built, default)) is not Level.INTEGER:
        raise PipelineError(f"the list of passes ends at the {level.value} level", stage="compile", expected="the integer level",
                            remedy="Edit the list that default_passes(target) returns.")  # fmt: skip
    return built
