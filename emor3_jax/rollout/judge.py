"""Who is asked the questions about a response."""

from typing import NamedTuple

import jax
import numpy as np

from emor3_jax.models.policy import Policy


class Judge(NamedTuple):
    """A policy that is asked about responses which another one wrote.

    It reads the same tokens, and the image with a prefix of its own.

    Attributes:
      policy: shapes and arithmetic.
      params: cast once for all replies of a rollout to the compute type.
      suppressed: bool[V], ids that a reply may never contain.
    """

    policy: Policy
    params: dict
    suppressed: np.ndarray | jax.Array
