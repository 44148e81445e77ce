import pytest

from emor3_jax.config import default
from emor3_jax.runtime.guards import GuardError, Watch

FINE = {
    "reward/overall": 0.4,
    "policy/loss": 0.0,
    "policy/skipped": 0.0,
    "policy/kl": 0.1,
    "group/zero_std_fraction": 0.5,
    "response/truncated_fraction": 0.1,
}


def watch(**limits: float) -> Watch:
    config = default()
    config.guard.update(limits)
    return Watch(config)


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"policy/skipped": 1.0}, "skipped_updates: policy/skipped=1 for 3 steps"),
        ({"group/zero_std_fraction": 1.0}, "equal_rewards: group/zero_std_fraction=1 for 3"),
        ({"response/truncated_fraction": 1.0}, "truncated: response/truncated_fraction=1"),
        ({"policy/kl": 7.5}, "kl: policy/kl=7.5 for 3 steps in a row, to step 7"),
        ({"reward/brief": float("nan")}, "not_finite: reward/brief=nan"),
        ({"policy/loss": float("inf")}, "not_finite: policy/loss=inf"),
    ],
)
def test_a_guard_warns_after_some_steps_and_stops_after_more(bad, name, caplog):
    seen = watch(warn_after=3, stop_after=5, max_kl=5.0)
    assert [seen.see(step, FINE) for step in range(1, 4)] == [[], [], []]
    said = [seen.see(step, FINE | bad) for step in range(5, 9)]
    assert [len(each) for each in said] == [0, 0, 1, 0]
    assert said[2][0].startswith(f"guard {name}") and said[2][0] in caplog.text
    with pytest.raises(GuardError, match=r"for 5 steps in a row, .* guard.stop_after=5"):
        seen.see(9, FINE | bad)


def test_one_good_step_begins_the_count_anew():
    seen, bad = watch(warn_after=2, stop_after=3), FINE | {"policy/skipped": 1.0}
    for step in range(1, 20):
        seen.see(step, FINE if step % 3 == 0 else bad)


@pytest.mark.parametrize(("advantage", "warnings"), [("grpo", 1), ("remax", 0), ("gdpo", 0)])
def test_groups_of_equal_rewards_are_no_fault_where_they_may_have_an_advantage(advantage, warnings):
    config = default()
    config.policy_update.advantage = advantage
    seen, bad = Watch(config), FINE | {"group/zero_std_fraction": 1.0}
    assert sum(len(seen.see(step, bad)) for step in range(1, 6)) == warnings


def test_guards_can_be_switched_off_and_need_no_metric():
    seen = watch(warn_after=0, stop_after=0, max_kl=0.0)
    bad = FINE | {"policy/skipped": 1.0, "policy/kl": 1e9}
    assert [seen.see(step, bad) for step in range(50)] == [[]] * 50
    assert watch().see(1, {"policy/loss": 0.5}) == []
