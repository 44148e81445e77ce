"""Who is asked the questions about a response."""

from typing import NamedTuple

import jax
import numpy as np

from emor3_jax.models.policy import Policy
from emor3_jax.models.processor import Processor


class Judge(NamedTuple):
    """A policy that is asked about responses which another one wrote.

    It reads the image with a prefix of its own.

    Attributes:
      policy: shapes and arithmetic.
      params: cast once for all replies of a rollout to the compute type.
      suppressed: bool[V], ids that a reply may never contain.
      processor: of a judge that shares nothing but the text, such as one of another family; None
        where it reads the prompts and tokens of the policy as they are.
    """

    policy: Policy
    params: dict
    suppressed: np.ndarray | jax.Array
    processor: Processor | None = None
