"""The other back ends: one body over each, and what each refuses."""

import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.fixtures.ranks import collectives, gpus, preheat
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


def what_one_rank_holds():
    """Of a model and its optimizer, after a real step."""
    model = torch.nn.Linear(96, 100)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 96)).sum().backward()
    optimizer.step()
    weights = list(model.parameters())
    moments = [optimizer.state[weight]["exp_avg"] for weight in weights]
    assert [moment.to_local().shape for moment in moments] == [weight.to_local().shape for weight in weights]
    return [weight.to_local().shape[0] for weight in weights]


@pytest.mark.world_size(64)
@pytest.mark.backend("fake")
def test_sixty_four_ranks_hold_the_whole_model_together(ranks):
    """100 rows do not divide by 64."""
    shares = {rank: what_one_rank_holds() for rank in ranks.each()}
    assert shares[0] == [2, 2]
    assert shares[63] == [0, 0]
    assert [sum(rows) for rows in zip(*shares.values(), strict=True)] == [100, 100]
    assert (ranks.rank, dist.get_rank()) == (0, 0)


def test_only_a_fake_rank_can_be_each(ranks):
    with pytest.raises(ValueError, match="is for the fake back end"):
        next(ranks.each())


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


@pytest.mark.world_size(1, 2, 4, 8)
@pytest.mark.backend("nccl")
def test_gpus_are_the_ranks_own(ranks):
    x = torch.full((3,), float(ranks.rank), device=ranks.device)
    dist.all_reduce(x)
    assert x.tolist() == [sum(range(ranks.world_size))] * 3
    dist.barrier()
    devices = [None] * ranks.world_size
    dist.all_gather_object(devices, torch.cuda.get_device_properties(ranks.device).uuid)
    assert len(set(devices)) == ranks.world_size


def see_gpus():
    return os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.is_available()


def test_gpus_are_hidden_from_all_but_ranks_over_nccl(launch):
    assert see_gpus() == ("", False)
    assert launch(1, see_gpus).values == [("", False)]


@pytest.mark.parametrize(
    ("visible", "first", "count", "given"),
    [(None, 0, 2, "0,1"), (None, 2, 2, "2,3"), ("5,GPU-8,7", 1, 2, "GPU-8,7"), ("3", 0, 1, "3")],
)
def test_each_node_sees_its_gpus(visible, first, count, given):
    assert gpus.devices_of(visible, first, count) == given


@pytest.mark.parametrize(("visible", "num_gpus"), [(None, 3), ("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("0,1,2,3", 3)])
def test_gpus_are_counted_by_their_devices(tmp_path, monkeypatch, visible, num_gpus):
    """In a container there may be devices and no folder of the driver."""
    for number in range(3):
        (tmp_path / f"nvidia{number}").touch()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "none")
    assert gpus.num_gpus(visible) == num_gpus


def steps_beside_gpus(folder):
    gpus.DEVICES = folder
    return preheat.sharded_steps()


def test_no_step_is_taken_before_forks_where_gpus_are(launch, tmp_path):
    assert launch(1, steps_beside_gpus, tmp_path, group=False).values == [gpus.num_installed() == 0]
    (tmp_path / "nvidia0").touch()
    assert launch(1, steps_beside_gpus, tmp_path, group=False).values == [False]


def test_collectives_of_nccl_are_read_too(monkeypatch):
    """From NCCL's recorder, which only a torch for GPUs has: its own ring, its own ids."""
    entries = [
        {"record_id": number, "profiling_name": "nccl:all_reduce", "process_group": ("0", "default_pg")}
        | {"input_sizes": [[2]], "input_dtypes": ["Float"], "time_created_ns": number, "retired": True}
        for number in (1, 0)
    ]
    recorder = torch._C._distributed_c10d
    monkeypatch.setattr(recorder, "_dump_nccl_trace", lambda **_: pickle.dumps({"entries": entries}), raising=False)
    monkeypatch.setattr(recorder, "_dump_fr_trace", lambda **_: pickle.dumps({"entries": []}))
    found = collectives.read()
    assert [str(each) for each in found] == ["nccl:all_reduce [[2]] Float"] * 2
    assert [each.number for each in found] == [1, 2]
    assert collectives.first_difference([found, found[:1]]) is not None
