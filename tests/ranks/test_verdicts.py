"""What must not come out green: a mark, a skip or a subtest hides nothing that the ranks did wrong together."""

import pytest

from tests.ranks.inner import collect, run_once

pytest_plugins = ["pytester"]

BODY = """
@pytest.mark.xfail
@pytest.mark.rank_timeout(1)
def test_expected_hangs(ranks):
    if ranks.rank == 1:
        time.sleep(60)

@pytest.mark.xfail
def test_expected_differs(ranks):
    dist.broadcast(torch.zeros(2, dtype=[torch.float32, torch.float64][ranks.rank]), 0)

@pytest.mark.xfail
def test_expected_leaks(ranks):
    os.environ["LEAKED"] = "yes"

@pytest.mark.xfail
def test_expected_skips_on_one(ranks):
    if ranks.rank == 0:
        pytest.skip("not here")

@pytest.mark.xfail
def test_expected_fails(ranks): assert ranks.rank == 0

def test_subtest(ranks, subtests):
    for number in range(3):
        with subtests.test(number=number):
            assert number != 1 or ranks.rank == 0, "second one"

@pytest.mark.backend("threads")
def test_thread_skips_beside_a_failure(ranks):
    if ranks.rank == 0:
        pytest.skip("not here")
    assert reduce is None, "bad loss"

@pytest.mark.backend("threads")
def test_thread_skips_alone(ranks):
    if ranks.rank == 0:
        pytest.skip("not here")

@pytest.mark.backend("threads")
def test_all_threads_skip(ranks): pytest.skip("nowhere")
"""

FAILURES = {
    "test_expected_hangs[gloo-2]": "timeout: not finished after 1 s",
    "test_expected_differs[gloo-2]": "collective #1 of the test differs",
    "test_expected_leaks[gloo-2]": "the test leaks into the next one",
    "test_expected_skips_on_one[gloo-2]": "ranks disagree: rank 0 skipped the test, rank 1 ran it",
    "test_subtest[gloo-2]": "second one",
    "test_thread_skips_beside_a_failure[threads-2]": "bad loss",
    "test_thread_skips_alone[threads-2]": "ranks disagree: rank 0 of 2 skipped the test",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_that_something_might_hide_is_one(tmp_path_factory, launch, name):
    run = run_once("verdicts", tmp_path_factory, launch, BODY)
    assert run.outcome(name) == "failed"
    assert FAILURES[name] in run.block(name)


def test_a_failure_on_threads_names_its_thread(tmp_path_factory, launch):
    block = run_once("verdicts", tmp_path_factory, launch, BODY).block("test_thread_skips_beside_a_failure[threads-2]")
    assert "one of 2 ranks (threads)" in block
    assert "rank 1 of 2 (threads)" in block
    assert "all ranks" in block


@pytest.mark.parametrize(
    ("name", "outcome"), [("test_expected_fails[gloo-2]", "xfail"), ("test_all_threads_skip[threads-2]", "skipped")]
)
def test_what_is_expected_or_skipped_by_all_stays_so(tmp_path_factory, launch, name, outcome):
    assert run_once("verdicts", tmp_path_factory, launch, BODY).outcome(name) == outcome


@pytest.mark.parametrize(
    ("marker", "allowed"),
    [
        ("world_size(True)", "positive integers"),
        ("rank_timeout('soon')", "seconds, more than 0"),
        ("rank_timeout(0)", "seconds, more than 0"),
        ("rank_timeout()", "seconds, more than 0"),
        ("isolation('spawn')", "'warm' and 'fork'"),
    ],
)
def test_a_marker_that_means_nothing_is_refused_where_it_stands(pytester, marker, allowed):
    run = collect(pytester, f"@pytest.mark.{marker}\ndef test_x(ranks): pass")
    assert f"test_x: @pytest.mark.{marker.partition('(')[0]}" in run.text
    assert f"allowed are {allowed}" in run.text


def test_a_marker_of_a_test_without_ranks_is_refused(pytester):
    run = collect(pytester, "@pytest.mark.world_size(4)\ndef test_x(): pass")
    assert "test_x: @pytest.mark.world_size has no effect, the test takes no `ranks`" in run.text


def test_what_multiprocessing_keeps_is_no_leak(tmp_path_factory, launch):
    body = """
    def test_shared_memory(ranks):
        from multiprocessing.shared_memory import SharedMemory
        memory = SharedMemory(create=True, size=64)
        memory.close()
        memory.unlink()
    """
    assert run_once("shared", tmp_path_factory, launch, body).outcome("test_shared_memory[gloo-2]") == "passed"


@pytest.mark.parametrize(("world_size", "backend"), [(2, "threads"), (2, "mpi"), (0, "gloo")])
def test_launch_refuses_what_it_cannot_run(launch, world_size, backend):
    with pytest.raises(ValueError, match="allowed are gloo, nccl, fake, from 1 rank on"):
        launch(world_size, print, backend=backend)
