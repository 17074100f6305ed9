"""The other back ends: one body over each, and what each refuses."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.fixtures.ranks.fake_numbers import FakeNumbersError


@pytest.mark.world_size(1, 2, 3)
@pytest.mark.backend("gloo", "threads")
def test_threads_compute_what_processes_compute(ranks):
    x = torch.tensor([float(ranks.rank + 1)])
    dist.all_reduce(x)
    assert x.item() == sum(range(1, ranks.world_size + 1))
    assert dist.get_rank() == ranks.rank


@pytest.fixture
def own_list(ranks):
    """One for each rank."""
    return [ranks.rank]


@pytest.fixture(scope="module")
def shared_list():
    """One for the process."""
    return []


@pytest.mark.world_size(3)
@pytest.mark.backend("threads")
@pytest.mark.parametrize("n", [4])
def test_each_thread_has_fixtures_of_its_own(ranks, own_list, shared_list, tmp_path, n):
    assert own_list == [ranks.rank]
    own_list.append(n)
    (tmp_path / "mine").touch(exist_ok=False)
    shared_list.append(ranks.rank)
    ranks.barrier()
    assert sorted(shared_list) == [0, 1, 2]


@pytest.mark.world_size(8, 256, 4096)
@pytest.mark.backend("fake")
def test_fake_shards_for_any_world(ranks):
    model = torch.nn.Linear(8, ranks.world_size)
    fully_shard(model, mesh=ranks.mesh())
    weight = model.weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape == (1, 8)
    model(torch.ones(2, 8)).sum().backward()
    torch.optim.SGD(model.parameters()).step()


@pytest.mark.world_size(8)
@pytest.mark.backend("fake")
class TestFakeNumbers:
    def test_what_no_collective_touched_can_be_read(self, ranks):
        assert torch.ones(2).sum().item() == 2
        assert torch.arange(3).tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        "read",
        [
            lambda x: x.sum().item(),
            lambda x: x.tolist(),
            lambda x: x.numpy(),
            lambda x: bool((x == 1).all()),
            lambda x: torch.equal(x, torch.ones(2)),
            lambda x: torch.testing.assert_close(x * 2, torch.ones(2)),
            lambda x: float((x[0] + 3).detach()),
        ],
        ids=["item", "tolist", "numpy", "bool", "equal", "assert_close", "float"],
    )
    def test_what_a_collective_touched_cannot(self, ranks, read):
        x = torch.ones(2)
        dist.all_reduce(x)
        with pytest.raises(FakeNumbersError, match="rank 0 of 8 has only its own input back"):
            read(x)

    def test_a_sharded_loss_cannot_be_read(self, ranks):
        model = torch.nn.Linear(8, 8)
        fully_shard(model, mesh=ranks.mesh())
        loss = model(torch.ones(2, 8)).sum()
        assert loss.shape == ()
        with pytest.raises(FakeNumbersError):
            loss.item()


@pytest.mark.world_size(2)
@pytest.mark.backend("gloo", "nccl")
def test_the_same_body_runs_where_the_hardware_is(ranks):
    x = torch.ones(3, device=ranks.device)
    dist.all_reduce(x)
    assert x.tolist() == [2.0, 2.0, 2.0]
