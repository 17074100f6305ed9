"""Every kind of failure, each followed by a test that must pass: what the report says about it."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.fixtures.tolerances import SAME_INSTANT
from tests.ranks.inner import run, run_once

FAILURES = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

def test_one_asserts(ranks):
    print(f"rank {ranks.rank} is here")
    if ranks.rank == 1:
        assert reduce is None, "bad loss"
    reduce()

def test_after_one_asserts(ranks): reduce()

def test_all_assert(ranks):
    assert reduce().sum() == 1

def test_killed(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    reduce()

def test_after_killed(ranks): reduce()

def test_exits(ranks):
    if ranks.rank == 0:
        os._exit(3)
    reduce()

@pytest.mark.world_size(3)
def test_deadlock(ranks):
    reduce()
    if ranks.rank != 2:
        reduce()

@pytest.mark.world_size(3)
def test_after_deadlock(ranks): reduce()

def test_crossed(ranks):
    dist.recv(torch.ones(3), src=1 - ranks.rank)

def test_send_is_lost(ranks):
    if ranks.rank == 0: dist.isend(torch.ones(3), dst=1, tag=4)

def test_after_send_is_lost(ranks): reduce()

def test_message_of_other_dtype(ranks):
    if ranks.rank == 0: dist.send(torch.ones(3), dst=1)
    else: dist.recv(torch.ones(3, dtype=torch.int32))

def test_one_more_receive(ranks):
    work = [dist.isend(torch.ones(1), 1 - ranks.rank), dist.irecv(torch.ones(1), 1 - ranks.rank)]
    if ranks.rank == 1: dist.irecv(torch.ones(1), 0)
    for each in work: each.wait()

@pytest.mark.world_size(3)
def test_subgroup_differs(ranks):
    group = dist.new_group([0, 2])
    x = torch.ones(2, dtype=[torch.float32, None, torch.int32][ranks.rank])
    if ranks.rank != 1: dist.all_reduce(x, group=group)

@pytest.mark.world_size(3)
def test_subgroup_of_which_one_stays_away(ranks):
    group = dist.new_group([0, 2])
    if ranks.rank == 2: dist.all_reduce(torch.ones(2), group=group, async_op=True)

@pytest.mark.world_size(3)
def test_after_subgroup(ranks):
    group = dist.new_group([0, 2])
    if ranks.rank != 1: dist.all_reduce(torch.ones(2), group=group)
    dist.destroy_process_group(group)

@pytest.mark.world_size(3)
def test_after_a_removed_subgroup(ranks): reduce()

@pytest.mark.rank_timeout(1)
def test_hang(ranks):
    if ranks.rank == 1:
        time.sleep(60)

def test_after_hang(ranks): reduce()

@pytest.mark.rank_timeout(1)
def test_stopped(ranks):
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)

def test_extra_collective(ranks):
    if ranks.rank == 1:
        dist.all_reduce(torch.ones(2), async_op=True)

def test_after_extra_collective(ranks): assert reduce()[0] == 2

def test_other_dtype(ranks):
    x = torch.ones(4, dtype=[torch.float32, torch.int32][ranks.rank])
    dist.all_reduce(x)

def test_other_size(ranks):
    reduce(1000 + ranks.rank)

def test_half_skipped(ranks):
    if ranks.rank == 1:
        pytest.skip("not here")

def test_all_skipped(ranks):
    pytest.skip("nowhere")

@pytest.mark.xfail(reason="known", strict=True)
def test_xfail_on_one(ranks):
    assert ranks.rank == 0
    dist.barrier()

@pytest.mark.xfail(reason="known", strict=True)
def test_xfail_passes(ranks): reduce()

def test_leak_of_environment(ranks):
    os.environ["LEAKED"] = "yes"

def test_after_leak_of_environment(ranks): assert "LEAKED" not in os.environ

def test_leak_of_settings(ranks, tmp_path):
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.chdir(tmp_path)

def test_after_leak_of_settings(ranks):
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()

def test_leak_of_thread(ranks):
    threading.Thread(target=time.sleep, args=(60,), name="lazy").start()

def test_leak_of_child(ranks):
    if ranks.rank == 1 and os.fork() == 0:
        time.sleep(60)

@pytest.fixture
def broken(ranks):
    if ranks.rank == 1:
        raise OSError("no such thing")

def test_setup_fails(ranks, broken): reduce()

@pytest.fixture
def bad_end(ranks):
    yield
    assert ranks.rank == 0, "bad end"

def test_teardown_fails(ranks, bad_end): reduce()

def test_group_destroyed(ranks):
    dist.destroy_process_group()

def test_after_group_destroyed(ranks): reduce()

def own_mesh():
    mesh = init_device_mesh("cpu", (2, 1))
    copy = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0), Replicate()]).detach()
    assert copy.device_mesh is mesh
    return mesh

def test_own_mesh(ranks): own_mesh()

def test_after_own_mesh(ranks):
    for group in own_mesh().get_all_groups():
        if group is not dist.group.WORLD: dist.destroy_process_group(group)

def test_after_own_mesh_without_groups(ranks): own_mesh()

torn_down = []

@pytest.fixture
def own_list(ranks):
    values = [ranks.rank]
    yield values
    torn_down.append(values)

@pytest.mark.backend("threads")
def test_own_list(ranks, own_list): own_list.append(4)

@pytest.mark.backend("threads")
def test_after_own_list(ranks): assert sorted(torn_down) == [[0, 4], [1, 4]]
"""


@pytest.fixture
def failures(launch, tmp_path_factory):
    """One inner run for all tests below."""
    return run_once("failures", tmp_path_factory, launch, FAILURES, "-p", "no:faulthandler")


def test_the_rank_that_asserts_comes_first_in_pytests_own_rendering(failures):
    block = failures.block("test_one_asserts[gloo-2]")
    assert "──────── rank 1 of 2 (gloo)" in block
    assert '>           assert reduce is None, "bad loss"\nE           AssertionError: bad loss' in block
    assert re.search(r"rank 0 .* released waits in all_reduce #1 \[\[2\]\] at test_inner.py:\d+ in reduce", block)
    assert re.search(r"rank 1 .* FAILED   AssertionError: bad loss", block)
    assert re.search(r"Captured output of rank 0 -+\nrank 0 is here", block)
    assert max(failures.seconds("test_one_asserts[gloo-2]")) < 2  # idle machine: below 0.3


def test_a_failure_on_all_ranks_is_shown_once(failures):
    block = failures.block("test_all_assert[gloo-2]")
    assert "──────── ranks 0, 1 of 2 (gloo)" in block
    assert block.count(">       assert reduce().sum() == 1") == 1


@pytest.mark.parametrize(
    ("name", "said"), [("killed", "rank 1/2 killed by SIGKILL"), ("exits", "rank 0/2 exited with status 3")]
)
def test_a_death_names_rank_and_cause(failures, name, said):
    block = failures.block(f"test_{name}[gloo-2]")
    assert f"E   {said}\n" in block
    assert re.search(r"rank \d .* lost peer at test_inner.py:\d+", block)


def test_a_deadlock_is_proven_from_all_positions(failures):
    block = failures.block("test_deadlock[gloo-3]")
    waits = r"waits in all_reduce #2 \[\[2\]\] at test_inner.py:\d+ in reduce"
    assert re.search(rf"E   deadlock: rank 0 {waits}, rank 1 {waits}, rank 2 finished after collective #1", block)
    assert max(failures.seconds("test_deadlock[gloo-3]")) < 6  # idle machine: below 2


def test_ranks_that_wait_for_each_others_message_are_a_deadlock(failures):
    block = failures.block("test_crossed[gloo-2]")
    waits = r"waits in recv #1 \[\[3\]\] from rank {} at \S+ in test_crossed"
    assert re.search(rf"E   deadlock: rank 0 {waits.format(1)}, rank 1 {waits.format(0)}", block)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("send_is_lost[gloo-2]", "send #1 [[3]] to rank 1 by rank 0 (float32, tag 4) has no receive"),
        ("message_of_other_dtype[gloo-2]", "differs from its receive: send [[3]] float32; recv [[3]] int32"),
        ("one_more_receive[gloo-2]", "recv #3 [[1]] from rank 0 by rank 1 (float32, tag 0) has no send"),
        ("subgroup_differs[gloo-3]", "collective #1 of the test on the group of ranks 0, 2 differs: rank 0: "),
        ("subgroup_of_which_one_stays_away[gloo-3]", "on the group of ranks 0, 2 differs: rank 0: none; rank 2: gloo:"),
    ],
)
def test_messages_and_subgroups_must_match(failures, name, said):
    assert said in failures.block(f"test_{name}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hang", r"rank 1 is busy after no collective at test_inner.py:\d+ in test_hang"),
        ("stopped", "rank 1 is stopped by a signal"),
    ],
)
def test_a_hang_ends_at_the_time_limit_with_the_position(failures, name, said):
    block = failures.block(f"test_{name}[gloo-2]")
    assert re.search(rf"E   timeout: not finished after 1 s: rank 0 finished after collective #0, {said}", block)
    assert re.search(r"rank 1 .* HUNG", block)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("extra_collective", "rank 0: none; rank 1: gloo:all_reduce [[2]] Float"),
        ("other_dtype", "rank 0: gloo:all_reduce [[4]] Float; rank 1: gloo:all_reduce [[4]] Int"),
    ],
)
def test_ranks_that_pass_with_different_collectives_fail(failures, name, said):
    assert f"E   collective #1 of the test differs: {said}\n" in failures.block(f"test_{name}[gloo-2]")


def test_different_sizes_fail_and_both_are_named(failures):
    block = failures.block("test_other_size[gloo-2]")
    assert "all_reduce [[1000]] Float; rank 1: gloo:all_reduce [[1001]] Float" in block or "SIGABRT" in block


def test_skips_must_agree(failures):
    assert failures.outcome("test_all_skipped[gloo-2]") == "skipped"
    assert "E   ranks disagree: rank 1 skipped the test, rank 0 ran it\n" in failures.block("test_half_skipped[gloo-2]")


def test_one_rank_is_enough_for_an_expected_failure(failures):
    assert failures.outcome("test_xfail_on_one[gloo-2]") == "xfail"
    assert "[XPASS(strict)] known" in failures.block("test_xfail_passes[gloo-2]")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("environment", "rank 0: environment LEAKED is 'yes' (was unset)"),
        ("settings", "rank 1: default dtype is torch.float64 (was torch.float32)"),
        ("settings", "rank 0: gradient mode is False (was True)"),
        ("settings", "rank 0: working directory is "),
        ("thread", "rank 1: thread 'lazy' still runs"),
        ("child", "rank 1: child process "),
    ],
)
def test_a_leak_fails_the_test_that_leaks(failures, name, said):
    block = failures.block(f"test_leak_of_{name}[gloo-2]")
    assert "E   the test leaks into the next one on these ranks: " in block
    assert said in block


def test_setup_and_teardown_fail_as_errors_of_the_rank(failures):
    assert failures.outcome("test_setup_fails[gloo-2]") == "error"
    assert re.search("E +OSError: no such thing", failures.block("test_setup_fails[gloo-2]"))
    assert "AssertionError: bad end" in failures.block("test_teardown_fails[gloo-2]")


def test_the_next_test_always_passes(failures):
    names = re.findall(r"::(test_after_\w+\[\w+-\d\]) PASSED", failures.text)
    assert len(names) == len(re.findall(r"def test_after_", FAILURES))
    assert failures.outcome("test_group_destroyed[gloo-2]") == "passed"


def timeline_of(failures, name):
    """The events that a failure's timeline has, by rank and row."""
    (path,) = re.findall(r"^timeline: (\S+) \(open it in", failures.block(name), re.M)
    trace = json.loads(Path(path).read_text())
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"], rows[event["pid"], event["tid"]]].append(event)
    return found


def test_a_failure_names_its_timeline(failures):
    events = timeline_of(failures, "test_one_asserts[gloo-2]")
    assert [event["name"] for event in events[1, "test"]] == ["setup", "call", "teardown"]
    (issued,), (wait,) = events[0, "collectives and messages"], events[0, "waits"]
    assert issued["name"] == "all_reduce #1 [[2]]"
    assert issued["ts"] <= wait["ts"]
    assert wait["ts"] + wait["dur"] == pytest.approx(issued["ts"] + issued["dur"], abs=SAME_INSTANT)
    assert wait["dur"] > 1000  # microseconds: as long as it took the harness to release it
    assert (1, "waits") not in events


def test_the_timeline_of_a_deadlock_shows_who_waits(failures):
    events = timeline_of(failures, "test_deadlock[gloo-3]")
    issued = {rank: [event["name"] for event in events[rank, "collectives and messages"]] for rank in range(3)}
    assert issued == {0: ["all_reduce #1 [[2]]", "all_reduce #2 [[2]]"], 1: issued[0], 2: ["all_reduce #1 [[2]]"]}
    assert [max(event["dur"] for event in events[rank, "waits"]) > 1e6 for rank in range(3)] == [True, True, False]
    (message,) = timeline_of(failures, "test_crossed[gloo-2]")[0, "collectives and messages"]
    assert message["name"] == "recv #1 [[3]] from rank 1"


def test_timelines_are_written_of_passing_tests_where_asked(launch, tmp_path):
    run(launch, tmp_path, "def test_x(ranks): reduce()", "--rank-timeline=seen")
    (path,) = (tmp_path / "seen").iterdir()
    assert path.name == "test_inner.py_test_x_gloo-2.json"
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert {"setup", "call", "teardown", "wait", "all_reduce #1 [[2]]"} <= names
