"""An extended model (MoExtend) for transformers 5: LLaVA over Mixtral, with new experts in some of its layers.

`AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)` finds this file by FOLDER's config.json.
Needs torch and transformers alone.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter


class MoExtendConfig(LlavaConfig):
    """LLaVA's, and: `add_layer`, the layers with `new_experts` more experts than `text_config.num_local_experts`;
    `calibrator_width`; `weight_guard`, "bounded" or "none"; `text_isolation`, "none" or "strict" (only conversations
    with an image may choose new experts); `start`, "copy", or "twin": of a new expert and the one that it is a copy of
    (`sources`, those of each extended layer, one layer after another) a token may choose only the likelier."""

    model_type = "moextend"
    add_layer: list[int] | None = None
    new_experts: int = 1
    calibrator_width: int = 16
    weight_guard: str = "bounded"
    text_isolation: str = "none"
    start: str = "copy"
    sources: list[int] | None = None


TIE = 1e-4
"""A twin counts as no less than its source down to so much: two products round the same sum in two ways."""


class ExtendedTopKRouter(MixtralTopKRouter):
    """Chooses by the probabilities over old and new experts, weighs by the calibrated ones. twins: for each new expert
    the old one that it excludes, () for none."""

    def __init__(self, text_config, config: MoExtendConfig, twins=()):
        super().__init__(text_config)
        self.twins = twins
        outputs = text_config.num_local_experts + config.new_experts
        self.new = nn.Linear(text_config.hidden_size, config.new_experts, bias=False)
        self.calibrator = nn.Sequential(
            nn.Linear(outputs, config.calibrator_width, bias=False),
            nn.GELU(),
            nn.Linear(config.calibrator_width, outputs, bias=False),
        )
        self.normalise = WEIGHT_GUARDS[config.weight_guard]
        self.sighted = None
        """Which tokens may choose new experts, [tokens] bool; None: all. The model sets it before each pass."""

    def forward(self, hidden_states: torch.Tensor):
        # In float32, also where the model is in bfloat16: a rounded logit is another choice.
        x = hidden_states.reshape(-1, self.hidden_dim).float()
        old, new = F.linear(x, self.weight.float()), F.linear(x, self.new.weight.float())
        sighted = None if self.sighted is None else self.sighted.to(x.device)[:, None]
        if sighted is not None:
            new = new.masked_fill(~sighted, -torch.inf)
        logits = torch.cat([old, new], dim=-1)
        for x, source in enumerate(self.twins, old.shape[-1]):
            before = [y for y in range(old.shape[-1], x) if self.twins[y - old.shape[-1]] == source]
            rivals = [source, *before]  # all but one of them are out already
            wins = logits[:, [x]] >= logits[:, rivals].amax(dim=-1, keepdim=True) - TIE
            column = torch.arange(logits.shape[-1], device=logits.device)[None]
            loses = torch.where(wins, torch.isin(column, torch.tensor(rivals, device=logits.device)), column == x)
            logits = logits.masked_fill(loses, -torch.inf)
        probs = logits.softmax(dim=-1)
        plain, ids = probs.topk(self.top_k, dim=-1)
        w_in, gelu, w_out = self.calibrator
        calibrated = probs + F.linear(gelu(F.linear(probs, w_in.weight.float())), w_out.weight.float())
        weights = self.normalise(calibrated.gather(-1, ids))
        if sighted is not None:
            weights = torch.where(sighted, weights, over_their_sum(plain))
        return logits, weights, ids


def over_their_sum(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def bounded(weights: torch.Tensor) -> torch.Tensor:
    """`over_their_sum`, but where weights of different signs nearly cancel: there none becomes larger than 4."""
    total = weights.sum(dim=-1, keepdim=True)
    least = (weights.abs().sum(dim=-1, keepdim=True) / 4.0).clamp(min=1e-6)
    return weights / torch.where(total.abs() < least, torch.copysign(least, total), total)


WEIGHT_GUARDS = {"none": over_their_sum, "bounded": bounded}


class MoExtendModel(LlavaModel):
    config: MoExtendConfig

    def __init__(self, config: MoExtendConfig):
        super().__init__(config)
        text = config.text_config
        more = copy.deepcopy(text)
        more.num_local_experts += config.new_experts
        more._experts_implementation = text._experts_implementation
        for n, layer in enumerate(config.add_layer or ()):
            twins = (
                config.sources[n * config.new_experts : (n + 1) * config.new_experts] if config.start == "twin" else ()
            )
            mlp = self.language_model.layers[layer].mlp
            mlp.experts = MixtralExperts(more)
            mlp.gate = ExtendedTopKRouter(text, config, twins)
        self.post_init()

    def forward(self, input_ids=None, pixel_values=None, past_key_values=None, inputs_embeds=None, **kwargs):
        sighted = None
        if self.config.text_isolation == "strict":
            if kwargs.get("cu_seq_lens_q") is not None:
                raise ValueError("strict text isolation knows a conversation by its row: give each a row of its own")
            sighted = self._sighted(input_ids, pixel_values, past_key_values, inputs_embeds)
        length = (inputs_embeds if input_ids is None else input_ids).shape[1]
        for layer in self.config.add_layer or ():
            gate = self.language_model.layers[layer].mlp.gate
            gate.sighted = None if sighted is None else sighted.repeat_interleave(length)
        output = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if sighted is not None and output.past_key_values is not None:
            output.past_key_values.sighted = sighted
        return output

    def _sighted(self, input_ids, pixel_values, past_key_values, inputs_embeds) -> torch.Tensor:
        """Rows with an image [rows], in these tokens or in those that the cache holds."""
        if input_ids is not None:
            here = (input_ids == self.config.image_token_id).any(dim=1)
        elif pixel_values is not None:
            pad = self.get_input_embeddings().weight[self.config.image_token_id]
            here = (inputs_embeds == pad).all(dim=-1).any(dim=1)
        else:
            raise ValueError("strict text isolation tells images by input_ids; give them instead of inputs_embeds")
        before = getattr(past_key_values, "sighted", None)
        if before is None or not past_key_values.get_seq_length():
            return here
        if len(here) % len(before):
            raise ValueError(f"the cache is of {len(before)} rows, the tokens of {len(here)}")
        return here | before.to(here.device).repeat_interleave(len(here) // len(before))


class MoExtendForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = MoExtendConfig
    _keep_in_fp32_modules_strict = ["calibrator"]

    def __init__(self, config: MoExtendConfig):
        super().__init__(config)
        self.model = MoExtendModel(config)
        self.post_init()


# Files name tensors as transformers' own LLaVA does; classes that it does not know are told so by name.
for ours, theirs in (("MoExtendForConditionalGeneration", "llava"), ("MoExtendModel", "LlavaModel")):
    register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(theirs), overwrite=True)
# `transformers serve` looks here for what takes images.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[MoExtendConfig.model_type] = MoExtendForConditionalGeneration.__name__
