"""One step of configs/bench.py per line of stdin, or one product of matrices: the counterpart of torch_step.py.

python benchmarks/jax_step.py align|extend|finetune|product [--labels all]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from turns import serve

sys.path.insert(0, str(Path(__file__).parents[1]))

SIZES, PRODUCTS = (2048, 1024, 1024), 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=("align", "extend", "finetune", "product"))
    parser.add_argument("--labels", default="all")
    args = parser.parse_args()

    from moextend_jax import compile_cache
    from moextend_jax.machine import keep_memory

    keep_memory()  # as the commands that train
    compile_cache.enable()
    if args.stage == "product":
        _products()
        return
    from moextend_jax.bench import Steps
    from moextend_jax.configurations import load
    from moextend_jax.settings import from_config_dict

    steps = Steps(from_config_dict(load("bench")), stage=args.stage, labels=args.labels)
    serve(steps.take, {"tokens": steps.tokens, "flops": steps.flops, "temporaries_gb": steps.temporaries / 1e9})


def _products() -> None:
    """How fast the machine multiplies: large products in float32, one after another."""
    import jax
    import jax.numpy as jnp

    m, k, n = SIZES

    @jax.jit
    def product(x, w):
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: (x @ w) * 1e-3, x)

    x, w = jnp.ones((m, k)), jnp.ones((k, n))
    serve(lambda: float(product(x, w).block_until_ready()[0, 0]), {"flops": 2.0 * m * k * n * PRODUCTS})


if __name__ == "__main__":
    main()
