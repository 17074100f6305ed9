"""Bugs that trainers have had, as small edits of ours, each with the test that must notice.

`python -m tests.mutants.run` applies one after the other to a copy of the repository. `old` stands exactly once in
`function`; tests/mutants/test_declarations.py checks that in the default suite, so that an edit moves with its code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """One edit: in this function of this file, the first text becomes the second."""

    what: str
    law: str
    file: str
    function: str
    old: str
    new: str
    test: str


_STEP = "trainer/training/step.py"
_PACKED = "trainer/training/packed_task.py"
_LOADER = "trainer/data/loader.py"
_LOSS = "trainer/model/loss.py"
_HEAD = "trainer/model/cross_entropy.py"
_ORDER = "trainer/data/order.py"
_COLLATOR_TESTS = "tests/test_data_loader.py::TestMaxTokensPerRankCollator"
_INVARIANCE = "tests/laws/test_layout_invariance.py"
_ACCOUNTING = "tests/laws/test_accounting.py"
_CHECKPOINTS = "trainer/training/checkpoints.py"

BUGS = [
    Bug(
        "the first label of a packed sample is trained across the border",
        "L1 isolation",
        _LOADER,
        "collate_pack",
        "labels[starts] = IGNORE_INDEX",
        "labels[starts[:1]] = IGNORE_INDEX",
        f"{_COLLATOR_TESTS}::test_layout_by_hand",
    ),
    Bug(
        "positions of a packed sample go on from its neighbour's",
        "L1 isolation",
        _LOADER,
        "collate_pack",
        "np.arange(num_tokens) - np.repeat(starts, lengths)",
        "np.arange(num_tokens)",
        f"{_COLLATOR_TESTS}::test_layout_by_hand",
    ),
    Bug(
        "packed samples attend to each other",
        "L1 isolation",
        "trainer/model/attention.py",
        "_attend_apart",
        "if len(borders) <= 2:",
        "if len(borders) >= 2:",
        "tests/laws/test_isolation.py::test_packed_logits_are_bit_equal_to_the_sample_alone",
    ),
    Bug(
        "the loss is a mean over the tokens of each micro-batch",
        "L2 layout invariance",
        _PACKED,
        "pack_loss",
        '/ micro_batch["batch_num_loss_counted_tokens"]',
        '/ max(micro_batch["num_loss_counted_tokens"], 1)',
        f"{_INVARIANCE}::test_gradient_is_that_of_one_sample_after_another",
    ),
    Bug(
        "gradients are averaged over ranks where they must be summed",
        "L2 layout invariance",
        "trainer/model/fsdp.py",
        "shard_model",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(float(mesh.size()))",
        f"{_INVARIANCE}::test_gradient_is_that_of_one_sample_after_another",
    ),
    Bug(
        "gradients of whole parameters are averaged over ranks",
        "L2 layout invariance",
        "trainer/optim/gradients.py",
        "sum_whole_gradients",
        "parameter.grad = gradient.view_as(parameter)",
        "parameter.grad = (gradient / group.world_size).view_as(parameter)",
        "tests/trainer/test_trainer.py::TestNumbers::test_a_run_is_the_run_by_hand",
    ),
    Bug(
        "gradients are not zeroed after a step",
        "L2 layout invariance",
        _STEP,
        "take_step",
        "step_schedule(schedule)\n    optimizer.zero_grad()",
        "step_schedule(schedule)",
        f"{_INVARIANCE}::test_a_run_is_the_run_by_hand",
    ),
    Bug(
        "gradients are not clipped",
        "L7 accounting",
        _STEP,
        "take_step",
        "clip(model.parameters(), norm, engine.max_grad_norm)",
        "clip(model.parameters(), norm, 0.0)",
        f"{_INVARIANCE}::test_a_run_is_the_run_by_hand",
    ),
    Bug(
        "each gradient is scaled up to the norm where it is smaller",
        "L7 accounting",
        "trainer/optim/gradients.py",
        "clip",
        ".clamp(max=1.0)",
        "",
        "tests/test_training_components.py::TestGradients::test_clipping_scales_down_and_never_up",
    ),
    Bug(
        "the logged gradient norm is that of clipped gradients",
        "L7 accounting",
        _STEP,
        "take_step",
        "return StepResult(loss, grad_norm, learning_rate, *signals, more)",
        "return StepResult(loss, min(grad_norm, engine.max_grad_norm or grad_norm), learning_rate, *signals, more)",
        f"{_ACCOUNTING}::test_loss_and_gradient_norm_are_those_by_hand",
    ),
    Bug(
        "the schedule moves with every micro-batch",
        "L7 accounting",
        _STEP,
        "accumulate_gradients",
        "if not is_last:",
        "advance(engine.schedule)\n        if not is_last:",
        f"{_ACCOUNTING}::test_the_learning_rate_is_the_closed_form",
    ),
    Bug(
        "the learning rate of a step is read after the schedule has moved",
        "L7 accounting",
        _STEP,
        "take_step",
        "return StepResult(loss, grad_norm, learning_rate, *signals, more)",
        "return StepResult(loss, grad_norm, float(schedule.get_last_lr()[0]), *signals, more)",
        f"{_ACCOUNTING}::test_the_learning_rate_is_the_closed_form",
    ),
    Bug(
        "a NaN loss is stepped on",
        "L10 loud failure",
        _STEP,
        "find_non_finite",
        "if not math.isfinite(loss):",
        "if math.isinf(loss):",
        "tests/test_training_components.py::TestGradients::test_a_non_finite_number_is_named",
    ),
    Bug(
        "norms and biases decay",
        "L7 accounting",
        "trainer/optim/groups.py",
        "by_decay",
        '"weight_decay": 0.0}',
        '"weight_decay": weight_decay}',
        "tests/test_optimizers.py::TestGroups::test_norms_and_biases_do_not_decay",
    ),
    Bug(
        "every epoch has the same order",
        "L3 conservation",
        _ORDER,
        "epoch_order",
        "np.array([seed, epoch], np.uint64)",
        "np.array([seed, 0], np.uint64)",
        "tests/laws/test_conservation.py::test_epochs_cover_the_data_in_different_orders",
    ),
    Bug(
        "a resumed epoch begins again from its first sample",
        "L4 resume",
        _ORDER,
        "_rest_of",
        "for block in range(start, self.len_data, BLOCK):",
        "for block in range(0, self.len_data, BLOCK):",
        "tests/test_data_loader.py::TestEpochSampler::test_start_resumes_where_it_stopped",
    ),
    Bug(
        "the last partial micro-batch of an epoch is dropped",
        "L3 conservation",
        "trainer/data/batched.py",
        "num_trained",
        "if self.drop_last else num_samples",
        "if self.drop_last or num_samples > self.per_micro_batch else num_samples",
        "tests/trainer/test_trainer.py::TestSteps::test_there_are_as_many_as_counted_by_hand",
    ),
    Bug(
        "a rank without work counts its placeholder's tokens",
        "L7 accounting",
        _LOADER,
        "_micro_batch",
        'micro_batch["num_tokens"] = 0',
        'micro_batch["num_tokens"] = len(self._dummy[0])',
        f"{_COLLATOR_TESTS}::test_a_rank_without_work_gets_a_placeholder",
    ),
    Bug(
        "loss tokens are counted before the causal shift",
        "L7 accounting",
        _LOADER,
        "__init__",
        "(labels[1:] != IGNORE_INDEX).sum()",
        "(labels != IGNORE_INDEX).sum()",
        _COLLATOR_TESTS,
    ),
    Bug(
        "logits are compared with the token at their own position",
        "L7 accounting",
        _LOSS,
        "trained_positions",
        "positions[:, 0], following[positions[:, 0]]",
        'positions[:, 0], micro_batch["input_ids"][0, positions[:, 0]]',
        "tests/test_loss.py::test_loss_head_and_gradients_are_transformers_own",
    ),
    Bug(
        "the evaluation loss is a mean over samples, not over tokens",
        "L8 evaluation",
        "trainer/training/evaluate.py",
        "evaluation_loss",
        '"loss": totals["loss"] / num_loss_tokens',
        '"loss": totals["loss"] / num_samples',
        f"{_ACCOUNTING}::test_evaluation_counts_every_sample_once",
    ),
    Bug(
        "label smoothing puts its share on the target too often",
        "L2 layout invariance",
        _HEAD,
        "_piece_losses",
        "(1 - label_smoothing) * expected",
        "expected",
        "tests/test_loss.py::test_label_smoothing_is_torchs",
    ),
    Bug(
        "the scale that a model gives its logits is left out of the loss",
        "L5 fidelity",
        _HEAD,
        "apply",
        "scaled = values if self.scale == 1.0 else values * self.scale",
        "scaled = values",
        "tests/test_loss.py::test_pieces_equal_whole_logits_in_float64",
    ),
    Bug(
        "the router loss counts once for each micro-batch",
        "L2 layout invariance",
        _LOSS,
        "token_loss_sum",
        'share = micro_batch["num_tokens"] / micro_batch["batch_num_tokens"]',
        "share = 1.0",
        "tests/test_loss.py::test_a_router_loss_weighs_what_its_tokens_weigh_in_the_global_batch",
    ),
    Bug(
        "tied weights are exported twice",
        "L5 fidelity",
        "trainer/model/export.py",
        "_gather",
        "if name in tied or is_osft_parameter(name):",
        "if is_osft_parameter(name):",
        "tests/laws/test_fidelity.py::test_tied_weights_are_stored_once",
    ),
    Bug(
        "the end of a turn is not trained",
        "L15 trained as generated",
        "trainer/data/spans.py",
        "_turn",
        "stop = at + len(end.token)",
        "stop = at",
        "tests/test_chat.py::test_every_assistant_turn_and_its_end_are_trained",
    ),
    Bug(
        "a token that a trained span begins in is not trained",
        "L15 trained as generated",
        "trainer/data/encode.py",
        "_mask",
        'np.searchsorted(ends, edges[:, 0], side="right")',
        'np.searchsorted(starts, edges[:, 0], side="right")',
        "tests/test_chat.py",
    ),
    Bug(
        "a damaged checkpoint passes for whole",
        "L4 resume",
        "trainer/checkpoint/verify.py",
        "_damage",
        "None if digest.hexdigest() == fact.sha256 else",
        "None if digest.hexdigest() else",
        "tests/test_checkpoint_files.py::test_damage_to_any_file_shows",
    ),
    Bug(
        "random generators are not restored",
        "L4 resume",
        "trainer/checkpoint/run_state.py",
        "restore_random_state",
        'torch.set_rng_state(_bytes(state["torch"]))',
        '_bytes(state["torch"])',
        "tests/laws/test_resume.py::test_the_end_is_the_same_from_everywhere",
    ),
    Bug(
        "the optimizer starts anew after a resume",
        "L4 resume",
        _CHECKPOINTS,
        "restore",
        "restore_optimizer(self.engine.optimizer, self.engine.model, form, stored, kept)",
        "_ = form, kept",
        "tests/laws/test_resume.py::test_the_end_is_the_same_from_everywhere",
    ),
    Bug(
        "the best checkpoint is removed with the old ones",
        "L14 nothing foreign destroyed",
        "trainer/checkpoint/writer.py",
        "_retire",
        "manifest.retire(self.folder, self.limit, self.best_step, self.run_id)",
        "manifest.retire(self.folder, self.limit, None, self.run_id)",
        "tests/trainer/test_trainer_checkpointing.py::TestTheBestModel::test_the_limit_spares_it_where_later_ones_are_worse",
    ),
    Bug(
        "gradients of protected directions are not projected",
        "L9 frozen stays frozen",
        _STEP,
        "take_step",
        "osft.project_gradients()",
        "pass",
        "tests/test_osft_runs.py::test_the_gradient_norm_is_that_of_what_moves",
    ),
    Bug(
        "updates of protected directions are not taken back",
        "L9 frozen stays frozen",
        _STEP,
        "take_step",
        "osft.project_updates()",
        "pass",
        "tests/test_osft_runs.py::test_a_run_moves_what_is_free_and_nothing_else",
    ),
    Bug(
        "fp16 gradients are clipped before the loss scale is taken out",
        "L7 accounting",
        "trainer/optim/gradients.py",
        "unscale",
        "torch._foreach_mul_(gradients, 1 / self.value)",
        "torch._foreach_mul_(gradients, 1.0)",
        "tests/trainer/test_trainer_precision.py",
    ),
    Bug(
        "a step that overflows at the smallest scale is tried for ever",
        "L10 loud failure",
        "trainer/optim/gradients.py",
        "must_shrink",
        "or self.value <= 1",
        "or self.value <= 0",
        "tests/trainer/test_trainer_precision.py",
    ),
    Bug(
        "a pack is filled beyond the budget",
        "L3 conservation",
        "trainer/data/packing.py",
        "batch_lengths_to_minibatches",
        "tokens[chosen] + length > max_tokens_per_rank",
        "tokens[chosen] > max_tokens_per_rank",
        "tests/test_batch_lengths_to_minibatches.py::TestBatchLengthsToMinibatches",
    ),
]
