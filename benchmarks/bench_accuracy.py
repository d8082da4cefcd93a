"""Float and integer accuracy of real pretrained models, calibrated and data-free.

    python benchmarks/bench_accuracy.py                                  # every model whose files are here
    python benchmarks/bench_accuracy.py --models resnet20 kws --limit 500
    python benchmarks/bench_accuracy.py --check-data                     # only the float figures against the published
    python benchmarks/bench_accuracy.py --methods --models lite0         # what each data-free method wins, at every width

Per model and way of choosing ranges: the metric of the float and of the integer network (top-1 in percent, ROC AUC for
the autoencoder), the drop in points, the SQNR of the outputs, predictions that changed, the seconds ``compile`` took and
whether the target is met. A drop below zero is a gain; 500 images resolve only 0.2 points, so read the SQNR too.

"data-free" means batch-norm statistics and the declared input range only. ``--methods`` measures the rows of ``METHODS`` at
the widths of ``WIDTHS``: a further method is one entry. Exit status 1 when a target is missed on the full set.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import harness
import torch
from real_models import LOADERS, WHOLE_SET, Unavailable, Workload, load

import fxcompress
from fxcompress.report import sqnr_db
from fxcompress.weight_quantizers import QUANTIZERS

CALIBRATED, DATA_FREE = "calibrated", "data-free"

#: What is compared by ``--methods``: options of ``compile``. One scale per weight tensor, then one per output channel.
NEAREST, SQUANT, POWER = ({"weight_quantizer": name} for name in ("nearest", "squant", "power"))
PER_TENSOR = NEAREST | {"weight_granularity": "tensor"}
NAIVE = {"equalize": False, "absorb_bias": False, "spiq": False, "bias_correction": None}
CORRECTED = NAIVE | {"bias_correction": "auto"}
DFQ = {"equalize": True, "absorb_bias": True, "spiq": False, "bias_correction": "auto"}
METHODS = {
    "tensor": PER_TENSOR | NAIVE,
    "tensor + CLE": PER_TENSOR | NAIVE | {"equalize": True},
    "tensor + correction": PER_TENSOR | CORRECTED,
    "tensor + DFQ": PER_TENSOR | DFQ,
    "channel": NEAREST | NAIVE,
    "channel + CLE": NEAREST | NAIVE | {"equalize": True},
    "channel + correction": NEAREST | CORRECTED,
    "channel + DFQ": NEAREST | DFQ,
    "SPIQ": NEAREST | NAIVE | {"spiq": True},
    "SPIQ + correction": NEAREST | CORRECTED | {"spiq": True},
    "SPIQ + DFQ": NEAREST | DFQ | {"spiq": True},
    "squant": SQUANT | NAIVE,
    "squant + correction": SQUANT | CORRECTED,
    "squant + DFQ": SQUANT | DFQ,
    "squant, SPIQ + correction": SQUANT | CORRECTED | {"spiq": True},
    "power": POWER | NAIVE,
    "power + correction": POWER | CORRECTED,
    "rex 25 %": NEAREST | NAIVE | {"residual": 0.25},
    "rex 50 %": NEAREST | NAIVE | {"residual": 0.5},
    "rex 75 %": NEAREST | NAIVE | {"residual": 0.75},
    "rex 25 % + correction": NEAREST | CORRECTED | {"residual": 0.25},
    "rex 50 % + correction": NEAREST | CORRECTED | {"residual": 0.5},
    "rex 75 % + correction": NEAREST | CORRECTED | {"residual": 0.75},
    "squant, rex 25 % + correction": SQUANT | CORRECTED | {"residual": 0.25},
    "squant, rex 50 % + correction": SQUANT | CORRECTED | {"residual": 0.5},
    "squant, rex 75 % + correction": SQUANT | CORRECTED | {"residual": 0.75},
    "power, rex 50 % + correction": POWER | CORRECTED | {"residual": 0.5},
    "squant, SPIQ, rex 50 % + corr.": SQUANT | CORRECTED | {"spiq": True, "residual": 0.5},
}
DEFAULT_METHOD = "default"
RESIDUAL_BITS = 4  # residual rows are measured for weights of at most that many bits
WIDTHS = ["w8a8", "w6a8", "w4a8", "w8a6", "w8a4"]

#: Bounds to meet: ("drop", points at most) or ("metric", at least).
TARGETS = {
    ("resnet20", CALIBRATED): ("drop", 0.2),
    ("resnet32", CALIBRATED): ("drop", 0.2),
    ("resnet56", CALIBRATED): ("drop", 0.2),
    ("resnet8", CALIBRATED): ("drop", 0.3),
    ("lite0", CALIBRATED): ("drop", 0.8),
    ("vww", CALIBRATED): ("metric", 85.0),
    ("kws", CALIBRATED): ("metric", 91.0),
    ("ad", CALIBRATED): ("metric", 0.87),
    ("resnet20", DATA_FREE): ("drop", 0.3),
    ("resnet32", DATA_FREE): ("drop", 0.3),
    ("resnet56", DATA_FREE): ("drop", 0.3),
    ("resnet8", DATA_FREE): ("drop", 0.3),
    ("lite0", DATA_FREE): ("drop", 0.8),
}


@dataclass(frozen=True)
class Case:
    """What to compile: where ranges come from, the widths, and further options by the name of a method."""

    ranges: str
    bits: str = "w8a8"
    method: str = DEFAULT_METHOD
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table. ``drop`` and both metrics in percent points, or AUC; ``met`` None without a target."""

    model: str
    ranges: str
    bits: str
    method: str
    unit: str
    labels: int
    float_metric: float
    integer_metric: float
    sqnr_db: float
    flipped: int | None
    compile_seconds: float
    run_seconds: float
    target: str
    met: bool | None

    @property
    def drop(self) -> float:
        return self.float_metric - self.integer_metric

    def __str__(self) -> str:
        digits = 4 if self.unit == "AUC" else 2
        flipped = "-" if self.flipped is None else str(self.flipped)
        mark = {True: "pass", False: "FAIL", None: ""}[self.met]
        return (
            f"{self.model:<9} {self.ranges:<11} {self.bits:<5} {self.method:<30} {self.labels:>6} {self.float_metric:>8.{digits}f} "
            f"{self.integer_metric:>8.{digits}f} {self.drop:>+8.{digits}f} {self.sqnr_db:>6.1f} {flipped:>6} "
            f"{self.compile_seconds:>8.1f} {self.run_seconds:>7.1f}  {self.target:<14} {mark}"
        )


HEADER = (
    f"{'model':<9} {'ranges':<11} {'bits':<5} {'method':<30} {'labels':>6} {'float':>8} {'integer':>8} {'drop':>8} {'SQNR':>6} {'flips':>6} "
    f"{'compile s':>8} {'run s':>6}  {'target':<14}"
)


def compile_workload(workload: Workload, ranges: str, target: str = "int8", **options):
    """The integer network: raw inputs in, what the float model gives out."""
    return fxcompress.compile(
        workload.model,
        target=target,
        example_inputs=(next(workload.batches(workload.inputs[:2])),),
        calibration_data=list(workload.batches(workload.calibration)) if ranges == CALIBRATED else None,
        input_range=workload.input_range,
        input_normalization=workload.normalization,
        **options,
    )


def check_backends(compiled, workload: Workload) -> None:
    """Raise unless the reference backend gives the same bits on a few inputs, from what was saved."""
    inputs = next(workload.batches(workload.inputs[:4]))
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(path := Path(folder) / "model.fxc")
        reference = fxcompress.load(path, backend="reference")
    if not torch.equal(compiled(inputs), reference(inputs)):
        raise AssertionError(f"{workload.name}: {compiled.report().backend} and reference differ")


def judge(name: str, case: Case, metric: float, drop: float) -> tuple[str, bool | None]:
    """The target in words and whether it is met; floating-point noise of a sum of 0/1 does not count."""
    kind, bound = TARGETS.get((name, case.ranges), (None, 0.0))
    if kind is None or (case.bits, case.method) != ("w8a8", DEFAULT_METHOD):
        return "", None
    if kind == "drop":
        return f"drop <= {bound}", drop <= bound + 1e-9
    return f">= {bound}", metric >= bound - 1e-9


def measure(workload: Workload, cases: list[Case], compare_backends: bool = False) -> Iterator[Row]:
    """One row per case; the float model runs once."""
    expected = workload.outputs(workload.run_float)
    float_metric = workload.metric(expected)
    for case in cases:
        start = time.perf_counter()
        compiled = compile_workload(workload, case.ranges, case.bits, **case.options)
        compiled_at = time.perf_counter()
        outputs = workload.outputs(compiled)
        finished_at = time.perf_counter()
        if compare_backends:
            check_backends(compiled, workload)
        metric = workload.metric(outputs)
        target, met = judge(workload.name, case, metric, float_metric - metric)
        yield Row(
            workload.name,
            case.ranges,
            case.bits,
            case.method,
            workload.unit,
            len(workload.labels),
            float_metric,
            metric,
            sqnr_db(expected, outputs),
            None if workload.unit == "AUC" else int((outputs.argmax(1) != expected.argmax(1)).sum()),
            compiled_at - start,
            finished_at - compiled_at,
            target,
            met,
        )


def select(args: argparse.Namespace, options: dict) -> Iterator[Case]:
    """The cases that the command line asks for; ``options`` go to all of them."""
    if args.methods is None:
        yield from (Case(ranges, options=options) for ranges in args.ranges)
        return
    for bits in args.widths:
        for method in args.methods or METHODS:
            case = METHODS[method] | options
            if _measured(bits, case):
                yield from (Case(ranges, bits, method, case) for ranges in args.ranges)


def _measured(bits: str, options: dict) -> bool:
    """False for a method without codes of that width ("power" has none beyond 4 bits), and for residuals of wide weights."""
    width = fxcompress.options.Target.parse(bits).weight_bits
    return width <= min(QUANTIZERS[options["weight_quantizer"]].widest, RESIDUAL_BITS if "residual" in options else 8)


def available(names: list[str]) -> Iterator[Workload]:
    """The workloads whose files are here; the others are named on stderr."""
    for name in names:
        try:
            yield load(name)
        except Unavailable as reason:
            print(f"SKIPPED {name}: {reason}", file=sys.stderr)


def check_data(names: list[str]) -> int:
    """Print the float metric on the whole test set beside the published figure; 1 if one is off by more than rounding."""
    off = 0
    for workload in available(names):
        metric, published = workload.metric(workload.outputs(workload.run_float)), WHOLE_SET[workload.name]
        agrees = abs(metric - published) <= (0.00005 if workload.unit == "AUC" else 0.005)
        print(
            f"{workload.name:<9} {metric:.4f}  published {published}  {'agrees' if agrees else 'DIFFERS'}", flush=True
        )
        off |= not agrees
    return off


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="The data folder: see real_models.py, FXCOMPRESS_DATA."
    )
    parser.add_argument("--models", nargs="+", choices=list(LOADERS), default=list(LOADERS), metavar="NAME")
    parser.add_argument("--ranges", nargs="+", choices=[CALIBRATED, DATA_FREE], default=[CALIBRATED, DATA_FREE])
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=list(METHODS),
        metavar="NAME",
        help=f"all, or some of {list(METHODS)}".replace("%", "%%"),
    )
    parser.add_argument(
        "--widths", nargs="+", default=WIDTHS, metavar="wWaA", help="with --methods (default: %(default)s)"
    )
    parser.add_argument("--backend", help="what runs the integer networks (default: compile's own)")
    parser.add_argument("--range-method", help="minmax, percentile, mse or kl (default: compile's own)")
    parser.add_argument(
        "--limit", type=int, help="evaluate on that many labels only; the exit status then ignores the targets"
    )
    parser.add_argument("--json", type=Path, help="write the rows and the machine facts there")
    parser.add_argument(
        "--check-backends", action="store_true", help="every network must give the same bits on the reference backend"
    )
    parser.add_argument("--check-data", action="store_true", help="only compare the float figures with the published")
    args = parser.parse_args(arguments)
    if args.check_data:
        return check_data(args.models)

    options = {"range_method": args.range_method, "backend": args.backend}
    cases = list(select(args, {name: value for name, value in options.items() if value is not None}))
    print(harness.describe_machine(), HEADER, sep="\n\n", flush=True)
    rows = []
    for workload in available(args.models):
        for row in measure(workload.reported(args.limit), cases, args.check_backends):
            rows.append(row)
            print(row, flush=True)
    if args.json:
        harness.write_json(args.json, "accuracy", [asdict(row) | {"drop": row.drop} for row in rows])
    return int(args.limit is None and any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
