"""What the report shows of single questions and of routing: examples.json and finetune/routing.json of a run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moextend_jax import distributed, preemption
from moextend_jax.config import IMAGE, Batch
from moextend_jax.data.datasets import AnyItems
from moextend_jax.data.readers import Readers
from moextend_jax.evaluate.pictures import PIXELS, as_png
from moextend_jax.evaluate.prompts import bucket, prompt_batch, rooms_of_prompts
from moextend_jax.evaluate.routed import by_medium, expert_names, routing_program, token_texts
from moextend_jax.evaluate.run_questions import PromptedQuestion, Questions, prompt_for
from moextend_jax.evaluate.text_losses import CORPORA, passages
from moextend_jax.extension import routing
from moextend_jax.media.image import framed, tower_of
from moextend_jax.mesh import on_host, place_whole, row_shards
from moextend_jax.runs.askable import Askable
from moextend_jax.runs.models_of import grown_config
from moextend_jax.runs.run import Run, write_json
from moextend_jax.settings import EvaluateSettings

ROUTED_BATCHES = 2
"""Batches of each text whose routing is counted: enough for shares, and a small part of the evaluation's time."""
MOST_PAIRED = 64
"""Experts of a layer up to which pairs of them are written: their number grows with the square."""


def write_routing(run: Run, opened: Askable, asked: Mapping[str, tuple[Questions, Readers]]) -> None:
    """finetune/routing.json: picks of every expert over the questions of the run's extension, which come first; then of
    all questions and texts by their names, and how often two experts were picked by one token."""
    count = functools.partial(
        routing.count_all, opened.model, opened.arrays, recipe=run.settings.recipe, mesh=run.mesh, pairs=True
    )
    counted: dict[str, routing.Counts] = {}
    for on, (of, readers) in asked.items():
        title = of.asked.title if len(asked) == 1 else f"{on}: {of.asked.title}"
        counted[title] = count(_batches(run, of.prompted, readers=readers, settings=of.settings))
    first = next(iter(counted.values()))
    counted |= {text: count(itertools.islice(passages(run, text), ROUTED_BATCHES)) for text in CORPORA}
    pairs = {
        data: {"text": counts.text_pairs_ZOO} | ({"image": counts.image_pairs_ZOO} if counts.image_tokens else {})
        for data, counts in counted.items()
    }
    extensions, routed = opened.model.config.extensions.values(), run.config.decoder.routed
    names = expert_names(opened.model.config)
    record = {
        "layers": len(routed),
        **({"first_layer": routed.start} if routed.start else {}),
        "experts": run.config.decoder.experts,
        "new_experts": sum(added.new_experts for added in extensions),
        "names": names,
        "has": opened.model.config.has_ZO,
        "extended_layers": sorted({layer for added in extensions for layer in added.layers}),
        "tokens": {"text": int(first.text_tokens), "image": int(first.image_tokens)},
        "counts": {"text": first.text_ZO.tolist(), "image": first.image_ZO.tolist()},
        "loads": {
            data: {kind: np.diagonal(of_ZOO, axis1=1, axis2=2).tolist() for kind, of_ZOO in of.items()}
            for data, of in pairs.items()
        },
    }
    if len(names) <= MOST_PAIRED:
        record["pairs"] = {data: {kind: of_ZOO.tolist() for kind, of_ZOO in of.items()} for data, of in pairs.items()}
    write_json(run.workdir / "finetune" / "routing.json", record, indent=None)


class Picks(NamedTuple):
    """Experts that every token of a prompt picked, `[Z, L, k]`, and their weights."""

    ids_ZLk: np.ndarray
    weights_ZLk: np.ndarray


def picks_of(run: Run, opened: Askable, prompted: Sequence[PromptedQuestion], readers: Readers) -> list[Picks]:
    program = routing_program(opened.model.config, run.mesh)
    shards = row_shards(run.mesh)
    rows = min(-(-len(prompted) // shards) * shards, run.settings.evaluate.batch_size)
    settings = dataclasses.replace(run.settings.evaluate, batch_size=rows)
    found: list[Picks] = []
    for batch in _batches(run, prompted, readers=readers, settings=settings):
        routing = program(opened.arrays, batch)
        ids_ZTk, weights_ZTk = on_host(routing.ids_Tk), on_host(routing.weights_Tk)
        shape = (len(ids_ZTk), *batch.ids_BL.shape, -1)
        ids_ZBLk, weights_ZBLk = ids_ZTk.reshape(shape), weights_ZTk.reshape(shape)
        for row, item in enumerate(prompted[len(found) :][:rows]):
            own = slice(len(item.prompt.ids_L))
            found.append(Picks(ids_ZBLk[:, row, own], weights_ZBLk[:, row, own]))
    return found


def write_examples(
    run: Run, prompted: Sequence[PromptedQuestion], picks: Mapping[str, Sequence[Picks]],
    predictions: dict[str, list[str]], images: AnyItems,
) -> None:  # fmt: skip
    """examples.json: questions with all answers; for each patch the share of extended layers where it chose a new
    expert; and for each token what each model's routers picked in every layer, with weights in per cent. Without
    questions none is left of an earlier evaluation."""
    path = run.workdir / "examples.json"
    if not prompted:
        if distributed.first():
            path.unlink(missing_ok=True)
        return
    grown = grown_config(run, run.table.grown(run.table.model("moextend").results))
    experts, names, routed = run.config.decoder.experts, expert_names(grown), run.config.decoder.routed
    layers = sorted({routed.index(layer) for added in grown.extensions.values() for layer in added.layers})
    tower = tower_of(run.config.media[IMAGE])
    gridded = run.config.media[IMAGE].tokens == tower.patches  # a connector may join them, or ask them
    grid = tower.grid if gridded else 1
    look: dict[str, Any] = {"preparation": run.settings.recipe.image_preparation, "tower": tower}
    records: list[dict[str, Any]] = []
    for row, (question, prompt) in enumerate(prompted):
        picture = images.decoded(question.items[IMAGE][0].row).item  # of which the grid is
        ids_ZLk = picks["moextend"][row].ids_ZLk
        chose_ZL = np.any((ids_ZLk >= experts) & (ids_ZLk < len(names)), axis=-1)
        # Of an extension without experts no layer.
        share_L = chose_ZL[layers or slice(0)].sum(axis=0) / max(len(layers), 1)
        media, own_L = by_medium(run.tokenizer, prompt.places_L)
        patches_L = np.where([medium == IMAGE and gridded for medium in media], own_L, -1)
        share_P = share_L[patches_L >= 0][: grid * grid]
        share = {"new_expert_share": share_P.reshape(grid, grid).tolist()} if gridded else {}
        records.append(
            {
                "image_png": as_png(framed(picture, size=min(PIXELS, max(picture.size)), **look)),
                "question": question.text.replace("<image>", "").strip(),
                "answer": question.answer,
                "predictions": {name: answers[row] for name, answers in predictions.items()},
                "grid": grid,
                **share,
                "routing": {
                    "experts": names,
                    "tokens": token_texts(run.tokenizer, prompt.ids_L, media, own_L),
                    "patches": patches_L.tolist(),
                    "models": {
                        model: {
                            "picks": of[row].ids_ZLk.tolist(),
                            "weights": np.rint(100 * of[row].weights_ZLk).astype(int).tolist(),
                        }
                        for model, of in picks.items()
                    },
                },
            }
        )
    write_json(path, records, indent=None)


def _batches(
    run: Run, prompted: Sequence[PromptedQuestion], *, readers: Readers, settings: EvaluateSettings
) -> Iterator[Batch]:
    """The prompts in the order given, on the mesh; the last batch ends in empty rows."""
    rows = settings.batch_size
    length = settings.length or bucket(max(len(item.prompt.ids_L) for item in prompted))
    for first in range(0, len(prompted), rows):
        preemption.stop_if_told()
        prompts = [prompt_for(item, readers) for item in prompted[first : first + rows]]
        batch = prompt_batch(
            dict(enumerate(prompts)), readers=readers, rooms=rooms_of_prompts(prompts, readers),
            media=tuple(run.tokenizer.media), rows=rows, length=length,
        )  # fmt: skip
        yield place_whole(batch, run.mesh)
