"""A run on a TPU pod slice: a queued resource, this checkout on all its workers, one command on all of them.

    python launch/tpu_pod.py create NAME --zone us-east5-a --accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5
    python launch/tpu_pod.py setup  NAME --zone us-east5-a
    python launch/tpu_pod.py run    NAME --zone us-east5-a \\
        -- run --config mixtral_8x7b --workdir gs://BUCKET/mixtral
    python launch/tpu_pod.py delete NAME --zone us-east5-a

`create` returns when the resource is queued; `status` says whether it is ACTIVE. `setup` copies the committed checkout
and installs it with jax[tpu]. One slice; for several use gke.py.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

import commands

FOLDER = "moextend_jax"
"""Where the checkout lies on the workers, in the home directory."""


def main(argv: Sequence[str]) -> int:
    parser = commands.parser(__doc__)
    parser.add_argument("action", choices=["create", "status", "setup", "run", "delete"])
    parser.add_argument("name", help="of the queued resource and of its TPU")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", help="default: gcloud's own")
    parser.add_argument("--accelerator-type", help="create: e.g. v5p-128, v5litepod-256, v6e-64")
    parser.add_argument("--runtime-version", help="create: e.g. v2-alpha-tpuv5, v2-alpha-tpuv5-lite, v2-alpha-tpuv6e")
    parser.add_argument("--spot", action="store_true", help="create: may be taken away")
    options, moextend = commands.parse(parser, argv, needed=False)
    if options.action == "run" and not moextend:
        parser.error("say what to run after --, e.g. -- run --config mixtral_8x7b --workdir gs://B/DIR")
    if options.action == "create" and not (options.accelerator_type and options.runtime_version):
        parser.error("create needs --accelerator-type and --runtime-version")
    for command in plan(options, moextend):
        if code := commands.run(command, dry_run=options.dry_run):
            return code
    return 0


def plan(options, moextend: Sequence[str]) -> list[list[str]]:
    """The commands of an action, in order."""
    tpus = ["gcloud", "compute", "tpus"]
    where = [f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])]
    queued, archive = [*tpus, "queued-resources"], f"/tmp/{options.name}.tar.gz"
    match options.action:
        case "create":
            spot = ["--spot"] if options.spot else []
            kind = [f"--accelerator-type={options.accelerator_type}", f"--runtime-version={options.runtime_version}"]
            return [[*queued, "create", options.name, f"--node-id={options.name}", *where, *kind, *spot]]
        case "status":
            return [[*queued, "describe", options.name, *where, "--format=value(state.state)"]]
        case "delete":
            return [[*queued, "delete", options.name, *where, "--force", "--quiet"]]
        case "setup":
            unpack = f"mkdir -p {FOLDER} && tar -xzf {shlex.quote(archive)} -C {FOLDER}"
            install = f"{unpack} && sh {FOLDER}/launch/tpu_setup.sh"
            return [
                ["git", "-C", str(commands.ROOT), "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
                [*tpus, "tpu-vm", "scp", archive, f"{options.name}:{archive}", "--worker=all", *where],
                [*tpus, "tpu-vm", "ssh", options.name, "--worker=all", f"--command={install}", *where],
            ]
    # MOEXTEND_PROCESSES: the runtime's metadata says which worker this is, and without them it should not run alone.
    line = f"cd {FOLDER} && MOEXTEND_PROCESSES=auto .venv/bin/python -m moextend_jax.cli {shlex.join(moextend)}"
    return [[*tpus, "tpu-vm", "ssh", options.name, "--worker=all", f"--command={line}", *where]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
