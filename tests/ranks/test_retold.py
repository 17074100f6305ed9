"""Multi-rank tests of torch's own suites, retold: what each asks there, in the fewest words that it takes here.

Their names there: `TestClipGradNormWorldSize4` (fully_shard), `TestDTensorReshardPlacementChange` (checkpoint) and
`test_batch_isend_irecv_gloo_tags` (distributed_test.py); each starts new processes for every test.
"""

import copy
import unittest

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


@pytest.mark.world_size(4)
@pytest.mark.parametrize("norm_type", [2, 1, float("inf")])
def test_a_sharded_models_gradient_is_clipped_as_a_whole_ones(ranks, norm_type):
    generator = ranks.seeded()
    whole = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3)).double()
    sharded = copy.deepcopy(whole)
    mesh = ranks.mesh(replicate=2, shard=2)
    for module in (sharded[0], sharded[2], sharded):
        fully_shard(module, mesh=mesh)
    rows = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    whole(rows).square().sum().backward()
    sharded(rows[2 * ranks.rank : 2 * ranks.rank + 2]).square().sum().mul(ranks.world_size).backward()
    limit = 0.25 * torch.nn.utils.get_total_norm([each.grad for each in whole.parameters()], norm_type).item()
    norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), limit, norm_type) for model in (whole, sharded)]
    torch.testing.assert_close(norms[1].full_tensor(), norms[0])
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), one.grad)


PLACEMENTS = ([Shard(0)], [Shard(1)], [Replicate()])


@pytest.mark.world_size(2)
class TestCheckpoint(unittest.TestCase):
    """As there a TestCase: it keeps its form."""

    def test_a_checkpoint_loads_into_any_placement(self) -> None:
        whole, mesh = torch.arange(35.0).reshape(5, 7), self.ranks.mesh()
        for number, saved in enumerate(PLACEMENTS):
            path = self.ranks.tmp_path / str(number)
            dcp.save({"weight": distribute_tensor(whole, mesh, saved)}, checkpoint_id=path)
            for wanted in PLACEMENTS:
                loaded = distribute_tensor(torch.zeros(5, 7), mesh, wanted)
                dcp.load({"weight": loaded}, checkpoint_id=path)
                with self.subTest(saved=saved, wanted=wanted):
                    assert isinstance(loaded, DTensor)
                    assert torch.equal(loaded.full_tensor(), whole)


@pytest.mark.world_size(3)
def test_every_rank_sends_to_every_other_at_once_and_tags_tell_messages_apart(ranks):
    received, operations = {}, []
    for peer in set(range(3)) - {ranks.rank}:
        for tag in (1, 2):
            sent = torch.full((3,), 100.0 * ranks.rank + tag)
            received[peer, tag] = torch.zeros(3)
            operations.append(dist.P2POp(dist.isend, sent, peer, tag=tag))
            operations.insert(0, dist.P2POp(dist.irecv, received[peer, tag], peer, tag=tag))
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    for (peer, tag), message in received.items():
        assert message.tolist() == [100 * peer + tag] * 3
