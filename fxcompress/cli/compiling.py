"""``compile`` and ``bisect``: what makes a network out of a model, from parsed arguments to an exit status."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from .. import errors
from ..api import compile
from ..backends.onnx_qdq import check_packages
from ..bisect import bisect
from ..pipeline import default_passes
from . import sources
from .output import show


def compile_model(args: argparse.Namespace) -> int:
    _check_destinations(args)
    network = compile(sources.load_model(args.model), args.target, debug=args.debug, **_options(args))
    written = {}  # where: what
    if args.out:
        network.save(args.out)
        written[args.out] = f"{args.out} ({Path(args.out).stat().st_size:,} bytes)"
    if args.export_c:
        written[args.export_c] = str(network.export_c(args.export_c))
    if args.export_onnx:
        network.export_onnx(args.export_onnx)
        written[args.export_onnx] = f"{args.export_onnx} ({Path(args.export_onnx).stat().st_size:,} bytes)"
    if args.debug:
        page = Path(args.debug, "index.html")
        written[args.debug] = f"{page}: what every pass changed, and where the accuracy went; open it in a browser"
    report = network.report()
    lines = [report.summary(), *(f"wrote {what}" for what in written.values())]
    if args.out:
        lines.append(
            f"next: fxcompress inspect {args.out}; fxcompress bench {args.out}; in Python: fxcompress.load({args.out!r})"
        )
    show({"written": list(written), "report": report.to_dict()}, "\n".join(lines), args.json)
    return 0


def _check_destinations(args: argparse.Namespace) -> None:
    """Whether the results can be written, before any work."""
    if not (args.out or args.export_c or args.export_onnx or args.debug):
        raise _error("nothing to write", "", "Say where: --out model.fxc.")
    for option in ("out", "export_onnx"):
        path = getattr(args, option)
        if path and (Path(path).is_dir() or not Path(path).resolve().parent.is_dir()):
            raise _error(
                f"--{option.replace('_', '-')} {path}",
                "a file in an existing folder",
                "Make the folder, or name a file in it.",
            )
    if args.export_onnx:
        check_packages()


def _error(found: str, expected: str, remedy: str) -> errors.OptionError:
    return errors.OptionError(found, stage="command line", expected=expected, remedy=remedy)


def _options(args: argparse.Namespace) -> dict:
    """The keyword arguments of ``compile`` that describe the model's inputs and the quantization."""
    options = dict(args.option)
    examples = tuple(sources.example(spec) for spec in args.example)
    limits = tuple(args.input_range) if args.input_range else None
    if (args.mean is None) != (args.std is None):
        raise _error("one of --mean and --std", "both", "The network computes (x - mean) / std.")
    if args.mean is not None:
        options["input_normalization"] = (args.mean, args.std)
    if examples and limits:  # random values of the declared range
        examples = tuple(limits[0] + (limits[1] - limits[0]) * x if x.is_floating_point() else x for x in examples)
    if args.calibration:
        options["calibration_data"] = sources.calibration(
            args.calibration, examples, limits or (0.0, 1.0), args.calibration_count
        )
        if len(examples) == 1:
            examples = ()  # the data are the better example
    if not examples and not args.calibration:
        raise _error("neither --example nor --calibration", "", "Say the shape of the input: --example 1x3x224x224.")
    if args.insert_after:
        options["passes"] = passes = default_passes(args.target)
        for name, new in args.insert_after:
            passes.insert_after(name, new)
    return options | {"example_inputs": examples or None, "input_range": limits, "keep_float": args.keep_float}


class _Agreement:
    """Share of the inputs whose largest output lies where the first network asked, the model, has it."""

    def __init__(self, batches: list):
        self.batches, self.expected = batches, None

    def __call__(self, network) -> float:
        answers = []
        with torch.inference_mode():
            for batch in self.batches:
                outputs = network(**batch) if isinstance(batch, dict) else network(batch)
                answers.append(tree_leaves(outputs)[0].flatten(1).argmax(1))
        found = torch.cat(answers)
        if self.expected is None:
            self.expected = found
        return (found == self.expected).double().mean().item()


def bisect_model(args: argparse.Namespace) -> int:
    options = _options(args)
    if args.metric != "agreement":
        metric = sources.load_function(args.metric)
    elif "calibration_data" in options:
        metric = _Agreement(options["calibration_data"])
    else:
        raise _error("no inputs to ask the metric on", "", "Pass --calibration, or --metric package.module:function.")
    found = bisect(
        sources.load_model(args.model),
        metric,
        args.target,
        tolerance=args.tolerance,
        threshold=args.threshold,
        **options,
    )
    show({"broken": found.broken, **vars(found)}, str(found), args.json)
    return 1 if found.broken else 0
