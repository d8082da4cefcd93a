"""The command line: what each command prints and writes, and its exit status. In process, and once as a program."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fxcompress
from fxcompress.cli import DONE, INTERNAL_ERROR, NO, USER_ERROR, WRONG_COMMAND_LINE, main, sources
from fxcompress.errors import CalibrationError, FxcompressError, ModelError, OptionError, PassContractError
from fxcompress.strict_json import dumps
from tests.support.graphs import build

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

def factory():
    torch.manual_seed(0)
    return Net()

def broken():
    raise RuntimeError("no weights")

instance = factory()
number = 7

def positive(network):
    return float(network(torch.ones(1, 3, 8, 8)).isfinite().all())

def broken_metric(network):
    return 1 / 0

def never(network):
    positive(network)
    return float("-inf") if not isinstance(network, nn.Module) else network.training - 1.0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model's module."""
    (tmp_path / "cli_models.py").write_text(MODULE)
    (tmp_path / "cli_faulty.py").write_text("x = 1\ny = gone\n")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "damaged.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "empty").mkdir()
    yield tmp_path
    sys.modules.pop("cli_models", None)


@pytest.fixture
def saved(folder) -> Path:
    assert main(["compile", "cli_models:factory", "--example", "1x3x8x8", "--out", "net.fxc"]) == DONE
    return folder / "net.fxc"


def strict(text: str):
    """As other programs read JSON: no Infinity, no NaN."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def run_json(capsys, *arguments: str, status: int = DONE):
    capsys.readouterr()
    assert main([*arguments, "--json"]) == status
    return strict(capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------------- compile


def test_compile_writes_what_python_would(folder, capsys):
    assert main(["compile", "cli_models:factory", "--example", "1x3x8x8", "--out", "net.fxc"]) == DONE
    text = capsys.readouterr().out
    assert (
        "wrote net.fxc (" in text
        and "index.html" not in text
        and "Integer-only" in text
        and "next: fxcompress inspect net.fxc" in text
    )
    import cli_models

    generator = torch.Generator().manual_seed(0)
    expected = fxcompress.compile(
        cli_models.factory().eval(), example_inputs=torch.rand(1, 3, 8, 8, generator=generator)
    )
    x = torch.rand(3, 3, 8, 8)
    assert torch.equal(fxcompress.load("net.fxc")(x), expected(x))


def test_compile_reads_images_and_folds_the_normalization(folder, capsys):
    from PIL import Image

    (folder / "images" / "damaged.png").unlink()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    data = run_json(
        capsys, "compile", "cli_models:instance", "--example", "1x3x8x8", "--calibration", "images", "--input-range", "0", "255",
        "--mean", "120", "110", "100", "--std", "60", "60", "60", "--option", "range_method=minmax", "--out", "net.fxc", "--export-c", "c",
    )  # fmt: skip
    assert data["written"] == ["net.fxc", "c"] and (folder / "c" / "model.c").exists()
    (given,) = data["report"]["inputs"]
    assert (given["lo"], given["hi"]) == (0, 255) and data["report"]["resources"]["c_source"]["arena_bytes"] > 0
    assert fxcompress.load("net.fxc")(torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)).shape == (2, 4)


def test_images_are_scaled_and_cut(folder):
    from PIL import Image

    Image.fromarray(np.full((40, 20, 3), 255, np.uint8)).save(folder / "tall.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "black.png")
    (folder / "images" / "damaged.png").unlink()
    black, white = sources.calibration(".", (torch.zeros(1, 3, 8, 8),), (-1.0, 1.0), 9)
    assert white.shape == (1, 3, 8, 8) and white.unique().tolist() == [1] and black.unique().tolist() == [-1]
    (gray,) = sources.calibration(".", (torch.zeros(1, 1, 4, 6),), (0.0, 255.0), 1)
    assert gray.shape == (1, 1, 4, 6)


def test_compile_reads_arrays(folder):
    np.save("x.npy", np.random.default_rng(0).random((6, 3, 8, 8), dtype=np.float32))
    np.savez("x.npz", left=np.zeros((4, 2)), right=np.ones((4, 3)))
    assert main(["compile", "cli_models:factory", "--calibration", "x.npy", "--out", "a.fxc"]) == DONE
    assert len(sources.calibration("x.npy", (), (0, 1), 5)) == 5
    batches = sources.calibration("x.npz", (), (0, 1), 100)
    assert len(batches) == 4 and batches[0]["right"].tolist() == [[1, 1, 1]]


def test_compile_reads_exported_programs(folder):
    model, (x,) = build("mlp")
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)), "mlp.pt2")
    assert main(["compile", "mlp.pt2", "--example", "2x12", "--out", "mlp.fxc"]) == DONE


# ----------------------------------------------------------------------------------------------- the other commands


def test_inspect(saved, capsys):
    data = run_json(capsys, "inspect", str(saved), "--graph", "--verify")
    assert data["report"] == json.loads(dumps(fxcompress.load(saved).report().to_dict()))
    assert data["verified"]["integer_only"] and any("fxc.conv" in line for line in data["graph"])
    assert main(["inspect", str(saved)]) == DONE
    assert capsys.readouterr().out.strip() == str(fxcompress.load(saved).report()).strip()


def test_bench(saved, capsys):
    data = run_json(capsys, "bench", str(saved), "--batch", "2", "--seconds", "0.05", "--backend", "reference")
    assert data["backend"] == "reference" and data["batch"] == 2 and 0 < data["minimum_ms"] <= data["median_ms"]
    assert main(["bench", str(saved), "--seconds", "0.01"]) == DONE
    assert "ms median of" in capsys.readouterr().out


def test_diff(folder, saved, capsys):
    assert main(["diff", str(saved), str(saved)]) == DONE
    assert "are the same network" in capsys.readouterr().out
    main(["compile", "cli_models:factory", "--example", "1x3x8x8", "--target", "w4a8", "--out", "four.fxc"])
    data = run_json(capsys, "diff", str(saved), "four.fxc", status=NO)
    assert data["target"] == ["w8a8", "w4a8"] and "conv2d_weight" in data["constants"] and not data["same"]
    assert 5 < data["answers"]["sqnr"][0] < 45 and 0 <= data["answers"]["agreement"][0] <= 1
    assert main(["diff", str(saved), "four.fxc"]) == NO
    assert "target: w8a8 -> w4a8" in capsys.readouterr().out
    model, inputs = build("mlp")
    fxcompress.compile(model, example_inputs=inputs).save("mlp.fxc")
    assert run_json(capsys, "diff", str(saved), "mlp.fxc", status=NO)["answers"] is None


def test_passes(capsys):
    data = run_json(capsys, "passes")
    assert data["published"] == fxcompress.published_passes()
    rows = data["default"]
    assert [r["name"] for r in rows] == fxcompress.default_passes().names
    assert all(r["what"] and r["why_here"] for r in rows)
    assert main(["passes"]) == DONE
    text = " ".join(capsys.readouterr().out.split())
    assert "fold_batch_norm" in text and "EXACT" in text


def test_bisect(folder, capsys):
    np.save("x.npy", np.random.default_rng(0).random((8, 3, 8, 8), dtype=np.float32))
    found = run_json(capsys, "bisect", "cli_models:factory", "--calibration", "x.npy", "--tolerance", "0.9")
    assert not found["broken"] and found["reference"] == 1.0
    found = run_json(capsys, "bisect", "cli_models:factory", "--calibration", "x.npy", "--threshold", "2", status=NO)
    assert found["broken"] and found["pass_name"] == "model"
    assert main(["bisect", "cli_models:factory", "--example", "1x3x8x8", "--metric", "cli_models:positive"]) == DONE
    assert "Nothing breaks the metric" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "cli_models:factory"], "nothing to write"),
        (["compile", "cli_models:factory", "--out", "a.fxc"], "neither --example nor --calibration"),
        (
            ["compile", "cli_models:factory", "--example", "1x3", "--out", "no/a.fxc"],
            "expected a file in an existing folder",
        ),
        (["compile", "cli_models:factory", "--example", "1x3", "--out", "images"], "--out images; expected a file"),
        (
            ["compile", "cli_models:factory", "--example", "1x3", "--export-onnx", "no/a.onnx"],
            "--export-onnx no/a.onnx",
        ),
        (
            ["compile", "weights.pt", "--example", "1x3", "--out", "a.fxc"],
            "A file of weights needs the code of its model",
        ),
        (
            ["compile", "cli_faulty:x", "--example", "1x3", "--out", "a.fxc"],
            "name 'gone' is not defined (cli_faulty.py:2)",
        ),
        (
            ["compile", "cli_models:factory", "--example", "1x3x8x8", "--calibration", "images", "--out", "a.fxc"],
            "damaged.png cannot be read",
        ),
        (
            [
                "compile",
                "cli_models:factory",
                "--example",
                "1x3x8x8",
                "--insert-after",
                "quantise",
                "x",
                "--out",
                "a.fxc",
            ],
            "Did you mean 'quantize'?",
        ),
        (
            ["bisect", "cli_models:factory", "--example", "1x3x8x8", "--metric", "cli_models:broken_metric"],
            "ZeroDivisionError: division by zero (cli_models.py",
        ),
        (["compile", "cli_models", "--example", "1x3", "--out", "a.fxc"], "'cli_models' names no object"),
        (["compile", "no_such:x", "--example", "1x3", "--out", "a.fxc"], "no_such cannot be imported"),
        (["compile", "cli_models:gone", "--example", "1x3", "--out", "a.fxc"], "cli_models has no gone"),
        (["compile", "cli_models:number", "--example", "1x3", "--out", "a.fxc"], "the model is a int"),
        (
            ["compile", "cli_models:broken", "--example", "1x3", "--out", "a.fxc"],
            "broken() failed: RuntimeError: no weights (cli_models.py",
        ),
        (["compile", "gone.pt2", "--example", "1x3", "--out", "a.fxc"], "gone.pt2 cannot be read"),
        (["compile", "cli_models:factory", "--example", "1x3:int7", "--out", "a.fxc"], "--example 1x3:int7"),
        (
            ["compile", "cli_models:factory", "--example", "1x3x8x8", "--mean", "1", "--out", "a.fxc"],
            "one of --mean and --std",
        ),
        (
            ["compile", "cli_models:factory", "--example", "1x3x8x8", "--calibration", "gone", "--out", "a.fxc"],
            "a folder of images",
        ),
        (
            ["compile", "cli_models:factory", "--example", "1x3x8x8", "--calibration", "empty", "--out", "a.fxc"],
            "no images in empty",
        ),
        (["compile", "cli_models:factory", "--calibration", ".", "--out", "a.fxc"], "one --example of shape Nx3xHxW"),
        (
            ["compile", "cli_models:factory", "--example", "1x3x8x8", "--target", "int9", "--out", "a.fxc"],
            "unknown target 'int9'",
        ),
        (
            ["compile", "cli_models:factory", "--example", "1x3x8x8", "--option", "spik=true", "--out", "a.fxc"],
            "Did you mean 'spiq'?",
        ),
        (["inspect", "gone.fxc"], "cannot read gone.fxc"),
        (["bisect", "cli_models:factory", "--example", "1x3x8x8"], "no inputs to ask the metric on"),
        (["bisect", "cli_models:factory", "--example", "1x3x8x8", "--metric", "cli_models:number"], "is a int"),
    ],
)
def test_mistakes_say_what_to_do(folder, capsys, arguments, message):
    assert main([*arguments, "--json"]) == USER_ERROR
    captured = capsys.readouterr()
    assert message in captured.err
    error = json.loads(captured.out)
    assert (
        message in error["message"]
        and error["found"]
        and issubclass(getattr(fxcompress.errors, error["error"]), FxcompressError)
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["compile"],
        ["fly"],
        ["bench", "x", "--batch", "0"],
        ["bench", "x", "--batch", "two"],
        ["bench", "x", "--seconds", "-1"],
        ["compile", "m:f", "--option", "spiq"],
    ],
)
def test_a_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == WRONG_COMMAND_LINE and "usage: fxcompress" in capsys.readouterr().err


def test_internal_errors_have_a_status_of_their_own(monkeypatch, capsys):
    def fail(args):
        raise PassContractError("planted", stage="a_pass")

    monkeypatch.setattr("fxcompress.cli.looking.list_passes", fail)
    assert main(["passes"]) == INTERNAL_ERROR
    assert "PassContractError: a_pass: planted" in capsys.readouterr().err


def test_an_unknown_exception_is_no_answer(monkeypatch, capsys):
    monkeypatch.setattr("fxcompress.cli.looking.list_passes", lambda args: {}["gone"])
    assert run_json(capsys, "passes", status=INTERNAL_ERROR)["error"] == "KeyError"


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fxcompress {fxcompress.__version__}\n"


@pytest.mark.parametrize("command", [[], ["compile"], ["inspect"], ["bench"], ["diff"], ["passes"], ["bisect"]])
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "usage: fxcompress" in text and len(text.splitlines()) > 7


def test_as_a_program(folder):
    """``python -m fxcompress`` from any folder: standard output, standard error, exit status."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "fxcompress", *arguments], capture_output=True, text=True, env=environment
        )

    done = run("compile", "cli_models:factory", "--example", "2x3x8x8", "--out", "net.fxc", "--json")
    assert done.returncode == DONE and json.loads(done.stdout)["written"] == ["net.fxc"]
    failed = run("inspect", "cli_models.py")
    assert (
        failed.returncode == USER_ERROR
        and failed.stdout == ""
        and failed.stderr.startswith("fxcompress: ArtifactError: ")
    )


def test_sources_raise_their_own_errors(folder):
    for call, kind in (
        (lambda: sources.load_model("cli_models:broken"), ModelError),
        (lambda: sources.load_function("cli_models:number"), OptionError),
        (lambda: sources.calibration("cli_models.py", (), (0, 1), 1), CalibrationError),
    ):
        with pytest.raises(kind):
            call()


def test_the_package_installs_the_command():
    script = re.search(r"\[project\.scripts\]\nfxcompress = \"(.+):(.+)\"", (ROOT / "pyproject.toml").read_text())
    assert getattr(importlib.import_module(script[1]), script[2]) is main
