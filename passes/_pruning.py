"""What passes share that prune by scores: what they declare, what scores look at, and the comparison that holds a cut to its promise.

Such a pass prunes a network once. It goes in front of the passes that fold batch norm, whose statistics follow the cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from fxcompress.analysis.channel_groups import ChannelGroups
from fxcompress.errors import PassContractError
from fxcompress.options import context
from fxcompress.promises import in_float64, relative_change
from fxcompress.pruning.evidence import Evidence, Objective, predicted_logits
from fxcompress.pruning.statistics import collect
from fxcompress.rewrite import Fact, Level, Pass

EXAMPLES = 64  # that criteria look at
LARGEST_DIFFERENCE = 1e-6  # of the smaller network from the masked one, relative, in float64
SHORT = 0.01  # of the ratio asked for that may be missing: layers have whole channels


class PruningPass(Pass):
    """Base of the passes that prune by the options ``pruning_ratio``, ``pruning_criterion``, ...

    Args:
        objective: a scalar of the flat outputs whose gradient criteria use; default: the predicted logits.
    """

    level = Level.FLOAT
    needs = {Fact.NORMALIZED}
    invalidates = {Fact.STATISTICS}
    atomic = True
    source = "docs/pruning.md"

    def __init__(self, objective: Objective = predicted_logits):
        self.objective = objective

    def evidence(self, groups: ChannelGroups, needs_data: bool) -> Evidence:
        """What criteria look at, with examples of the calibration data where they need them."""
        calibrate = context(groups.gm).calibrate
        batches = collect(calibrate, EXAMPLES) if needs_data and calibrate is not None else ()
        return Evidence(groups, batches, self.objective)

    def difference(
        self,
        gm: fx.GraphModule,
        masked_and_smaller: Callable[[fx.GraphModule], tuple[fx.GraphModule, fx.GraphModule]],
        units: str,
    ) -> float:
        """Relative difference between the network whose ``units`` are zero and the one without them; 0 without example inputs.

        ``masked_and_smaller`` makes both of a float64 copy of ``gm``. Raises ``PassContractError`` if it is not rounding.
        """
        inputs = [x.double() if x.is_floating_point() else x for x in context(gm).example_inputs]
        if not inputs:
            return 0.0
        with torch.no_grad():
            masked, smaller = (fx.Interpreter(n).run(*inputs) for n in masked_and_smaller(in_float64(gm)))
        difference = relative_change(masked, smaller)
        if difference > LARGEST_DIFFERENCE:
            raise PassContractError(f"the smaller network differs by {difference:.3g} from the one with the {units} zeroed",
                                    stage=self.name, expected=f"at most {LARGEST_DIFFERENCE:g} in float64")  # fmt: skip
        return difference
