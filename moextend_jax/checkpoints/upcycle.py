"""Dense to mixture of experts (sparse upcycling): a Llama-shaped model in, a Mixtral's sizes and tensors out, lazily.

Every expert is a copy of its layer's dense FFN (Komatsuzaki et al. 2023). Mixtral's router renormalises the weights
of the chosen experts to one, so equal experts give the dense model's output whatever the router says; with `noise`
the copies differ a little from the start. No tensor is read before its `Stored.read` is called.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moextend_jax.checkpoints import gguf, huggingface, leaves, store
from moextend_jax.checkpoints.gguf_tokenizer import write_tokenizer
from moextend_jax.checkpoints.huggingface import read_json
from moextend_jax.checkpoints.llama import llama_config
from moextend_jax.checkpoints.source import Source, side_files
from moextend_jax.checkpoints.spelling import unwrapped
from moextend_jax.checkpoints.tensors import Stored, name_list, open_tensors
from moextend_jax.config import DecoderConfig, ModelConfig, MoextendError
from moextend_jax.folders import local

_FFN = re.compile(r"model\.layers\.(?P<layer>[0-9]{1,9})\.mlp\.(?P<matrix>gate|up|down)_proj\.weight")
_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}
_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
_ROUTER = "model.layers.{layer}.block_sparse_moe.gate.weight"


def open_upcycled(
    path: Path, *, experts: int, top_k: int = 2, noise: float = 0.0, seed: int = 0, tokenizer_folder: Path
) -> Source:
    """A dense model's folder or GGUF file as the opened checkpoint of a Mixtral, ready to import.

    Args:
      tokenizer_folder: where the tokenizer of a GGUF file is written, to be copied from there; where it is of a kind
        that cannot be written, `record.facts["tokenizer"]` says so.

    Raises:
      MoextendError: the model is no Llama or Mistral, or has something that this decoder does not compute.
    """
    facts: dict[str, Any] = {}
    if path.is_file() and path.suffix == ".gguf":
        opened = gguf.open_gguf(local(path, what="a GGUF file"))
        dense, tensors = opened.config, opened.tensors
        of_text = {name: opened.metadata[key] for name, key in gguf.TEXT_ATTRIBUTES.items() if key in opened.metadata}
        try:
            files = {file.name: file for file in write_tokenizer(opened.metadata, tokenizer_folder)}
        except MoextendError as error:
            files, facts["tokenizer"] = {}, f"not written: {error}"
    else:
        if not path.is_dir():
            raise MoextendError(f"{path} is neither a Hugging Face model folder nor a .gguf file")
        attributes = read_json(path / "config.json")
        dense = llama_config(attributes, where=path / "config.json")
        tensors, _ = unwrapped(open_tensors(path))
        of_text = {name: attributes[name] for name in gguf.TEXT_ATTRIBUTES if name in attributes}
        files = side_files(path)
    config = ModelConfig(decoder=upcycled_config(dense, experts=experts, top_k=top_k))
    mixture = upcycle(tensors, experts=experts, noise=noise, seed=seed)
    if dense.tied_head:
        mixture.pop("lm_head.weight", None)  # some files hold the embedding twice
    matched = leaves.match(mixture, table="mixtral", config=config, where=path)
    facts["upcycled"] = {"from": path.name, "experts": experts, "noise": noise, "seed": seed}
    attributes_of_mixture = huggingface.decoder_attributes(config.decoder, dtype=str(store.dtype_of(matched))) | of_text
    return Source(matched, store.Record(config, "mixtral", {"decoder": attributes_of_mixture}, facts=facts), files)


def upcycled_config(dense: DecoderConfig, *, experts: int, top_k: int) -> DecoderConfig:
    """The Mixtral's sizes."""
    if not 1 <= top_k <= experts:
        raise MoextendError(f"of {experts} experts each token cannot take {top_k}; give 1 <= top-k <= experts")
    return dataclasses.replace(dense, experts=experts, top_k=top_k)


ROUTER_STD = 0.02
"""Standard deviation of a new router's weights."""


def upcycle(source: Mapping[str, Stored], *, experts: int, noise: float = 0.0, seed: int = 0) -> dict[str, Stored]:
    """A dense model's tensors seen as a Mixtral's; both under Hugging Face's names.

    The router's weights are drawn from (seed, layer). Random rather than zero: with a router of zeros all tokens tie
    and go to the first k experts, and the others never see a gradient; random directions spread tokens over all
    experts, which then become different from the tokens they get.

    Args:
      noise: standard deviation of what is added to each copy, in units of the matrix's own root mean square; drawn
        from (seed, layer, expert, matrix), in float32, then rounded to the matrix's dtype. 0: exact copies.
    """
    if already := [name for name in source if ".block_sparse_moe." in name]:
        raise MoextendError(f"{source[already[0]].where} is a mixture of experts already ({already[0]})")
    ffn = {(int(match["layer"]), match["matrix"]): name for name in source if (match := _FFN.fullmatch(name))}
    if not ffn:
        raise MoextendError("nothing to upcycle: no tensor is called model.layers.N.mlp.{gate,up,down}_proj.weight")
    layers = range(1 + max(layer for layer, _ in ffn))
    if len(layers) > len(source):
        raise MoextendError(f"{source[next(iter(ffn.values()))].where}: of {len(layers)} layers most are missing")
    if missing := [f"model.layers.{n}.mlp.{m}_proj.weight" for n in layers for m in _MATRICES if (n, m) not in ffn]:
        raise MoextendError(f"{source[next(iter(ffn.values()))].where}: missing: {name_list(missing)}")

    @functools.lru_cache(maxsize=1)  # an import reads each tensor twice in a row: to write it, and for its hash
    def noisy(name: str, *drawn_from: int) -> np.ndarray:
        return _noisy(source[name].read(), noise=noise, drawn_from=[seed, *drawn_from])

    result = {name: stored for name, stored in source.items() if not _FFN.fullmatch(name)}
    for (layer, matrix), name in ffn.items():
        for expert in range(experts):
            copy = source[name]._replace(file=None)
            if noise:
                read = functools.partial(noisy, name, layer, expert, list(_MATRICES).index(matrix))
                copy = copy._replace(read=read, run=None)  # `run` would read the file, without noise
            result[_EXPERT.format(layer=layer, expert=expert, matrix=_MATRICES[matrix])] = copy
    for layer in layers:
        like = source[ffn[layer, "up"]]
        shape = (experts, like.shape[-1])
        read = functools.partial(_random, shape, dtype=like.dtype, std=ROUTER_STD, drawn_from=[seed, layer])
        result[_ROUTER.format(layer=layer)] = Stored(shape, like.dtype, read, "upcycling")
    return result


def _noisy(array: np.ndarray, *, noise: float, drawn_from: list[int]) -> np.ndarray:
    exact = array.astype(np.float32)
    scale = np.float32(noise * np.sqrt(np.mean(np.square(exact))))
    return (exact + scale * _random(exact.shape, dtype=exact.dtype, std=1.0, drawn_from=drawn_from)).astype(array.dtype)


def _random(shape: tuple[int, ...], *, dtype: np.dtype, std: float, drawn_from: list[int]) -> np.ndarray:
    normal = np.random.default_rng(drawn_from).standard_normal(shape, np.float32)
    return (np.float32(std) * normal).astype(dtype)
