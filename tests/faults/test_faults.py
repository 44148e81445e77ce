"""A few rows of the table of faults, see `faults.table`; `make faults` tries them all."""

import pytest
from faults.child import Fault
from faults.trial import Trials, newest


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> Trials:
    return Trials(tmp_path_factory.mktemp("faults"))


def test_killed_while_a_checkpoint_is_written(trials: Trials) -> None:
    """And its data worker ends with it."""
    ended = trials.suffer(Fault("a file of a checkpoint", 16, "kill", workers=1))
    assert trials.judge(ended, -9).wrong == ()


def test_killed_while_the_policy_is_written(trials: Trials) -> None:
    ended = trials.suffer(Fault("a file of the policy", 3, "kill"))
    assert trials.judge(ended, -9) == ((), 0)


def test_a_full_disk_while_a_checkpoint_is_written(trials: Trials) -> None:
    """The one before may still be on its way; that before it is whole."""
    ended = trials.suffer(Fault("saving", 3, "full"))
    step = newest(ended.workdir)
    assert step in (2, 4)
    said = (
        "error: ",
        f"checkpoints: the checkpoint of step {step + 2} could not be written: File too large; "
        f"make room there, and start again: the run goes on from the checkpoint of step {step}\n",
    )
    assert trials.judge(ended, 1, said).wrong == ()
