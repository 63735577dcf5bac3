"""Cache the text backbone's output of repeated texts."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling


# id of a model -> its cache, in the context (thread or asynchronous task) that entered it; never changed in place
_caches: ContextVar[dict | None] = ContextVar("text_caches", default=None)


def active_text_cache(model: nn.Module) -> "TextCache | None":
    """Return the cache of a model in this thread, None if there is none."""
    return (_caches.get() or {}).get(id(model))


class TextCache:
    """
    Outputs of the text backbone by token ids. Missing texts are encoded together, each once. It is thread-safe.

    Args:
        encode (`Callable`): returns the backbone's output for `input_ids` (N, L) and `attention_mask` (N, L).
        max_tokens (`int`): number of tokens to hold; the least recently used texts are dropped first.
    """

    def __init__(self, encode: Callable, max_tokens: int):
        self.encode = encode
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.texts = OrderedDict()  # token ids -> last_hidden_state (tokens, width) and pooler_output (width,)
        self._lock = threading.Lock()  # not held while texts are encoded

    @contextmanager
    def active_for(self, model: nn.Module) -> Iterator["TextCache"]:
        """Make a model use the cache within this context, in this thread."""
        token = _caches.set({**(_caches.get() or {}), id(model): self})
        try:
            yield self
        finally:
            _caches.reset(token)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutputWithPooling:
        """Return the output of `encode`, zero at padding. The host waits for the token ids."""
        marked = input_ids.where(attention_mask.bool(), -1).tolist()
        keys = [tuple(tokens[: last_real(tokens) + 1]) for tokens in marked]
        with self._lock:
            found = {key: self.texts[key] for key in keys if key in self.texts}
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        if missing:
            rows = torch.tensor(list(missing.values()), device=input_ids.device)
            width = max(1, *map(len, missing))
            output = self.encode(input_ids[rows, :width], attention_mask[rows, :width])
            for key, states, pooled in zip(missing, output.last_hidden_state, output.pooler_output, strict=True):
                # copies: a view would keep the whole batch in memory
                found[key] = (states[: len(key)].clone(), pooled.clone())
        self.keep(found)
        states = nn.utils.rnn.pad_sequence([found[key][0] for key in keys], batch_first=True)
        states = nn.functional.pad(states, (0, 0, 0, input_ids.shape[1] - states.shape[1]))
        pooled = torch.stack([found[key][1] for key in keys])
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)

    def keep(self, found: dict) -> None:
        """Hold encoded texts as the most recently used, and drop others beyond `max_tokens`."""
        with self._lock:
            for key, encoded in found.items():
                if key not in self.texts:
                    self.texts[key] = encoded
                    self.num_tokens += len(key)
                self.texts.move_to_end(key)
            while self.num_tokens > self.max_tokens:
                self.num_tokens -= len(self.texts.popitem(last=False)[0])


def last_real(tokens: list[int]) -> int:
    """Return the index of the last token that is not -1; -1 if there is none."""
    return max((index for index, token in enumerate(tokens) if token != -1), default=-1)
