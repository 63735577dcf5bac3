"""Texts that are asked for again and again, through the text backbone once."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


class TextCache:
    """
    Outputs of the text backbone, by token ids. Texts that it does not hold are encoded together, each once.

    Args:
        encode (`Callable`): `input_ids` (N, L) and `attention_mask` (N, L) -> the backbone's output.
        max_tokens (`int`): what is held; texts that were not asked for the longest go first.
    """

    def __init__(self, encode: Callable, max_tokens: int):
        self.encode = encode
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.texts = OrderedDict()  # token ids -> last_hidden_state (tokens, width) and pooler_output (width,)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutputWithPooling:
        """As `encode`, with zeros where there is padding. The host waits for the token ids."""
        marked = input_ids.where(attention_mask.bool(), -1).tolist()
        keys = [tuple(tokens[: last_real(tokens) + 1]) for tokens in marked]
        missing = {key: row for row, key in enumerate(keys) if key not in self.texts}
        if missing:
            rows = torch.tensor(list(missing.values()), device=input_ids.device)
            width = max(1, *map(len, missing))
            output = self.encode(input_ids[rows, :width], attention_mask[rows, :width])
            outputs = zip(output.last_hidden_state, output.pooler_output, strict=True)
            for key, (states, pooled) in zip(missing, outputs, strict=True):
                # copies: a view would keep the whole batch in memory
                self.texts[key] = (states[: len(key)].clone(), pooled.clone())
                self.num_tokens += len(key)
        for key in keys:
            self.texts.move_to_end(key)
        states = torch.nn.utils.rnn.pad_sequence([self.texts[key][0] for key in keys], batch_first=True)
        states = torch.nn.functional.pad(states, (0, 0, 0, input_ids.shape[1] - states.shape[1]))
        pooled = torch.stack([self.texts[key][1] for key in keys])
        while self.num_tokens > self.max_tokens:
            self.num_tokens -= len(self.texts.popitem(last=False)[0])
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)


def last_real(tokens: list[int]) -> int:
    """Index of the last token that is not -1; -1 where there is none."""
    return max((index for index, token in enumerate(tokens) if token != -1), default=-1)
