"""The harness on itself: what a test body sees on its ranks."""

import os
import sys
import threading
import time
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
    assert (answer, computed) == ({"of": 0}, [0] if ranks.is_lead else [])


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


def test_a_sharded_parameter_is_of_its_own_rank(ranks):
    """Of the shapes that `preheat` has sharded before, as rank 0 of a group that is gone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks.world_size,)))
    assert [weight.device_mesh.get_coordinate() for weight in model.parameters()] == [(ranks.rank,)] * 2
