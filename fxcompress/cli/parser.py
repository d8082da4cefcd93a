"""The commands, their options and their help."""

from __future__ import annotations

import argparse
import json

from .. import __version__
from . import compiling, looking

_EPILOG = """\
examples:
  fxcompress compile my_net:trained --example 1x3x96x96 --out net.fxc
      trained is a module, or a function that returns one, in my_net.py; no data: ranges come from batch norm statistics

  fxcompress compile my_net:trained --example 1x3x96x96 --calibration images/ \\
             --input-range 0 255 --mean 123.7 116.3 103.5 --std 58.4 57.1 57.4 --out net.fxc --export-c firmware/
      the network takes raw pixels and normalizes them itself, in integers; C source for a microcontroller beside it

  fxcompress inspect net.fxc           what every pass did, every layer's range and error, the certificate
  fxcompress bench net.fxc --threads 2
  fxcompress bisect my_net:trained --target w4a8 --calibration images/ --example 1x3x96x96

exit status: 0 done, 1 the answer is no (diff, bisect), 2 wrong command line, 3 a mistake in model, data or options, 4 internal error
"""

_EXAMPLES = {
    "compile": """\
my_net.py, for the examples:
  def trained():
      net = MyNet()
      net.load_state_dict(torch.load("weights.pt"))
      return net                                        # eval mode is set for you

examples:
  fxcompress compile my_net:trained --example 1x3x96x96 --out net.fxc
  fxcompress compile my_net:trained --example 1x3x96x96 --calibration images/ --target w4a8 --option spiq=true --debug dumps --out net.fxc
  fxcompress compile program.pt2 --calibration inputs.npy --out net.fxc --export-onnx net.onnx
""",
    "inspect": """\
examples:
  fxcompress inspect net.fxc
  fxcompress inspect net.fxc --json | jq '.report.products[] | [.node, .macs]'
""",
    "bench": "The inputs are random, in the range the network was compiled for. The minimum is what the machine can; the median what it did.",
    "diff": "From the first to the second: what a change of the model, the data or an option did.",
    "passes": "`Passes, their sources and limits` in the documentation says more about each.",
    "bisect": """\
examples:
  fxcompress bisect my_net:trained --target w4a8 --calibration images/ --example 1x3x96x96
  fxcompress bisect my_net:trained --target w4a8 --calibration x.npy --metric my_eval:accuracy --tolerance 0.02

my_eval.py has  def accuracy(network): ...  which calls the network as the model is called, and returns a number.
""",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxcompress", description="From a trained PyTorch model to an integer-only network.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fxcompress {__version__}")
    subparsers = parser.add_subparsers(metavar="command", required=True, help="each explains itself with --help")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=_EXAMPLES[name],
                                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.set_defaults(run=run)
        return sub

    compile_ = command("compile", compiling.compile_model, "compile a model and save it")
    _model_options(compile_)
    compile_.add_argument("--out", metavar="FILE", help="where to save the compiled model (.fxc)")
    compile_.add_argument("--export-c", metavar="DIR", help="write C99 source for a microcontroller")
    compile_.add_argument("--export-onnx", metavar="FILE", help="write the quantized graph as ONNX")
    compile_.add_argument("--debug", metavar="DIR", help="write every pass's graph and what it changed")

    inspect = command("inspect", looking.inspect_model, "show what a compiled model is, costs and proves")
    inspect.add_argument("file", help="a model that compile saved")
    inspect.add_argument("--graph", action="store_true", help="list the integer graph, one line per operation")
    inspect.add_argument(
        "--verify", action="store_true", help="prove again that it is integer-only and cannot overflow"
    )

    bench = command("bench", looking.bench_model, "measure the latency of a compiled model")
    bench.add_argument("file", help="a model that compile saved")
    bench.add_argument("--batch", type=_positive, default=1, help="samples per inference (default 1)")
    bench.add_argument("--threads", type=_positive, help="default: PyTorch's setting")
    bench.add_argument("--seconds", type=_duration, default=2.0, help="how long to measure (default 2)")
    bench.add_argument("--backend", choices=("native", "reference"), help="default: the one it was compiled for")

    diff = command(
        "diff", looking.diff_models, "compare two compiled models: graph, cost, answers; exit status 1 if they differ"
    )
    diff.add_argument("first")
    diff.add_argument("second")
    diff.add_argument("--samples", type=_positive, default=16, help="random inputs to compare answers on (default 16)")

    passes = command("passes", looking.list_passes, "list the passes in order: what each does, and why it stands there")
    passes.add_argument("--target", default="int8", help="int8, w4a8, ... (default int8)")

    bisect = command(
        "bisect", compiling.bisect_model, "find the pass and the rewrite that break a metric; exit status 1 if one does"
    )
    _model_options(bisect)
    bisect.add_argument("--metric", default="agreement", metavar="M",
                        help="package.module:function of a network, higher is better; or agreement: the share of the calibration inputs whose "
                             "largest output is where the model has it (default)")  # fmt: skip
    bisect.add_argument(
        "--tolerance", type=float, default=0.01, help="how much the metric may fall, as a share (default 0.01)"
    )
    bisect.add_argument("--threshold", type=float, help="the lowest value that is good, instead of --tolerance")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="package.module:name of a module or of a factory without arguments; or a .pt2 file of torch.export.save",
    )
    parser.add_argument(
        "--target",
        default="int8",
        help="int8 (= w8a8), w6a8, w4a8, w8a4, ...: bits of weights and activations (default int8)",
    )
    parser.add_argument("--example", action="append", default=[], metavar="SHAPE",
                        help="shape of an input, 1x3x224x224, or 1x12:int64; once per input, in order")  # fmt: skip
    parser.add_argument("--calibration", metavar="PATH",
                        help="folder of images, .npy, or .npz: about 100 typical inputs; without: ranges from batch norm statistics")  # fmt: skip
    parser.add_argument(
        "--calibration-count", type=_positive, default=100, metavar="N", help="how many of them to use (default 100)"
    )
    parser.add_argument("--input-range", type=float, nargs=2, metavar=("LO", "HI"),
                        help="values an input takes; the pixels of calibration images are spread over it (default 0 1)")  # fmt: skip
    parser.add_argument(
        "--mean",
        type=float,
        nargs="+",
        help="with --std: the network takes values of --input-range and normalizes them itself",
    )
    parser.add_argument("--std", type=float, nargs="+", help="one number, or one per channel, as --mean")
    parser.add_argument(
        "--keep-float", action="append", default=[], metavar="MODULE", help="leave a submodule in floating point"
    )
    parser.add_argument("--insert-after", action="append", default=[], nargs=2, metavar=("PASS", "NEW"),
                        help="put a pass that an installed package publishes behind one of the default list (fxcompress passes)")  # fmt: skip
    parser.add_argument("--option", action="append", default=[], type=_option, metavar="NAME=VALUE",
                        help='any further option of fxcompress.compile, its value in JSON: spiq=true, range_method="kl"')  # fmt: skip


def _positive(text: str) -> int:
    return _number(text, int, 1, "a whole number, at least 1")


def _duration(text: str) -> float:
    return _number(text, float, 0, "a number of seconds")


def _number(text: str, kind: type, least: float, expected: str) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")
    return value


def _option(text: str) -> tuple[str, object]:
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a plain word is itself: range_method=kl
