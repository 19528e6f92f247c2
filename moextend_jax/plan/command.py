"""`moextend plan`: settings and a topology in; tables or JSON out. Nothing but a CPU is needed."""

from __future__ import annotations

import json
import sys
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax

from moextend_jax.config import Count, MoextendError
from moextend_jax.plan.abstract_step import text_only
from moextend_jax.plan.planning import plan
from moextend_jax.plan.sweep import sweep
from moextend_jax.plan.table import print_plan, print_ranking
from moextend_jax.settings import Positive, RunSettings, Share, from_config_dict
from moextend_jax.terminal import console

MOST = 8


@dataclass(frozen=True)
class PlanOptions:
    config: RunSettings
    _: KW_ONLY
    stage: str
    """what trains"""
    topology: str
    """CHIP:SHAPE, as v5p:4x4x4, v5e:16x16, v6e:8x8 or h100:2x8"""
    json: bool = False
    """JSON instead of tables"""
    text_only: bool = False
    """leave tower, projector and images out"""
    new_share: Share | None = None
    """share of picks that new experts get; as many as the others, where not given"""
    layers: Count | None = None
    """decoder layers to keep of the base"""
    sweep: bool = False
    """try meshes, micro-batches and what is saved"""
    most: Count = MOST
    """programs that a sweep compiles at most"""
    within: Positive | None = None
    """GiB per chip that a sweep may use"""


def plan_command(options: PlanOptions) -> None:
    """A stage's step compiled for chips that are not here: does it fit, bytes, FLOPs, messages, least time."""
    jax.config.update("jax_platforms", "cpu")  # the chips of a plan are not here, and those that are stay free
    settings = text_only(options.config) if options.text_only else options.config
    if options.sweep and (options.layers or options.new_share is not None):
        raise MoextendError("--sweep compiles the step as the settings have it: leave --layers and --new_share out")
    if not options.sweep and (options.most != MOST or options.within is not None):
        raise MoextendError("--most and --within go with --sweep")
    stage, topology, screen = options.stage, options.topology, console(stderr=options.json)
    if options.sweep:
        figures: Any = sweep(
            settings, stage=stage, topology_name=topology, most=options.most, within=options.within, tell=screen.print
        )
    else:
        figures = plan(
            settings, stage=stage, topology_name=topology, new_share=options.new_share, layers=options.layers
        )
    if options.json:
        print(json.dumps(figures, indent=1))
    elif options.sweep:
        print_ranking(figures, screen)
    else:
        print_plan(figures, screen)


if __name__ == "__main__":  # one candidate of a sweep: settings on standard input, a line of JSON on standard output
    print(json.dumps(plan(from_config_dict(json.load(sys.stdin)), stage=sys.argv[1], topology_name=sys.argv[2])))
