"""What a CPU can tell of the path that a GPU takes, and, where there is one, that the host never waits for it."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tests.fixtures import tolerances
from tests.fixtures.models import build_model, build_pack, prepared_for_packs, tiny_llama
from tests.fixtures.runs import build_trainer, random_token_samples
from tests.fixtures.varlen import NeverReads
from trainer.config.arguments import TrainingArguments
from trainer.config.groups import ModelArguments
from trainer.data.loader import to_device
from trainer.errors import ModelError, UsageError
from trainer.model.attention import attention_settings, choose_attention, packed_sdpa
from trainer.model.borrowing import Borrowing
from trainer.model.build import prepare_model
from trainer.model.fsdp import PRODUCTS, checkpoint_activations, compile_blocks
from trainer.model.isolation import check_isolation
from trainer.model.loss import token_loss_sum
from trainer.model.prepared import Prepared
from trainer.model.varlen import varlen

ROOT = Path(__file__).resolve().parent.parent
GATHERING = ("fsdp::all_gather_copy_in",)
LENGTHS = [5, 1, 9, 3]
PACKS = [[7, 9], [5, 6, 7], [12], [3, 4, 5, 6], [20, 1], [8] * 5, [30, 2], [2, 2], [11, 12, 13], [40]]


def as_on_a_gpu(model: PreTrainedModel, *, by_autocast: bool = True, **options: Any) -> Prepared:
    """A model as one GPU trains it: float32 weights under autocast, or bfloat16 ones as FSDP2 gathers them."""
    prepared = prepared_for_packs(model.train(), bf16=True, **options)
    attention = choose_attention(model, "auto", "cuda", torch.bfloat16)
    settings = [*prepared.borrowing.settings, *attention_settings(model, attention)]
    if not by_autocast:
        model.to(torch.bfloat16)
    return replace(prepared, uses_autocast=by_autocast, attention=attention, borrowing=Borrowing(settings))


class CountedOperations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._counts[function.name().partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    def of(self, names: Collection[str]) -> int:
        return sum(self._counts[name] for name in names)


class Layer(torch.nn.Module):
    """An attention layer as the attention function sees it."""

    is_causal = True


class TestVarlen:
    @pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"scaling": 0.3}], ids=str)
    def test_varlen_attends_as_the_loop_over_samples_does(self, options):
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, heads, sum(LENGTHS), 8) for heads in (4, 2, 2)]
        inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
        borders = torch.tensor([0, 5, 6, 15, 18], dtype=torch.int32)
        told = {"cu_seq_lens_q": borders, "max_length_q": max(LENGTHS), **options}
        outputs = [attend(Layer(), *inputs, None, **told)[0] for attend in (varlen, packed_sdpa)]
        gradients = [torch.autograd.grad(output.float().square().sum(), inputs) for output in outputs]
        tolerance = {"rtol": tolerances.LOSS_BF16, "atol": tolerances.LOSS_BF16}
        torch.testing.assert_close(*outputs, **tolerance)
        torch.testing.assert_close(*gradients, **tolerance)

    @pytest.mark.parametrize("by_autocast", [True, False])
    @pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
    def test_varlen_gives_the_loss_and_gradients_of_the_loop(self, name, by_autocast):
        pack, found = build_pack(LENGTHS), []
        for device in ("cuda", "cpu"):
            model = build_model(name).train()
            prepared = as_on_a_gpu(model, by_autocast=by_autocast)
            if device == "cpu":
                settings = attention_settings(model, choose_attention(model, "auto", "cpu"))
                prepared = replace(prepared, borrowing=Borrowing(settings))
            loss = token_loss_sum(prepared, pack)
            loss.backward()
            found.append((loss, torch.cat([p.grad.flatten().float() for p in model.parameters()])))
        (loss, gradient), (expected, expected_gradient) = found
        assert loss.item() == pytest.approx(expected.item(), rel=tolerances.LOSS_BF16)
        assert (gradient - expected_gradient).norm() < tolerances.GRADIENT_BF16 * expected_gradient.norm()


@contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """Raises where the host would wait for the device."""
    if device.type == "cpu":
        with NeverReads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.world_size(1, 2)
@pytest.mark.backend("gloo", "nccl")
def test_the_host_never_waits_inside_the_micro_batch_loop(ranks, tmp_path: Path):
    samples = random_token_samples([9, 3, 17, 5, 30, 2, 11, 7])
    trainer = build_trainer(tmp_path, samples, tiny_llama(), bf16=True, batch_size=8, max_tokens_per_rank=32)
    attention = choose_attention(trainer.model, "auto", "cuda", torch.bfloat16)
    task = trainer.task
    borrowing = Borrowing(attention_settings(trainer.model, attention))
    task.prepared = replace(task.prepared, attention=attention, borrowing=borrowing)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch) > 1
    assert batch[0]["input_ids"].is_pinned() == (ranks.device.type == "cuda")
    for i in range(len(batch)):
        task.backward(batch, i)  # warms up
    with never_waiting(ranks.device):
        losses = [task.backward(batch, i)["loss"] for i in range(len(batch))]
    assert all(loss.isfinite() for loss in losses)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("by_autocast", [True, False])
def test_products_that_are_kept_are_not_computed_again(name, by_autocast):
    def multiply(**options: Any) -> tuple[int, float, torch.Tensor]:
        model = build_model(name)
        prepared = as_on_a_gpu(model, by_autocast=by_autocast, gradient_checkpointing=bool(options), **options)
        with prepared.in_use(), CountedOperations() as counted:
            token_loss_sum(prepared, build_pack(LENGTHS)).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return counted.of(PRODUCTS), counted.of({"aten::rsqrt"}), gradient

    plain = multiply()
    kept, recomputed = (multiply(gradient_checkpointing_keeps=keeps) for keeps in ("products", "nothing"))
    assert kept[0] == plain[0] < recomputed[0]
    assert plain[1] < kept[1] == recomputed[1]
    assert torch.equal(kept[2], plain[2])
    assert torch.equal(recomputed[2], plain[2])


def test_what_is_kept_and_reentrance_exclude_each_other():
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ModelError, match="use_reentrant exclude each other: leave the latter out"):
        checkpoint_activations(tiny_llama(), TrainingArguments(**options, gradient_checkpointing_keeps="products"))
    with pytest.raises(UsageError, match="no effect without gradient_checkpointing"):
        TrainingArguments(gradient_checkpointing_keeps="products")


@pytest.mark.world_size(2)
@pytest.mark.backend("gloo", "nccl")
def test_a_block_gathers_the_next_ones_weights_before_it_computes(ranks):
    model = tiny_llama(num_hidden_layers=3).to(ranks.device)
    prepared = prepare_model(model, ModelArguments(), ranks.mesh(), ranks.device, is_packed=True)
    pack, gathered = to_device(build_pack(LENGTHS), ranks.device), []
    token_loss_sum(prepared, pack).backward()
    with CountedOperations() as counted:
        for block in model.model.layers:
            block.mlp.register_forward_pre_hook(lambda *_: gathered.append(counted.of(GATHERING)))
        token_loss_sum(prepared, pack).backward()
    assert gathered == [3, 4, 4]  # the root, the first block and the second; the third; no more


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own tracing
class TestCompilation:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("by_autocast", [True, False])
    def test_ten_lengths_cost_one_graph_and_the_probes_none(self, by_autocast):
        compiler = torch._dynamo.testing.CompileCounter()
        prepared = as_on_a_gpu(tiny_llama(), by_autocast=by_autocast)
        compile_blocks(prepared.model, backend=compiler)
        check_isolation(prepared)
        assert compiler.frame_count == 0
        for lengths in PACKS:
            token_loss_sum(prepared, build_pack(lengths)).backward()
        assert compiler.frame_count == 1
        assert not counters["graph_break"]

    def test_ten_lengths_on_a_cpu_cost_what_the_first_does(self):
        model, compiler = tiny_llama().train(), torch._dynamo.testing.CompileCounter()
        prepared = prepared_for_packs(model)
        compile_blocks(model, backend=compiler)
        counts = []
        for lengths in PACKS:
            token_loss_sum(prepared, build_pack(lengths)).backward()
            counts.append(compiler.frame_count)
        assert len(set(counts)) == 1


GPU_ONLY_GROUP = """
import sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from trainer.distributed.group import Group
from trainer.distributed.topology import Topology

def run(rank, folder):
    # As nccl alone: the group has a back end for GPUs and none for what lies on the CPU.
    dist.init_process_group("cuda:gloo", store=dist.FileStore(folder + "/store", 2), rank=rank, world_size=2)
    group = Group(Topology(rank, 2, rank, 2), torch.device("cpu"))
    assert group.sum([1.0 + rank, 5.0]) == [3.0, 10.0]
    assert group.any(rank == 1) and not group.any(False)
    assert group.from_main([7, 8] if rank == 0 else []) == [7, 8]
    assert group.first_error(ValueError("no") if rank == 1 else None) == "rank 1: ValueError: no"
    assert [len(part) for part in group.gather(torch.zeros(rank + 1))] == [1, 2]
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(run, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_flags_counts_and_errors_travel_between_cpus_where_the_group_serves_gpus_alone(tmp_path: Path):
    script = tmp_path / "gpu_only.py"
    script.write_text(GPU_ONLY_GROUP)
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
