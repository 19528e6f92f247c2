"""A run on Google Kubernetes Engine: through XPK, or as a plain JobSet manifest for kubectl (TPU slices or GPU nodes).

    python launch/gke.py xpk NAME --cluster C --zone Z --image IMAGE --tpu-type v5p-128 \\
        -- run --config mixtral_8x7b --workdir gs://BUCKET/mixtral
    python launch/gke.py jobset NAME --image IMAGE --tpu tpu-v5p-slice:4x4x4:4 -- run ...       chips per host last
    python launch/gke.py jobset NAME --image IMAGE --gpu nvidia-h100-80gb:8 --nodes 2 -- run ...

IMAGE holds this package and the jax of its accelerator: docker/ has one for TPUs and one for GPUs. The work directory
is a gs:// path, or lies in a volume that all pods share (jobset: --claim NAME:/mount).
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import commands
import yaml

PREEMPTED = 75
"""Exit code of a run that was told to stop (SIGTERM) and has saved."""
GRACE = 300
"""Seconds that Kubernetes gives it for that, where the cloud does not give less."""
PORT = 1234
"""Where the first GPU node's process waits for the others."""


def main(argv: Sequence[str]) -> int:
    parser = commands.parser(__doc__)
    parser.add_argument("how", choices=["xpk", "jobset"])
    parser.add_argument("name", type=label, help="of the workload: lower case letters, digits and dashes")
    parser.add_argument("--image", required=True)
    parser.add_argument("--slices", type=int, default=1, help="TPU slices")
    parser.add_argument("--restarts", type=int, default=4, help="a run goes on from its last checkpoint")
    xpk = parser.add_argument_group("xpk")
    for name in ("cluster", "zone", "project", "tpu-type"):
        xpk.add_argument(f"--{name}")
    jobset = parser.add_argument_group("jobset")
    jobset.add_argument("--tpu", type=tpu, metavar="ACCELERATOR:TOPOLOGY:CHIPS_PER_HOST")
    jobset.add_argument("--gpu", type=gpu, metavar="ACCELERATOR:GPUS_PER_NODE")
    jobset.add_argument("--nodes", type=int, default=1, help="GPU nodes")
    jobset.add_argument("--claim", type=claim, metavar="NAME:/MOUNT", help="a PersistentVolumeClaim for all pods")
    options, moextend = commands.parse(parser, argv)
    idle = ("tpu", "gpu", "claim") if options.how == "xpk" else ("cluster", "zone", "project", "tpu_type")
    if given := [f"--{name.replace('_', '-')}" for name in idle if getattr(options, name)]:
        parser.error(f"{', '.join(given)} means nothing to {options.how}")
    if options.how == "jobset":
        if bool(options.tpu) == bool(options.gpu):
            parser.error("a JobSet needs either --tpu or --gpu")
        if (options.slices if options.gpu else options.nodes) != 1:
            parser.error("--slices is of TPUs, --nodes of GPUs")
        text = yaml.safe_dump(manifest(options, moextend), sort_keys=False, width=10**9)
        return commands.run(["kubectl", "apply", "-f", "-"], dry_run=options.dry_run, stdin=text)
    if missing := [name for name in ("cluster", "zone", "tpu_type") if not getattr(options, name)]:
        parser.error(f"xpk needs --{', --'.join(missing).replace('_', '-')}")
    command = [
        "xpk", "workload", "create", f"--workload={options.name}", f"--cluster={options.cluster}",
        f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else []),
        f"--tpu-type={options.tpu_type}", f"--num-slices={options.slices}", f"--docker-image={options.image}",
        # Its own defaults are 30 seconds, no restart, and none after this exit code.
        f"--termination-grace-period-seconds={GRACE}", f"--max-restarts={options.restarts}",
        f"--restart-on-exit-codes={PREEMPTED}",
        f"--command=MOEXTEND_PROCESSES=auto moextend {shlex.join(moextend)}",
    ]  # fmt: skip
    return commands.run(command, dry_run=options.dry_run)


def manifest(options: argparse.Namespace, moextend: Sequence[str]) -> dict[str, Any]:
    """The JobSet: one replicated job per TPU slice, or one over all GPU nodes; one pod, and one process, per host."""
    name = options.name
    if options.tpu:
        accelerator, topology, chips = options.tpu
        replicas, pods = options.slices, math.prod(map(int, topology.split("x"))) // chips
        selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
        limits = {"google.com/tpu": chips}
        # GKE tells TPU pods their index and their slice's hosts; JAX reads that.
        environment: list[dict[str, Any]] = [{"name": "MOEXTEND_PROCESSES", "value": "auto"}]
        ports = [{"containerPort": 8471}, {"containerPort": 8080}]
    else:
        accelerator, gpus = options.gpu
        replicas, pods = 1, options.nodes
        selector = {"cloud.google.com/gke-accelerator": accelerator}
        limits = {"nvidia.com/gpu": gpus}
        index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
        environment = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-hosts-0-0.{name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(pods)},
            {"name": "JAX_PROCESS_ID", "valueFrom": index},
        ]
        ports = [{"containerPort": PORT}]
    container: dict[str, Any] = {
        "name": "moextend",
        "image": options.image,
        # Words, not a shell line: nothing to quote. Only $(NAME) means something to Kubernetes, and $$ is a dollar.
        "command": ["moextend", *(word.replace("$", "$$") for word in moextend)],
        "env": environment,
        "ports": ports,
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "memory", "mountPath": "/dev/shm"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "nodeSelector": selector,
        "containers": [container],
        # Workers hand batches on in /dev/shm, of which a pod has 64 MB otherwise.
        "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
    }
    if options.claim:
        claimed, mount = options.claim
        container["volumeMounts"].append({"name": "shared", "mountPath": mount})
        pod["volumes"].append({"name": "shared", "persistentVolumeClaim": {"claimName": claimed}})
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one pod that fails ends its job, and the JobSet starts all of them again
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "moextend", "operator": "In", "values": [PREEMPTED]},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {"name": name}
    if options.tpu:  # a slice is a node pool: no two jobs on one
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": options.restarts,
                # A run that was told to stop and has saved is no failure.
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "hosts", "replicas": replicas, "template": {"spec": job}}],
        },
    }


def label(text: str) -> str:
    # Pods are called NAME-hosts-SLICE-POD, which may have 63 characters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1-40 lower case letters, digits and dashes")
    return text


def tpu(text: str) -> tuple[str, str, int]:
    found = re.fullmatch(r"([a-z0-9-]+):(\d+x\d+(?:x\d+)?):([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like tpu-v5p-slice:4x4x4:4")
    chips = math.prod(map(int, found[2].split("x")))
    if chips % int(found[3]):
        raise argparse.ArgumentTypeError(f"{text!r}: {chips} chips are not hosts of {found[3]}")
    return found[1], found[2], int(found[3])


def gpu(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"([a-z0-9-]+):([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like nvidia-h100-80gb:8")
    return found[1], int(found[2])


def claim(text: str) -> tuple[str, str]:
    name, _, mount = text.partition(":")
    if not name or not mount.startswith("/"):
        raise argparse.ArgumentTypeError(f"{text!r} is not like claim:/mount")
    return name, mount


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
