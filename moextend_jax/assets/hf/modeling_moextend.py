"""An extended model (MoExtend) for transformers 5: LLaVA over a mixture of experts, new experts in some of its layers,
and Whisper's encoder with a projector of its own where it hears.

`AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)` finds this file by FOLDER's config.json;
so does `AutoModelForCausalLM`, where the model sees nothing: it hears, or its extension is a task in text.
Needs torch and transformers alone, and works for every family whose router gives (logits, weights, ids) and whose
experts take (hidden states, ids, weights), as those of transformers do.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration, WhisperConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class MoExtendConfig(LlavaConfig):
    """LLaVA's, and: `extensions`, a list of dicts; `weight_guard`, "bounded" or "none"; `mass`, "base" or "literal":
    whether weights sum to what the base's would; `text_isolation`, "none" or "strict" (an extension is open only to
    conversations with an item of its medium); `composition`, "shared", or "decoupled" (tokens of an item choose its
    medium's extensions alone, with share 1; text chooses none with strict isolation, else all); `router`, how the base
    decides: experts, top_k, scores ("softmax" or "sigmoid"), normalised, routed_factor, groups, top_groups, bias,
    selection_bias; `expert`, what a pretrained one is: width, bias, glu ("silu" or "clamped"), glu_limit.

    A model that hears has `audio_config`, a WhisperConfig's, `audio_feature_layer`, the hidden state that its projector
    reads, and `sounds`: `name` of the medium; `tags`, whose `pad` is the id of a sound's tokens; `projector`, of kind
    "linear", "pool" or "stack" over so many `neighbours`.

    An extension: `name`; `medium`, "image", that of the sounds, or "" for a task in text; `layers`, those with
    `new_experts` more experts, each `wide` times as wide as a pretrained one; `sources`, the experts that they were
    copied from, one layer after another; `start`, how they stand among the others (below); `calibrator_width`; `share`,
    whose log its logits get. Experts are numbered in the order of the list.

    Starts: "copy" competes for the k picks; "lowered" with an offset on its logits; "twin" stands in the column of its
    source wherever its own logit is no smaller; "added" stands beside the picks where it reaches the last of them.
    """

    model_type = "moextend"
    extensions: list[dict] | None = None
    weight_guard: str = "bounded"
    mass: str = "base"
    text_isolation: str = "none"
    composition: str = "shared"
    router: dict | None = None
    expert: dict | None = None
    sounds: dict | None = None
    audio_config: dict | None = None
    audio_feature_layer: int = -1


class MoExtendTextConfig(MoExtendConfig):
    """The same of a model without eyes; what it says of pictures is read by nobody."""

    model_type = "moextend_text"


TIE = 1e-4
"""A copy counts as no less than its source down to so much: two products round the same sum in two ways."""


def over_their_sum(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def bounded(weights: torch.Tensor) -> torch.Tensor:
    """`over_their_sum`, but where weights of different signs nearly cancel: there none becomes larger than 4."""
    total = weights.sum(dim=-1, keepdim=True)
    least = (weights.abs().sum(dim=-1, keepdim=True) / 4.0).clamp(min=1e-6)
    return weights / torch.where(total.abs() < least, torch.copysign(least, total), total)


def silu(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    return F.silu(gate) * up


def clamped(gate: torch.Tensor, up: torch.Tensor, limit: float) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


WEIGHT_GUARDS = {"none": over_their_sum, "bounded": bounded}
SCORES = {"softmax": lambda logits: logits.softmax(dim=-1), "sigmoid": torch.sigmoid}
GLUS = {"silu": silu, "clamped": clamped}


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x, weight.float(), None if bias is None else bias.float())


class Product(nn.Module):
    """A linear map in float32. Not nn.Linear, which loaders in few bits put something else in the place of; and called,
    as what brings weights from elsewhere (`device_map`) does so when a module is called."""

    def __init__(self, size: int, out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, size))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias)


class NewExpert(nn.Module):
    def __init__(self, size: int, width: int, bias: bool, glu: str, glu_limit: float):
        super().__init__()
        self.w1 = nn.Linear(size, width, bias=bias)
        self.w3 = nn.Linear(size, width, bias=bias)
        self.w2 = nn.Linear(width, size, bias=bias)
        self.glu, self.limit = GLUS[glu], glu_limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.glu(self.w1(x), self.w3(x), self.limit))


class Extension(nn.Module):
    """One of a layer's extensions: columns of its router, a calibrator, and experts, numbered from `first` on."""

    def __init__(self, config: MoExtendConfig, own: dict, layer: int, first: int):
        super().__init__()
        rule, size, new = config.router, config.text_config.hidden_size, own["new_experts"]
        both, expert = rule["experts"] + new, {**config.expert, "width": own["wide"] * config.expert["width"]}
        at, each = own["layers"].index(layer), new * own["wide"]
        self.sources = own["sources"][at * each : (at + 1) * each]
        self.start, self.medium, self.share, self.first = own["start"], own["medium"], own["share"], first
        self.gate = Product(size, new, bias=rule["bias"])
        self.calibrator = nn.Sequential(
            Product(both, own["calibrator_width"]), nn.GELU(), Product(own["calibrator_width"], both)
        )
        self.ffn = nn.ModuleDict({str(first + x): NewExpert(size, **expert) for x in range(new)})
        self.selection_bias = nn.Parameter(torch.zeros(new)) if rule["selection_bias"] else None
        self.offset = nn.Parameter(torch.zeros(new)) if self.start == "lowered" else None
        self.shares = None
        """Each token's share of it, [tokens], 0 where its experts may not be chosen; None: `share` for all. The model
        sets it before each pass."""

    @property
    def competes(self) -> bool:
        return self.start in ("copy", "lowered")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Of tokens [T, D]: logits [T, X], -inf for tokens that may not choose it; each token's share of it [T, 1]; the
        bias that its experts are chosen by besides."""
        share = torch.full_like(x[:, :1], self.share) if self.shares is None else self.shares.to(x)[:, None]
        new = self.gate(x) if self.offset is None else self.gate(x) + self.offset.float()
        return new + share.log(), share, None if self.selection_bias is None else self.selection_bias.float()


class Extensions(nn.ModuleDict):
    """A layer's, by their place in the list of the model's."""

    def __init__(self, config: MoExtendConfig, layer: int):
        super().__init__()
        self.config, self.rule, self.old = config, config.router, config.router["experts"]
        self.outputs = self.old
        for n, own in enumerate(config.extensions):
            if layer in own["layers"]:
                self[str(n)] = Extension(config, own, layer, self.outputs)
            self.outputs += own["new_experts"]

    def forward(self, x: torch.Tensor, old: torch.Tensor, bias: torch.Tensor | None):
        """From tokens [T, D], the base's logits and what it chooses by besides: the router's (logits [T, O], weights
        [T, k], ids [T, k]). O: all experts of the model, -inf for those that the layer lacks. k is wider by the new
        experts with start "added".

        In float32, also where the model is in bfloat16: a rounded logit is another choice. Experts are chosen by the
        scores over all columns and weighed by the calibrated ones. Each calibrator sees the columns as if there were
        no other extension, and its correction counts as much as the others leave.
        """
        parts = [(extension, *extension(x)) for extension in self.values()]
        competing = [part for part in parts if part[0].competes]
        held, holders = self.held(old, parts)
        columns = torch.cat([held, *(new for _, new, _, _ in competing)], dim=-1)
        experts = torch.cat([holders, *(self.numbers(extension, new) for extension, new, _, _ in competing)], dim=-1)
        both = bias if bias is None else torch.cat([bias, *(own for _, _, _, own in competing)])
        picked = self.ranks(columns, both).topk(self.rule["top_k"], dim=-1).indices
        chosen = experts.gather(-1, picked)
        logits = torch.full((len(x), self.outputs), -torch.inf, device=x.device).scatter(-1, experts, columns)
        probs, behind, beside = self.probabilities(columns), self.old, []
        calibrated = probs.clone()
        for extension, new, share, own_bias in parts:
            first, width = extension.first, new.shape[-1]
            if extension.start == "added":
                logits[:, first : first + width] = new
            place = holders - first
            holds = (place >= 0) & (place < width)
            alone = torch.cat([held.masked_fill(holds, -torch.inf), logits[:, first : first + width]], dim=-1)
            after = behind + width * extension.competes
            others = probs[:, self.old : behind].sum(-1, keepdim=True) + probs[:, after:].sum(-1, keepdim=True)
            correction = extension.calibrator(self.probabilities(alone)) * share * (1 - others)
            of_old, of_new = correction[:, : self.old], correction[:, self.old :]
            calibrated[:, : self.old] += of_new.gather(-1, place.clamp(0, width - 1)).where(holds, of_old)
            calibrated[:, behind:after] += of_new[:, : after - behind]
            behind = after
            if extension.start == "added":
                seen = torch.cat([columns, new], dim=-1)
                seen_bias = both if both is None else torch.cat([both, own_bias])
                beside.append((self.numbers(extension, new), self.beside(seen, seen_bias, picked, of_new)))
        weights = calibrated.gather(-1, picked)
        plain_ids, plain = self.plain(old, bias)
        if self.rule["normalised"] or self.config.mass == "base":
            weights = WEIGHT_GUARDS[self.config.weight_guard](weights) * plain.sum(dim=-1, keepdim=True)
        else:
            total = 1.0 if self.rule["scores"] == "softmax" else self.scores(columns).sum(dim=-1, keepdim=True)
            weights = weights * total * self.rule["routed_factor"]
        is_open = torch.cat([share for _, _, share, _ in parts], dim=-1).amax(dim=-1, keepdim=True) > 0
        chosen, weights = torch.where(is_open, chosen, plain_ids), torch.where(is_open, weights, plain)
        chosen = torch.cat([chosen, *(numbers for numbers, _ in beside)], dim=-1)
        return logits, torch.cat([weights, *(own for _, own in beside)], dim=-1), chosen

    def held(self, old: torch.Tensor, parts: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits in the pretrained experts' columns, and the expert in each: twins take those of their sources."""
        held, holders = old.clone(), torch.arange(self.old, device=old.device).repeat(len(old), 1)
        for extension, new, _, _ in parts:
            for x, source in enumerate(extension.sources if extension.start == "twin" else ()):
                wins = new[:, x] >= held[:, source] - TIE
                held[:, source] = torch.where(wins, new[:, x], held[:, source])
                holders[:, source] = torch.where(wins, extension.first + x, holders[:, source])
        return held, holders

    def beside(self, seen: torch.Tensor, bias: torch.Tensor | None, picked: torch.Tensor, of_new: torch.Tensor):
        """Weights of experts that stand beside the picks, 0 where they do not reach them. `seen`: logits of what
        competes, and theirs; `of_new`: how their probabilities are corrected."""
        width, ranks = of_new.shape[-1], self.ranks(seen, bias)
        reaches = ranks[:, -width:] >= ranks.gather(-1, picked[:, -1:]) - TIE
        weights = (self.probabilities(seen)[:, -width:] + of_new) * self.rule["routed_factor"]
        return weights.where(reaches, 0.0)

    def numbers(self, extension: Extension, new: torch.Tensor) -> torch.Tensor:
        """Of its experts, for each token."""
        return torch.arange(extension.first, extension.first + new.shape[-1], device=new.device).expand_as(new)

    def ranks(self, logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the k best are of; columns behind the pretrained experts' are in no group and always may be chosen."""
        groups, closed = self.rule["groups"], torch.isneginf(logits)
        if bias is None and groups == 1:
            return logits
        ranks = self.scores(logits)
        if self.rule["scores"] == "softmax":  # over the pretrained experts' sum: of another a bias would weigh more
            powers = (logits - logits[:, : self.old].amax(dim=-1, keepdim=True)).exp()
            ranks = powers / powers[:, : self.old].sum(dim=-1, keepdim=True)
        ranks = ranks if bias is None else ranks + bias
        if groups > 1:
            grouped = ranks[:, : self.old].reshape(len(ranks), groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.rule["top_groups"], dim=-1).indices
            out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
            grouped = grouped.masked_fill(out[..., None], -torch.inf)
            ranks = torch.cat([grouped.flatten(1), ranks[:, self.old :]], dim=-1)
        return ranks.masked_fill(closed, -torch.inf)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return SCORES[self.rule["scores"]](logits)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        scores = self.scores(logits)
        return scores if self.rule["scores"] == "softmax" else over_their_sum(scores)

    def plain(self, old: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's choice and weights."""
        ids = self.ranks(old, bias).topk(self.rule["top_k"], dim=-1).indices
        weights = self.scores(old).gather(-1, ids)
        weights = over_their_sum(weights) if self.rule["normalised"] else weights
        return ids, weights * self.rule["routed_factor"]

    def add_experts(self, y: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`y`, and what new experts make of the tokens that have chosen them."""
        for extension in self.values():
            for number, expert in extension.ffn.items():
                token, pick = torch.where((ids == int(number)) & (weights != 0))
                y = y.index_add(0, token, (expert(x[token]) * weights[token, pick, None]).to(y.dtype))
        return y


def selection_bias_of(gate: nn.Module) -> torch.Tensor | None:
    """What pretrained experts are chosen by besides their scores. Ernie's is in a module, which adds it: asked so, as
    its weights may be brought only when it is called."""
    adder = getattr(gate, "moe_statics", None)
    bias = adder(torch.zeros(())) if adder is not None else getattr(gate, "e_score_correction_bias", None)
    return None if bias is None else bias.float().reshape(-1)


class ExtendedRouter:
    def forward(self, hidden_states):
        (extensions,) = self.of_block
        x = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
        return extensions(x, product(x, self.weight, getattr(self, "bias", None)), selection_bias_of(self))


class ExtendedExperts:
    def forward(self, hidden_states, ids, weights):
        (extensions,) = self.of_block
        pretrained = ids < extensions.old
        y = super().forward(hidden_states, ids.where(pretrained, 0), weights.where(pretrained, 0.0))
        return extensions.add_experts(y, hidden_states, ids, weights)


def extend(block: nn.Module, extensions: Extensions) -> None:
    """Gives a block of experts its extensions: its router and experts keep their parameters, names and classes."""
    block.extensions = extensions
    router = "gate" if hasattr(block, "gate") else "router"
    for name, mixin in ((router, ExtendedRouter), ("experts", ExtendedExperts)):
        part = getattr(block, name)
        part.of_block = (extensions,)  # in a tuple, so that its parameters are the block's alone
        part.__class__ = type(f"Extended{type(part).__name__}", (mixin, type(part)), {})


def block_of(layer: nn.Module) -> nn.Module:
    return layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe


class AudioProjector(nn.Module):
    """Two linear maps with a GELU, of each state of a tower [n, P, C] ("linear"), of the mean of each group of
    neighbours ("pool"; an incomplete last group's is over those that it has), or of these side by side ("stack"; zeros
    fill the last group)."""

    def __init__(self, size: int, out: int, kind: str, neighbours: int):
        super().__init__()
        self.kind, self.neighbours = kind, neighbours
        self.linear_1 = nn.Linear(size * neighbours if kind == "stack" else size, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, positions = self.neighbours, x.shape[1]
        groups = F.pad(x, (0, 0, 0, -positions % k)).unflatten(1, (-1, k))
        if self.kind == "pool":
            counts = (positions - k * torch.arange(groups.shape[1], device=x.device)).clamp(max=k)
            x = (groups.float().sum(dim=2) / counts[:, None]).to(x.dtype)
        elif self.kind == "stack":
            x = groups.flatten(2)
        return self.linear_2(F.gelu(self.linear_1(x)))


def begins(here: torch.Tensor) -> torch.Tensor:
    """Which of these places [rows, length] are the first of a run: each run is an item."""
    return here & ~F.pad(here, (1, 0))[:, :-1]


def cache_of(named: dict):
    """The cache among what a pass is given or returns, by name: past_key_values before transformers 5.24."""
    return named.get("cache", named.get("past_key_values"))


class MoExtendModel(LlavaModel):
    config: MoExtendConfig
    told = None
    """The ids of a pass, by which items are told from text also where embeddings have come in their place: other tokens
    may have the same ones."""

    def __init__(self, config: MoExtendConfig):
        super().__init__(config)
        self.pads = {"image": config.image_token_id}
        self._extend()

    def _extend(self) -> None:
        """Gives it ears and new experts. `pads`: by medium the id of the tokens of its items."""
        if (sounds := self.config.sounds) is not None:
            self.audio_tower = WhisperEncoder(WhisperConfig(**self.config.audio_config))
            size, out = self.config.audio_config["d_model"], self.config.text_config.hidden_size
            how = sounds["projector"]
            self.audio_projector = AudioProjector(size, out, how["kind"], how["neighbours"])
            self.pads[sounds["name"]] = sounds["tags"]["pad"]
        self.extended = sorted({layer for own in self.config.extensions or () for layer in own["layers"]})
        for layer in self.extended:
            extend(block_of(self.language_model.layers[layer]), Extensions(self.config, layer))
        self.post_init()

    def forward(self, input_ids=None, pixel_values=None, inputs_embeds=None, input_features=None, **kwargs):
        """As LLaVA's. `input_features`: sounds as the feature extractor makes them [n, bands, frames], in the order of
        their tokens: each run of these is one sound, and gets its first tokens."""
        items, near, self.told = None, None, input_ids
        strict, decoupled = self.config.text_isolation == "strict", self.config.composition == "decoupled"
        if strict or decoupled or input_features is not None:
            items = self._items(
                input_ids,
                inputs_embeds,
                images=pixel_values is not None or bool(kwargs.get("mm_encoder_outputs")),
                sounds=input_features is not None,
            )
        if input_features is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            inputs_embeds = self._with_sounds(inputs_embeds, items[self.config.sounds["name"]], input_features)
            input_ids = None
        if strict and not decoupled:
            packed = restarts(kwargs.get("position_ids"), kwargs.get("attention_mask"))
            if packed or kwargs.get("cu_seq_lens_q") is not None:
                raise ValueError("strict text isolation knows a conversation by its row: give each a row of its own")
            near = self._near(items, cache_of(kwargs))
        for layer in self.extended:
            for extension in block_of(self.language_model.layers[layer]).extensions.values():
                extension.shares = self._shares(extension, items, near).flatten() if strict or decoupled else None
        output = super().forward(input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs)
        if near is not None and (cache := cache_of(vars(output))) is not None:
            cache.near = near
        return output

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        return super().get_placeholder_mask(
            self.told if input_ids is None else input_ids, inputs_embeds, image_features
        )

    def _with_sounds(self, embeds: torch.Tensor, here: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """`embeds` [rows, length, size] with the tokens of sounds where these are `here` [rows, length]."""
        features = features.to(self.audio_tower.dtype)
        states = self.audio_tower(features, output_hidden_states=True).hidden_states[self.config.audio_feature_layer]
        tokens = self.audio_projector(states).to(embeds)
        first, numbers = begins(here), torch.arange(here.shape[1], device=here.device).expand_as(here)
        sound = first.flatten().cumsum(0).view_as(here)[here] - 1
        place = (numbers - numbers.where(first, 0).cummax(dim=1).values)[here]
        if first.sum() != len(tokens) or (place >= tokens.shape[1]).any():
            raise ValueError(f"{len(tokens)} sounds of {tokens.shape[1]} tokens at most are not those of input_ids")
        return embeds.masked_scatter(here[..., None], tokens[sound, place])

    def _shares(self, extension: Extension, items: dict, near: dict | None) -> torch.Tensor:
        """Each token's share of an extension [rows, length]. `items`: by medium the tokens that are an item's; `near`:
        by medium the rows with one, where the composition is "shared"."""
        own, share = items[extension.medium], extension.share
        if near is not None:
            return near[extension.medium][:, None].expand_as(own) * share
        is_text = ~torch.stack([*items.values()]).any(dim=0)
        # A share of 0 takes an extension out, also of its own medium's items.
        return own * float(share > 0) + is_text * (0.0 if self.config.text_isolation == "strict" else share)

    def _items(self, input_ids, inputs_embeds, *, images: bool, sounds: bool) -> dict[str, torch.Tensor]:
        """By medium which tokens are an item's [rows, length], "" for none: none where no item is given, as when an
        answer is written."""
        given = inputs_embeds if input_ids is None else input_ids
        if self.pads and input_ids is None and not (images or sounds):
            raise ValueError("items are told from text by input_ids: give them, or pixel_values or input_features too")
        none = torch.zeros(given.shape[:2], dtype=torch.bool, device=given.device)
        items = {"": none, **dict.fromkeys(self.pads, none)}
        for medium, pad in self.pads.items():
            if not (images if medium == "image" else sounds):
                continue
            if input_ids is not None:
                items[medium] = input_ids == pad
            else:
                of_pad = self.get_input_embeddings()(torch.tensor(pad, device=given.device))
                items[medium] = (inputs_embeds == of_pad).all(dim=-1)
        return items

    def _near(self, items: dict[str, torch.Tensor], cache) -> dict[str, torch.Tensor]:
        """By medium the rows with an item [rows], in these tokens or in those that the cache holds."""
        here = {medium: own.any(dim=1) for medium, own in items.items()}
        before = getattr(cache, "near", None)
        if before is None or not cache.get_seq_length():
            return here
        for medium, rows in here.items():
            earlier = before[medium].to(rows.device)
            if len(rows) % len(earlier):
                raise ValueError(f"the cache is of {len(earlier)} rows, the tokens of {len(rows)}")
            here[medium] = rows | earlier.repeat_interleave(len(rows) // len(earlier))
        return here


class MoExtendTextModel(MoExtendModel):
    def __init__(self, config: MoExtendTextConfig):
        LlavaPreTrainedModel.__init__(self, config)  # without a tower and a projector
        self.language_model = AutoModel.from_config(config.text_config)
        self.pads = {}
        self._extend()


def restarts(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> bool:
    """Whether a row holds several conversations: positions fall within it, where the mask [rows, length] keeps both."""
    if position_ids is None or position_ids.dim() != 2:
        return False
    kept = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    if not torch.is_tensor(kept) or kept.dim() != 2 or kept.shape[1] < position_ids.shape[1]:
        return False  # of a cache of fixed size: such a row is being answered
    kept = kept[:, -position_ids.shape[1] :].bool()
    return bool((position_ids.diff(dim=1).lt(0) & kept[:, 1:] & kept[:, :-1]).any())


class DividedHead(nn.Linear):
    """A head whose logits are divided, as Granite's are."""

    divisor = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) / self.divisor


class MoExtendForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = MoExtendConfig
    decoder_class = MoExtendModel
    _keep_in_fp32_modules_strict = ["calibrator", "extensions.*.selection_bias", "extensions.*.offset"]

    def __init__(self, config: MoExtendConfig):
        LlavaPreTrainedModel.__init__(self, config)  # LLaVA's own would make a model that is not extended first
        self.model = self.decoder_class(config)
        if config.sounds is not None:
            self.input_modalities = (*self.input_modalities, "audio")
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        divisor = getattr(config.text_config, "logits_scaling", 1.0)
        if divisor != 1.0:  # which LLaVA's own head knows nothing of
            self.lm_head.__class__ = type("DividedHead", (DividedHead,), {"divisor": divisor})
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, input_features=None, **kwargs):
        # Named, as `generate` refuses what neither this nor LLaVA's forward names.
        return super().prepare_inputs_for_generation(input_ids, input_features=input_features, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, input_ids=None, input_features=None, **kwargs):
        """All sounds of a row go along with each of its copies."""
        if input_features is not None and input_ids is not None:
            here = input_ids == self.config.sounds["tags"]["pad"]
            rows = input_features.split(begins(here).sum(dim=1).tolist())
            input_features = torch.cat([row.repeat(expand_size, 1, 1) for row in rows])
        copies, kwargs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        return copies, {**kwargs, "input_features": input_features}


class MoExtendForCausalLM(MoExtendForConditionalGeneration):
    config_class = MoExtendTextConfig
    decoder_class = MoExtendTextModel
    input_modalities = ("text",)


# Files name tensors as transformers' own LLaVA does; classes that it does not know are told so by name.
for ours, theirs in (
    ("MoExtendForConditionalGeneration", "llava"),
    ("MoExtendForCausalLM", "llava"),
    ("MoExtendModel", "LlavaModel"),
    ("MoExtendTextModel", "LlavaModel"),
):
    names = get_checkpoint_conversion_mapping(theirs)
    if theirs == "llava":
        names = [*names, *(WeightRenaming(f"^{part}", f"model.{part}") for part in ("audio_tower", "audio_projector"))]
    register_checkpoint_conversion_mapping(ours, names, overwrite=True)
# `transformers serve` looks here for what is no class of its own; whether it takes images, its processor says.
for model in (MoExtendForConditionalGeneration, MoExtendForCausalLM):
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model.config_class.model_type] = model.__name__
