"""Writes the routing explorer, one HTML file with Plotly inside: no network, but, unlike the report, with scripts.

In: a WORKDIR as `workdir.py` reads it. Out: WORKDIR/explorer.html; a part whose data is not there says what to run.
assets/report/explorer.js draws; the page's own rules (a Content Security Policy) let it load nothing and run only that
script and Plotly, so that texts from outside cannot.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moextend_jax.folders import absolute, extra_hint
from moextend_jax.report.examples import MOST_EXAMPLES, image_data
from moextend_jax.report.markup import how, section, write_page
from moextend_jax.report.results_pictures import CORPORA, title_of
from moextend_jax.report.workdir import kind_title, malformed, read_workdir

EXPLORER = "explorer.html"
WITHOUT = f"no {EXPLORER}: {extra_hint('web')} adds it"
MODELS = ("aligned", "moextend")
SCRIPT = Path(__file__).parents[1] / "assets" / "report" / "explorer.js"
STYLE = """<style>
.controls{display:flex;flex-wrap:wrap;gap:10px 22px;align-items:center;margin:0 0 14px}
.controls label{display:flex;flex-wrap:wrap;gap:4px 8px;align-items:center}
.controls label,select{max-width:100%;min-width:0;font:inherit}
.pictures>div{min-width:0}
.picture .layer-below image,.picture .imagelayer image{filter:grayscale(1) brightness(.9);image-rendering:pixelated}
h3{font-size:1rem;margin:0 0 6px}
</style>
"""


def write_explorer(workdir: Path) -> Path | None:
    """Writes WORKDIR/explorer.html and returns its path; None, and no file, where Plotly is not installed.

    Raises:
      MoextendError: nothing of a run is there, or a file does not hold what its name says.
    """
    try:
        from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    found = read_workdir(workdir)
    loads, selection, some = found.loads, found.selection, (found.examples or ())[:MOST_EXAMPLES]
    with malformed("examples.json"):
        examples = [_example(example, found.summary) for example in some if "routing" in example]
    models = [(name, title_of(name, found.summary)) for name in MODELS]
    data = {
        "models": models,
        "names": loads.names if loads else [],
        "base": loads.base if loads else 0,
        "has": loads.has_ZO.tolist() if loads else [],
        "first": loads.first if loads else selection.first if selection else 0,
        "extended": found.new_experts.layers if found.new_experts else [],
        "examples": examples if loads and examples else None,  # without loads nobody knows which experts are new
        "loads": _named(loads.picks_ZO, medium=loads.medium) if loads else None,
        "pairs": _named(loads.pairs_ZOO, medium=loads.medium) if loads and loads.pairs_ZOO else None,
        "choice": {"shift": selection.shift_Z.tolist(), "copied": selection.copied} if selection else None,
    }
    title = f"Routing explorer: {absolute(workdir).name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        '<p class="lead"><a href="report.html">Report of the run</a></p>',
        section("One question, token by token", _example_panel(data, models)),
        section("Experts by data set", _load_panel(data)),
        section("Experts picked together", _pair_panel(data)),
        section("Which layers were extended", _choice_panel(data)),
    ]
    scripts = get_plotlyjs(), SCRIPT.read_text(encoding="utf-8")
    # In a script element only "<" can end the data, or begin anything else.
    embedded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts.append(f'<script type="application/json" id="data">{embedded}</script>')
    parts += [f"<script>{script}</script>" for script in scripts]
    path = workdir / EXPLORER
    write_page(path, parts, title=title, head=_policy(scripts) + STYLE)
    return path


def _policy(scripts: Sequence[str]) -> str:
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{of}'" for of in hashes)
    rules = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    return f'<meta http-equiv="Content-Security-Policy" content="{rules}">\n'


def _example(example: Mapping[str, Any], summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the script draws of an example that has the picks of its tokens."""
    routing = example["routing"]
    names, tokens = ([str(text) for text in routing[name]] for name in ("experts", "tokens"))
    patches = [int(patch) for patch in routing["patches"]]
    models = {}
    for model in MODELS:
        picks, weights = (np.asarray(routing["models"][model][name], int) for name in ("picks", "weights"))
        if picks.ndim != 3 or picks.shape != weights.shape or not picks.shape[1] == len(tokens) == len(patches):
            raise ValueError(f"picks {picks.shape} and weights {weights.shape} of {len(tokens)} tokens")
        models[model] = {"picks": picks.tolist(), "weights": weights.tolist()}
    return {
        "question": str(example["question"]), "answer": str(example["answer"]),
        "said": [(title_of(str(model), summary), str(said)) for model, said in example["predictions"].items()],
        "image": image_data(str(example["image_png"]))[0], "grid": int(example["grid"]),
        "names": names, "tokens": [text.replace("\n", "↵") for text in tokens], "patches": patches, "models": models,
    }  # fmt: skip


def _named(counts: Mapping[tuple[str, str], np.ndarray], *, medium: str) -> list[dict[str, Any]]:
    """What was counted on anything, with names for people."""
    return [
        {
            "name": f"{CORPORA.get(data, data)}, {kind_title(kind, medium=medium)} tokens",
            "counts": of.astype(int).tolist(),
        }
        for (data, kind), of in counts.items()
        if of.any()
    ]


# --- markup ---


def _example_panel(data: Mapping[str, Any], models: Sequence[tuple[str, str]]) -> str:
    if not data["examples"]:
        return _missing("What single tokens picked is not stored: run <code>moextend evaluate</code> again.")
    layers = len(data["examples"][0]["models"][MODELS[0]]["picks"])
    pictures = "".join(
        f'<div><h3>{escape(title)}</h3><div class="picture" id="picture-{n}"></div></div>'
        for n, (_, title) in enumerate(models)
    )
    tokens = "".join(f'<div id="tokens-{n}"></div>' for n in range(len(models)))
    return (
        _controls(_select("Example", "example"), _slider("layer", layers), _select("Tint by expert", "expert"))
        + '<p><b id="question"></b><br><span id="answers"></span></p>'
        + f'<div class="pictures">{pictures}</div>'
        + how(
            "Each patch is tinted by the weight that the chosen expert has for it in the chosen layer: "
            '0&nbsp;%<span class="scale"></span>100&nbsp;%. Point at a patch or a token for all its experts.'
        )
        + f'<div class="wide">{tokens}</div>'
        + how(
            "Each cell is the expert with the largest weight, n0 the first new one (vermilion). The other colours "
            "repeat after eight experts. The frame is the chosen layer. Patches are in the pictures alone."
        )
    )


def _load_panel(data: Mapping[str, Any]) -> str:
    if not data["loads"]:
        return _missing("finetune/routing.json is not there: run <code>moextend evaluate</code>.")
    old = "" if data["pairs"] or len(data["loads"]) > 2 else (
        " Loads on texts are not stored: run <code>moextend evaluate</code> again."
    )  # fmt: skip
    return (
        _controls(_select("Data set", "load-data"))
        + '<div id="loads"></div>'
        + how(f"Of the extended model: the share, in per cent, of a layer’s picks that went to an expert.{old}")
    )


def _pair_panel(data: Mapping[str, Any]) -> str:
    if not data["pairs"]:
        return _missing(
            "Pairs are not stored: run <code>moextend evaluate</code> again (it leaves them out where layers have "
            "more than 64 experts)."
        )
    layers = len(data["pairs"][0]["counts"])
    return (
        _controls(_select("Data set", "pair-data"), _slider("pair-layer", layers))
        + '<div id="pairs"></div>'
        + how("Of the tokens that picked the expert of the row, the share, in per cent, that also picked the column’s.")
    )


def _choice_panel(data: Mapping[str, Any]) -> str:
    if not data["choice"]:
        return _missing("select/routing.json is not there: run <code>moextend select</code>.")
    return '<div id="layers"></div>' + how(
        "The shift d<sub>j</sub> is the standard deviation over experts of the change of their share in layer j after "
        "the router-only probe. Blue layers got new experts; the arrow names the expert that each one copies."
    )


def _missing(text: str) -> str:
    return f'<p class="missing">{text}</p>'


def _controls(*controls: str) -> str:
    return f'<div class="controls">{"".join(controls)}</div>'


def _select(label: str, name: str) -> str:
    return f'<label>{label} <select id="{name}"></select></label>'


def _slider(name: str, layers: int) -> str:
    return (
        f'<label>Layer <input type="range" id="{name}" min="0" max="{layers - 1}" value="0"> '
        f'<output id="{name}-name"></output></label>'
    )
