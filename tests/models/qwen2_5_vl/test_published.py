import pytest

from emor3_jax.models import published
from emor3_jax.models.params import count_params


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("3B", 3_754_622_976),
        ("7B", 8_292_166_656),
        ("32B", 33_452_718_336),
        ("72B", 73_410_777_344),
    ],
)
def test_published_policies_have_their_published_sizes(size, count):
    policy = published(f"Qwen/Qwen2.5-VL-{size}-Instruct")
    assert count_params(policy.param_shapes()) == count
