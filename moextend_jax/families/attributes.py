"""What the description of a model may say: each kind of file has a table, and here is the one loop that reads them.

In: attributes by name (of a config.json, or the keys of a GGUF file) and their table. Out: fields of `DecoderConfig` or
`VisionConfig`, or a refusal that names the attribute: nothing that would change the computation goes unread.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from moextend_jax.config import DecoderConfig, MoextendError, RopeScaling, VisionConfig
from moextend_jax.families.rope import LENGTH, is_possible, read_rope, rope_attributes
from moextend_jax.outside import short, shown

MOST = 1 << 31
"""Sizes stay below; what they multiply to stays a number that can be written down."""

OF_ANY_MODEL = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path", "pad_token_id",
    "bos_token_id", "eos_token_id", "initializer_range", "initializer_factor", "max_position_embeddings",
    "output_router_logits", "router_aux_loss_coef", "projection_dim", "quantization_config_note",
    "_attn_implementation_autoset", "attn_implementation", "_attn_implementation", "vocab_size", "model_type",
    # the released code's own: its image tower is described elsewhere, most of these lines are left over
    "add_layer", "visual", "embed_dim", "img_size", "in_chans", "patch_size", "tiny_vocab",
    # ours, in exported models: the sizes of the tower inside, ids of the image tags, experts that were copied
    "vision_config", "image_tags", "sources",
    # what transformers 4 wrote of every model, about text generation, outputs and labels
    "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript",
    "typical_p", "use_bfloat16",
    # what tools write about themselves, and how a program computes what is computed here in any case
    "auto_map", "pretraining_tp", "unsloth_version", "unsloth_fixed", "_flash_attn_2_enabled", "_commit_hash",
    "tokenizer_model_max_length", "tokenizer_padding_side", "max_sequence_length", "unk_token_id", "is_llama_config",
    "transformers.js_config",
}  # fmt: skip
"""Attributes of a config.json that say nothing about what is computed."""


class Table(NamedTuple):
    """sizes: their name -> our field. must_be: what changes the computation, with the only values that this code
    computes. harmless: what says nothing about it. optional: sizes that may be left out. aliases: their other names.
    ours, theirs: functions from a file's value of a size to ours and back, where the two differ; `ours` returns a value
    that it cannot read as it is."""

    sizes: Mapping[str, str]
    must_be: Mapping[str, tuple[Any, ...]]
    harmless: Collection[str]
    optional: Collection[str] = ()
    aliases: Mapping[str, str] = {}
    ours: Mapping[str, Callable[[Any], Any]] = {}
    theirs: Mapping[str, Callable[[Any], Any]] = {}

    def attributes_of(self, config: Any) -> dict[str, Any]:
        """The attributes that `read_fields` makes these fields of, without a rope_scaling of None."""
        written = {
            name: self.theirs.get(name, _as_written)(getattr(config, field)) for name, field in self.sizes.items()
        }
        return {name: value for name, value in written.items() if value is not None or name != "rope_scaling"}


def _as_written(value: Any) -> Any:
    return rope_attributes(value) if isinstance(value, RopeScaling) else value


def read_fields(attributes: Mapping[str, Any], table: Table, *, where: Path, prefix: str = "") -> dict[str, Any]:
    """Our fields, each with a possible value; those that are optional and not there are left out.

    Args:
      prefix: what stands before the names in the file, for messages.

    Raises:
      MoextendError: names an attribute that is unknown, cannot be honoured, is impossible or is missing.
    """
    attributes = _by_first_name(attributes, table.aliases, where=where)
    for name, value in attributes.items():
        if name in table.must_be and value not in table.must_be[name]:
            only = " or ".join(map(repr, table.must_be[name]))
            raise MoextendError(f"{where}: {prefix}{name} = {shown(value)} cannot be honoured (only {only})")
        if name == "quantization_config" and name not in table.harmless:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            raise MoextendError(
                f"{where}: {prefix}quantization_config: weights quantised by {shown(method or 'somebody')} are not "
                "read; take the model as it was before, and --config.expert_storage for few bits"
            )
        if name not in table.sizes and name not in table.must_be and name not in table.harmless:
            raise MoextendError(f"{where}: {prefix}{short(name)} is unknown to this code, so it cannot be honoured")
    fields = {}
    for theirs, ours in table.sizes.items():
        if theirs not in attributes and theirs in table.optional:
            continue
        value = attributes.get(theirs)
        fields[ours] = value = table.ours.get(theirs, lambda value: value)(value)
        if not fits(ours, value):  # a list: other sizes in other layers
            hint, default = _FIELDS.get(ours, _COUNT)
            may_be_null = "null or " if type(None) in get_args(hint) else ""
            wanted = (
                "a list of full_attention and sliding_attention" if ours == "local"
                else "true or false" if hint is bool or get_origin(hint) is Literal
                else may_be_null + ("a number from 0 on" if default == 0 and hint is int else "one positive number")
            )  # fmt: skip
            raise MoextendError(f"{where}: {prefix}{theirs} must be {wanted}, not {shown(value)}")
    return fields


def _by_first_name(attributes: Mapping[str, Any], aliases: Mapping[str, str], *, where: Path) -> dict[str, Any]:
    attributes = dict(attributes)
    for name in aliases.keys() & attributes.keys():
        value = attributes.pop(name)
        if attributes.setdefault(aliases[name], value) != value:
            raise MoextendError(f"{where}: {name} and {aliases[name]} differ")
    return attributes


_FIELDS: dict[str, tuple[Any, Any]] = {
    field.name: (get_type_hints(of)[field.name], field.default)
    for of in (VisionConfig, DecoderConfig)
    for field in dataclasses.fields(of)
}
"""Type and default of each size. A default of 0 says that the size may be 0."""
_COUNT = int, 1
"""Those of what is no field there: sizes of other towers, and what sizes are computed from."""


def fits(field: str, value: Any) -> bool:
    """Whether a field of `DecoderConfig` or `VisionConfig` can have this value, whatever a file says."""
    if field == "family":
        return isinstance(value, str) and re.fullmatch(r"\w{1,64}", value) is not None
    if field == "feature_layer":
        return type(value) is int and -MOST < value < 0
    if field == "local":
        return isinstance(value, tuple) and all(isinstance(is_local, bool) for is_local in value)
    hint, default = _FIELDS.get(field, _COUNT)
    options = get_args(hint)
    if field == "rope_scaling" and value is not None:
        fields = vars(value) if isinstance(value, RopeScaling) else value
        return isinstance(fields, dict) and is_possible(fields)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in options
    if value is None:
        return type(None) in options
    if hint is bool:
        return isinstance(value, bool)
    if float in (hint, *options):
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30
    return type(value) is int and (0 if default == 0 else 1) <= value < MOST


def decoder_attributes_of(attributes: Mapping[str, Any], *, where: Path) -> dict[str, Any]:
    """What transformers 5 writes inside `rope_parameters` is taken out, and `rope_scaling` is ours, a field of
    `DecoderConfig`, if the file says anything of it. A head_dim of null is none.

    Raises:
      MoextendError: as `read_rope`; or both are there and differ, of which transformers would drop one.
    """
    ropes = ("rope_scaling", "rope_parameters")
    read = [read_rope(name, attributes, where=where) for name in ropes if attributes.get(name) not in (None, {})]
    if read and read[0] != read[-1]:
        raise MoextendError(f"{where}: {' and '.join(ropes)} differ")
    used = (*ropes, LENGTH) if read and read[0]["rope_scaling"] else ropes
    attributes = {name: value for name, value in attributes.items() if name not in used}
    if attributes.get("head_dim", 0) is None:
        del attributes["head_dim"]
    return attributes | (read[0] if read else {})


def with_head_size(fields: dict[str, Any], *, where: Path) -> dict[str, Any]:
    """Where no head size is given, heads share the width."""
    if "head_size" not in fields:
        fields["head_size"], rest = divmod(fields["width"], fields["heads"])
        if rest:
            raise MoextendError(f"{where}: num_attention_heads does not divide hidden_size, and there is no head_dim")
    return fields
