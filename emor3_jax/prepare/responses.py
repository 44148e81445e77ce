"""Responses of rows that supervised fine-tuning can learn from."""

from collections.abc import Callable

from ml_collections import ConfigDict

from emor3_jax.data.sources import Texts
from emor3_jax.models import LoadedPolicy
from emor3_jax.rollout.tokens import suppressed_tokens


class ResponseReader:
    """Turns responses into tokens, or says why one cannot be learned."""

    def __init__(self, config: ConfigDict, policy: LoadedPolicy) -> None:
        """Reads the special tokens.

        Args:
          config: of the run; a response has at most `rollout.max_tokens`.
          policy: whose tokens they are.
        """
        self._tokenizer = policy.processor.tokenizer
        self._suppressed = suppressed_tokens(policy.shapes.vocab_size, self._tokenizer)
        self._end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._limit = config.rollout.max_tokens

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a response and its end."""
        return [*self._tokenizer.encode(text, add_special_tokens=False), self._end]

    def fault(self, tokens: list[int]) -> str | None:
        """Returns why a response cannot be learned, one of `data.encode.REASONS`; None if it can.

        Args:
          tokens: as `encode` returns them.
        """
        if len(tokens) > self._limit:
            return "long_response"
        return "special_token_in_response" if self._suppressed[tokens].any() else None


def row_fault(config: ConfigDict, policy: LoadedPolicy) -> Callable[[Texts], str | None]:
    """Returns a function that says why no response of a row can be learned; None if one can.

    Such a row would be drawn without a token to learn.

    Args:
      config, policy: as of `ResponseReader`.
    """
    reader = ResponseReader(config, policy)

    def fault(texts: Texts) -> str | None:
        found: str | None = "no_response"
        for text in texts.responses[: config.sft.responses]:
            if (found := reader.fault(reader.encode(text))) is None:
                break
        return found

    return fault
