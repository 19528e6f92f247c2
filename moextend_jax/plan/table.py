"""Prints a plan, or a ranking of plans, with rich: the numbers of `planning.plan` in, tables out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from moextend_jax.chips import GIB

KINDS = {
    "frozen": "frozen base",
    "trainable": "trainable",
    "optimizer": "optimizer",
    "batch": "batch",
    "padding": "arguments: layout's padding, less unused",
    "temporaries": "activations and temporaries",
    "outputs": "outputs",
    "aliased": "outputs in place of arguments (aliased)",
    "code": "program",
    "total": "total",
    "limit": "the chip has",
    "host": "optimizer in the host's memory",
}
PHASES = {
    "forward": "forward (frozen and new)",
    "recomputed": "forward, recomputed",
    "activation_backward": "backward to activations",
    "weight_gradients": "weight gradients",
}


def print_plan(figures: dict[str, Any], console: Console) -> None:
    held, flops = figures["bytes_per_chip"], figures["flops_per_step"]
    verdict = "[green]fits[/]" if figures["fits"] else "[red]does not fit[/]"
    console.print(
        f"{figures['stage']} on {figures['topology']}: {verdict}, {held['total'] / GIB:.2f} of "
        f"{held['limit'] / GIB:.2f} GiB per chip; {describe(figures)}, {figures['rows']} rows of {figures['length']}"
    )
    table = Table("bytes per chip", "GiB")
    for kind, words in KINDS.items():
        sign = -1 if kind == "aliased" else 1
        if kind != "host" or held[kind]:
            table.add_row(words, f"{sign * held[kind] / GIB:.3f}", end_section=kind in ("code", "limit"))
    console.print(table)
    table = Table("FLOPs per step, all chips", "TFLOP", "share")
    for phase, words in PHASES.items():
        table.add_row(words, f"{flops[phase] / 1e12:,.1f}", f"{flops[phase] / flops['total']:.1%}")
    table.add_section()
    table.add_row("total, counted from the sizes", f"{flops['total'] / 1e12:,.1f}", "100.0%")
    if "compiled" in flops:
        share = f"{flops['compiled_over_analytic']:.1%}"
        table.add_row("total, counted in the compiled program", f"{flops['compiled'] / 1e12:,.1f}", share)
    ratio = f"{flops['full_training'] / flops['total']:.1%}"
    table.add_row("full training, every layer recomputed", f"{flops['full_training'] / 1e12:,.1f}", ratio)
    console.print(table)
    if flops.get("uncounted_kernels"):
        kernels = flops["uncounted_kernels"]
        console.print(f"{len(kernels)} kernels whose FLOPs are not counted, for instance {kernels[0]}")
    if figures.get("collective_bytes_per_chip"):
        table = Table("collective", "over", "MiB received per chip and step")
        for kind, row in figures["collective_bytes_per_chip"].items():
            for axes, nbytes in row.items():
                table.add_row(kind, axes, f"{nbytes / 2**20:,.1f}")
        console.print(table)
    for what in figures["undivided"]:
        console.print(f"[yellow]{what}: it does not divide, so each of those chips holds all of it[/]")
    line = figures["roofline"]
    console.print(
        f"step at least {figures['step_seconds']:.3f} s, bound by {figures['bound']} (compute {line['compute']:.3f} s, "
        f"memory {line['memory']:.3f} s, network {line['network']:.3f} s"
        + (f", host {line['host']:.3f} s" if line["host"] else "")
        + f"{', what the host sends not counted' if held['host'] and not line['host'] else ''}); at most "
        f"{figures['tokens_per_second']:,.0f} tokens/s, MFU {figures['mfu']:.1%}"
    )
    console.print(
        f"{figures['trained_parameters']:,} parameters are trained, at {flops['share_of_full_training']:.1%} of the "
        f"FLOPs of full training; compiled in {figures['compile_seconds']:.0f} s"
    )


def print_ranking(ranked: Sequence[dict[str, Any]], console: Console) -> None:
    """Best first; what does not fit comes last."""
    columns = ("mesh, remat, micro-batches", "fits", "GiB per chip", "s/step", "bound by", "tokens/s", "MFU", "of full")
    table = Table(*columns, caption="times are what the hardware allows at best; of full: FLOPs over full training's")
    for one in ranked:
        held, flops = one["bytes_per_chip"], one["flops_per_step"]
        table.add_row(
            describe(one),
            "yes" if one["fits"] else "[red]no[/]",
            f"{held['total'] / GIB:.2f}",
            f"{one['step_seconds']:.3f}",
            one["bound"],
            f"{one['tokens_per_second']:,.0f}",
            f"{one['mfu']:.1%}",
            f"{flops['share_of_full_training']:.1%}",
        )
    console.print(table)


def describe(figures: dict[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in figures["mesh"].items() if size > 1) or "one chip"
    micro = f", {figures['accumulate']} micro-batches" if figures["accumulate"] > 1 else ""
    saved = f" less {', '.join(figures['saved'])}" if figures["saved"] else ""
    return f"{mesh}, remat {figures['remat']}{saved}{micro}"
