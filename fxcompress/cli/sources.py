"""What the words of a command line stand for: models, example inputs, calibration data, functions."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CalibrationError, FxcompressError, ModelError, OptionError

_WEIGHTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
_DTYPES = {
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
    "uint8": torch.uint8,
}


def _error(found: str, expected: str, remedy: str, kind: type = OptionError) -> Exception:
    return kind(found, stage="command line", expected=expected, remedy=remedy)


def load_object(spec: str) -> object:
    """What ``package.module:name`` names; the current directory can be imported from."""
    module, colon, name = spec.partition(":")
    if not colon or not module or not name:
        raise _error(
            f"{spec!r} names no object",
            "package.module:name",
            "A file of weights needs the code of its model: write a module with a function that builds the model and loads them."
            if Path(spec).suffix in _WEIGHTS
            else "For example my_net:trained, for the function or module trained in my_net.py.",
        )
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise _error(f"{module} cannot be imported: {error}", "an importable module",
                     "Run the command where the module lies, or install its package.") from error  # fmt: skip
    except Exception as error:  # its own code runs here
        raise _error(
            f"importing {module} failed: {_told(error)}", "an importable module", "Repair the module."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise _error(f"{module} has no {name}", "a name in that module", "Check the spelling after the colon.")
        found = getattr(found, part)
    return found


def load_model(spec: str) -> nn.Module | torch.export.ExportedProgram:
    """A module, what a factory without arguments returns (in eval mode), or a file of ``torch.export.save`` (.pt2)."""
    if Path(spec).suffix == ".pt2":
        try:
            Path(spec).open("rb").close()  # torch logs a traceback about a missing file
            return torch.export.load(spec)
        except Exception as error:
            raise _error(
                f"{spec} cannot be read: {error}", "a file of torch.export.save", "Check the path.", ModelError
            ) from error
    model = load_object(spec)
    if callable(model) and not isinstance(model, nn.Module):
        try:
            model = model()
        except Exception as error:
            raise _error(f"{spec}() failed: {_told(error)}", "a factory that needs no arguments",
                         "Write one that builds the model and loads its weights.", ModelError) from error  # fmt: skip
    return model.eval() if isinstance(model, nn.Module) else model


def example(spec: str) -> Tensor:
    """ "1x3x224x224", "2x12:int64": seeded random values (0..1), or zeros of an integer dtype."""
    match = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?", spec)
    if match is None or match[2] not in (None, *_DTYPES):
        raise _error(f"--example {spec}", f"sizes like 1x3x224x224, with :dtype of {', '.join(_DTYPES)} where they are not float32",
                     "The first size is the batch.")  # fmt: skip
    shape, dtype = [int(n) for n in match[1].split("x")], _DTYPES[match[2] or "float32"]
    if dtype is torch.float32:
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))
    return torch.zeros(shape, dtype=dtype)


def calibration(path: str, examples: tuple[Tensor, ...], limits: tuple[float, float], count: int) -> list:
    """Up to ``count`` inputs from a folder of images, a .npy array or a .npz archive.

    Images are resized to the example's height and width (short side, then cut in the middle) and their pixels spread over ``limits``.
    Arrays are taken as they are, (N, ...); an archive with several holds the model's arguments by name.
    """
    source = Path(path)
    if source.is_dir():
        return list(_images(source, examples, limits, count))
    if source.suffix not in (".npy", ".npz") or not source.is_file():
        raise _error(
            f"--calibration {path}", "a folder of images, a .npy or a .npz file", "Check the path.", CalibrationError
        )
    try:
        loaded = np.load(source, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _error(
            f"{path} cannot be read: {error}", "numeric arrays", "Save it with numpy.save.", CalibrationError
        ) from error
    arrays = {
        k: torch.from_numpy(v[:count]) for k, v in (loaded.items() if source.suffix == ".npz" else [("", loaded)])
    }
    if len(arrays) == 1:
        (array,) = arrays.values()
        return [array[i : i + 1] for i in range(len(array))]
    return [{k: v[i : i + 1] for k, v in arrays.items()} for i in range(min(map(len, arrays.values())))]


def _told(error: Exception) -> str:
    """An exception of the user's code: what, and in which line of theirs."""
    line = traceback.extract_tb(error.__traceback__)[-1]
    theirs = Path(line.filename).is_file() and line.filename != __file__
    return f"{type(error).__name__}: {error}" + (f" ({Path(line.filename).name}:{line.lineno})" if theirs else "")


def _images(folder: Path, examples: tuple[Tensor, ...], limits: tuple[float, float], count: int) -> Iterator[Tensor]:
    try:
        from PIL import Image
    except ImportError as error:
        raise _error(
            "Pillow is not installed, which reads images",
            "",
            "pip install pillow, or pass a .npy file.",
            CalibrationError,
        ) from error
    if len(examples) != 1 or examples[0].ndim != 4 or examples[0].shape[1] not in (1, 3):
        raise _error(
            f"{folder} holds images",
            "one --example of shape Nx3xHxW or Nx1xHxW",
            "Say the network's input size.",
            CalibrationError,
        )
    _, channels, height, width = examples[0].shape
    files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in IMAGES][:count]
    if not files:
        raise _error(
            f"no images in {folder}", f"files ending in {', '.join(IMAGES)}", "Check the path.", CalibrationError
        )
    lo, hi = limits
    for file in files:
        try:
            with Image.open(file) as image:
                fitted = _fitted(image.convert("RGB" if channels == 3 else "L"), width, height)
        except (OSError, ValueError) as error:
            raise _error(
                f"{file} cannot be read: {error}", "an image", "Remove it from the folder.", CalibrationError
            ) from error
        pixels = np.asarray(fitted, dtype=np.float32)
        tensor = torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)[None]
        yield (lo + (hi - lo) / 255 * tensor).contiguous()


def _fitted(image, width: int, height: int):
    """The image scaled until it covers width x height, and its middle cut out."""
    scale = max(width / image.width, height / image.height)
    image = image.resize((max(width, round(image.width * scale)), max(height, round(image.height * scale))))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def load_function(spec: str) -> Callable:
    """A metric: its own exceptions are the user's to repair."""
    found = load_object(spec)
    if not callable(found):
        raise _error(f"{spec} is a {type(found).__name__}", "a function", "Name a function that takes the network.")

    def metric(network: nn.Module) -> object:
        try:
            return found(network)
        except FxcompressError:
            raise
        except Exception as error:
            raise _error(
                f"{spec} failed: {_told(error)}", "a function that takes the network", "Repair the metric."
            ) from error

    return metric
