"""`launch`: a function on new ranks, faults at chosen points, one outcome per rank."""

import itertools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from tests.fixtures.ranks.faults import bit_flipped, delay, disk_full, kill, nan, send, stop, throw, truncated
from tests.fixtures.ranks.gpus import exclusive_gpus

CONTENT = b"x" * 1000


def train(num_steps, directory=None):
    """A sharded model, a file per step and rank, published as careful programs do: written, closed, renamed."""
    torch.default_generator.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(1, num_steps + 1):
        loss = model(torch.ones(2, 4) * step).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if directory:
            publish(f"{directory}/{dist.get_rank()}-{step}")
    return losses


def publish(path):
    with open(f"{path}.part", "wb") as file:
        file.write(CONTENT)
    os.replace(f"{path}.part", path)


def own_group():
    dist.init_process_group("gloo")
    dist.barrier()  # the first rank holds the store, which the others need until they have met
    return dist.get_world_size(), os.environ["LOCAL_RANK"], os.environ["FLAVOUR"]


def stubborn():
    received = []
    signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    train(3)
    return received


def test_every_rank_returns_its_value(launch):
    values = launch(3, train, 2).values
    assert values[0] == values[1] == values[2]


def test_code_that_starts_its_own_group_meets_at_the_environment(launch):
    outcomes = launch(2, own_group, group=False, env={"FLAVOUR": "sour"})
    assert outcomes.values == [(2, "0", "sour"), (2, "1", "sour")]


def test_a_killed_rank_is_named_and_its_peer_raises(launch):
    outcomes = launch(2, train, 3, faults=[kill(1, at=("step", 2))])
    assert outcomes[1].signal == "SIGKILL"
    assert outcomes.died == [1]
    assert outcomes.raised == [0]
    assert "closed by peer" in str(outcomes[0].error) or "reset by peer" in str(outcomes[0].error)


def test_a_stopped_rank_is_hung_and_its_peer_times_out(launch):
    outcomes = launch(2, train, 3, faults=[stop(1, at=("backward", 2))], pg_timeout=1, timeout=4)
    assert outcomes.hung == [1]
    assert outcomes[1].where == "is stopped by a signal"
    assert "Timed out waiting 1000ms" in str(outcomes[0].error)


def test_an_exception_keeps_its_type_and_ends_the_peer(launch):
    outcomes = launch(2, train, 3, faults=[throw(1, KeyError("boo"), at=("collective", 3))])
    assert isinstance(outcomes[1].error, KeyError)
    assert "in train" in outcomes[1].traceback
    assert outcomes.raised == [0, 1]
    with pytest.raises(AssertionError, match="rank 1 raised KeyError"):
        _ = outcomes.values


def test_nan_in_a_backward_reaches_all_ranks(launch):
    for losses in launch(2, train, 2, faults=[nan(1, at=("backward", 1))]).values:
        assert losses[0] == losses[0]
        assert losses[1] != losses[1]


def test_nan_in_a_forward_is_local_until_the_step(launch):
    one, other = launch(2, train, 3, faults=[nan(1, at=("forward", 2))]).values
    assert one[1] == one[1]
    assert other[1] != other[1]
    assert one[2] != one[2]


def test_a_full_disk_is_an_os_error(launch, tmp_path):
    outcomes = launch(2, train, 3, str(tmp_path), faults=[disk_full(1, at=("write", 2))])
    assert isinstance(outcomes[1].error, OSError)
    assert outcomes[1].error.errno == 28
    assert not (tmp_path / "1-2").exists()
    assert (tmp_path / "1-1").read_bytes() == CONTENT


def test_files_are_ruined_between_closing_and_renaming(launch, tmp_path):
    faults = [bit_flipped(1, at=("write", 2)), truncated(0, at=("write", 1, "*-3.part"))]
    _ = launch(2, train, 3, str(tmp_path), faults=faults).values
    ruined = {path.name for path in tmp_path.iterdir() if path.read_bytes() != CONTENT}
    assert ruined == {"1-2", "0-3"}
    assert (tmp_path / "0-3").stat().st_size == len(CONTENT) // 2
    assert len((tmp_path / "1-2").read_bytes()) == len(CONTENT)


def test_a_signal_reaches_its_handler(launch):
    outcomes = launch(2, stubborn, faults=[send(0, signal.SIGUSR1, at=("step", 1))])
    assert outcomes.values == [[1], []]


def test_a_slow_rank_changes_nothing(launch):
    slow = launch(2, train, 2, faults=[delay(1, 0.3, at=("collective", 1, "all_gather*"))])
    assert slow.values == launch(2, train, 2).values
    assert max(outcome.seconds for outcome in slow) > 0.25


@pytest.mark.parametrize("name", ["all_gather*", "reduce_scatter*"])
def test_a_name_finds_the_collectives_of_a_sharded_model(launch, name):
    assert launch(2, train, 2, faults=[kill(1, at=("collective", 2, name))]).died == [1]


def test_a_kill_by_the_clock_needs_no_event(launch):
    outcomes = launch(2, signal.pause, faults=[kill(0, at=("seconds", 0.1)), kill(1, at=("seconds", 0.2))])
    assert [outcome.signal for outcome in outcomes] == ["SIGKILL", "SIGKILL"]


def test_on_fake_each_rank_is_a_process(launch):
    assert launch(3, dist.get_rank, backend="fake").values == [0, 1, 2]


def take_a_turn():
    with exclusive_gpus(1):
        begin = time.monotonic()
        time.sleep(0.05)
        return begin, time.monotonic()


def test_processes_take_turns_on_gpus(launch):
    turns = sorted(launch(3, take_a_turn, group=False).values)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(turns))


def test_wrong_use_says_what_is_allowed(launch):
    with pytest.raises(TypeError, match="function at module level"):
        launch(2, lambda: 1)
    with pytest.raises(ValueError, match="no rank 2 of 2"):
        launch(2, train, 1, faults=[kill(2, at=("step", 1))])
    with pytest.raises(ValueError, match="nan at 'step': allowed at forward or backward"):
        nan(0, at=("step", 1))
    with pytest.raises(TypeError, match=r"unknown \['speed'\]"):
        launch(2, train, 1, speed=3)
