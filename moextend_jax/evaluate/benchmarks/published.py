"""Published numbers to print beside ours: a benchmark's name in, (model, number) out.

Source: the method's paper, arXiv 2408.03511, its tables on image question answering and on multimodal benchmarks,
which print LLaVA-1.5's row too. Benchmarks that the paper leaves out (GQA, VizWiz, LLaVA-Bench, easy-VQA) have none.
"""

from __future__ import annotations

MODELS = ("MoExtend", "LLaVA-1.5-13B")
PUBLISHED = {
    "scienceqa": (73.8, 71.6),  # image questions
    "textvqa": (58.7, 61.3),
    "vqav2": (76.6, 80.0),  # test-dev
    "pope": (85.5, 85.9),  # mean F1
    "mmvet": (37.1, 35.4),
    "mmbench": (67.8, 67.7),
    "mmbench_cn": (61.5, 63.6),
    "mme": (1710.1, 1531.3),  # LLaVA's is perception alone; of what MoExtend's is the sum is not known here
}


def published(name: str) -> dict[str, float]:
    """Model to number, in `MODELS`' order; empty where the paper has none."""
    return dict(zip(MODELS, PUBLISHED.get(name, ()), strict=False))
