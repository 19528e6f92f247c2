"""`moextend routing collect | compare | plot`: what a model's routers do, measured, set side by side, drawn.

In: a checkpoint and a data set or token ids; or files of statistics (`stats.py` describes them), which
tools/dump_torch_routing.py writes from PyTorch. Out: such a file; a table or JSON; a PNG and an HTML page.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moextend_jax import distributed
from moextend_jax.checkpoints.npz import read_npz, whole_numbers, write_npz
from moextend_jax.config import IMAGE, Amount, Batch, Count, ModelConfig, MoextendError
from moextend_jax.data.conversations import text_batch
from moextend_jax.folders import folder, local
from moextend_jax.mesh import row_shards
from moextend_jax.routing.collect import collect
from moextend_jax.routing.compare import (
    Choice,
    LayerDistance,
    Taken,
    check_same_shape,
    choices,
    distances,
    is_extension_of,
    taken,
    why_no_agreement,
)
from moextend_jax.routing.stats import KINDS, Stats, load_of, on_first_columns, read_stats, write_stats
from moextend_jax.runs.askable import Askable, open_place
from moextend_jax.runs.data_of import data_dir_of, open_in_step
from moextend_jax.runs.place import Place
from moextend_jax.runs.run import known_settings
from moextend_jax.settings import LayerShare, NotNegative
from moextend_jax.terminal import as_json, console, table_of

# --- collect ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectOptions(Place):
    data: str | None = None
    """data set, as easy_vqa/questions"""
    text: str | None = None
    """file of passages, one per line"""
    ids: Path | None = None
    """npz file with input_ids [rows, length], attention_mask and, for pictures, pixel_values"""
    split: str = "train"
    """of the data set"""
    samples: Count | None = None
    """so many rows of it, drawn with --seed"""
    seed: Amount = 0
    """of the draw"""
    data_dir: str | None = None
    """where prepared data sets go; else those of a --workdir"""
    manual_dir: str | None = None
    """where LLaVA's JSON and image folder are"""
    images: str | None = None
    """folder that image paths in data are relative to"""
    length: Count = 512
    """tokens per row"""
    batch_size: Count = 8
    """rows at once"""
    per_token: bool | None = None
    """keep every token's picks, or do not (--no_per_token)"""
    ids_out: Path | None = None
    """also write the token ids and pictures, for --ids and for PyTorch"""
    out: Path
    """file of statistics to write"""


def collect_command(options: CollectOptions) -> None:
    """Measures what a model's routers do with a data set, a text or token ids."""
    if sum(value is not None for value in (options.data, options.text, options.ids)) != 1:
        raise MoextendError("routing collect needs one of --data NAME, --text FILE and --ids IDS.npz")
    if options.ids and options.samples:
        raise MoextendError("--samples draws rows of --data or --text; all of --ids are counted")
    for path in filter(None, (options.ids, options.ids_out, options.out)):  # now, not when all has been counted
        local(path, what="an npz file")
    if options.ids_out and options.ids_out.resolve() == options.out.resolve():
        raise MoextendError(f"--out and --ids_out are one file, {options.out}: the ids would replace the statistics")
    opened = _open(options)
    shards = row_shards(opened.mesh)
    batch_size = -(-options.batch_size // shards) * shards  # empty rows count for nothing
    options = dataclasses.replace(options, batch_size=batch_size)
    rows: list[Batch] = []
    # bfloat16 has only one precision, and TPU kernels do not compile with another.
    with jax.default_matmul_precision("highest" if opened.config.dtype == "float32" else "default"):
        batches: Iterable[Batch] = _batches(options, opened)
        if options.ids_out:
            batches = rows = list(batches)
        stats = collect(opened.model, opened.arrays, batches, per_token=options.per_token, mesh=opened.mesh)
    if not distributed.first():
        return
    write_stats(options.out, stats)
    if options.ids_out:
        _write_ids(options.ids_out, rows, patches=opened.patches)
    _print_loads(stats, title=f"{options.out}: {stats.tokens['text']} text and {stats.tokens['image']} image tokens")


def _open(options: CollectOptions) -> Askable:
    float32 = not options.in_workdir and options.dtype is None
    return open_place(dataclasses.replace(options, dtype="float32") if float32 else options)


def _batches(options: CollectOptions, opened: Askable) -> Iterable[Batch]:
    config = opened.config
    if options.ids:
        pad = lambda: opened.tokenizer.tags.pad  # noqa: E731  ids of text need no tokenizer
        return _id_batches(options.ids, config, pad=pad, batch_size=options.batch_size)
    from moextend_jax.data.batches import batches, text_batches
    from moextend_jax.data.datasets import IMAGES_ALONE, distinct, hold_out, open_text
    from moextend_jax.data.readers import Inputs
    from moextend_jax.faults import STRICT
    from moextend_jax.settings import StageSettings

    tokenizer = opened.tokenizer
    shape: dict[str, Any] = {"length": options.length, "batch_size": options.batch_size}
    if options.text:
        passages = open_text(options.text)
        if options.samples and options.samples < len(passages):
            drawn = np.random.default_rng(options.seed).choice(len(passages), options.samples, replace=False)
            passages = [passages[row] for row in np.sort(drawn)]
        # One passage to a row: --ids_out and PyTorch know no passages that share one.
        return text_batches(passages, tokenizer=tokenizer, conversations_per_row=1, seed=None, epochs=1, **shape)
    data_dir = local(folder(options.data_dir), what="data_dir") if options.data_dir else None
    manual_dir, images, faults = options.manual_dir, options.images, STRICT
    if options.in_workdir:
        settings = known_settings(options.folder)
        data_dir = data_dir or data_dir_of(settings, options.folder)
        manual_dir, images = manual_dir or settings.manual_dir or None, images or settings.images or None
        faults = settings.faults  # what the run left out is left out here
    if options.data is None or data_dir is None:
        raise MoextendError("--data needs --data_dir DIR: where the prepared data set is, or shall be")
    source = open_in_step(
        options.data,
        split=options.split,
        data_dir=data_dir,
        manual_dir=manual_dir,
        images=images,
        media=config.media or IMAGES_ALONE,
        faults=faults,
    )
    if options.samples:  # each row once, also of a mixture that repeats some
        every = distinct(source)
        few = options.samples < len(every)
        source = hold_out(source, samples=options.samples, seed=options.seed).held_out if few else every
    recipe = opened.recipe
    readers = {
        name: Inputs(items=source.items[name], medium=medium, preparation=recipe.image_preparation)
        for name, medium in config.media.items()
    }
    counts = [example.by_medium for example in source]
    most = {name: max(len(items.get(name, ())) for items in counts) for name in readers}
    if options.ids_out and (others := [name for name, items in most.items() if items and name != IMAGE]):
        raise MoextendError(f"--ids_out carries pictures, and the data have items of {', '.join(others)}; leave it out")
    return batches(
        source,
        stage=StageSettings(
            data=options.data,
            steps=1,
            images_per_row=most.pop(IMAGE, 0) or 1,
            items_per_row=most,
            too_long="drop_turns",
            **shape,
        ),
        tokenizer=tokenizer,
        recipe=recipe,
        readers=readers,
        seed=None,
        epochs=1,
        faults=faults,
    )


def _id_batches(path: Path, config: ModelConfig, *, pad: Callable[[], int], batch_size: int) -> Iterator[Batch]:
    """The file's rows as they are, with their pictures, if it has some; the last batch is filled up with empty
    rows."""
    arrays = read_npz(path)
    if "input_ids" not in arrays:
        raise MoextendError(f"{path} holds no input_ids; it holds {', '.join(sorted(arrays)) or 'nothing'}")
    ids_BL = whole_numbers(arrays["input_ids"], what=f"{path}: input_ids")
    mask_BL = (arrays.get("attention_mask", np.ones_like(ids_BL)) != 0).astype(np.int32)
    if ids_BL.ndim != 2 or mask_BL.shape != ids_BL.shape:
        raise MoextendError(f"{path}: input_ids and attention_mask must be [rows, length] alike")
    real = ids_BL[mask_BL > 0]
    if real.size and not 0 <= real.min() <= real.max() < config.decoder.vocab_size:
        raise MoextendError(f"{path}: ids from {real.min()} to {real.max()}, but the vocabulary has "
                            f"{config.decoder.vocab_size}")  # fmt: skip
    ids_BL = np.where(mask_BL > 0, ids_BL, 0)
    places_BL, images_BMhwc = _pictures(path, arrays, ids_BL, mask_BL, config, pad=pad)
    for first in range(0, len(ids_BL), batch_size):
        some = slice(first, first + batch_size)
        empty = ((0, batch_size - len(ids_BL[some])), (0, 0))
        batch = text_batch(*(np.pad(array[some], empty) for array in (ids_BL, mask_BL)))
        if images_BMhwc is not None:
            images = np.pad(images_BMhwc[some], (*empty, (0, 0), (0, 0), (0, 0)))
            patches = np.pad(places_BL[some], empty, constant_values=-1)
            batch = batch._replace(places_BL=patches, media={IMAGE: images})
        yield batch


def _pictures(
    path: Path, arrays: Mapping[str, np.ndarray], ids_BL: np.ndarray, mask_BL: np.ndarray, config: ModelConfig, *,
    pad: Callable[[], int],
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """Which patch each token is, and the pictures of each row, from `pixel_values` [images, 3, height, width]."""
    places_BL = np.full_like(ids_BL, -1)
    if "pixel_values" not in arrays:
        return places_BL, None
    if config.vision is None:
        raise MoextendError(f"{path} holds pixel_values, but the model sees no pictures")
    pixels, size, each = arrays["pixel_values"], config.vision.image_size, config.media[IMAGE].tokens
    pads_BL = (ids_BL == pad()) & (mask_BL > 0)
    counts_B, rest_B = np.divmod(pads_BL.sum(axis=1), each)
    if pixels.shape[1:] != (3, size, size) or pixels.dtype.kind != "f" or rest_B.any() or counts_B.sum() != len(pixels):
        raise MoextendError(
            f"{path}: pixel_values {list(pixels.shape)} are not one picture [3, {size}, {size}] for every {each} image "
            f"tokens (id {pad()}) of a row, of which there are {pads_BL.sum()}"
        )
    places_BL = np.where(pads_BL, np.cumsum(pads_BL, axis=1) - 1, -1).astype(ids_BL.dtype)
    images_BMhwc = np.zeros((len(ids_BL), counts_B.max(initial=1), size, size, 3), np.float32)
    images_BMhwc[np.arange(images_BMhwc.shape[1]) < counts_B[:, None]] = pixels.transpose(0, 2, 3, 1)
    return places_BL, images_BMhwc


def _write_ids(path: Path, batches: list[Batch], *, patches: int) -> None:
    """Rows cut to the longest, and their pictures, row by row."""
    ids_BL, mask_BL, places_BL = (np.concatenate([np.asarray(getattr(batch, name)) for batch in batches])
                                   for name in ("ids_BL", "segments_BL", "places_BL"))  # fmt: skip
    used_B, real_BL = (mask_BL > 0).any(axis=1), mask_BL > 0
    length = 1 + int(np.flatnonzero(real_BL.any(axis=0)).max(initial=0))
    arrays = {"input_ids": ids_BL[used_B, :length], "attention_mask": real_BL[used_B, :length].astype(np.int8)}
    if (places_BL >= 0).any():
        counts_B = (places_BL.max(axis=1) + 1) // patches
        images_BMhwc = np.concatenate([np.asarray(batch.media[IMAGE]) for batch in batches])
        shown_BM = np.arange(images_BMhwc.shape[1]) < counts_B[:, None]
        arrays["pixel_values"] = images_BMhwc[shown_BM].transpose(0, 3, 1, 2).astype(np.float32)
    write_npz(path, arrays)


def _print_loads(stats: Stats, *, title: str) -> None:
    names = ("layer", "tokens", "balance", "max/mean load", "busiest expert", "entropy of mean", "of tokens")
    table = table_of(names, left=0, title=title, caption="balance 1 and entropy of the mean = ln(experts) are even")
    for kind in KINDS:
        if not stats.tokens[kind]:
            continue
        load = load_of(stats, kind)
        for z in range(len(stats.has_ZO)):
            numbers = (load.balance_Z[z], load.busiest_Z[z], load.entropy_Z[z], load.token_entropy_Z[z])
            balance, busiest, entropy, own = (f"{number:.3f}" for number in numbers)
            table.add_row(f"{stats.layers[z]}", kind, balance, busiest, f"{load.share_ZO[z].argmax()}", entropy, own)
    console().print(table)


# --- compare ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    a: Path
    """file of statistics"""
    b: Path
    """second file of statistics"""
    _: dataclasses.KW_ONLY
    after: tuple[Path, Path] | None = None
    """A2 B2: the same two models after the probe"""
    share: LayerShare = 0.5
    """share of the layers to choose"""
    tie: NotNegative = 1e-5
    """logits this close tie"""
    json: bool = False
    """one JSON object instead of tables"""


def compare_command(options: CompareOptions) -> None:
    """Sets two files of statistics side by side: top-k, total variation, KL, d_j, and what each would choose. Of a
    model before and after its extension: the experts that both have, and what the new ones took."""
    names = (str(options.a), str(options.b))
    a, b = read_stats(options.a), read_stats(options.b)
    new = taken(a, b) if is_extension_of(a, b) and not options.after else []
    if not new:
        check_same_shape(a, b, names=names)
    rows = distances(a, on_first_columns(b, a.columns) if new else b, tie=options.tie)
    why = why_no_agreement(a, b)
    chosen: dict[str, list[Choice] | str] = {}
    if options.after:
        after = [read_stats(path) for path in options.after]
        for before, probed, *of in zip((a, b), after, names, map(str, options.after), strict=True):
            check_same_shape(before, probed, names=(of[0], of[1]))
        chosen = {"a": _chosen(a, after[0], options), "b": _chosen(b, after[1], options)}
    elif not new:  # else layers have been chosen already
        chosen = {"a_to_b": _chosen(a, b, options)}
    record = {
        "a": names[0],
        "b": names[1],
        "tokens": {kind: [a.tokens[kind], b.tokens[kind]] for kind in KINDS},
        "top_k_agreement_missing": why,
        "layers": as_json(rows),
        "new_experts": as_json(new),
        "choices": {side: None if isinstance(of, str) else as_json(of) for side, of in chosen.items()},
        "choices_missing": next((of for of in chosen.values() if isinstance(of, str)), None),
        "same_choice": _same(chosen),
        "same_source_experts": all(row.source_a == row.source_b for row in rows if row.kind == "all"),
    }
    if options.json:
        print(json.dumps(record, indent=1, allow_nan=False))
        return
    shared = f", the {a.columns} experts that both have" if new else ""
    if sum(any(stats.tokens[kind] for stats in (a, b)) for kind in KINDS) == 1:  # "all" has the same numbers again
        rows = [row for row in rows if row.kind != "all"]
    _print_distances(rows, title=f"{options.a} and {options.b}{shared}", why=why)
    if new:
        _print_taken(new, title=f"new experts of {options.b}")
    _print_choices(chosen, record)


def _chosen(before: Stats, after: Stats, options: CompareOptions) -> list[Choice] | str:
    """What the extender would choose, or why it can choose nothing."""
    try:
        return choices(before, after, share=options.share) or "the models are extended already"
    except MoextendError as error:
        return str(error)


def _same(chosen: dict[str, list[Choice] | str]) -> dict[str, bool] | None:
    """Per recipe: would both pairs choose the same layers and source experts? None without two pairs."""
    a, b = chosen.get("a", ""), chosen.get("b", "")
    if isinstance(a, str) or isinstance(b, str):
        return None
    return {x.recipe: (x.layers, x.sources) == (y.layers, y.sources) for x, y in zip(a, b, strict=True)}


def _print_distances(rows: list[LayerDistance], *, title: str, why: str | None) -> None:
    names = ["layer", "tokens", "top-k equal", "tied", "TV picks", "KL picks", "TV probs", "KL probs", "d_j",
             "d_j least", "source a", "source b"]  # fmt: skip
    caption = "TV total variation, KL in nats; d_j standard deviation over experts"
    table = table_of(names, left=0, title=title, caption=caption)
    for row in rows:
        agreement = "" if row.agreement is None else f"{100 * row.agreement:.4g} %"
        tied = "" if row.tied is None else f"{row.tied}"
        numbers = (row.tv_picks, row.kl_picks, row.tv_probs, row.kl_probs, row.shift, row.shift_least)
        colour = "" if row.source_a == row.source_b else "[yellow]"
        sources = (f"{colour}{'none' if source is None else source}" for source in (row.source_a, row.source_b))
        table.add_row(f"{row.layer}", row.kind, agreement, tied, *(f"{number:.2e}" for number in numbers),
                      *sources)  # fmt: skip
    console().print(table)
    if why:
        console().print(f"no top-k agreement per token: {why}", highlight=False)


def _print_taken(rows: list[Taken], *, title: str) -> None:
    names = ("layer", "tokens", "experts", "share of picks", "mean probability", "tokens that pick one", "from")
    caption = "from: experts that tokens with a new expert picked before and no longer pick"
    table = table_of(names, left=0, title=title, caption=caption)
    for row in rows:
        shares, probs = (" ".join(f"{100 * x:.1f} %" for x in part) for part in (row.share_X, row.probs_X))
        tokens = "" if row.tokens is None else f"{100 * row.tokens:.1f} %"
        most = sorted(enumerate(row.from_E or ()), key=lambda pair: -pair[1])[:3]
        losers = ", ".join(f"{expert}: {100 * share:.0f} %" for expert, share in most if share)
        table.add_row(f"{row.layer}", row.kind, " ".join(map(str, row.experts)), shares, probs, tokens, losers)
    console().print(table)


def _print_choices(chosen: dict[str, list[Choice] | str], record: dict[str, Any]) -> None:
    titles = {"a": "chosen by the first pair", "b": "chosen by the second pair", "a_to_b": "if the second were the "
              "first after the probe"}  # fmt: skip
    for side, by_recipe in chosen.items():
        if isinstance(by_recipe, str):
            console().print(f"no choice of layers: {by_recipe}", highlight=False)
            break
        if not any(any(choice.shift_Z) for choice in by_recipe):
            console().print("no layer's picks differ: there is nothing to choose layers by", highlight=False)
            continue
        for choice in by_recipe:
            chosen_layers = f"layers {list(choice.layers)}, copying {list(choice.sources)}"
            console().print(f"{titles[side]}, recipe {choice.recipe}: {chosen_layers}", highlight=False)
    if record["same_choice"] is not None:
        for recipe, same in record["same_choice"].items():
            verdict = "the same layers and source experts" if same else "[bold red]not the same[/]"
            console().print(f"recipe {recipe}: {verdict}", highlight=False)
    same = record["same_source_experts"]
    console().print(f"the most picked expert of every layer is {'' if same else '[yellow]not [/]'}the same in both")


# --- plot -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlotOptions:
    stats: Path
    """file of statistics"""
    other: Path | None = None
    """second file of statistics: the difference of the two is drawn"""
    _: dataclasses.KW_ONLY
    out: Path
    """PREFIX of PREFIX.png and PREFIX.html"""


def plot_command(options: PlotOptions) -> None:
    """Draws one or two files of statistics as a PNG and an HTML page."""
    if not local(options.out, what="the picture and the page").name:
        raise MoextendError(f"--out {options.out} needs a name: PREFIX of PREFIX.png and PREFIX.html")
    files = [file for file in (options.stats, options.other) if file]
    read = [read_stats(file) for file in files]
    if options.other and not is_extension_of(*read):
        check_same_shape(*read, names=(str(options.stats), str(options.other)))
    from moextend_jax.report.routing_page import write_routing_page  # matplotlib takes a second to import

    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        names = [f"{file.resolve().parent.name}/{file.stem}" for file in files]
    for path in write_routing_page(list(zip(names, read, strict=True)), options.out):
        print(path)
