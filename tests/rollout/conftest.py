"""The tiny policy of `support.setting`, and responses that it sampled."""

import pytest
from support.setting import STOP, Setting, build_setting

from emor3_jax.rollout.sampling import Sampling
from emor3_jax.types import Samples


@pytest.fixture(scope="session")
def make_setting():
    """Builds a setting of another number of prompts."""
    return build_setting


@pytest.fixture(scope="session")
def setting() -> Setting:
    return build_setting()


@pytest.fixture(scope="session")
def rule() -> Sampling:
    return Sampling(max_tokens=10, temperature=0.8, top_p=1.0, stop=(STOP,))


@pytest.fixture(scope="session")
def samples(setting, rule) -> Samples:
    return setting.roll_out(rule, 3, 6)
