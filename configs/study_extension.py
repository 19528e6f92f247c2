"""Where new experts go, how they start and what calibrates them: the paper's ablations on the demo, several seeds.

    moextend study study_extension:layers --workdir work/layers       minutes for each point and seed on 2 CPU cores
    moextend study study_extension:start --workdir work/start --config.study.seeds=0,1,2
    moextend study study_extension:calibrator --workdir work/calibrator

`paper` is the method; everything else is compared with it, seed by seed, after as many steps and with as many questions
as in configs/study_methods.py.
"""

import dataclasses
from typing import Literal

from ml_collections import ConfigDict

from moextend_jax.configurations import load
from moextend_jax.settings import StudySettings, from_config_dict, to_config_dict

POINTS = {
    "layers": {
        name: (f"select.layers={name}",)
        for name in ("all", "first_half", "second_half", "first_quarter", "first_interval", "every_second", "random")
    },
    "start": {
        "zero column": ("grow.column=zero",), "mean column": ("grow.column=mean",),
        "random column": ("grow.column=random",), "zero expert": ("grow.expert=zero_down",),
        "random expert": ("grow.expert=random",), "source after": ("select.source=after",),
        "source 2": ("select.source=fixed", "select.expert=2"), "saliency": ("select.source=saliency",),
        "twin": ("grow.start=twin",), "lowered": ("grow.start=lowered",), "added": ("grow.start=added",),
    },
    "calibrator": {
        name: (f"grow.calibrator={name}",) for name in ("none", "vector", "vector_multiplied", "two_layers_multiplied")
    },
}  # fmt: skip


def get_config(arg: Literal["layers", "start", "calibrator"] = "layers") -> ConfigDict:
    points = {name.replace(" ", "_"): words for name, words in POINTS[arg].items()}
    study = StudySettings(points={"paper": (), **points})
    return to_config_dict(dataclasses.replace(from_config_dict(load("study_methods")), study=study))
