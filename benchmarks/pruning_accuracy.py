"""What pruning costs real networks: by criterion and budget without training, and after training. Run by ``bench_pruning.py``.

Every cell is a row of a file of JSON lines with what was asked; cells that have one are not measured again, so that a run can be
interrupted, and tables can be printed from what there is.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import real_models
import torch
from torch import nn

import fxcompress
from fxcompress.pruning.criteria import CRITERIA, Criterion

#: Layers that write to the residual stream: without them only channels inside the blocks go.
STREAM = {
    "resnet56": ["conv1", *(f"layer{stage}.{block}.conv2" for stage in (1, 2, 3) for block in range(9))],
    "resnet8": ["conv", *(f"block{block}.{conv}" for block in (1, 2, 3) for conv in ("conv2", "shortcut"))],
}


class Results:
    """Rows of a file of JSON lines, found by what was asked for.

    >>> Results(path).get({"share": 0.5}, lambda: {"top1": 90.1})                             # doctest: +SKIP
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def get(self, asked: dict, measure: Callable[[], dict]) -> dict:
        """The row of ``asked``: an earlier one, or what ``measure()`` says."""
        asked = json.loads(json.dumps(asked))
        row = next((row for row in self.rows if asked.items() <= row.items()), None)
        if row is None:
            start = time.perf_counter()
            row = asked | measure()
            row["seconds"] = round(time.perf_counter() - start, 1)
            self.rows.append(row)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row


def remember_scores() -> None:
    """Make every criterion score the network once: the scores of one network depend neither on ratio nor on budget."""
    for name, criterion in CRITERIA.items():
        CRITERIA[name] = Criterion(_once(criterion.score), criterion.needs_data)


def _once(score: Callable) -> Callable:
    known: list[torch.Tensor] = []

    def remembered(evidence) -> torch.Tensor:
        if not known:
            known.append(score(evidence))
        return known[0]

    return remembered


def channels_last(model: nn.Module) -> nn.Module:
    """A copy whose convolutions read and write channels last, which trains faster on processors."""
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def top1(workload, network: nn.Module) -> float:
    """In percent, of a float network that takes normalized images."""
    return workload.metric(workload.outputs(lambda raw: network(workload.normalized(raw))))


# ----------------------------------------------------------------------------------------------------------- criteria


def criteria(args: argparse.Namespace) -> None:
    """Top-1 of a network by criterion, budget and share of the parameters removed, without training, as a Markdown table."""
    workload, results = real_models.load(args.network).reported(args.images), Results(args.results)
    columns = [(share, budget) for share in args.shares for budget in args.budgets]
    print("| criterion | " + " | ".join(f"{share:.0%}, {budget}" for share, budget in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    remember_scores()
    for name in args.only or CRITERIA:
        cells = [_cell(workload, results, name, share, budget, args) for share, budget in columns]
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


def _cell(workload, results: Results, criterion: str, share: float, budget: str, args: argparse.Namespace) -> str:
    """ "87.70 (90.05)": one number for every correction."""
    values = []
    for correction in args.corrections:
        asked = {"network": args.network, "images": args.images, "inner": args.inner, "criterion": criterion,
                 "share": share, "budget": budget, "correction": correction}  # fmt: skip
        values.append(results.get(asked, lambda asked=asked: _pruned(workload, asked))["top1"])
    first, *others = (f"{value:.2f}" for value in values)
    return f"{first} ({', '.join(others)})" if others else first


def _pruned(workload, asked: dict) -> dict:
    images = workload.normalized(workload.calibration.float())
    small = fxcompress.prune(
        workload.model, images[:1], pruning_ratio=asked["share"], pruning_measure="parameters", round_to=1,
        pruning_criterion=asked["criterion"], pruning_budget=asked["budget"], pruning_correction=asked["correction"],
        ignored_layers=STREAM[asked["network"]] if asked["inner"] else [], calibration_data=images.split(128),
    )  # fmt: skip
    report = small.meta["pruning"]
    return {"top1": top1(workload, small), "saved": report.saved, "macs": report.macs}


# -------------------------------------------------------------------------------------------------------- fine-tuning


class Augmented(torch.utils.data.Dataset):
    """(normalized image, label) of the training images; each time flipped or not, and moved by up to 4 pixels."""

    def __init__(self, workload):
        arrays = real_models.arrays("cifar10_train_10k.npz")
        self.images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        self.labels, self.normalized = torch.from_numpy(arrays["labels"]), workload.normalized

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = nn.functional.pad(self.normalized(self.images[i : i + 1].float())[0], (4, 4, 4, 4))
        down, right, flip = (int(torch.randint(n, ())) for n in (9, 9, 2))
        x = x[:, down : down + 32, right : right + 32]
        return x.flip(2) if flip else x, self.labels[i]


def reduced_precision(enabled: bool) -> torch.autocast:
    """Products of training in bfloat16, weights and sums in float32: half the time where a processor multiplies bfloat16."""
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def fine_tuning(args: argparse.Namespace) -> None:
    """Top-1 of ResNet-56 by how it is trained after or while it is pruned, as a Markdown table."""
    workload, results = real_models.load("resnet56").reported(args.images), Results(args.results)
    data = Augmented(workload)
    orders = [order for order in ORDERS if not args.orders or order in args.orders]
    print("| removed | trained towards | " + " | ".join(ORDERS[order] for order in orders) + " |")
    print("|---" * (len(orders) + 2) + "|")
    for share in args.shares:
        for target in args.targets:
            cells = []
            for order in orders:
                asked = {"network": "resnet56", "images": args.images, "share": share, "target": target, "order": order,
                         "criterion": args.only[0] if args.only else "outgoing", "budget": args.budgets[0],
                         "steps": args.steps, "batch_size": args.batch_size, "removals": args.removals,
                         "learning_rate": args.learning_rate, "bfloat16": args.bfloat16}  # fmt: skip
                row = results.get(asked, lambda asked=asked: _trained(workload, data, asked, args.checkpoints))
                cells.append(f"{row['top1']:.2f}")
            what = "labels" if target == "labels" else "the unpruned model"
            print(f"| {share:.0%} | {what} | {' | '.join(cells)} |", flush=True)


#: What is compared, with the head of its column.
ORDERS = {"none": "one cut, no training", "after": "one cut, then training", "entwined": "cut and trained in turns"}


def _trained(workload, data: Augmented, asked: dict, checkpoints: Path | None) -> dict:
    images, model = workload.normalized(workload.calibration.float()), channels_last(workload.model)
    pruning = {"pruning_ratio": asked["share"], "pruning_measure": "parameters", "pruning_budget": asked["budget"],
               "pruning_criterion": asked["criterion"], "round_to": 1}  # fmt: skip
    training = {key: asked[key] for key in ("steps", "batch_size", "learning_rate")}
    training["teacher"] = None if asked["target"] == "labels" else model
    if checkpoints is not None:
        checkpoints.mkdir(parents=True, exist_ok=True)
        training["checkpoint"] = checkpoints / (
            "_".join(str(asked[k]) for k in ("order", "share", "target", "steps")) + ".pt"
        )
    if asked["order"] == "entwined":
        with reduced_precision(asked["bfloat16"]):
            small = fxcompress.prune_gradually(
                model, images[:1], data, removals=asked["removals"], **pruning, **training
            )
        return {"top1": top1(workload, small)}
    small = fxcompress.prune(model, images[:1], calibration_data=images.split(128), **pruning)
    if asked["order"] == "after":
        with reduced_precision(asked["bfloat16"]):
            small = fxcompress.fine_tune(small, data, **training)
    return {"top1": top1(workload, small)}
