"""EMO-R3 in JAX: reflective reinforcement learning for visual emotion reasoning."""

import logging


def _is_needed(record: logging.LogRecord) -> bool:
    # The models are this package's own: only tokenizers are wanted of transformers.
    return "PyTorch was not found" not in record.getMessage()


logging.getLogger("transformers").addFilter(_is_needed)
