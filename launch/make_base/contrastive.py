"""Pretrains the embedded base's vision tower contrastively on the pictures and captions of images.py.

In: the font of fonts-noto-color-emoji and PyPI's `emoji` (see README.md). Out: the tower as a Hugging Face
CLIPVisionModel folder, moextend_jax/assets/base/vision; the text encoder and both projections are thrown away.

    PYTHONPATH=. python launch/make_base/contrastive.py --font NotoColorEmoji.ttf
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from images import SIZE, emoji_picture, render_emoji, shape_pair, shape_set
from probe import load_tower

from moextend_jax.checkpoints.huggingface import write_parameters
from moextend_jax.config import DecoderConfig, VisionConfig, of_pictures
from moextend_jax.media.image import MEAN_c, STD_c
from moextend_jax.models.vision import VisionTower
from moextend_jax.parameters import arrays_of

CONFIG = VisionConfig(width=128, hidden=512, layers=4, heads=4, image_size=SIZE, patch_size=16)
FOLDER = Path(__file__).parents[2] / "moextend_jax" / "assets" / "base" / "vision"
WORDS = 24
"""Caption length in words; longer ones are cut."""
EMOJI_SHARE, PAIR_SHARE = 0.15, 0.1
"""Of a batch; the rest are sets of four single shapes."""


class TextEncoder(nnx.Module):
    """Word embeddings, one mixing of each word with its neighbours, mean: enough to tie a colour to its shape."""

    def __init__(self, vocabulary: int, width: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.mix = nnx.Linear(3 * width, width, rngs=rngs)

    def __call__(self, words_nl: jax.Array) -> jax.Array:
        mask_nl1 = (words_nl > 0)[..., None]
        x_nlC = self.embed(words_nl) * mask_nl1
        padded = jnp.pad(x_nlC, ((0, 0), (1, 1), (0, 0)))
        x_nlC = nnx.gelu(self.mix(jnp.concatenate([padded[:, :-2], x_nlC, padded[:, 2:]], axis=-1))) * mask_nl1
        return x_nlC.sum(axis=1) / mask_nl1.sum(axis=1)


class Pair(nnx.Module):
    """Tower and text encoder, their projections to the common space, and the logarithm of the inverse temperature."""

    def __init__(self, vocabulary: int, *, rngs: nnx.Rngs):
        self.tower = VisionTower(CONFIG, rngs=rngs, dtype="float32")
        # Weights of 0.02 suit wide towers: at this width layers would start as almost nothing, and learn late.
        for part in (self.tower.layers.attention, self.tower.layers.mlp):
            for param in jax.tree.leaves(nnx.state(part), is_leaf=lambda x: isinstance(x, nnx.Param)):
                param[...] = 3 * param[...]
        self.tower.position[...] = 5 * self.tower.position[...]
        self.text = TextEncoder(vocabulary, CONFIG.width, rngs=rngs)
        self.class_head = nnx.Linear(CONFIG.width, CONFIG.width, use_bias=False, rngs=rngs)
        self.patch_head = nnx.Linear(CONFIG.width, CONFIG.width, use_bias=False, rngs=rngs)
        self.text_head = nnx.Linear(CONFIG.width, CONFIG.width, use_bias=False, rngs=rngs)
        self.scale = nnx.Param(jnp.log(1 / 0.07))

    def views(self, images_nhwc: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projections of the pooled class token, as in CLIP, and of the mean of the patches at hidden state -2.

        A projector reads the patches at -2, and the class token alone does not make them say what they show.
        """
        below_nQC = self.tower.hidden_state(images_nhwc, layer=-2)
        graph, stack_U = nnx.split(self.tower.layers)
        last = nnx.merge(graph, jax.tree.map(lambda w_U: w_U[-1], stack_U))
        pooled_nC = self.tower.post_norm(last(below_nQC)[:, :1])[:, 0]
        return self.class_head(pooled_nC), self.patch_head(below_nQC[:, 1:].mean(axis=1))


class Pictures(NamedTuple):
    """Host or device arrays of one batch."""

    images_nhwc: Any
    words_nl: Any
    captions_n: Any
    """A number per caption: pictures with the same one are no negatives of each other."""


class Source:
    """Fresh pictures for every step, from one seed."""

    def __init__(self, font: Path, *, seed: int):
        self.rng = np.random.default_rng(seed)
        self.symbols = render_emoji(font)
        probe = np.random.default_rng(0)
        captions = [caption for _ in range(1000) for _, caption in shape_set(probe)]
        captions += [name for _, name in self.symbols] + ["and"]
        self.vocabulary = {word: i + 1 for i, word in enumerate(sorted(set(" ".join(captions).split())))}

    def batch(self, n: int) -> Pictures:
        pairs = [emoji_picture(self.rng, self.symbols) for _ in range(int(n * EMOJI_SHARE))]
        pairs += [shape_pair(self.rng) for _ in range(int(n * PAIR_SHARE))]
        while len(pairs) < n:
            pairs += shape_set(self.rng)
        pairs = pairs[:n]
        words_nl = np.zeros((n, WORDS), np.int32)
        for row, (_, caption) in enumerate(pairs):
            ids = [self.vocabulary[word] for word in caption.split() if word in self.vocabulary][:WORDS]
            words_nl[row, : len(ids)] = ids
        images_nhwc = np.stack([pixels for pixels, _ in pairs]).astype(np.float32) / 255
        captions_n = np.unique([caption for _, caption in pairs], return_inverse=True)[1]
        return Pictures((images_nhwc - MEAN_c) / STD_c, words_nl, captions_n)


def contrastive_loss(pair: Pair, pictures: Pictures) -> tuple[jax.Array, jax.Array]:
    """CLIP's symmetric cross-entropy over the batch, mean over both views, and each view's share of first places."""
    same_nm = (pictures.captions_n[:, None] == pictures.captions_n[None]).astype(jnp.float32)
    target_nm = same_nm / same_nm.sum(axis=1, keepdims=True)
    text_nC = unit(pair.text_head(pair.text(pictures.words_nl)))
    losses, hits = [], []
    for view_nC in pair.views(pictures.images_nhwc):
        logits_nm = jnp.minimum(jnp.exp(pair.scale[...]), 100.0) * unit(view_nC) @ text_nC.T
        losses.append(optax.softmax_cross_entropy(logits_nm, target_nm).mean())
        losses.append(optax.softmax_cross_entropy(logits_nm.T, target_nm).mean())
        hits.append(jnp.take_along_axis(same_nm, logits_nm.argmax(axis=1)[:, None], axis=1).mean())
    return jnp.mean(jnp.stack(losses)), jnp.stack(hits)


def unit(x_nC: jax.Array) -> jax.Array:
    return x_nC / jnp.linalg.norm(x_nC, axis=-1, keepdims=True)


def save(tower: VisionTower, folder: Path) -> None:
    """The tower as a Hugging Face folder, tensors in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"media/image/tower/{path}": np.asarray(w.astype(jnp.bfloat16)) for path, w in arrays_of(tower).items()}
    whole = of_pictures(decoder=DecoderConfig(), vision=CONFIG)
    write_parameters(folder, arrays, table="clip", config=whole)
    model = {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_size": CONFIG.width,
        "intermediate_size": CONFIG.hidden, "num_hidden_layers": CONFIG.layers, "num_attention_heads": CONFIG.heads,
        "image_size": CONFIG.image_size, "patch_size": CONFIG.patch_size, "num_channels": 3,
        "hidden_act": CONFIG.activation, "layer_norm_eps": CONFIG.norm_eps, "attention_dropout": 0.0,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": SIZE}, "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    for name, content in {"config.json": model, "preprocessor_config.json": processor}.items():
        (folder / name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the tower goes")
    parser.add_argument("--start", type=Path, help="tower to go on from, instead of random weights")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = Source(options.font, seed=options.seed)
    pair = nnx.jit(lambda: Pair(len(source.vocabulary) + 1, rngs=nnx.Rngs(options.seed)))()
    if options.start:
        pair.tower = load_tower(options.start)
    train(pair, source.batch, steps=options.steps, batch=options.batch, folder=options.folder)


def train(pair: Pair, batch_of: Callable[[int], Pictures], *, steps: int, batch: int, folder: Path) -> None:
    """Trains both on pictures of `batch_of` so many, and saves the tower now and then."""
    graph, state = nnx.split(pair)
    schedule = optax.warmup_cosine_decay_schedule(0, 1e-3, steps // 10, steps, 1e-5)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.05, mask=lambda tree: jax.tree.map(lambda w: w.ndim > 1, tree)),
    )

    @jax.jit
    def step(state, moments, pictures):
        def loss_of(state):
            return contrastive_loss(nnx.merge(graph, state), pictures)

        (loss, hits), gradient = jax.value_and_grad(loss_of, has_aux=True)(state)
        updates, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, updates), moments, loss, hits

    moments = optimizer.init(state)
    start = time.time()
    for i in range(1, steps + 1):
        state, moments, loss, hits = step(state, moments, batch_of(batch))
        if i % 50 == 0 or i == steps:
            print(f"step {i} loss {loss:.3f} own caption first {hits} {time.time() - start:.0f} s", flush=True)
        if i % 500 == 0 or i == steps:
            save(nnx.merge(graph, state).tower, folder)


if __name__ == "__main__":
    main()
