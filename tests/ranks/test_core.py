"""The harness on itself: what a test body sees on its ranks."""

import os
import sys
import threading
import time
import unittest
import warnings

import pytest
import torch
import torch.distributed as dist


@pytest.mark.world_size(1, 2, 3)
def test_every_rank_runs_the_body(ranks):
    x = torch.tensor([float(ranks.rank + 1)])
    dist.all_reduce(x)
    assert x.item() == sum(range(1, ranks.world_size + 1))
    assert dist.get_rank() == ranks.rank


def test_a_thread_that_is_about_to_end_is_not_left_behind(ranks):
    thread = threading.Thread(target=time.sleep, args=(0.1,))
    thread.start()
    assert thread.is_alive()  # when the test ends; that it passes is what is asked


@pytest.mark.parametrize("n", [3, 5])
def test_parametrisation_and_fixtures_work_inside(ranks, n, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SOMETHING", str(n))
    os.write(1, b"to the log\n")
    sys.stdout.write(f"hello {n}\n")
    assert capsys.readouterr().out == f"hello {n}\n"
    (ranks.tmp_path / f"{ranks.rank}").write_text("x")
    ranks.barrier()
    assert sorted(path.name for path in ranks.tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.world_size(1, 3)
@pytest.mark.backend("gloo", "threads")
def test_what_is_right_on_one_rank_is_given_to_all(ranks):
    computed = []
    answer = ranks.once(lambda: computed.append(ranks.rank) or {"of": ranks.rank})
    assert (answer, computed) == ({"of": 0}, [0] if ranks.is_main else [])


@pytest.mark.filterwarnings("ignore:let me pass")
def test_filters_of_warnings_hold_inside(ranks):
    warnings.warn("let me pass", stacklevel=1)
    with pytest.raises(UserWarning, match="me not"):  # as pyproject.toml says
        warnings.warn("me not", stacklevel=1)


def test_fsdp2(ranks):
    from torch.distributed.fsdp import fully_shard

    ranks.seeded()
    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=ranks.mesh())
    model(torch.ones(1, 4)).sum().backward()
    assert torch.equal(model.weight.grad.full_tensor(), torch.ones(4, 4))


@pytest.mark.world_size(8)
def test_eight_ranks_share_the_cores(ranks):
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 8)
    fully_shard(model, mesh=ranks.mesh())
    model(torch.full((1, 4), float(ranks.rank))).sum().backward()
    assert torch.equal(model.weight.grad.full_tensor(), torch.full((8, 4), 3.5))


def test_a_sharded_parameter_is_of_its_own_rank(ranks):
    """Of the shapes that `preheat` has sharded before, as rank 0 of a group that is gone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks.world_size,)))
    assert [weight.device_mesh.get_coordinate() for weight in model.parameters()] == [(ranks.rank,)] * 2


@pytest.mark.world_size(2, 3)
def test_messages_that_match_pass(ranks):
    """In a ring, all at once, with tags out of order, from anyone, and over a sub-group."""
    left, right = (ranks.rank - 1) % ranks.world_size, (ranks.rank + 1) % ranks.world_size
    mine, received = torch.full((2, 3), float(ranks.rank)), torch.zeros(6)
    operations = [dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, received, left)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert received.tolist() == [float(left)] * 6
    if ranks.rank == 0:
        handles = [dist.isend(torch.ones(1) * tag, dst=1, tag=tag) for tag in (7, 8)]
        for work in handles:
            work.wait()
        assert dist.recv(torch.zeros(1)) == 1
    if ranks.rank == 1:
        late, early = torch.zeros(1), torch.zeros(1)
        dist.recv(late, src=0, tag=8)
        dist.recv(early, src=0, tag=7)
        assert (late.item(), early.item()) == (8, 7)
        dist.send(late, dst=0)
    pair = dist.new_group([0, ranks.world_size - 1])
    if ranks.rank == 0:
        dist.send(mine, dst=ranks.world_size - 1, group=pair)
    elif ranks.rank == ranks.world_size - 1:
        dist.recv(mine, group_src=0, group=pair)


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")


def environment():
    return [int(os.environ[name]) for name in TORCHRUN]


@pytest.mark.world_size(4)
@pytest.mark.nodes(1, 2)
class TestNodes:
    def test_the_environment_is_that_of_several_machines(self, ranks):
        per_node = 4 // ranks.num_nodes
        node, local_rank = divmod(ranks.rank, per_node)
        assert environment() == [ranks.rank, 4, local_rank, per_node, node, ranks.num_nodes]
        assert (ranks.node, ranks.local_rank, ranks.local_world_size) == (node, local_rank, per_node)

    def test_a_local_disk_is_seen_on_its_node_alone(self, ranks):
        (ranks.tmp_path / f"shared{ranks.rank}").touch()
        (ranks.node_tmp_path / f"local{ranks.rank}").touch()
        ranks.barrier()
        assert len([path for path in ranks.tmp_path.iterdir() if path.is_file()]) == 4
        first = ranks.node * ranks.local_world_size
        own = {f"local{rank}" for rank in range(first, first + ranks.local_world_size)}
        assert {path.name for path in ranks.node_tmp_path.iterdir()} == own

    def test_weights_are_sharded_on_a_node_and_replicated_over_nodes(self, ranks):
        from torch.distributed.fsdp import fully_shard

        mesh = ranks.mesh(replicate=ranks.num_nodes, shard=ranks.local_world_size)
        model = torch.nn.Linear(4, 8, bias=False)
        fully_shard(model, mesh=mesh)
        assert len(model.weight.to_local()) == 8 // ranks.local_world_size
        assert mesh["shard"].get_local_rank() == ranks.local_rank
        model(torch.full((1, 4), float(ranks.rank))).sum().backward()
        assert model.weight.grad.full_tensor()[0, 0] == 1.5  # the mean over all four


def test_launched_ranks_are_on_nodes_too(launch):
    values = launch(4, environment, nodes=2).values
    assert values[3] == [3, 4, 1, 2, 1, 2]
    with pytest.raises(ValueError, match="nodes=3; allowed are divisors of the world size, 4"):
        launch(4, environment, nodes=3)


class TestCases(unittest.TestCase):
    """Methods of `unittest.TestCase` run on ranks where a marker says so."""

    @classmethod
    def setUpClass(cls):
        cls.group_at_start = dist.is_initialized()

    def setUp(self):
        self.rank = dist.get_rank() if dist.is_initialized() else None

    @pytest.mark.world_size(2, 3)
    def test_a_method_runs_on_ranks(self):
        x = torch.ones(1)
        dist.all_reduce(x)
        self.assertEqual(x.item(), self.ranks.world_size)  # noqa: PT009
        assert self.rank == self.ranks.rank
        assert self.group_at_start

    @pytest.mark.world_size(2)
    def test_a_method_uses_subtests(self):
        for number in range(2):
            with self.subTest(number=number):
                assert number < self.ranks.world_size

    def test_a_method_without_a_marker_runs_as_ever(self):
        assert not dist.is_initialized()
        assert not hasattr(self, "ranks")
