"""The name table against the names that are published, written down here from the index files' own scheme."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
from flax import nnx

from moextend_jax.checkpoints import names
from moextend_jax.checkpoints.leaves import match, plan_theirs
from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.config import DecoderConfig, ExtensionConfig, ModelConfig, MoextendError, VisionConfig, of_pictures
from moextend_jax.models.moextend import MoExtend
from moextend_jax.parameters import by_path
from moextend_jax.plan.sizes import DECODERS, TOWERS

M8X7B = DecoderConfig()
M8X22B = DecoderConfig(width=6144, hidden=16384, layers=56, heads=48)
M8X22B_INSTRUCT = dataclasses.replace(M8X22B, vocab_size=32768)
CLIP_L_336 = VisionConfig()
PUBLISHED = ExtensionConfig(layers=(2, 3, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 19, 20, 25, 27), sources=(0,) * 16)


def mixtral(layers: int, *, width: int, hidden: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published Mixtral files (all have 8 experts and 8 key/value heads of 128)."""
    made: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for n in range(layers):
        layer = f"model.layers.{n}."
        made[layer + "input_layernorm.weight"] = made[layer + "post_attention_layernorm.weight"] = (width,)
        made[layer + "self_attn.q_proj.weight"] = made[layer + "self_attn.o_proj.weight"] = (width, width)
        made[layer + "self_attn.k_proj.weight"] = made[layer + "self_attn.v_proj.weight"] = (1024, width)
        made[layer + "block_sparse_moe.gate.weight"] = (8, width)
        for e in range(8):
            expert = f"{layer}block_sparse_moe.experts.{e}."
            made[expert + "w1.weight"] = made[expert + "w3.weight"] = (hidden, width)
            made[expert + "w2.weight"] = (width, hidden)
    return made


def clip_l_336() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tower in openai/clip-vit-large-patch14-336, less its position_ids buffer."""
    top = "vision_model."
    made: dict[str, tuple[int, ...]] = {
        top + "embeddings.class_embedding": (1024,),
        top + "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        top + "embeddings.position_embedding.weight": (577, 1024),
    }
    norms = [top + "pre_layrnorm", top + "post_layernorm"]
    for n in range(24):
        layer = f"{top}encoder.layers.{n}."
        norms += [layer + "layer_norm1", layer + "layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made[f"{layer}self_attn.{part}.weight"] = (1024, 1024)
            made[f"{layer}self_attn.{part}.bias"] = (1024,)
        made |= {layer + "mlp.fc1.weight": (4096, 1024), layer + "mlp.fc1.bias": (4096,)}
        made |= {layer + "mlp.fc2.weight": (1024, 4096), layer + "mlp.fc2.bias": (1024,)}
    return made | {f"{norm}.{part}": (1024,) for norm in norms for part in ("weight", "bias")}


def siglip(layers: int, *, width: int, hidden: int, patch: int, positions: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tower in google/siglip-*, without the head that pools its positions."""
    top = "vision_model."
    made: dict[str, tuple[int, ...]] = {
        top + "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        top + "embeddings.patch_embedding.bias": (width,),
        top + "embeddings.position_embedding.weight": (positions, width),
    }
    norms = [top + "post_layernorm"]
    for n in range(layers):
        layer = f"{top}encoder.layers.{n}."
        norms += [layer + "layer_norm1", layer + "layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= {f"{layer}self_attn.{part}.weight": (width, width), f"{layer}self_attn.{part}.bias": (width,)}
        made |= {layer + "mlp.fc1.weight": (hidden, width), layer + "mlp.fc1.bias": (hidden,)}
        made |= {layer + "mlp.fc2.weight": (width, hidden), layer + "mlp.fc2.bias": (width,)}
    return made | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


def dinov2(
    layers: int, *, width: int, mlp: dict[str, tuple[int, ...]], registers: int = 0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tower of facebook/dinov2-*, less its mask token, and of the same with registers.

    Args:
      mlp: of one layer.
    """
    made: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "embeddings.position_embeddings": (1, 1370, width),
    }
    if registers:
        made["embeddings.register_tokens"] = (1, registers, width)
    norms = ["layernorm"]
    for n in range(layers):
        layer = f"encoder.layer.{n}."
        norms += [layer + "norm1", layer + "norm2"]
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            made |= {f"{layer}attention.{part}.weight": (width, width), f"{layer}attention.{part}.bias": (width,)}
        made |= {f"{layer}layer_scale{m}.lambda1": (width,) for m in (1, 2)}
        for part, shape in mlp.items():
            made |= {f"{layer}mlp.{part}.weight": shape, f"{layer}mlp.{part}.bias": shape[:1]}
    return made | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


LARGE = {"fc1": (4096, 1024), "fc2": (1024, 4096)}
GIANT = {"weights_in": (8192, 1536), "weights_out": (1536, 4096)}


def extension(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the released code adds in the published layers: one expert, calibrators of width 16."""
    made = {}
    for n in PUBLISHED.layers:
        block = f"model.layers.{n}.block_sparse_moe."
        made |= {
            block + "gate_vision.weight": (1, width),
            block + "weight_scale.weight_scale.0.weight": (16, 9),
            block + "weight_scale.weight_scale.2.weight": (9, 16),
            block + "experts.8.w1.weight": (hidden, width),
            block + "experts.8.w2.weight": (width, hidden),
            block + "experts.8.w3.weight": (hidden, width),
        }
    return made


def projector(first: str, second: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        first + ".weight": (width, 1024), first + ".bias": (width,),
        second + ".weight": (width, width), second + ".bias": (width,),
    }  # fmt: skip


def of_mlp_experts(layers: int, *, width: int, heads: int, keys: int, hidden: int, experts: int, vocab: int,
                   norms: tuple[int, int] | None = None, shared: int = 0) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Names and shapes of Qwen3-MoE and OLMoE, written down from their index files; heads and keys: rows of q_proj and
    k_proj, norms: sizes of q_norm and k_norm. Those of Qwen2-MoE have a shared expert and biases instead."""
    made = {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for n in range(layers):
        layer = f"model.layers.{n}."
        made |= {layer + f"{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        if norms:
            made |= {layer + "self_attn.q_norm.weight": (norms[0],), layer + "self_attn.k_norm.weight": (norms[1],)}
        if shared:
            made |= {
                layer + f"self_attn.{part}_proj.bias": (n,) for part, n in zip("qkv", (heads, keys, keys), strict=True)
            }
            inside = layer + "mlp.shared_expert"
            made |= {f"{inside}.{part}_proj.weight": (shared, width) for part in ("gate", "up")}
            made |= {f"{inside}.down_proj.weight": (width, shared), f"{inside}_gate.weight": (1, width)}
        made |= {layer + "self_attn.q_proj.weight": (heads, width), layer + "self_attn.o_proj.weight": (width, heads)}
        made |= {layer + f"self_attn.{part}_proj.weight": (keys, width) for part in "kv"}
        made[layer + "mlp.gate.weight"] = (experts, width)
        for e in range(experts):
            made |= {f"{layer}mlp.experts.{e}.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
            made[f"{layer}mlp.experts.{e}.down_proj.weight"] = (width, hidden)
    return made


def granite(layers: int, *, width: int, experts: int, vocab: int = 49155) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Granite 3.1's MoE models, whose head is tied: experts of 512 lie in one tensor."""
    made = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for n in range(layers):
        layer, block = f"model.layers.{n}.", f"model.layers.{n}.block_sparse_moe."
        made |= {layer + f"{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        made |= {layer + f"self_attn.{part}_proj.weight": (width, width) for part in "qo"}
        made |= {layer + f"self_attn.{part}_proj.weight": (512, width) for part in "kv"}
        made |= {block + "router.layer.weight": (experts, width)}
        made |= {block + "input_linear.weight": (experts, 1024, width)}
        made |= {block + "output_linear.weight": (experts, width, 512)}
    return made


def glm(layers: int, *, width: int, heads: int, keys: int, hidden: int, dense: int, experts: int, vocab: int):
    """Names and shapes of GLM-4.5-Air: its first layer is dense, the others have an expert that all tokens pass."""
    made: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocab, width))
    made["model.norm.weight"] = (width,)

    for n in range(layers):
        layer = f"model.layers.{n}."
        made |= {layer + f"{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        for part, size in zip("qkv", (heads, keys, keys), strict=True):
            attention = layer + f"self_attn.{part}_proj."
            made |= {attention + "weight": (size, width), attention + "bias": (size,)}
        made[layer + "self_attn.o_proj.weight"] = (width, heads)
        if n == 0:
            made |= swiglu(layer + "mlp", width, dense)
            continue
        made |= swiglu(layer + "mlp.shared_experts", width, hidden)
        made |= {layer + "mlp.gate.weight": (experts, width), layer + "mlp.gate.e_score_correction_bias": (experts,)}
        for e in range(experts):
            made |= swiglu(f"{layer}mlp.experts.{e}", width, hidden)
    return made


def ernie(layers: int, *, width: int, heads: int, keys: int, hidden: int, dense: int, experts: int, vocab: int):
    """Names and shapes of ERNIE-4.5-21B-A3B: its head is tied, its first layer dense, two experts lie in one."""
    made = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for n in range(layers):
        layer = f"model.layers.{n}."
        made |= {layer + f"{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        made |= {layer + f"self_attn.{part}_proj.weight": (keys, width) for part in "kv"}
        made |= {layer + "self_attn.q_proj.weight": (heads, width), layer + "self_attn.o_proj.weight": (width, heads)}
        if n == 0:
            made |= swiglu(layer + "mlp", width, dense)
            continue
        made |= swiglu(layer + "mlp.shared_experts", width, 2 * hidden)
        made |= {layer + "mlp.gate.weight": (experts, width)}
        made |= {layer + "mlp.moe_statics.e_score_correction_bias": (1, experts)}
        for e in range(experts):
            made |= swiglu(f"{layer}mlp.experts.{e}", width, hidden)
    return made


def swiglu(block: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    both = {f"{block}.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
    return both | {f"{block}.down_proj.weight": (width, hidden)}


def gpt_oss(layers: int, *, width: int, experts: int, packed: bool, vocab: int = 201088):
    """Names and shapes of gpt-oss: 64 query and 8 key heads of 64, and F = D; experts in four bits, or not."""
    made: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocab, width))
    made["model.norm.weight"] = (width,)
    for n in range(layers):
        layer, block = f"model.layers.{n}.", f"model.layers.{n}.mlp."
        made |= {layer + f"{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
        for part, heads in zip("qkv", (4096, 512, 512), strict=True):
            made |= {layer + f"self_attn.{part}_proj.weight": (heads, width)}
            made |= {layer + f"self_attn.{part}_proj.bias": (heads,)}
        made |= {layer + "self_attn.o_proj.weight": (width, 4096), layer + "self_attn.o_proj.bias": (width,)}
        made |= {layer + "self_attn.sinks": (64,)}
        made |= {block + "router.weight": (experts, width), block + "router.bias": (experts,)}
        for name, out in (("gate_up", 2 * width), ("down", width)):
            made[f"{block}experts.{name}_proj_bias"] = (experts, out)
            if packed:
                made[f"{block}experts.{name}_proj_blocks"] = (experts, out, width // 32, 16)
                made[f"{block}experts.{name}_proj_scales"] = (experts, out, width // 32)
            else:
                made[f"{block}experts.{name}_proj"] = (experts, width, out)
    return made


AIR = dict(width=4096, heads=12288, keys=1024, hidden=1408, dense=10944, experts=128, vocab=151552)
ERNIE = dict(width=2560, heads=2560, keys=512, hidden=1536, dense=12288, experts=64, vocab=103424)


FUSED = {
    "granite-3.1-3b-a800m-base": (290, 3_298_793_472, granite(32, width=1536, experts=40)),
    "gpt-oss-20b": (411, 20_914_757_184, gpt_oss(24, width=2880, experts=32, packed=False)),
}


def test_experts_in_four_bits_are_matched_once():
    published = gpt_oss(24, width=2880, experts=32, packed=True)
    config = ModelConfig(decoder=DECODERS["gpt-oss-20b"])
    leaves = match(unread(published), table="gpt_oss", config=config, where="test")
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == 20_914_757_184


def test_layers_that_predict_further_tokens_are_left_out():
    """GLM's files number them on behind the others; nobody else's may hold more layers than there are."""
    config, further = ModelConfig(decoder=DECODERS["GLM-4.5-Air"]), {"model.layers.46.eh_proj.weight": (4096, 8192)}
    leaves = match(unread(glm(46, **AIR) | further), table="glm4_moe", config=config, where="test")
    assert sum(math.prod(leaf.shape) for leaf in leaves.values()) == 106_852_251_264
    with pytest.raises(MoextendError, match=r"Not asked for: model.layers.47.eh_proj.weight"):
        match(
            unread(glm(46, **AIR) | {"model.layers.47.eh_proj.weight": (1,)}), table="glm4_moe", config=config, where=""
        )


def unread(published: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    return {
        name: Stored(shape, np.dtype(np.float32), lambda: pytest.fail("read"), name)
        for name, shape in published.items()
    }


@pytest.mark.parametrize("name", FUSED)
def test_tensors_that_hold_several_experts_are_matched_once_and_written_as_they_were(name: str):
    tensors, parameters, published = FUSED[name]
    config = ModelConfig(decoder=DECODERS[name])
    assert (len(published), sum(map(math.prod, published.values()))) == (tensors, parameters)
    leaves = match(unread(published), table=config.decoder.family, config=config, where="test")
    model = nnx.eval_shape(lambda: MoExtend(config, rngs=nnx.Rngs(0)))
    ours = {path: tuple(param.shape) for path, param in by_path(nnx.state(model, nnx.Param)).items()}
    assert {path: leaf.shape for path, leaf in leaves.items()} == ours
    written = plan_theirs(leaves, table=config.decoder.family, config=config)
    assert {name: tensor.shape for name, tensor in written.items()} == published


OTHERS = {
    "GLM-4.5-Air": (17925, 106_852_251_264, glm(46, **AIR)),
    "ERNIE-4.5-21B-A3B-PT": (5492, 21_825_437_888, ernie(28, **ERNIE)),
    "Qwen3-30B-A3B": (18867, 30_532_122_624, dict(width=2048, heads=4096, keys=512, norms=(128, 128), hidden=768,
                                                  experts=128, vocab=151936, layers=48)),
    "Qwen3-235B-A22B": (36945, 235_093_634_560, dict(width=4096, heads=8192, keys=512, norms=(128, 128), hidden=1536,
                                                     experts=128, vocab=151936, layers=94)),
    "OLMoE-1B-7B-0924": (3219, 6_919_161_856, dict(width=2048, heads=2048, keys=2048, norms=(2048, 2048), hidden=1024,
                                                   experts=64, vocab=50304, layers=16)),
    "Qwen1.5-MoE-A2.7B": (4659, 14_315_784_192, dict(width=2048, heads=2048, keys=2048, hidden=1408, experts=60,
                                                     vocab=151936, shared=5632, layers=24)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_every_parameter_of_another_family_is_matched_once(name: str):
    tensors, parameters, sizes = OTHERS[name]
    published, decoder = of_mlp_experts(**sizes) if "layers" in sizes else sizes, DECODERS[name]
    assert (len(published), sum(map(math.prod, published.values()))) == (tensors, parameters)
    config = ModelConfig(decoder=decoder)
    model = nnx.eval_shape(lambda: MoExtend(config, rngs=nnx.Rngs(0)))
    ours = {path: tuple(param.shape) for path, param in by_path(nnx.state(model, nnx.Param)).items()}
    matched = list(names.tensors(decoder.family, config))
    assert sorted(tensor.file for tensor in matched) == sorted(published)
    assert {tensor.path for tensor in matched} == set(ours)
    for tensor in matched:
        file_side, our_side = tensor.layout.split(" -> ")
        letters = names.letters(tensor.path, config)
        assert names.shape(file_side, letters) == published[tensor.file], tensor.file
        assert names.shape(our_side, letters) == ours[tensor.path][len(tensor.index) :], tensor.path


CASES = {
    "mixtral 8x7B": ("mixtral", M8X7B, mixtral(32, width=4096, hidden=14336, vocab=32000)),
    "mixtral 8x22B": ("mixtral", M8X22B, mixtral(56, width=6144, hidden=16384, vocab=32000)),
    "mixtral 8x22B instruct": ("mixtral", M8X22B_INSTRUCT, mixtral(56, width=6144, hidden=16384, vocab=32768)),
    "clip": ("clip", M8X7B, clip_l_336()),
    "llava": ("llava", M8X7B, projector("mm_projector.0", "mm_projector.2", 4096)),
    "llava_hf": (
        "llava_hf",
        M8X7B,
        projector("multi_modal_projector.linear_1", "multi_modal_projector.linear_2", 4096),
    ),
    "released": (
        "released",
        M8X7B,
        mixtral(32, width=4096, hidden=14336, vocab=32000)
        | {"model.visual.vision_tower." + name: shape for name, shape in clip_l_336().items()}
        | projector("model.visual.mm_projector.0", "model.visual.mm_projector.2", 4096)
        | extension(4096, 14336),
    ),
}


PICTURE_TOWERS = {
    # transformers' classes count the heads, of 15,238,352 and 7,087,104, and the mask token, of 1024
    "siglip-so400m-patch14-384": (
        siglip(27, width=1152, hidden=4304, patch=14, positions=729),
        428_225_600 - 15_238_352,
    ),
    "siglip-base-patch16-224": (siglip(12, width=768, hidden=3072, patch=16, positions=196), 92_884_224 - 7_087_104),
    "dinov2-large": (dinov2(24, width=1024, mlp=LARGE), 304_368_640 - 1024),
    "dinov2-with-registers-large": (dinov2(24, width=1024, mlp=LARGE, registers=4), 304_371_712),
    "dinov2-giant": (dinov2(40, width=1536, mlp=GIANT), 1_136_480_768 - 1536),
}


@pytest.mark.parametrize("tower", PICTURE_TOWERS)
def test_every_name_of_a_picture_tower_is_matched_once_and_has_its_shape(tower: str):
    published, parameters = PICTURE_TOWERS[tower]
    assert sum(math.prod(shape) for shape in published.values()) == parameters
    config = of_pictures(decoder=DecoderConfig(layers=1), vision=TOWERS[tower])
    model = nnx.eval_shape(lambda: MoExtend(config, rngs=nnx.Rngs(0)))
    ours = {path: param.shape for path, param in by_path(nnx.state(model, nnx.Param)).items() if "/tower/" in path}
    tensors = list(names.tensors(TOWERS[tower].family, config))
    assert collections.Counter(tensor.file for tensor in tensors) == collections.Counter(published.keys())
    assert {tensor.path for tensor in tensors} == ours.keys()
    for tensor in tensors:
        letters = names.letters(tensor.path, config)
        theirs, inner = (names.shape(side, letters) for side in tensor.layout.split(" -> "))
        assert theirs == published[tensor.file], tensor.file
        assert inner == ours[tensor.path][len(tensor.index) :], tensor.path


@functools.cache
def shapes(decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters of the full-size model."""
    config = of_pictures(decoder=decoder, vision=CLIP_L_336, extension=PUBLISHED)
    model = nnx.eval_shape(lambda: MoExtend(config, rngs=nnx.Rngs(0)))
    return {path: tuple(param.shape) for path, param in by_path(nnx.state(model, nnx.Param)).items()}


def test_the_counts_are_the_published_ones():
    """995 and 1,739 tensors, and 46.7 and 140.6 billion parameters, stand in the index files and model cards."""
    for case, count, parameters in (("mixtral 8x7B", 995, 46_702_792_704), ("mixtral 8x22B", 1739, 140_620_634_112)):
        expected = CASES[case][2]
        assert len(expected) == count
        assert sum(math.prod(shape) for shape in expected.values()) == parameters


@pytest.mark.parametrize("case", CASES)
def test_every_published_name_is_matched_once_and_has_its_shape(case: str):
    table, decoder, published = CASES[case]
    config = of_pictures(decoder=decoder, vision=CLIP_L_336, extension=PUBLISHED)
    tensors = list(names.tensors(table, config))
    assert collections.Counter(tensor.file for tensor in tensors) == collections.Counter(published.keys())
    ours = shapes(decoder)
    indices = collections.defaultdict(list)
    for tensor in tensors:
        letters = names.letters(tensor.path, config)
        theirs, inner = (names.shape(side, letters) for side in tensor.layout.split(" -> "))
        assert theirs == published[tensor.file], tensor.file
        assert inner == ours[tensor.path][len(tensor.index) :], tensor.path
        indices[tensor.path].append(tensor.index)
    for path, seen in indices.items():  # and together they fill the stacked arrays
        assert sorted(seen) == list(itertools.product(*map(range, ours[path][: len(seen[0])]))), path
    if table == "released":
        assert indices.keys() == ours.keys()


def test_no_pattern_of_other_tensors_swallows_one_of_ours():
    for table, pattern in names.BESIDE.items():
        vision = next((tower for tower in TOWERS.values() if tower.family == table), CLIP_L_336)
        config = of_pictures(decoder=M8X7B, vision=vision)
        for tensor in names.tensors(table, config):
            for prefix in ("", names.PREFIXES.get(table, "")):
                assert not pattern.fullmatch(prefix + tensor.file)
                assert not names.IGNORED.fullmatch(prefix + tensor.file)


def test_the_text_half_of_a_clip_is_known_by_name():
    """Of openai/clip-vit-large-patch14-336, all that is not the tower."""
    others = ["logit_scale", "text_projection.weight", "visual_projection.weight", "text_model.final_layer_norm.bias"]
    others += ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.11.mlp.fc2.bias"]
    assert all(names.BESIDE["clip"].fullmatch(name) for name in others)
    assert names.IGNORED.fullmatch("vision_model.embeddings.position_ids")
    assert not names.BESIDE["clip"].fullmatch("vision_projection.weight")
    assert not names.BESIDE["clip"].fullmatch("logit_bias")


def test_so_are_the_text_half_and_the_head_of_a_siglip():
    """Of google/siglip-base-patch16-224, all that is not the tower."""
    others = ["logit_scale", "logit_bias", "text_model.head.weight", "vision_model.head.probe"]
    others += ["vision_model.head.attention.in_proj_weight", "vision_model.head.mlp.fc1.bias"]
    assert all(names.BESIDE["siglip"].fullmatch(name) for name in others)
    assert not names.BESIDE["siglip"].fullmatch("vision_model.embeddings.class_embedding")
