"""The report as text: tables for a terminal, read from the data of ``report.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Column, Table

from .terminal import printed

if TYPE_CHECKING:
    from .report import Report

PLACES = 4  # shown of one reason for refusing


def text(report: Report) -> str:
    """Everything: totals, passes, what they refused and what they did to layers, activations, weights, products."""
    return printed(_totals(report), _passes(report), *_refusals(report), *_effects(report), _layers(report), _weights(report), _products(report),
                    *_block_products(report))  # fmt: skip


def summary(report: Report) -> str:
    """The totals alone."""
    return printed(_totals(report))


def _totals(report: Report) -> Table:
    table = Table("", "", title="fxcompress", show_header=False)
    table.add_row("target, backend", f"{report.target}, {report.backend}")
    for entry in report.inputs:
        table.add_row(
            f"input {entry['name']}", f"[{entry['lo']:.5g}, {entry['hi']:.5g}] ({entry['chosen_by']})", style=None
        )
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row(
        "bytes", f"{report.float_bytes:,} float -> {report.integer_bytes:,} integer, {report.stored_bytes:,} saved"
    )
    if "arena_bytes" in report.resources:
        table.add_row(
            "memory of an inference",
            "{arena_bytes:,} bytes of arena, {packed_weight_bytes:,} of packed weights".format(**report.resources),
        )
    if source := report.resources.get("c_source"):
        table.add_row(
            "as C source",
            "{flash_bytes:,} bytes of flash and the kernels' code, {ram_bytes:,} bytes of RAM".format(**source),
        )
    table.add_row("MACs per sample", f"{report.macs:,}")
    if report.pruning:
        table.add_row("pruned", report.pruning.summary())
    table.add_row("output SQNR on the example", ", ".join(f"{v:.1f} dB" for v in report.output_sqnr) or "-")
    if report.weight_bound:
        table.add_row("rounded weights move the network by", str(report.weight_bound))
    if report.exponents:
        e = report.exponents
        table.add_row(
            "power exponent",
            f"1/2 loses {e.half_error:.4g}, the best, {e.best:.3f}, {e.best_error:.4g}, uniform {e.uniform_error:.4g}",
        )
    table.add_row("seconds", ", ".join(f"{k} {v:.2f}" for k, v in report.seconds.items()))
    if report.certificate:
        table.add_row("certificate", report.certificate["text"])
    return table


def _passes(report: Report) -> Table:
    """Those that did or refused something; the others in one line below."""
    acted = [p for p in report.passes if p["rewrites"] or p["refusals"]]
    idle = [p["name"] for p in report.passes if p not in acted]
    table = Table(
        Column("pass", no_wrap=True), "level", "effect", "rewrites", "refused", "seconds", "checks", "change of output", "SQNR dB", "without -> with",
        title="passes: SQNR of the output behind each, and of the qdq graph compiled without it and with it",
        caption=f"nothing to do: {', '.join(idle)}" if idle else None,
    )  # fmt: skip
    for p in acted:
        change = "-" if p["output_change"] is None else f"{p['output_change']:.1e}"
        without = ""
        if p["output_sqnr_without"]:
            without = f"{_decibels(p['output_sqnr_without'])} -> {_decibels(p['output_sqnr_with'])}"
            without += "" if p["without"] == "left out" else f" ({p['without']})"
        table.add_row(p["name"], p["level"], p["effect"], str(p["rewrites"]), str(len(p["refusals"])), f"{p['seconds']:.3f}",
                      f"{p['check_seconds']:.3f}", change, _decibels(p["output_sqnr"] or []), without)  # fmt: skip
    return table


def _refusals(report: Report) -> list[Table]:
    """Where passes looked and declined: one row per pass and reason. Nothing where none did."""
    rows = [(p["name"], *_split(refusal)) for p in report.passes for refusal in p["refusals"]]
    if not rows:
        return []
    table = Table("pass", "places", "where", "why", title="refused")
    for name, why in dict.fromkeys((name, why) for name, _, why in rows):
        places = [place for other, place, reason in rows if (other, reason) == (name, why)]
        shown = ", ".join(places[:PLACES]) + (", ..." if len(places) > PLACES else "")
        table.add_row(name, str(len(places)), shown, why)
    return [table]


def _split(refusal: str) -> tuple[str, str]:
    """Place and reason of a refusal (``Reject``)."""
    place, _, why = refusal.removeprefix("not applied at ").partition(" because ")
    return place, why


def _effects(report: Report) -> list[Table]:
    """Layers down, passes across: the weight's SQNR around every pass, and the output's without and with it."""
    weights = {
        (e.node, e.pass_name): (e.weight_before, e.weight_after) for e in report.effects if e.weight_after is not None
    }
    outputs = {(e.node, e.pass_name): (e.sqnr_without, e.sqnr) for e in report.effects if e.sqnr is not None}
    titles = (
        "SQNR dB of each layer's rounded weight, before and after",
        "SQNR dB of each layer's output, without and with",
    )
    return [_matrix(report, cells, title) for cells, title in zip((weights, outputs), titles, strict=True) if cells]


def _matrix(report: Report, cells: dict, title: str) -> Table:
    origins = {e.node: e.origin for e in report.effects}
    passes = [p["name"] for p in report.passes if any(name == p["name"] for _, name in cells)]
    table = Table(*_place("layer"), *passes, title=title)
    for node in dict.fromkeys(node for node, _ in cells):
        pairs = [cells.get((node, name), ()) for name in passes]
        table.add_row(node, origins[node], *(" -> ".join("-" if v is None else f"{v:.1f}" for v in p) for p in pairs))
    return table


def _layers(report: Report) -> Table:
    table = Table(*_place("tensor"), "range", "chosen by", "scale", "SQNR dB", title="activations")
    for layer in report.layers:
        sqnr = "-" if layer.sqnr is None else f"{layer.sqnr:.1f}"
        table.add_row(
            layer.node, layer.origin, f"{layer.lo:.4g}..{layer.hi:.4g}", layer.chosen_by, f"{layer.scale:.4g}", sqnr
        )
    return table


def _weights(report: Report) -> Table:
    table = Table(*_place("layer"), "rows", "residuals", "sums", "largest error", "at most", "SQNR dB", title="weights")
    for w in report.weights:
        table.add_row(w.node, w.origin, str(w.rows), str(w.residuals), str(w.accumulators), f"{w.largest_error:.3g}",
                      f"{w.bound:.3g}", f"{w.sqnr:.1f}")  # fmt: skip
    return table


def _products(report: Report) -> Table:
    table = Table(
        *_place("node"),
        "operator",
        "MACs",
        "weight bytes",
        "saved bytes",
        "accumulator bits",
        title="multiplications",
    )
    for p in report.products:
        table.add_row(p.node, p.origin, p.operator, f"{p.macs:,}", f"{p.weight_bytes:,}", f"{p.stored_bytes:,}",
                      str(p.accumulator_bits))  # fmt: skip
    return table


def _block_products(report: Report) -> list[Table]:
    """Nothing where every product is computed by its definition."""
    if not report.block_products:
        return []
    table = Table(*_place("node"), "algorithm", "products", "multiplications", "of", "additions", "operand bits", "weight bytes", "of",
                  title="products in blocks")  # fmt: skip
    for b in report.block_products:
        table.add_row(b.node, b.origin, b.algorithm, str(b.products), f"{b.multiplications:,}", f"{b.plain_multiplications:,}",
                      f"{b.additions:,}", " x ".join(map(str, b.operand_bits)), f"{b.weight_bytes:,}",
                      f"{b.plain_weight_bytes:,}")  # fmt: skip
    return [table]


def _decibels(values: list[float]) -> str:
    return ", ".join(f"{v:.1f}" for v in values)


def _place(kind: str) -> tuple[Column, Column]:
    """Names of nodes and modules are never cut short."""
    return Column(kind, overflow="fold"), Column("module", overflow="fold")
