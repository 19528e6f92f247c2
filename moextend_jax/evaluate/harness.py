"""EleutherAI's lm-eval asking our models: its requests in, log-likelihoods and greedy text out.

Needs the extra `eval`; lm-eval without its own model back ends needs no PyTorch. Texts are tokenised as in training
(after BOS, if the model has one), without a chat template. Of several processes each asks lm-eval the same and all
compute together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from moextend_jax.config import MoextendError
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.evaluate.asking import Asker
from moextend_jax.evaluate.prompts import Prompt
from moextend_jax.folders import extra_hint
from moextend_jax.progress import counting

try:
    from lm_eval import tasks  # noqa: F401  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models import utils as generating  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise MoextendError(f"text benchmarks need lm-eval ({error}): {extra_hint('eval')}") from error

NEW_TOKENS = 256
"""Most new tokens of an answer where a task does not say how many; lm-eval's own number."""


class HarnessModel(TemplateLM):
    """A model as lm-eval wants one.

    Args:
      max_length: most tokens of a request, its answer included; what is longer loses its beginning, as lm-eval does.
    """

    def __init__(self, asker: Asker, *, tokenizer: Tokenizer, max_length: int):
        super().__init__()
        self.asker, self.text, self.max_length = asker, tokenizer, max_length

    @property
    def eot_token_id(self) -> int:
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        return self.text.eos if self.text.bos is None else self.text.bos

    @property
    def tokenizer_name(self) -> str:
        return self.text.pieces.kind

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = self.text.encode(string)
        return ids if add_special_tokens is False else [*self.text.prefix, *ids]

    # --- log-likelihoods ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """requests: (what to cache under, ids of the context, ids of the continuation)."""
        prompts = [self._scored(*request) for request in requests]
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with counting("scoring", len(prompts), unit="requests") as bar:
            for scored in self.asker.score(prompts):
                for index, nats, greedy in scored:
                    scores[index] = nats, greedy
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], scores[index])
                bar.add(len(scored))
        return scores

    def _scored(self, request: Any, context: list[int], continuation: list[int]) -> Prompt:
        """The context but for its last token is the head, which all continuations of a question share."""
        if not context or not continuation:
            raise MoextendError(f"lm-eval asks for a text without tokens: {request!r:.200}")
        if len(continuation) > self.max_length:
            raise MoextendError(
                f"lm-eval asks for {len(continuation)} tokens after a text, --max_length is {self.max_length}; raise it"
            )
        ids = (context + continuation)[-(self.max_length + 1) : -1]
        tail = len(continuation)
        return Prompt(
            ids_L=np.array(ids, np.int32),
            places_L=np.full(len(ids), -1, np.int32),
            head=len(ids) - tail,
            targets_L=np.array(continuation, np.int32),
            where=f"request {request!r:.80}",
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Each token of a text once, given what comes before it in its window."""
        windows = []
        for n, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pieces = get_rolling_token_windows(
                ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [(n, *make_disjoint_window(piece)) for piece in pieces]
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens([(None, context, ids) for _, context, ids in windows])
        for (n, _, _), (nats, _) in zip(windows, scored, strict=True):
            totals[n] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # --- generation ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for n, request in enumerate(requests):
            options: Any = generating.normalize_gen_kwargs(request.args[1], NEW_TOKENS)
            if options.get("do_sample") and options.get("temperature"):
                raise MoextendError(
                    "a task asks for sampled text, but here text is generated greedily: leave it out of --tasks"
                )
            stops = generating.handle_stop_sequences(options["until"], eos=None)
            alike[options["max_gen_toks"], tuple(stops)].append(n)
        with counting("generating", len(requests), unit="requests") as bar:
            for (most, stops), numbers in alike.items():
                for index, text in self._generated([requests[n] for n in numbers], most, stops, bar):
                    n = numbers[index]
                    texts[n] = text
                    self.cache_hook.add_partial("generate_until", requests[n].args, text)
        return texts

    def _generated(self, requests: list[Any], most: int, stops: tuple[str, ...], bar: Any):
        if most >= self.max_length:
            raise MoextendError(f"a task asks for {most} new tokens, --max_length is {self.max_length}; raise it")
        encoded = (self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests)
        contexts = [ids[-(self.max_length - most) :] for ids in encoded]
        prompts = [Prompt(ids_L=np.array(ids, np.int32), places_L=np.full(len(ids), -1, np.int32)) for ids in contexts]

        def text(index: int, ids: list[int]) -> str:
            return self.text.decode(ids, after=contexts[index][-1:])

        def enough(index: int, ids: list[int]) -> bool:
            so_far = text(index, ids)
            return any(stop and stop in so_far for stop in stops)

        for completed in self.asker.complete(prompts, max_new_tokens=most, stop=enough if stops else None):
            for index, ids in completed:
                yield index, generating.postprocess_generated_text(text(index, ids), list(stops), None)
            bar.add(len(completed))
