"""The responses that supervised fine-tuning learns, as tokens, by row."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from emor3_jax.data.sources import Texts
from emor3_jax.models import LoadedPolicy
from emor3_jax.rollout.tokens import suppressed_tokens


class Responses:
    """What rows themselves say (`Texts.responses`), as far as the policy can learn it.

    Attributes:
      of_row: id → the tokens of each response, rows without one left out.
      counts: responses left out, by reason.
    """

    def __init__(self, config: ConfigDict, policy: LoadedPolicy) -> None:
        """Reads nothing yet.

        Args:
          config: of the run.
          policy: whose tokens they are.
        """
        self._tokenizer = tokenizer = policy.processor.tokenizer
        self._suppressed = suppressed_tokens(policy.shapes.vocab_size, tokenizer)
        self._end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._limit, self._most = config.rollout.max_tokens, config.sft.responses
        self.of_row: dict[str, list[list[int]]] = {}
        self.counts = {"long_response": 0, "special_token_in_response": 0}

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a response, its end included."""
        return [*self._tokenizer.encode(text, add_special_tokens=False), self._end]

    def read(self, row: Texts) -> bool:
        """Keeps what can be learned of a row; returns whether there is anything."""
        if found := self._usable(row.responses[: self._most]):
            self.of_row[row.id] = found
        return bool(found)

    def _usable(self, responses: Sequence[str]) -> list[list[int]]:
        found = []
        for text in responses:
            tokens = self.encode(text)
            if len(tokens) > self._limit:
                self.counts["long_response"] += 1
            elif self._suppressed[tokens].any():
                self.counts["special_token_in_response"] += 1
            else:
                found.append(tokens)
        return found
