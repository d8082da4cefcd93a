"""Every mistake a user can make, how it is made, and the whole message it must give: the tests and docs/errors.md read it.

``[...]`` in a message stands for words of PyTorch's or of another library, which change with its version.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress
from fxcompress import LatencyTable, Target, compile, default_passes, load
from fxcompress.bilinear import BilinearAlgorithm, register_algorithm
from fxcompress.capture import capture
from fxcompress.errors import (
    AccumulatorError,
    ArtifactError,
    CalibrationError,
    CaptureError,
    FxcompressError,
    InputError,
    LevelError,
    ModelError,
    OptionError,
    PassContractError,
    PipelineError,
    UnsupportedOperatorError,
    VerificationError,
)
from tests.errors import models
from tests.errors.models import X, at, net

BITS = Target()
LABELS = torch.zeros(4, dtype=torch.int64)


@dataclass(frozen=True)
class Mistake:
    """``make`` makes the mistake that ``title`` says; it must raise ``error`` with ``message`` and nothing else."""

    title: str
    error: type[FxcompressError]
    make: Callable[[], object]
    message: str = ""

    def pattern(self) -> re.Pattern:
        return re.compile("(.*)".join(re.escape(part) for part in self.message.split("[...]")), re.DOTALL)


@functools.cache
def raised(mistake: Mistake) -> Exception | None:
    """What the mistake raises, None if nothing. Made in an empty folder."""
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(folder)
        try:
            mistake.make()
        except Exception as error:
            return error
        finally:
            os.chdir(home)
    return None


def changed(path: str, **attributes) -> nn.Module:
    """The network with attributes of one module replaced."""
    model = net()
    for name, value in attributes.items():
        setattr(model.get_submodule(path), name, value)
    return model


def filled(name: str, value: float) -> nn.Module:
    """The network with ``value`` in the first two places of a tensor."""
    model = net()
    with torch.no_grad():
        model.get_parameter(name).flatten()[:2] = value
    return model


def buffered(tensor: torch.Tensor) -> nn.Module:
    model = net()
    model.register_buffer("table", tensor)
    return model


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def hooked() -> nn.Module:
    traced = torch.fx.symbolic_trace(net())
    traced.register_forward_hook(lambda module, inputs, output: output * 2)
    return traced


def used_up():
    batches = (batch for batch in [X])
    list(batches)
    return batches


@functools.cache
def compiled() -> fxcompress.CompiledModule:
    return compile(net(), example_inputs=X)


def example(model: nn.Module, *inputs, **options):
    return compile(model.eval(), example_inputs=inputs or X, **options)


def calibrated(data, **options):
    return compile(net(), calibration_data=data, **options)


def saved(edit: Callable[[bytes], bytes]) -> None:
    compiled().save("model.fxc")
    path = Path("model.fxc")
    path.write_bytes(edit(path.read_bytes()))
    load(path)


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


def state_file() -> None:
    torch.save(net().state_dict(), "weights.pt")
    load("weights.pt")


def foreign_file() -> None:
    safetensors.torch.save_file({"weight": torch.zeros(3)}, "weights.safetensors")
    load("weights.safetensors")


def pruned(**options) -> torch.fx.GraphModule:
    return fxcompress.prune(net(), X, **options)


def gradually(**options) -> torch.fx.GraphModule:
    return fxcompress.prune_gradually(net(), X, (X, LABELS), pruning_ratio=0.1, steps=2, **options)


def tuned(data, **settings) -> nn.Module:
    return fxcompress.fine_tune(net(), data, **{"steps": 1} | settings)


def foreign_table() -> None:
    Path("times.json").write_text('{"format": "of another program"}')
    pruned(pruning_measure="latency", latency_table="times.json")


def debug_in_a_file() -> None:
    Path("notes.txt").write_text("notes")
    example(net(), debug="notes.txt")


def verified_too_early() -> None:
    fxcompress.verify(capture(net(), (X,)).graph_module, (X,))


def first(passes: fxcompress.pipeline.PassList, name: str) -> list:
    """The list with the named pass moved to the front."""
    moved = passes[passes.index_of(name)]
    return [moved, *passes.without(name)]


MISTAKES = [
    # ------------------------------------------------------------------------------------------------------ the model
    Mistake("weights are NaN", ModelError, lambda: compile(filled("stem.0.weight", float("nan"))),
            "model check: stem.0: parameter weight has 2 NaN or Inf of 216 values. Training diverged or the checkpoint is damaged: repair the weights."),
    Mistake("weights are infinite", ModelError, lambda: compile(filled("head.bias", float("inf"))),
            "model check: head: parameter bias has 2 NaN or Inf of 4 values. Training diverged or the checkpoint is damaged: repair the weights."),
    Mistake("statistics are NaN", ModelError, lambda: compile(changed("stem.1", running_mean=torch.full((8,), float("nan")))),
            "model check: stem.1: buffer running_mean has 8 NaN or Inf of 8 values. Training diverged or the checkpoint is damaged: repair the weights."),
    Mistake("a running variance is negative", ModelError, lambda: compile(changed("stem.1", running_var=-torch.ones(8))),
            "model check: stem.1: running_var is negative in 8 channels. A variance cannot be: check the checkpoint."),
    Mistake("the model is in training mode", ModelError, lambda: compile(net().train()),
            "model check: Net is in training mode. Call model.eval() first."),
    Mistake("a batch norm is in training mode", ModelError, lambda: compile(changed("stem.1", training=True)),
            "model check: stem.1: BatchNorm2d is in training mode. Call model.eval() first."),
    Mistake("F.dropout without training=self.training", ModelError, lambda: example(models.FunctionalDropout()),
            f"model check: dropout [{at('return F.dropout(x, 0.5)')}]: dropout is active. Pass training=self.training to F.dropout and call model.eval()."),
    Mistake("F.batch_norm with batch statistics", ModelError, lambda: example(models.FunctionalBatchNorm()),
            f"model check: batch_norm [{at('return F.batch_norm(x, None, None, training=True)')}]: batch norm computes batch statistics. Use running statistics: track_running_stats=True and model.eval()."),
    Mistake("batch norm without running statistics", ModelError,
            lambda: compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()),
            "model check: 1: batch norm without running statistics. Create it with track_running_stats=True and train it."),
    Mistake("a lazy module has not seen an input", ModelError, lambda: compile(nn.Sequential(nn.LazyConv2d(8, 3)).eval()),
            "model check: 0: parameter weight is not initialized. Run the model once: model(example)."),
    Mistake("the model is on the meta device", ModelError, lambda: compile(net().to("meta")),
            'model check: stem.0: parameter weight is on the meta device (8 of 8 tensors are): it has no values. Give it memory and values: model.to_empty(device="cpu"), then model.load_state_dict(...).'),
    Mistake("a part of the model is on another device", ModelError, lambda: compile(changed("", head=nn.Linear(8, 4, device="meta"))),
            'model check: head: parameter weight is on the meta device (2 of 8 tensors are): it has no values. Give it memory and values: model.to_empty(device="cpu"), then model.load_state_dict(...).'),
    Mistake("sparse weights", ModelError, lambda: compile(changed("head", weight=parameter(torch.eye(4, 8).to_sparse()))),
            "model check: head: parameter weight has the layout sparse_coo. Store it dense: tensor.to_dense()."),
    Mistake("quantized tensors", ModelError,
            lambda: compile(buffered(torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))),
            "model check: buffer table is quantized (qint8). Pass the float model it was made from."),
    Mistake("a quantized layer", ModelError,
            lambda: compile(changed("", head=torch.ao.nn.quantized.dynamic.Linear(8, 4))),
            "model check: head: Linear holds weights that are quantized already. Pass the float model it was made from."),
    Mistake("integer weights", ModelError, lambda: compile(changed("head", weight=parameter(torch.ones(4, 8, dtype=torch.int8)))),
            "model check: head: parameter weight has dtype int8; expected a floating-point dtype. Pass the float model; integer tables belong into buffers."),
    Mistake("complex weights", ModelError, lambda: compile(buffered(torch.zeros(4, dtype=torch.complex64))),
            "model check: buffer table has dtype complex64; expected a floating-point dtype. Complex networks cannot be compiled: compute with real and imaginary parts."),
    Mistake("a class instead of an instance", ModelError, lambda: compile(models.Net),
            "model check: the model is the class Net; expected an nn.Module, GraphModule or ExportedProgram. Make an instance: Net()."),
    Mistake("nothing instead of a model", ModelError, lambda: compile(None),
            "model check: the model is None; expected an nn.Module, GraphModule or ExportedProgram. Pass the trained model itself."),
    Mistake("a state_dict instead of a model", ModelError, lambda: compile(net().state_dict()),
            "model check: the model is a state_dict; expected an nn.Module, GraphModule or ExportedProgram. Build the module, then load the weights into it: model.load_state_dict(state_dict)."),
    Mistake("a file name instead of a model", ModelError, lambda: compile("model.pt"),
            "model check: the model is 'model.pt'; expected an nn.Module, GraphModule or ExportedProgram. Load the file first; a network that fxcompress saved is read by fxcompress.load."),
    Mistake("a function instead of a model", ModelError, lambda: compile(torch.relu),
            "model check: the model is a builtin_function_or_method; expected an nn.Module, GraphModule or ExportedProgram. Call the function in the forward of an nn.Module."),
    Mistake("a TorchScript model", ModelError, lambda: compile(torch.jit.script(net())),
            "model check: RecursiveScriptModule is TorchScript. Pass the Python module it was made from."),
    Mistake("a DataParallel wrapper", ModelError, lambda: compile(nn.DataParallel(net()).eval()),
            "model check: DataParallel is a wrapper for training on several devices. Pass the module inside: model.module."),
    Mistake("the result of torch.compile", ModelError, lambda: compile(torch.compile(net())),
            "model check: OptimizedModule comes from torch.compile. Pass the module inside: model._orig_mod."),
    Mistake("a model that is compiled already", ModelError, lambda: compile(compiled()),
            "model check: CompiledModule is compiled by fxcompress already. Pass the float model it was made from."),
    Mistake("hooks on a traced graph", ModelError, lambda: compile(hooked()),
            "model check: a GraphModule has forward hooks, which its graph does not show. Write them into the graph, or pass the module it was traced from."),
    Mistake("a model that cannot be copied", ModelError, lambda: compile(models.Locked().eval()),
            "model check: the model cannot be copied (TypeError: cannot [...]). copy.deepcopy(model) must work: remove locks, files and generators from its attributes."),
    # ------------------------------------------------------------------------------------------------------- capture
    Mistake("a branch on values, inside a submodule", CaptureError, lambda: example(models.WithBranch()),
            f"capture: gate ({at('if y.sum() > 0:')}): torch.export failed: the branch 'if y.sum() > 0:' depends on the values of a tensor. Keep only the side that inference takes, or choose with torch.where in a submodule that keep_float names."),
    Mistake("a conditional expression on values", CaptureError, lambda: example(models.ConditionalExpression()),
            f"capture: {at('return x if x.mean() > 0.5 else -x')}: torch.export failed: the branch 'return x if x.mean() > 0.5 else -x' depends on the values of a tensor. Keep only the side that inference takes, or choose with torch.where in a submodule that keep_float names."),
    Mistake("a loop on values", CaptureError, lambda: example(models.Loop()),
            f"capture: {at('while x.max() > 1:')}: torch.export failed: the loop 'while x.max() > 1:' depends on the values of a tensor. Write a fixed number of steps."),
    Mistake("an assertion on values", CaptureError, lambda: example(models.Assertion()),
            f'''capture: {at('assert x.min() > -100,')}: torch.export failed: the assertion 'assert x.min() > -100, "clean the input"' depends on the values of a tensor. Remove it, or check the values before the model is called.'''),
    Mistake("a size read from values", CaptureError, lambda: example(models.LengthFromValues()),
            f"capture: {at('return x[:, : int(x.sum())]')}: torch.export failed: the expression 'return x[:, : int(x.sum())]' depends on the values of a tensor. Replace .item(), int(), float() and bool() by tensor operations."),
    Mistake("NumPy in the forward", CaptureError, lambda: example(models.NumPy()),
            f"capture: {at('return x * float(x.numpy().max())')}: torch.export failed: the forward leaves PyTorch for NumPy. Write it with torch operations."),
    Mistake("a batch size written as a number", CaptureError, lambda: example(models.FixedBatch()),
            "capture: torch.export failed: the model fixes the batch size. Write the batch as x.shape[0] or -1, not as a number, and do not loop over it. If an argument is shared by all samples, pass an example whose batch differs from that argument's first dimension."),
    Mistake("a forward of **kwargs", CaptureError, lambda: compile(models.Keywords().eval(), example_inputs={"x": X}),
            "capture: torch.export failed: the forward takes **kwargs, whose batch torch.export cannot make dynamic. Wrap the model in a module that names its keyword arguments."),
    Mistake("the model returns an object", CaptureError, lambda: example(models.ReturnsObject()),
            "capture: torch.export failed: the model returns an object that is no tensor, tuple, list or dict. Wrap the model in a module that returns tensors."),
    Mistake("the model returns nothing", CaptureError, lambda: example(models.ReturnsNothing()),
            "capture: the model returns no tensor. Return what the forward computes."),
    Mistake("the model returns a size", CaptureError, lambda: example(models.ReturnsSize()),
            "capture: the model returns sym_size_int_1, a number computed from the shapes. Return tensors and constants only."),
    Mistake("the forward counts its calls", CaptureError, lambda: example(models.Counter()),
            f"capture: {at('self.count.add_(1)')}: the forward writes to count. Keep state out of the forward: pass it in and return it."),
    Mistake("a control flow operator", CaptureError, lambda: example(models.Conditional()),
            "capture: the graph holds true_graph_0, a <lambda>. Write the model without control flow operators (torch.cond, map, scan)."),
    # ------------------------------------------------------------------------------------------- unsupported operators
    Mistake("operators without an integer form", UnsupportedOperatorError, lambda: example(models.WithSorting()),
            f"normalize: 2 operators have no integer lowering:\n  aten.sort.default at sort [order ({at('return torch.sort(x, dim=1).values')})]\n  aten.cumprod.default at cumprod [{at('return self.order(self.conv(x)).cumprod(1)')}]. \nKeep them in float with keep_float=['order'], or write them with supported operators. What is in no submodule must move into one to be kept."),
    Mistake("a number read from values", UnsupportedOperatorError, lambda: example(models.NumberFromValues()),
            f"normalize: 2 operators have no integer lowering:\n  aten.max.default at max_1 [{at('return x * x.max().item()')}]\n  aten.item.default (a number read from a tensor) at item [{at('return x * x.max().item()')}]. \nWrite them with supported operators, or move them into a submodule and leave that in float with keep_float."),
    Mistake("an assignment to a part of a tensor", UnsupportedOperatorError, lambda: example(models.Assignment()),
            f"model check: fill_ [{at('y[:, 0] = 0')}]: aten.fill_.Tensor changes memory that output reads through another view. Write the change out of place: torch.cat of the parts for an assignment to a part."),
    # -------------------------------------------------------------------------------------------- inputs, when compiling
    Mistake("an example without batch dimension", InputError, lambda: example(net(), X[0]),
            f"capture: stem.1 ({at('return self.head(self.stem(x).mean((2, 3)))')}): the model fails on x float32 (3, 8, 8): ValueError: expected [...]). Pass one batch, as the model takes it: x[None] adds the batch dimension to a single sample."),
    Mistake("an example with too few channels", InputError, lambda: example(net(), X[:, :1]),
            f"capture: stem.0 ({at('return self.head(self.stem(x).mean((2, 3)))')}): the model fails on x float32 (4, 1, 8, 8): RuntimeError:[...]. Pass the channels the model takes, channels first: (N, C, H, W)."),
    Mistake("an example that is too small", InputError, lambda: example(nn.Sequential(nn.Conv2d(3, 4, 5), nn.Conv2d(4, 4, 5)), X),
            "capture: 1: the model fails on input float32 (4, 3, 8, 8): RuntimeError:[...]). Kernel size: (5 x 5). Kernel size can't be greater than actual input size. Pass a larger example: the network shrinks this one to nothing."),
    Mistake("an integer example", InputError, lambda: example(net(), X.long()),
            f"capture: stem.0 ({at('return self.head(self.stem(x).mean((2, 3)))')}): the model fails on x int64 (4, 3, 8, 8): RuntimeError:[...]. Pass the dtype the model takes, usually float32; raw uint8 pixels together with input_normalization=(mean, std)."),
    Mistake("a complex example", InputError, lambda: example(net(), X.to(torch.complex64)),
            "capture: argument x is a complex tensor; expected a real tensor, number, string, bool or None. Wrap the model in a module that takes tensors and builds the object itself."),
    Mistake("a sparse example", InputError, lambda: example(net(), X.to_sparse()),
            "capture: argument x: the example is sparse_coo; expected a dense tensor of plain numbers. Pass x.to_dense() or x.dequantize()."),
    Mistake("an example on the meta device", InputError, lambda: example(net(), X.to("meta")),
            "capture: argument x: the example is on the meta device: it has no values. Pass a tensor with typical values."),
    Mistake("NaN in the example", InputError, lambda: example(net(), X.masked_fill(X > 3, float("nan"))),
            "capture: argument x: the example has 5 NaN or Inf of 768 values. Every pass is checked on the example: pass typical inputs."),
    Mistake("an empty example", InputError, lambda: example(net(), X[:0]),
            "capture: the example batch is empty; expected at least one sample. Pass one batch of typical inputs."),
    Mistake("an example of zeros, with nothing else to tell the range", InputError, lambda: example(net(), torch.zeros(2, 3, 8, 8)),
            "capture: argument x: the range cannot be guessed from an example of which every value is 0. Pass input_range=(lo, hi), calibration_data, or example_inputs with typical values."),
    Mistake("an example outside the declared range", InputError, lambda: example(net(), 50 + X, input_range=(0, 1)),
            "capture: argument x: 0% of the example's values lie in input_range (0, 1), they span (46.8463, 54.1015). Correct input_range, or preprocess the example like the model's inputs."),
    Mistake("an array as example", InputError, lambda: compile(net(), example_inputs=X.numpy()),
            "capture: the example call holds no tensor with a batch dimension: ndarray. Make a tensor of it: torch.from_numpy(array)."),
    Mistake("a loader as example", InputError, lambda: compile(net(), example_inputs=DataLoader(TensorDataset(X))),
            "capture: the example call holds no tensor with a batch dimension: DataLoader. Pass one batch, next(iter(loader)), or the loader as calibration_data."),
    Mistake("a number as example", InputError, lambda: compile(net(), example_inputs=torch.tensor(1.0)),
            "capture: the example call holds no tensor with a batch dimension: Tensor of no dimensions. Pass at least one tensor whose dimension 0 is the batch."),
    Mistake("a shape as example", InputError, lambda: compile(net(), example_inputs=(1, 3, 8, 8)),
            "capture: the example call does not fit forward(x): too many positional arguments. A tuple holds positional arguments, a dict keyword arguments; one tensor is one argument."),
    Mistake("one input too many", InputError, lambda: example(net(), X, X),
            "capture: the example call does not fit forward(x): too many positional arguments. A tuple holds positional arguments, a dict keyword arguments; one tensor is one argument."),
    Mistake("one input too few", InputError, lambda: example(models.TwoInputs(), X),
            "capture: the example call does not fit forward(left, right): missing a required argument: 'right'. A tuple holds positional arguments, a dict keyword arguments; one tensor is one argument."),
    Mistake("an unknown keyword", InputError, lambda: compile(net(), example_inputs={"image": X}),
            "capture: the example call does not fit forward(x): missing a required argument: 'x'. A tuple holds positional arguments, a dict keyword arguments; one tensor is one argument."),
    Mistake("a model that takes one image at a time", InputError, lambda: example(models.OneImage(), X[:1]),
            f"capture: {at('assert x.shape[0] == 1,')}: the model fails on x float32 (2, 3, 8, 8): AssertionError: one image at a time. The model is traced with a batch of 2 or more: allow any batch size."),
    Mistake("a model that fails by itself", InputError, lambda: example(models.UnknownMode()),
            f"capture: {at('raise ValueError(')}: the model fails on x float32 (4, 3, 8, 8): ValueError: no such mode. Check that the model runs on it."),
    # ---------------------------------------------------------------------------------------------- inputs, when calling
    Mistake("calling with integers", InputError, lambda: compiled()(X.long()),
            "input: argument x has dtype int64; expected float32. Call the compiled model as the original one was called at compilation."),
    Mistake("calling with complex numbers", InputError, lambda: compiled()(X.to(torch.complex64)),
            "input: argument x has dtype complex64; expected float32. Call the compiled model as the original one was called at compilation."),
    Mistake("calling without batch dimension", InputError, lambda: compiled()(X[0]),
            "input: argument x has 3 dimensions; expected shape (batch, 3, 8, 8). Call the compiled model as the original one was called at compilation."),
    Mistake("calling with too few channels", InputError, lambda: compiled()(X[:, :1]),
            f"capture: stem.0 ({at('return self.head(self.stem(x).mean((2, 3)))')}): the model fails on x float32 (4, 1, 8, 8): RuntimeError:[...]. Pass the channels the model takes, channels first: (N, C, H, W)."),
    Mistake("calling without an input", InputError, lambda: compiled()(),
            "input: argument x is missing; expected the arguments of the example call: x. Call the compiled model as the original one was called at compilation."),
    Mistake("calling with one input too many", InputError, lambda: compiled()(X, X),
            "input: argument args[1] is not an argument of the example call; expected x. Call the compiled model as the original one was called at compilation."),
    Mistake("calling with an array", InputError, lambda: compiled()(X.numpy()),
            "input: argument x is ndarray; expected a tensor of shape (batch, 3, 8, 8). Call the compiled model as the original one was called at compilation."),
    Mistake("calling with a sparse tensor", InputError, lambda: compiled()(X.to_sparse()),
            "input: argument x has layout torch.sparse_coo; expected a dense tensor. Call the compiled model as the original one was called at compilation."),
    Mistake("calling with a tensor on another device", InputError, lambda: compiled()(X.to("meta")),
            "input: argument x is on meta; expected a tensor on the CPU. Call the compiled model as the original one was called at compilation."),
    Mistake("calling with NaN", InputError, lambda: compiled()(X.masked_fill(X > 3, float("nan"))),
            "quantize: 5 of 768 values are NaN. Clean the input: NaN has no code."),
    Mistake("calling with two batch sizes", InputError, lambda: example(models.TwoInputs(), X, X + 1)(X, X[:2]),
            "input: argument right has batch 2; expected batch 4 as left has. Call the compiled model as the original one was called at compilation."),
    Mistake("asking for the report before the first call", InputError, lambda: compile(net()).report(),
            "compile: the model has not seen an input yet. Call it once, or pass example_inputs to fxcompress.compile."),
    # --------------------------------------------------------------------------------------------------- calibration data
    Mistake("no calibration data", CalibrationError, lambda: calibrated([]),
            "calibration: calibration_data is empty; expected at least one example. 100 to 500 examples are usual; a generator must not be used up before."),
    Mistake("a generator that is used up", CalibrationError, lambda: calibrated(used_up()),
            "calibration: calibration_data is empty; expected at least one example. 100 to 500 examples are usual; a generator must not be used up before."),
    Mistake("an empty tensor", CalibrationError, lambda: calibrated(X[:0]),
            "calibration: calibration_data is empty; expected at least one example. 100 to 500 examples are usual; a generator must not be used up before."),
    Mistake("an empty batch", CalibrationError, lambda: calibrated([X, X[:0]]),
            "calibration: calibration batch 1 holds no values. Drop empty batches."),
    Mistake("NaN in a batch", CalibrationError, lambda: calibrated([X, X.masked_fill(X > 3, float("nan"))]),
            "calibration: calibration batch 1 has 5 NaN or Inf of 768 values. Check the preprocessing of the calibration data."),
    Mistake("too few channels in the first batch", CalibrationError, lambda: calibrated([X[:, :1]]),
            f"calibration: stem.0 ({at('return self.head(self.stem(x).mean((2, 3)))')}): the first batch of calibration_data, taken as example: the model fails on x float32 (4, 1, 8, 8): RuntimeError:[...]. Pass the channels the model takes, channels first: (N, C, H, W)."),
    Mistake("too few channels in a later batch", CalibrationError, lambda: calibrated([X, X[:, :1]]),
            "calibration: calibration batch 1 (a tensor (4, 1, 8, 8)) does not fit the model: argument x has shape (4, 1, 8, 8); expected x (batch, 3, 8, 8) float32. calibration_data may be a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model."),
    Mistake("single samples instead of batches", CalibrationError, lambda: calibrated(list(X), example_inputs=X),
            "calibration: calibration batch 0 (a tensor (3, 8, 8)) does not fit the model: argument x has 3 dimensions; expected x (batch, 3, 8, 8) float32. calibration_data may be a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model."),
    Mistake("integers", CalibrationError, lambda: calibrated([X.long()], example_inputs=X),
            "calibration: calibration batch 0 (a tensor (4, 3, 8, 8)) does not fit the model: argument x has dtype int64; expected x (batch, 3, 8, 8) float32. calibration_data may be a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model."),
    Mistake("raw pixels, not declared", CalibrationError, lambda: calibrated([X.to(torch.uint8)], example_inputs=X),
            "calibration: x: calibration batch 0 has dtype uint8; expected float32. Preprocess it as for the model, or pass x.float()."),
    Mistake("labels before the inputs", CalibrationError, lambda: calibrated([(LABELS, X)], example_inputs=X),
            "calibration: calibration batch 0 (a tuple of (4,), (4, 3, 8, 8)) does not fit the model: argument args[1] is not an argument of the example call; expected x (batch, 3, 8, 8) float32. calibration_data may be a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model."),
    Mistake("one input too many, in calibration", CalibrationError, lambda: calibrated([(X, X, LABELS)]),
            "calibration: the first batch of calibration_data, taken as example: the example call does not fit forward(x): too many positional arguments. A tuple holds positional arguments, a dict keyword arguments; one tensor is one argument."),
    Mistake("one tensor for a model of two inputs", CalibrationError,
            lambda: compile(models.TwoInputs().eval(), example_inputs=(X, X), calibration_data=X),
            "calibration: calibration_data is one tensor, the model has the inputs left, right. Pass a list of batches: [(left, right), ...]."),
    Mistake("a folder instead of data", CalibrationError, lambda: calibrated(Path("images")),
            "calibration: calibration_data is [...]Path; expected a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model. Load and preprocess the files first."),
    Mistake("file names instead of data", CalibrationError, lambda: calibrated(["cat.png", "dog.png"]),
            "calibration: calibration batch 0 holds no tensor: str; expected the model's inputs. Load and preprocess it first."),
    Mistake("arrays instead of tensors", CalibrationError, lambda: calibrated([X.numpy()]),
            "calibration: calibration batch 0 holds no tensor: ndarray; expected the model's inputs. torch.from_numpy(array) makes a tensor of an array."),
    Mistake("a data set instead of a loader", CalibrationError, lambda: calibrated(TensorDataset(X, LABELS)),
            "calibration: calibration_data is TensorDataset; expected a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model. Batch the data set: torch.utils.data.DataLoader(dataset, batch_size=32)."),
    Mistake("the class of a loader", CalibrationError, lambda: calibrated(DataLoader),
            "calibration: calibration_data is the class DataLoader; expected a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model. About 100 typical inputs are usual."),
    Mistake("a number of examples", CalibrationError, lambda: calibrated(100),
            "calibration: calibration_data is int; expected a tensor, an iterable of inputs, of (input, label) pairs or of keyword dicts, or a function that takes the model. About 100 typical inputs are usual."),
    Mistake("a function without argument", CalibrationError, lambda: calibrated(lambda: None),
            "calibration: calibration_data is a function that does not take one argument; expected a function of the model. For example: lambda model: model(x)."),
    Mistake("a function that does not call the model", CalibrationError, lambda: calibrated(lambda model: None, example_inputs=X),
            "calibration: calibration_data is a function that never called the model it was given. Call its argument on example inputs: lambda model: model(x)."),
    Mistake("a function that calls the model wrongly", CalibrationError,
            lambda: calibrated(lambda model: model(X[:, :1]), example_inputs=X),
            "calibration: call 1 of the model by calibration_data: argument x has shape (4, 1, 8, 8); expected shape (batch, 3, 8, 8). Pass the shape the model was compiled for."),
    Mistake("nothing but zeros", CalibrationError, lambda: calibrated([X * 0]),
            "assign_ranges: x: every calibration value of this input is 0; expected typical inputs. Check how the data are loaded."),
    Mistake("an empirical correction without data", CalibrationError, lambda: compile(net(), bias_correction="empirical"),
            'compile: bias_correction="empirical" measures, and there are no calibration data. '
            'Pass calibration_data, or bias_correction="analytic".'),
    Mistake("calibration data outside the declared range", CalibrationError,
            lambda: calibrated([5 * X], input_range=(-3, 3), example_inputs=X),
            "assign_ranges: x: calibration inputs span [-15.769, 20.507]; expected values in input_range [-3, 3]. Preprocess the calibration data like the model's inputs, or correct input_range."),
    # ------------------------------------------------------------------------------------------------------------ options
    Mistake("an unknown target", OptionError, lambda: compile(net(), "int9"),
            "compile: unknown target 'int9'; expected \"int8\" or \"w<weight bits>a<activation bits>\". Did you mean 'int8'?"),
    Mistake("int4", OptionError, lambda: compile(net(), "int4"),
            "compile: unknown target 'int4'; expected \"int8\" or \"w<weight bits>a<activation bits>\". Write \"w4a8\" for 4-bit weights, \"w4a4\" for activations too."),
    Mistake("impossible weight bits", OptionError, lambda: compile(net(), "w16a8"),
            'compile: target w16a8 asks for 16-bit weights and 8-bit activations; expected 2 to 8 bits each. Choose for example "w4a8".'),
    Mistake("impossible activation bits", OptionError, lambda: compile(net(), Target(8, 1)),
            'compile: target w8a1 asks for 8-bit weights and 1-bit activations; expected 2 to 8 bits each. Choose for example "w4a8".'),
    Mistake("bits that are no number", OptionError, lambda: compile(net(), Target("8", 8)),
            "compile: target w8a8 asks for '8'-bit weights and 8-bit activations; expected 2 to 8 bits each. Choose for example \"w4a8\"."),
    Mistake("an unknown option", OptionError, lambda: compile(net(), range_methd="mse"),
            "compile: unknown option 'range_methd'. Did you mean 'range_method'?"),
    Mistake("an unknown range_method", OptionError, lambda: calibrated([X], range_method="kld"),
            "compile: unknown range_method 'kld'. Did you mean 'kl'?"),
    Mistake("a flag as text", OptionError, lambda: compile(net(), integer_io="yes"),
            "compile: unknown integer_io 'yes'. Choose True or False."),
    Mistake("an unknown weight_granularity", OptionError, lambda: compile(net(), weight_granularity="row"),
            "compile: unknown weight_granularity 'row'. Known: 'channel', 'tensor'."),
    Mistake("power weights of more than 4 bits", OptionError, lambda: compile(net(), "w5a8", weight_quantizer="power"),
            'compile: weight_quantizer="power" reaches code 225 at 5 bits; int8 holds 127; expected weights of at most 4 bits. '
            'Choose "w4a8", or weight_quantizer="squant".'),
    Mistake("a residual in percent", OptionError, lambda: compile(net(), "w4a8", residual=50),
            'compile: residual is 50; expected a share 0..1 or "outliers". 0.5 gives every second row a residual.'),
    Mistake("residual orders without a share", OptionError, lambda: compile(net(), "w4a8", residual_orders=3),
            "compile: residual_orders=3 has no effect with residual=0.0. Pass residual=0.5 too, or drop residual_orders."),
    Mistake("an unknown backend", OptionError, lambda: compile(net(), backend="referense"),
            "backend: unknown backend 'referense'. Did you mean 'reference'?"),
    Mistake("percentile as a fraction", OptionError, lambda: calibrated([X], range_method="percentile", percentile=0.9999),
            "compile: percentile is 0.9999; expected a number with 50 < percentile <= 100. 99.99 keeps all but one value in ten thousand."),
    Mistake("percentile with another method", OptionError, lambda: calibrated([X], percentile=99.9),
            "compile: percentile=99.9 has no effect with range_method='mse'. Pass range_method=\"percentile\" too, or drop percentile."),
    Mistake("range_method without data", OptionError, lambda: compile(net(), range_method="kl"),
            "compile: range_method has no effect without calibration_data. Pass calibration_data (about 100 examples), or drop the option."),
    Mistake("a negative range_sigmas", OptionError, lambda: compile(net(), range_sigmas=-6),
            "compile: range_sigmas is -6; expected a positive number. 6 is the usual choice."),
    Mistake("an unknown matmul_algorithm", OptionError, lambda: compile(net(), matmul_algorithm="strasen"),
            "compile: unknown matmul_algorithm 'strasen'. Did you mean 'strassen'?"),
    Mistake("an unknown conv_algorithm", OptionError, lambda: compile(net(), conv_algorithm="winograd3"),
            "compile: unknown conv_algorithm 'winograd3'. Did you mean 'winograd4'?"),
    Mistake("no levels of blocks", OptionError, lambda: compile(net(), matmul_algorithm="winograd", matmul_levels=0),
            "compile: matmul_levels is 0; expected a whole number >= 1. Each level cuts the blocks again; 1 is the usual choice."),
    Mistake("levels without an algorithm", OptionError, lambda: compile(net(), matmul_levels=2),
            'compile: matmul_levels=2 has no effect with matmul_algorithm="naive". Pass matmul_algorithm="winograd" too, or drop matmul_levels.'),
    Mistake("an algorithm that does not multiply matrices", OptionError,
            lambda: register_algorithm(BilinearAlgorithm.parse("mine", (1, 1, 2), ["a11 b11", "a11 b12"], ["m1", "m1 + m2"])),
            "matmul_algorithm: the algorithm 'mine' has 1 a11 b11 in c12; expected 0. Check the signs of its formulas."),
    Mistake("max_rewrites as text", OptionError, lambda: compile(net(), max_rewrites="3"),
            "compile: max_rewrites is '3'; expected None or a whole number >= 0. None means no limit."),
    Mistake("keep_float of an unknown module", OptionError, lambda: compile(net(), keep_float=["haed"]),
            "keep_float: no submodule 'haed'. Did you mean 'head'?"),
    Mistake("keep_float of a module instead of its name", OptionError, lambda: compile(net(), keep_float=[nn.ReLU()]),
            "compile: keep_float is ['ReLU']; expected names of submodules. Pass the names that model.named_modules() lists, keep_float=[\"head.norm\"]."),
    Mistake("input_range upside down", OptionError, lambda: compile(net(), input_range=(1, 0)),
            "compile: input_range is (1, 0); expected finite (lo, hi) with lo < hi. For pixels divided by 255 it is (0, 1)."),
    Mistake("an infinite input_range", OptionError, lambda: compile(net(), input_range=(0, float("inf"))),
            "compile: input_range is (0, inf); expected finite (lo, hi) with lo < hi. For pixels divided by 255 it is (0, 1)."),
    Mistake("input_range as one number", OptionError, lambda: compile(net(), input_range=255),
            "compile: input_range is 255; expected finite (lo, hi) with lo < hi. For pixels divided by 255 it is (0, 1)."),
    Mistake("more ranges than inputs", OptionError, lambda: example(net(), input_range=[(0, 1), (0, 1)]),
            "compile: input_range lists 2 ranges, the model has 1 float inputs. Give one (lo, hi) or None per float input."),
    Mistake("input_range of too few channels", OptionError, lambda: example(net(), input_range=([-9, -9], [9, 9])),
            "ranges: input_range for x has 2 pairs; expected one (lo, hi), or one for each channel. For pixels divided by 255 it is (0, 1)."),
    Mistake("input_normalization by name", OptionError, lambda: compile(net(), input_normalization="imagenet"),
            "compile: input_normalization is 'imagenet'; expected (mean, std). Numbers, or one number per channel: ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))."),
    Mistake("a standard deviation of 0", OptionError, lambda: compile(net(), input_normalization=(0.5, 0.0)),
            "compile: std of input_normalization is 0.0; expected positive numbers. The network computes (x - mean) / std."),
    Mistake("input_normalization of too few channels", OptionError,
            lambda: example(net(), input_normalization=([0.5, 0.5], [0.2, 0.2])),
            "input_normalization: mean has 2 values; expected one finite number, or one for each of 3 channels. The network computes (x - mean) / std."),
    Mistake("debug is a file", OptionError, debug_in_a_file,
            "compile: the debug folder 'notes.txt' cannot be written: a file is in the way; expected the path of a folder. Choose a folder of your own, debug='dumps'."),
    Mistake("debug is a flag", OptionError, lambda: compile(net(), debug=True),
            "compile: the debug folder 'True' cannot be written: it is a bool; expected the path of a folder. Choose a folder of your own, debug='dumps'."),
    # ------------------------------------------------------------------------------------------------------------ pruning
    Mistake("a pruning_ratio of everything", OptionError, lambda: pruned(pruning_ratio=1),
            "compile: pruning_ratio is 1; expected a number with 0 <= pruning_ratio < 1. 0.3 removes 30 %."),
    Mistake("a pruning_ratio in percent", OptionError, lambda: pruned(pruning_ratio=30),
            "compile: pruning_ratio is 30; expected a number with 0 <= pruning_ratio < 1. 0.3 removes 30 %."),
    Mistake("an unknown pruning_criterion", OptionError, lambda: pruned(pruning_criterion="l3"),
            "compile: unknown pruning_criterion 'l3'. Did you mean 'l2'?"),
    Mistake("an unknown pruning_budget", OptionError, lambda: pruned(pruning_budget="even"),
            "compile: unknown pruning_budget 'even'. Known: 'global', 'importance', 'uniform'."),
    Mistake("an unknown pruning_measure", OptionError, lambda: pruned(pruning_measure="flops"),
            "compile: unknown pruning_measure 'flops'. Known: 'latency', 'macs', 'parameters'."),
    Mistake("an unknown pruning_correction", OptionError, lambda: pruned(pruning_correction="measure"),
            "compile: unknown pruning_correction 'measure'. Did you mean 'measured'? None is possible, too."),
    Mistake("an unknown pruning_granularity", OptionError, lambda: pruned(pruning_granularity="weight"),
            "compile: unknown pruning_granularity 'weight'; expected \"channels\", \"kernels\", \"unstructured\" or \"N:M\". \"2:4\" keeps two of every four weights."),
    Mistake("a pattern that keeps everything", OptionError, lambda: pruned(pruning_granularity="4:4"),
            'compile: pruning_granularity="4:4" keeps 4 of every 4 weights; expected "N:M" with N < M. "2:4" keeps two of every four.'),
    Mistake("a ratio beside a pattern", OptionError, lambda: pruned(pruning_granularity="2:4", pruning_ratio=0.3),
            'compile: pruning_ratio is 0.3, but pruning_granularity="2:4" removes 0.5. Drop pruning_ratio.'),
    Mistake("a criterion for channels, of weights", OptionError, lambda: pruned(pruning_granularity="unstructured", pruning_criterion="batch_norm"),
            "compile: pruning_criterion=\"batch_norm\" does not go with pruning_granularity=\"unstructured\". Known: 'contribution', 'magnitude', 'random', 'taylor'."),
    Mistake("a criterion for weights, of channels", OptionError, lambda: pruned(pruning_criterion="magnitude"),
            "compile: pruning_criterion=\"magnitude\" does not go with pruning_granularity=\"channels\". Known: 'activation', 'angular', 'batch_norm', 'contribution', 'gradient', 'hashed', 'hessian', 'integrated', 'l1', 'l2', 'mixed', 'outgoing', 'random', 'redundancy', 'taylor', 'weight_gradient'."),
    Mistake("a measure that kernels do not have", OptionError, lambda: pruned(pruning_granularity="kernels", pruning_measure="latency"),
            "compile: pruning_measure=\"latency\" does not go with pruning_granularity=\"kernels\". Known: 'macs', 'parameters'."),
    Mistake("round_to of single weights", OptionError, lambda: pruned(pruning_granularity="unstructured", round_to=8),
            'compile: round_to has no effect with pruning_granularity="unstructured". Drop it, or pass pruning_granularity="channels".'),
    Mistake("round_to of 0", OptionError, lambda: pruned(round_to=0),
            "compile: round_to is 0; expected None or a whole number >= 1. 1 allows any number of channels."),
    Mistake("pruning options without a ratio", OptionError, lambda: compile(net(), pruning_criterion="l1"),
            "compile: pruning_criterion has no effect with pruning_ratio=0. Pass pruning_ratio=0.3 too, or drop it."),
    Mistake("a ratio that cannot be reached", OptionError, lambda: pruned(pruning_ratio=0.9),
            f"prune_channels: pruning_ratio is 0.9, but at most 0.875 of the macs can be removed (1 layers stay: not applied at linear [head ({at('return self.head(self.stem(x).mean((2, 3)))')})] because output: it is a graph output). Lower pruning_ratio or round_to, or name fewer ignored_layers."),
    Mistake("a ratio of kernels that cannot be reached", OptionError, lambda: pruned(pruning_granularity="kernels", pruning_ratio=0.5),
            "group_kernels: pruning_ratio is 0.5, but at most 0.000 of the macs can be removed as kernels of 1 dense convolutions. Lower pruning_ratio or round_to, or name fewer ignored_layers."),
    Mistake("a share of weights that leaves no layer any", OptionError, lambda: pruned(pruning_granularity="unstructured", pruning_ratio=0.999),
            "prune_weights: pruning_ratio is 0.999, but at most 0.992 of the weights can be removed. Lower pruning_ratio, or name fewer ignored_layers."),
    Mistake("ignored_layers of an unknown module", OptionError, lambda: pruned(ignored_layers=["haed"]),
            "ignored_layers: no submodule 'haed'. Did you mean 'head'?"),
    Mistake("ignored_layers of a module instead of its name", OptionError, lambda: pruned(ignored_layers=[nn.ReLU()]),
            "compile: ignored_layers is ['ReLU']; expected names of submodules. Pass the names that model.named_modules() lists, ignored_layers=[\"head.norm\"]."),
    Mistake("a criterion of gradients without data", CalibrationError, lambda: pruned(pruning_criterion="taylor"),
            "prune: this pruning_criterion or pruning_budget looks at data, and there are none. Pass calibration_data (64 unlabeled examples), or choose one that looks at weights only."),
    Mistake("a budget of gradients without data", CalibrationError, lambda: pruned(pruning_budget="importance"),
            "prune: this pruning_criterion or pruning_budget looks at data, and there are none. Pass calibration_data (64 unlabeled examples), or choose one that looks at weights only."),
    Mistake("measured statistics without data", CalibrationError, lambda: pruned(pruning_correction="measured"),
            'prune_channels: pruning_correction="measured" needs data, and there are none. Pass calibration_data, or pruning_correction="analytic".'),
    Mistake("a latency table without the measure", OptionError, lambda: pruned(latency_table="times.json"),
            'compile: latency_table has no effect with pruning_measure="macs". Pass pruning_measure="latency" too, or drop it.'),
    Mistake("a latency table that is none", OptionError, lambda: pruned(pruning_measure="latency", latency_table=3),
            'compile: latency_table is a int; expected a LatencyTable or the path of a file. Pass latency_table="times.json".'),
    Mistake("a latency table that is another file", OptionError, foreign_table,
            "latency table: the latency table 'times.json' cannot be read: it is no latency table (ValueError: expected format 'fxcompress latency table', version 1); expected a file that LatencyTable.save wrote. Delete it, and it is measured anew."),
    Mistake("a latency table in a folder that is not there", OptionError, lambda: LatencyTable().save("tables/times.json"),
            "latency table: the latency table 'tables/times.json' cannot be written: No such file or directory; expected the path of a file. Choose a file of your own, latency_table=\"times.json\"."),
    Mistake("an incomplete latency table of another machine", OptionError, lambda: pruned(pruning_measure="latency", latency_table=LatencyTable(machine="an abacus")),
            "latency table: 35 layer shapes are missing from the table, which was measured on 'an abacus'; expected a complete table, or one of this machine, [...]. Measure the table for this model where it is to run, or name another file."),
    Mistake("pruning a model in training mode", ModelError, lambda: fxcompress.prune(net().train(), X),
            "model check: Net is in training mode. Call model.eval() first."),
    Mistake("pruning in no parts", OptionError, lambda: gradually(removals=0),
            "fine_tune: removals is 0; expected a whole number >= 1. 20 is the default."),
    Mistake("correcting what training corrects", OptionError, lambda: gradually(pruning_correction=None),
            "fine_tune: pruning_correction has no effect: training corrects the statistics. Drop it."),
    Mistake("single weights, gradually", OptionError, lambda: gradually(pruning_granularity="unstructured"),
            "fine_tune: pruning_granularity is 'unstructured'; expected \"channels\". Prune at once with fxcompress.prune, then fine_tune: zeros stay zero."),
    Mistake("no steps of fine-tuning", OptionError, lambda: tuned((X, LABELS), steps=-1),
            "fine_tune: steps is -1; expected a whole number >= 0. 1000 steps are usual."),
    Mistake("an unknown setting of fine_tune", OptionError, lambda: tuned((X, LABELS), epochs=3),
            "fine_tune: got an unexpected keyword argument 'epochs'. docs/pruning.md lists the settings of fine_tune."),
    Mistake("fine-tuning without labels or teacher", InputError, lambda: tuned(X),
            "fine_tune: the data hold inputs without labels; expected (inputs, labels). Pass the labels, or teacher=model to train towards the outputs of the unpruned model."),
    Mistake("inputs and labels of different lengths", InputError, lambda: tuned((X, LABELS[:2])),
            "fine_tune: tensors of 4, 2 examples; expected (inputs, labels) of one length. Every example needs its label."),
    Mistake("fine-tuning on a loader", InputError, lambda: tuned(DataLoader(TensorDataset(X, LABELS))),
            "fine_tune: data is DataLoader; expected a tensor, tensors (inputs, labels), or a torch Dataset with a length. Pass its data set, loader.dataset, and batch_size=."),
    Mistake("a teacher in training mode", ModelError, lambda: tuned(X, teacher=net().train()),
            "fine_tune: the teacher is in training mode. Call teacher.eval() first."),
    # ------------------------------------------------------------------------------------------------------------- passes
    Mistake("the name of a pass instead of the pass", PipelineError, lambda: compile(net(), passes=["fold_batchnorm"]),
            "compile: 'fold_batchnorm' is a name, not a pass; expected a Pass or a callable(gm) -> PassResult. Did you mean 'fold_batch_norm'? Edit default_passes(target): insert_after, replace, without."),
    Mistake("an unknown pass", PipelineError, lambda: default_passes().insert_after("fold_batchnorm", models.Liar()),
            "passes: no pass named 'fold_batchnorm'. Did you mean 'fold_batch_norm'?"),
    Mistake("one pass instead of a list", PipelineError, lambda: compile(net(), passes=models.Liar()),
            "compile: passes is a Liar; expected a list of passes. Edit the list that default_passes(target) returns."),
    Mistake("something that is no pass", PipelineError, lambda: compile(net(), passes=[*default_passes(), 3]),
            "compile: 3 is not a pass; expected a Pass or a callable(gm) -> PassResult. Derive it from fxcompress.Pass or RewriteRule, or return a PassResult."),
    Mistake("a pass twice", PipelineError, lambda: compile(net(), passes=[*default_passes(), default_passes()[0]]),
            "compile: the name 'normalize' occurs twice. Remove one, or rename it."),
    Mistake("a pass without what it needs", PipelineError, lambda: compile(net(), passes=default_passes().without("harvest_statistics")),
            "compile: canonicalize_affine needs STATISTICS, which no earlier pass establishes. Put harvest_statistics before it."),
    Mistake("passes in a forbidden order", PipelineError, lambda: compile(net(), passes=first(default_passes(), "fold_batch_norm")),
            "compile: fold_batch_norm needs STATISTICS, which no earlier pass establishes. Put harvest_statistics before it."),
    Mistake("a pass at the wrong level", PipelineError, lambda: compile(net(), passes=first(default_passes(), "fuse_padding")),
            "compile: fuse_padding runs at the integer level but the graph is at the float level there. Move it after the pass that changes the level."),
    Mistake("a list that never lowers", PipelineError, lambda: compile(net(), passes=default_passes()[:5]),
            "compile: the list of passes ends at the float level; expected the integer level. Edit the list that default_passes(target) returns."),
    # ------------------------------------------------------------------------------------------------------------- files
    Mistake("a file that is not there", ArtifactError, lambda: load("model.fxc"),
            "load: cannot read model.fxc: No such file or directory; expected the path of a file that CompiledModule.save wrote. Check the path."),
    Mistake("no path at all", ArtifactError, lambda: load(None),
            "load: cannot read None: it is a NoneType; expected the path of a file that CompiledModule.save wrote. Check the path."),
    Mistake("a truncated file", ArtifactError, lambda: saved(lambda data: data[: len(data) // 2]),
            "load: model.fxc is not a readable model file (Error while deserializing: [...]). Save it again with CompiledModule.save."),
    Mistake("a damaged file", ArtifactError, lambda: saved(flipped),
            "load: model.fxc is damaged: its checksum does not match. Copy or save it again."),
    Mistake("a file of another version", ArtifactError,
            lambda: saved(lambda data: data.replace(b'\\"version\\": 3', b'\\"version\\": 9')),
            "load: model.fxc has version 9; expected version 3. Compile the model again with this release."),
    Mistake("a file of another program", ArtifactError, foreign_file,
            "load: weights.safetensors was not written by fxcompress. Load files made by CompiledModule.save."),
    Mistake("a state_dict file", ArtifactError, state_file,
            "load: weights.pt is not a readable model file (Error while deserializing: [...]). Save it again with CompiledModule.save."),
    Mistake("saving into a folder that is not there", ArtifactError, lambda: compiled().save("results/model.fxc"),
            "save: cannot write results/model.fxc: No such file or directory; expected a file name in an existing folder. Check the path."),
    Mistake("loading for an unknown backend", OptionError, lambda: (compiled().save("model.fxc"), load("model.fxc", backend="refrence")),
            "backend: unknown backend 'refrence'. Did you mean 'reference'?"),
    # ------------------------------------------------------------------------------------------------------------ exports
    Mistake("C source of a network that is partly float", UnsupportedOperatorError,
            lambda: example(net(), keep_float=["head"]).export_c("firmware"),
            "C export: [...] operators are in float on purpose: aten.[...]; expected integers only. Compile without keep_float."),
    Mistake("C source under a name that is none", OptionError, lambda: compiled().export_c("firmware", name="my-net"),
            "C export: name is 'my-net'; expected a C identifier. Pass name=\"model\"."),
    Mistake("samples that do not fill a batch", OptionError, lambda: compiled().export_c("firmware", batch=3, samples=X),
            "C export: there are [...] samples; expected a multiple of the batch, [3]. Pass whole batches."),
    Mistake("ONNX of a loaded network", ArtifactError,
            lambda: (compiled().save("model.fxc"), load("model.fxc").export_onnx("model.onnx")),
            "ONNX export: a saved model holds its integers only, not the graph that ONNX can say. Export where you compile: fxcompress.compile(...).export_onnx(path)."),
    # -------------------------------------------------------------------------------------------------- limits and contracts
    Mistake("a sum that could overflow", AccumulatorError,
            lambda: compile(models.long_sum(), example_inputs=torch.rand(2, 100_000), input_range=(0, 1)),
            "verify: linear: its sum reaches 0..3238500000 and needs 33 bits; expected 32 bits. Quantize this layer's weights to fewer bits, or keep it in float (keep_float)."),
    Mistake("an EXACT pass that changes the function", PassContractError,
            lambda: example(net(), passes=default_passes().insert_after("fuse_activation", models.Liar())),
            "liar: mul_tensor: declared EXACT but changes an output by 1 relative (1 in float64). This is a bug in the pass or in fxcompress: please report it with the debug folder."),
    Mistake("a pass that inserts an unknown operator", LevelError,
            lambda: example(net(), passes=default_passes().insert_after("fuse_activation", models.Stranger())),
            "stranger: cumprod_default: aten.cumprod.default is not in the float dialect. This is a bug in the pass or in fxcompress: please report it with the debug folder."),
    Mistake("verifying a float graph", VerificationError, verified_too_early,
            "verify: stem_0_weight [stem.0]: stem.0.weight is a torch.float32 constant; expected an integer tensor. This is a bug in the pass or in fxcompress: please report it with the debug folder."),
]  # fmt: skip
