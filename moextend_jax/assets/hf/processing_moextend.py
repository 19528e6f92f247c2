"""Prepares sounds for a model that hears (MoExtend), alone or beside LLaVA's pictures, for transformers 5.

`AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)` finds this file by FOLDER's processor_config.json.
"""

from math import ceil

from transformers import LlavaProcessor
from transformers.processing_utils import ProcessorMixin


class Hears:
    """What both processors below do with sounds: Whisper's features, and tokens in the place of each sound's one.

    `neighbours`: states of the tower, 50 a second, that become a token. `spans`: the numbers of tokens that a sound may
    have, ascending, of which it gets the least that covers it; [] for as many as the longest sound has."""

    audio_kwargs = {"sampling_rate": 16000}

    def _hear(self, tokenizer, neighbours: int, spans: list[int]) -> None:
        self.neighbours, self.spans, self.audio_token = neighbours, spans, tokenizer.audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(self.audio_token)

    def _process_audio(self, audio, **kwargs):
        rate, most = self.feature_extractor.sampling_rate, self.feature_extractor.n_samples
        if (longest := max(map(len, audio))) > most:
            raise ValueError(f"a sound has {longest / rate:.2f} seconds, more than the {most / rate:g} that are heard")
        # Of the rest, as `padding`, texts are meant: a sound always fills the window of the tower.
        own = {name: kwargs[name] for name in ("sampling_rate", "return_tensors", "device") if name in kwargs}
        features = self.feature_extractor(audio, **own)
        tokens = [self.audio_token * self._span(len(wave)) for wave in audio]
        return {"input_features": features["input_features"]}, tokens

    def _span(self, samples: int) -> int:
        """How many tokens a sound has."""
        needed, most = (
            ceil(ceil(length * 50 / self.feature_extractor.sampling_rate) / self.neighbours)
            for length in (samples, self.feature_extractor.n_samples)
        )
        return next((span for span in self.spans if span >= needed), most)


class MoExtendAudioProcessor(Hears, ProcessorMixin):
    def __init__(self, feature_extractor=None, tokenizer=None, chat_template=None, neighbours=1, spans=()):
        self._hear(tokenizer, neighbours, list(spans))
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)


class MoExtendProcessor(Hears, LlavaProcessor):
    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        feature_extractor=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        neighbours=1,
        spans=(),
    ):
        self._hear(tokenizer, neighbours, list(spans))
        self.patch_size, self.num_additional_image_tokens = patch_size, num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = tokenizer.image_token if hasattr(tokenizer, "image_token") else image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, feature_extractor, chat_template=chat_template)
