"""L9: a frozen parameter is bit-equal after training, whatever the optimizer does to the others."""

import pytest
import torch

from tests.fixtures.models import build_pack, save_model
from tests.fixtures.runs import weights_of
from trainer.arguments.groups import ModelArguments
from trainer.model.load import load_model
from trainer.model.loss import token_loss_sum

PATTERNS = {
    "embeddings": ["embed_tokens"],
    "first block": [r"layers\.0\."],
    "all but the head": ["^model"],
    "norms and one matrix": ["norm", r"1\.mlp\.up_proj"],
}


def train(model, num_steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(num_steps):
        token_loss_sum(model, build_pack([7, 4], seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_training_moves_only_what_is_not_frozen(directory, patterns, mesh=None, **options):
    args = ModelArguments(model_name_or_path=str(directory), freeze_patterns=patterns, **options)
    model = load_model(args, None, mesh, seed=0)
    before = weights_of(model)
    train(model)
    moved = {name for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert 0 < len(moved) < len(before)


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_frozen_parameters_do_not_move(patterns, tmp_path):
    save_model(tmp_path)
    check_training_moves_only_what_is_not_frozen(tmp_path, patterns)


@pytest.mark.parametrize("pattern", ["lm_head", "embed_tokens"])
def test_freezing_either_name_of_a_tied_weight_freezes_it(pattern, tmp_path):
    save_model(tmp_path, "llama_tied")
    check_training_moves_only_what_is_not_frozen(tmp_path, [pattern])


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_frozen_parameters_do_not_move_with(options, tmp_path):
    save_model(tmp_path)
    check_training_moves_only_what_is_not_frozen(tmp_path, PATTERNS["embeddings"], **options)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_frozen_parameters_do_not_move_when_sharded(patterns, ranks):
    if ranks.is_lead:
        save_model(ranks.tmp_path)
    ranks.barrier()
    check_training_moves_only_what_is_not_frozen(ranks.tmp_path, patterns, ranks.mesh())
