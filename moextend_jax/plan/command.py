"""`moextend plan`: settings and a topology in; tables or JSON out. Nothing but a CPU is needed."""

from __future__ import annotations

import json
import sys
from typing import Any

from moextend_jax.config import MoextendError
from moextend_jax.plan.abstract_step import text_only
from moextend_jax.plan.planning import plan
from moextend_jax.plan.sweep import sweep
from moextend_jax.plan.table import print_plan, print_ranking
from moextend_jax.settings import RunSettings, from_config_dict
from moextend_jax.terminal import console


def plan_command(
    settings: RunSettings,
    *,
    stage: str | None,
    topology: str | None,
    without_images: bool = False,
    new_share: float | None = None,
    layers: int | None = None,
    most: int = 0,
    within: float | None = None,
    as_json: bool = False,
) -> None:
    """Prints one plan, or the ranking of a sweep.

    Args:
      most: programs that a sweep compiles at most; 0: no sweep, one plan of the settings as they are.
      within: GiB per chip that a sweep may use; None: all.
      as_json: JSON on standard output instead of tables.
    """
    if not stage or not topology:
        raise MoextendError("plan needs --stage STAGE and --topology CHIP:SHAPE, for instance v5p:4x4x4")
    if new_share is not None and not 0 <= new_share <= 1:
        raise MoextendError(f"--new_share {new_share} is not between 0 and 1")
    settings = text_only(settings) if without_images else settings
    screen = console(stderr=as_json)
    if most:
        figures: Any = sweep(settings, stage=stage, topology_name=topology, most=most, within=within, tell=screen.print)
    else:
        figures = plan(settings, stage=stage, topology_name=topology, new_share=new_share, layers=layers)
    if as_json:
        print(json.dumps(figures, indent=1))
    elif most:
        print_ranking(figures, screen)
    else:
        print_plan(figures, screen)


if __name__ == "__main__":  # one candidate of a sweep: settings on standard input, a line of JSON on standard output
    print(json.dumps(plan(from_config_dict(json.load(sys.stdin)), stage=sys.argv[1], topology_name=sys.argv[2])))
