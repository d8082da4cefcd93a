"""Training a network for a number of steps, so that it can be interrupted: what step t does depends on the state before it, on the
seed and on t, on nothing else. A run that goes on from a checkpoint is bit for bit the run that was not interrupted.

    Trainer      step after step; the learning rate falls to 0 along a cosine; checkpoints
    train_mode   the network as it is trained: batch norm takes the statistics of the batch
"""

from __future__ import annotations

import math
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..calibration_data import example_of
from ..dialects import BATCH_NORM, CLAMP
from ..errors import InputError, ModelError, OptionError
from ..graph import calls, copy_graph_module, set_argument
from ..terminal import progress
from .evidence import DIFFERENTIABLE
from .examples import STAGE, Examples, seed_of

SAVE_EVERY = 50  # steps between checkpoints
TEMPERATURE = 2.0
Loss = Callable[[object, object], Tensor]


def distillation(outputs: Tensor, wanted: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """T^2 KL(softmax(wanted / T) || softmax(outputs / T)), mean over the batch; classes along dimension 1.

    Source: Hinton et al. 2015.

    >>> float(distillation(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 3.0]]))) < 1e-6
    True
    """
    exact = torch.promote_types(outputs.dtype, torch.float32)  # bfloat16 of autocast has 8 bits
    ours, theirs = (F.log_softmax(logits / temperature, 1, dtype=exact) for logits in (outputs, wanted))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="none").sum(1).mean()


def momentum_sgd(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Stochastic gradient descent with Nesterov's momentum 0.9 and a weight decay of 1e-4."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)


@dataclass(frozen=True)
class Settings:
    """How a network is trained; ``fine_tune`` says what each means.

    >>> Settings(steps=-1)
    Traceback (most recent call last):
    fxcompress.errors.OptionError: fine_tune: steps is -1; expected a whole number >= 0. 1000 steps are usual.
    """

    steps: int
    teacher: nn.Module | None = None
    loss: Loss | None = None
    batch_size: int = 128
    learning_rate: float = 0.01
    optimizer: Callable[..., torch.optim.Optimizer] = momentum_sgd
    update_batch_norm: bool = True
    seed: int = 0
    checkpoint: str | os.PathLike | None = None

    def __post_init__(self):
        for name, smallest, remedy in (("steps", 0, "1000 steps are usual."), ("batch_size", 2, "128 is the default."),
                                       ("seed", 0, "0 is the default.")):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
                expected = f"a whole number >= {smallest}"
                raise OptionError(f"{name} is {value!r}", stage=STAGE, expected=expected, remedy=remedy)
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate < math.inf:
            raise OptionError(f"learning_rate is {self.learning_rate!r}", stage=STAGE, expected="a positive, finite number",
                              remedy="0.01 is the default.")  # fmt: skip
        for name in ("loss", "optimizer"):
            value = getattr(self, name)
            if not callable(value) and not (name == "loss" and value is None):
                signature = "f(outputs, target)" if name == "loss" else "f(parameters, lr=...)"
                raise OptionError(
                    f"{name} is {type(value).__name__}",
                    stage=STAGE,
                    expected="a function",
                    remedy=f"It is called as {signature}.",
                )
        if self.teacher is not None:
            if not isinstance(self.teacher, nn.Module):
                raise OptionError(f"teacher is {type(self.teacher).__name__}", stage=STAGE, expected="a module",
                                  remedy="Pass the model as it was before pruning.")  # fmt: skip
            if self.teacher.training:
                raise ModelError("the teacher is in training mode", stage=STAGE, remedy="Call teacher.eval() first.")

    @property
    def objective(self) -> Loss:
        """The loss, or what stands for it."""
        return self.loss or (F.cross_entropy if self.teacher is None else distillation)


def settings_of(**given) -> Settings:
    """``Settings``, with an ``OptionError`` for unknown names."""
    try:
        return Settings(**given)
    except TypeError as error:
        raise OptionError(str(error).removeprefix("Settings.__init__() "), stage=STAGE,
                          remedy="docs/pruning.md lists the settings of fine_tune.") from None  # fmt: skip


class Trainer:
    """Trains the parameters of ``network`` in place.

    Args:
        network: is called like the user's model; in eval mode.
        after_step: called after every step, without gradients: what must hold of the parameters (masks).
        run: what else, besides settings and weights, a checkpoint must agree in.

    Attributes:
        step: how many are done. extra: tensors by name that go into the checkpoint with the network.
    """

    def __init__(
        self,
        network: nn.Module,
        data: object,
        settings: Settings,
        after_step: Callable[[], None] = lambda: None,
        run: Mapping = MappingProxyType({}),
    ):
        self.network, self.settings, self.after_step = network, settings, after_step
        self.examples = Examples(data, settings.batch_size, settings.seed)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelError("no parameter of the model requires a gradient", stage=STAGE,
                             remedy="parameter.requires_grad_() makes one trainable.")  # fmt: skip
        self.optimizer = self._make_optimizer()
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.extra = 0, {}
        self._run = self._identity() | dict(run)
        if settings.checkpoint is not None:
            self._resume(Path(settings.checkpoint))

    def _make_optimizer(self) -> torch.optim.Optimizer:
        try:
            return self.settings.optimizer(self.parameters, lr=self.settings.learning_rate)
        except TypeError as error:
            raise OptionError(f"the optimizer cannot be made: {error}", stage=STAGE, expected="f(parameters, lr=...)",
                              remedy="For example torch.optim.AdamW, or functools.partial(torch.optim.SGD, momentum=0.9).") from error  # fmt: skip

    def run(self, until: int) -> None:
        """The steps before ``until`` that are not done; the learning rate falls to 0 over all steps of the settings."""
        with (
            train_mode(self.network, self.settings.update_batch_norm) as network,
            torch.random.fork_rng(devices=[]),
            progress(max(0, until - self.step)) as announce,
        ):
            while self.step < until:
                torch.manual_seed(seed_of(self.settings.seed, self.step))  # dropout, augmentation
                loss = self._descend(network)
                self.step += 1
                announce(f"step {self.step} of {self.settings.steps}, loss {loss:.4f}")
                if self.settings.checkpoint is not None and (
                    self.step % SAVE_EVERY == 0 or self.step == self.settings.steps
                ):
                    self._save(Path(self.settings.checkpoint))
        self.optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()

    def _descend(self, network: nn.Module) -> float:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * self.step / self.settings.steps)) / 2
        batch = self.examples.batch(self.step)
        torch.clear_autocast_cache()  # inside the caller's torch.autocast: casts of the weights as they were
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self.loss(network, batch)
            if not math.isfinite(float(loss.detach())):
                raise OptionError(f"the loss is {float(loss.detach())} at step {self.step}", stage=STAGE,
                                  remedy=f"Lower learning_rate, which is {self.settings.learning_rate}.")  # fmt: skip
            loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.after_step()
        return float(loss.detach())

    def loss(self, network: nn.Module, batch: tuple) -> Tensor:
        """Of a batch of ``examples``."""
        settings = self.settings
        call = example_of(batch if len(batch) > 1 else batch[0], self.network)
        if settings.teacher is None and (len(batch) < 2 or (isinstance(call, tuple) and len(call) == len(batch))):
            raise InputError("the data hold inputs without labels", stage=STAGE, expected="(inputs, labels)",
                             remedy="Pass the labels, or teacher=model to train towards the outputs of the unpruned model.")  # fmt: skip
        try:
            wanted = batch[-1] if settings.teacher is None else _target(settings.teacher, call)
            outputs = called(network, call)
            return settings.objective(outputs, wanted)
        except Exception as error:
            raise InputError(f"the model, the teacher or the loss fails on the batch of step {self.step}: {type(error).__name__}: {error}",
                             stage=STAGE, expected="data as the model takes them, labels as the loss does",
                             remedy="Outputs that are no logits need a loss=f(outputs, target) of your own.") from error  # fmt: skip

    # -- checkpoints

    def _identity(self) -> dict:
        """What a checkpoint must agree in: it goes on with this run or with none."""
        s, state = self.settings, self.network.state_dict()
        checksum = 0
        for name in sorted(state):
            checksum = zlib.crc32(state[name].detach().flatten().view(torch.uint8).numpy(), checksum)
        return {
            "steps": s.steps, "batch_size": s.batch_size, "learning_rate": s.learning_rate, "seed": s.seed,
            "examples": self.examples.count, "weights": checksum, "teacher": s.teacher is not None,
            "update_batch_norm": s.update_batch_norm, "optimizer": type(self.optimizer).__name__,
        }  # fmt: skip

    def _save(self, path: Path) -> None:
        """Into another file first: an interrupt leaves the one before."""
        unfinished = path.with_name(path.name + ".part")
        try:
            torch.save(
                {
                    "run": self._run,
                    "step": self.step,
                    "network": self.network.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "extra": self.extra,
                },
                unfinished,
            )
            unfinished.replace(path)
        except (OSError, RuntimeError) as error:
            raise OptionError(f"the checkpoint {str(path)!r} cannot be written: {error}", stage=STAGE, expected="the path of a file",
                              remedy='Choose a file of your own, checkpoint="run.pt".') from error  # fmt: skip

    def _resume(self, path: Path) -> None:
        if not path.exists():
            return
        try:
            found = torch.load(path, weights_only=True)
            run = found["run"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise OptionError(f"the checkpoint {str(path)!r} cannot be read: {type(error).__name__}", stage=STAGE,
                              remedy="Name another file, or remove it to begin again.") from error  # fmt: skip
        other = [name for name, value in self._run.items() if run.get(name) != value]
        if other:
            raise OptionError(f"the checkpoint {str(path)!r} is of another run: {', '.join(other)} differ", stage=STAGE,
                              remedy="Call it as before to go on, name another file, or remove it to begin again.")  # fmt: skip
        self.network.load_state_dict(found["network"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.step, self.extra = found["step"], found["extra"]


def called(network: nn.Module, call: tuple | dict) -> object:
    """What a network gives for a call's positional or keyword arguments."""
    return network(**call) if isinstance(call, dict) else network(*call)


@torch.no_grad()
def _target(teacher: nn.Module, call: tuple | dict) -> object:
    return called(teacher, call)


@contextmanager
def train_mode(model: nn.Module, update_batch_norm: bool = True) -> Iterator[nn.Module]:
    """``model`` as it is trained, on the same tensors: modules in training mode, calls of batch norm in a graph as well.

    Without ``update_batch_norm``, batch norm keeps its statistics and goes on to use them. So does in any case the one that reads
    an input of a graph: it is the user's normalization.
    """
    network = model
    if isinstance(model, fx.GraphModule):
        network = copy_graph_module(model)
        for node in network.graph.nodes:
            if node.op == "call_function":
                node.target = DIFFERENTIABLE.get(node.target, node.target)
                if node.target is CLAMP and node.args[1:] == (0.0, None):  # relu's gradient takes a third of the time
                    node.target, node.args = torch.ops.aten.relu.default, node.args[:1]
        for node in calls(network, BATCH_NORM):
            set_argument(node, "training", update_batch_norm and node.args[0].op != "placeholder")
        network.recompile()
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not update_batch_norm:
            module.eval()
    try:
        yield network
    finally:
        network.eval()
