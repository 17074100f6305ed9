"""The plain trainer: builds optimizer, schedule, checkpoints and callbacks around a task from the options.

The command line uses it as it is. `trainer.hf.trainer.Trainer` adds the surface and the override points of
transformers' Trainer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers.trainer_callback import CallbackHandler, TrainerCallback
from transformers.trainer_utils import TrainOutput

from trainer.checkpoint.run_state import data_fingerprint, tokenizer_fingerprint
from trainer.config.arguments import TrainingArguments
from trainer.data.batched import BatchedLoader
from trainer.data.length import RunLength
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.borrowing import embedding_noise
from trainer.model.export import export_model
from trainer.model.lora import base_fingerprint
from trainer.model.precision import emulates_bfloat16
from trainer.optim.adapters import averaged_weights
from trainer.optim.build import build_optimizer
from trainer.optim.gradients import LossScale
from trainer.optim.groups import parameter_groups
from trainer.optim.schedules import build_schedule, feed_metric
from trainer.training.agreement import (
    SAME_LENGTHS,
    SAME_OPTIONS,
    Facts,
    agree,
    data_facts,
    model_facts,
    option_facts,
    version_facts,
    weight_facts,
)
from trainer.training.callbacks import (
    DefaultFlowCallback,
    Events,
    ExportCallback,
    MetricsFile,
    RunState,
    reporters,
)
from trainer.training.checkpoints import Checkpoints, load_best_weights
from trainer.training.evaluate import best_metric, check_best_of_several, improves, more_is_better
from trainer.training.generate import Answer, write_answers
from trainer.training.loop import Run, train
from trainer.training.metrics import nominal_tflops
from trainer.training.nonfinite import CrashRecorder
from trainer.training.osft import start
from trainer.training.out_of_memory import Snapshot, free_cached_memory, is_out_of_memory, next_batch_size
from trainer.training.packed_task import Measure, PackedTask
from trainer.training.process import set_up_process, write_record
from trainer.training.run_dir import WEIGHTS, open_output_dir, sole_run
from trainer.training.scores import ScoreAnswers
from trainer.training.step import Engine
from trainer.training.task import Task, check_names, check_optimizer, describe_model

logger = logging.getLogger(__name__)

Callbacks = Sequence[TrainerCallback | type[TrainerCallback]]


class CoreTrainer:
    """Trains a task: by default a causal language model on packed token samples.

    What is not given is built from `args`: the model from model_name_or_path or model_config, the tokenizer likewise,
    the data from data_path.

    Args:
        model: a transformers causal LM.
        args: every option.
        train_dataset, eval_dataset: token data: a TokenStore or a JsonlDataset; held-out data may be a dict of several.
        processing_class: the tokenizer.
        callbacks: transformers callbacks, called after the trainer's own.
        optimizers: optimizer and learning-rate schedule to use instead of those that the options name.
        optimizer_cls_and_kwargs: class and settings of the optimizer; or, for the class, one whose objects make an
            optimizer of a model and the settings.
        score_answers: from all answers to held-out chats to numbers by name, which evaluations log.

    Raises:
        UsageError, ModelError, DataError: see the messages.
    """

    has_checkpoint_twins = False  # whether scripts for transformers look for checkpoint-N

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Callbacks = (),
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        score_answers: ScoreAnswers | None = None,
    ) -> None:
        self.args = args if args is not None else TrainingArguments()
        if not isinstance(self.args, TrainingArguments):
            given = f"{type(args).__module__}.{type(args).__qualname__}"
            raise UsageError(f"args is a {given}: give trainer.TrainingArguments")
        self.args.check()  # options may have been assigned since they were built
        check_names(self.args)
        self.group = Group.join(self.args)
        set_up_process(self.args, self.group.device)
        self.processing_class = processing_class
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.score_answers = score_answers
        self._made_schedule = False  # by us, not given
        with self.group.naming_faults(lambda: "before the first step"):
            agree(self.group, lambda: version_facts() | option_facts(self.args) | weight_facts(model))
            self.task = self.build_task(model, train_dataset, eval_dataset)
        self.processing_class = self.task.processing_class
        self.train_dataset, self.eval_dataset = self.task.train_dataset, self.task.eval_dataset
        check_best_of_several(self.args, self.eval_dataset)
        torch.manual_seed(self.args.seed + self.group.rank)  # dropout differs between ranks
        self.stop_signal: int | None = None  # the signal that ended the last run, if one did
        self.is_in_train = False
        self._has_trained = False
        self._exports: dict[Path, int] = {}  # folder -> step whose weights it holds
        self._ignored_outputs: list[str] | None = None  # of the model, in evaluations while training
        handler = CallbackHandler(
            [DefaultFlowCallback(), *self.display(), *reporters(self.args.report_to), *callbacks],
            self.model,
            self.processing_class,
            None,
            None,
        )
        own = [MetricsFile(), ExportCallback(lambda: self.save_model(self.export_folder()))]
        self.events = Events(self.args, self._new_state(), handler, own)
        self.scale = LossScale(self.events.state, is_on=False)
        self.events.emit("on_init_end")

    def build_task(
        self, model: nn.Module | None, train_dataset: Any, eval_dataset: Any, measure: Measure | None = None
    ) -> Task:
        """Build what is trained; `measure` returns what else evaluations measure."""
        data = train_dataset, eval_dataset
        return PackedTask(
            self.args, self.group, model, self.processing_class, *data, self.score_answers, measure=measure
        )

    def display(self) -> list[TrainerCallback]:
        """Return callbacks that show progress; the command line brings its own."""
        return []

    @property
    def model(self) -> Any:
        """The model that is trained; never wrapped."""
        return self.task.model

    @property
    def state(self) -> RunState:
        """Where the run stands, and what was logged."""
        return self.events.state

    @property
    def answers(self) -> dict[int, list[Answer]]:
        """Step -> answers to held-out chats of the evaluation after it."""
        return self.task.answers

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Train from the start, or from a checkpoint, to the end.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True, the newest whole one in output_dir; "auto", the same,
                or from the start if there is none; by default the value of the option of that name.

        Returns:
            Steps taken, mean loss (over all loss tokens; over steps where these are not known), and throughput.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
            CheckpointError: there is no whole checkpoint to continue from, or one could not be written.
        """
        self.args.check()
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        snapshot = Snapshot(self.model) if self.args.auto_find_batch_size else None
        while True:
            if self._has_trained:
                self.begin_anew()
            run = self._build_run(asked)
            with sole_run(self.args, self.group):
                with self.group.naming_faults(lambda: "before the first step"):
                    self._open(run, asked)
                self._run_started, self.is_in_train, self._has_trained = perf_counter(), True, True
                try:
                    with self.task.prepared.in_use(), embedding_noise(self.model, self.args.neftune_noise_alpha):
                        train(run)
                    break
                except RuntimeError as error:
                    if snapshot is None or not is_out_of_memory(error):
                        raise
                finally:
                    self.is_in_train = False
            # Out of the except block: the error's traceback holds the tensors of the step that failed.
            free_cached_memory()
            snapshot.restore()
            self.optimizer = None
            self.task.train_batch_size = next_batch_size(self.task.train_batch_size)
            logger.warning("out of memory: trying again with %d samples a micro-batch", self.task.train_batch_size)
        with self.group.naming_faults(lambda: f"after step {self.state.global_step}"):
            self.group.barrier()  # what the main rank wrote is there for all
        self.stop_signal = run.stop_signal
        return TrainOutput(self.state.global_step, self._train_metrics["train_loss"], self._train_metrics)

    def begin_anew(self) -> None:
        """Forget an earlier run: the second one counts from 0, with a schedule of its own."""
        self.events.state = self._new_state()
        self._exports.clear()
        if self._made_schedule:
            self.lr_scheduler = None

    def _new_state(self) -> RunState:
        return RunState(
            is_world_process_zero=self.group.is_main,
            is_local_process_zero=self.group.topology.is_local_main,
            train_batch_size=self.task.train_batch_size,
        )

    def _build_run(self, asked: bool | str | None = None) -> Run:
        loader = self.get_train_dataloader()
        batches = self.task.train_batches(loader)
        length = self.task.length(batches)
        with self.group.naming_faults(lambda: "before the first step"):
            agree(self.group, lambda: self._facts(loader, length, asked))
        self.create_optimizer_and_scheduler(length.num_steps)
        optimizer, schedule = self.create_optimizer(), self.create_scheduler(length.num_steps)
        check_optimizer(optimizer, self.model)
        self.scale = LossScale(self.state, is_on=self.args.fp16)
        handler = self.events.handler
        handler.model, handler.train_dataloader = self.model, loader
        handler.optimizer, handler.lr_scheduler = optimizer, schedule
        engine = Engine(
            model=self.model,
            task=self.task,
            optimizer=optimizer,
            schedule=schedule,
            group=self.group,
            max_grad_norm=self.args.max_grad_norm,
            emit=self.events.emit,
            scale=self.scale,
            osft=self.task.osft,
        )
        is_async = self.task.saves_asynchronously if self.args.async_save is None else self.args.async_save
        identify = functools.cache(self._fingerprints)  # once a run: nothing that it names changes, and a base is large
        checkpoints = Checkpoints(self.args, engine, self.events, batches, identify, is_async=is_async)
        checkpoints.has_twins = self.has_checkpoint_twins
        return Run(
            args=self.args,
            engine=engine,
            batches=batches,
            length=length,
            events=self.events,
            evaluate=self._evaluate_and_compare,
            checkpoints=checkpoints,
            crash=CrashRecorder(self.args, engine, self.state, checkpoints),
            log=self.log,
            finish=self._finish_run,
            nominal_tflops=nominal_tflops(self.group.device, self.task.prepared.compute_dtype),
        )

    def _facts(self, loader: DataLoader[Any], length: RunLength, asked: bool | str | None) -> Facts:
        """Return what all ranks must have in common to train."""
        lengths = {
            "steps of the run": length.num_steps,
            "steps of an epoch": length.steps_per_epoch,
            "samples of a micro-batch": self.task.train_batch_size,
        }
        facts: Facts = {name: (value, SAME_LENGTHS) for name, value in lengths.items()}
        facts["resume_from_checkpoint"] = Path(asked).name if isinstance(asked, str) else bool(asked), SAME_OPTIONS
        if self.task.collate is None or isinstance(loader, BatchedLoader):  # else each rank may hold samples of its own
            facts |= data_facts("train_dataset", self.train_dataset)
        facts |= data_facts("eval_dataset", self.eval_dataset)
        return option_facts(self.args) | model_facts(self.args, self.model, self.processing_class) | facts

    def _fingerprints(self) -> dict[str, str | None]:
        """Return what identifies data and tokenizer: a checkpoint records it, and a resumed run must agree."""
        return {
            "data": data_fingerprint(self.train_dataset),
            "eval_data": data_fingerprint(self.eval_dataset),
            "base_weights": base_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.processing_class),
        }

    def _open(self, run: Run, asked: bool | str | None) -> None:
        """Open the output folder for a new run, or bring the run to where its checkpoint stands."""
        source = run.checkpoints.find(asked)
        if source is None:
            keeps_older = self.task.keeps_older_runs or asked == "auto"
            open_output_dir(self.args, self.group, keeps_older=keeps_older)
        else:
            run.length = run.checkpoints.restore(source, run.length)
        if self.group.is_main:
            write_record(Path(self.args.output_dir), self.args.seed)
            for line in self._describe(run, source):
                logger.info("%s", line)
            is_bfloat16 = self.task.prepared.compute_dtype == torch.bfloat16
            if is_bfloat16 and self.group.device.type == "cpu" and emulates_bfloat16():
                logger.warning(
                    "bf16: this processor has no instructions for bfloat16 and emulates them, many times slower than "
                    "float32; leave bf16 out here (`trainer doctor` times both)"
                )
        if self.task.osft is not None:
            self.log(start(self.task.osft, self.events, self.group))

    def _describe(self, run: Run, source: Path | None) -> list[str]:
        """Return the lines that a run opens with."""
        prepared = self.task.prepared
        attention = prepared.attention
        device, topology = self.group.device, self.group.topology
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        num_steps, steps_per_epoch = run.length.num_steps, run.length.steps_per_epoch
        per_epoch = "" if steps_per_epoch is None else f", {steps_per_epoch:,} an epoch"
        optimizer = type(run.engine.optimizer).__name__
        lines = [
            describe_model(self.model),
            f"computes in {prepared.compute_dtype}"
            + ("" if attention is None else f", attention: {attention.name} ({attention.reason})")
            + (", blocks compiled" if self.args.torch_compile else ""),
            f"device: {device.type}{name}, {topology.world_size} rank(s), {topology.local_world_size} on this node, "
            f"{torch.get_num_threads()} threads",
            *self.task.describe(),
            f"plan: {'no end' if num_steps is None else f'{num_steps:,} steps'}{per_epoch}",
            f"optimizer: {optimizer}, learning rate {self.args.learning_rate:g}, {self.args.lr_scheduler_type}",
            f"output: {self.args.output_dir}",
        ]
        if source is not None:
            lines.append(f"resumes from {source}, after step {self.state.global_step:,}")
        return lines

    def _finish_run(self) -> None:
        """Log what the whole run did, and load the best weights if that was asked for."""
        if self.args.load_best_model_at_end:
            load_best_weights(self.model, self.create_optimizer(), self.state, self.group)
            self._exports.clear()
        self._train_metrics = self.state.train_metrics(perf_counter() - self._run_started)
        self.log(self._train_metrics)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the loss, and what else was asked for, on held-out samples.

        Args:
            eval_dataset: what to evaluate on instead of the Trainer's own; a dict of several is evaluated one by one,
                each with its name behind the prefix.
            ignore_keys: outputs of the model that are not predictions.
            metric_key_prefix: what the name of every metric begins with.

        Returns:
            `eval_loss`, what compute_metrics returns, `eval_runtime`, samples and steps per second; with token data
            also `eval_num_loss_tokens`, `eval_num_samples`, and `eval_exact_match` when that option is set.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, Mapping):
            metrics: dict[str, float] = {}
            answers: list[Answer] = []
            for name, part in dataset.items():
                chosen = name if eval_dataset is None else part
                metrics |= self.evaluate(
                    chosen, ignore_keys=ignore_keys, metric_key_prefix=f"{metric_key_prefix}_{name}"
                )
                answers += self.answers.pop(self.state.global_step, [])
            if answers:
                self.answers[self.state.global_step] = answers
            return metrics
        started = perf_counter()
        loader = self.get_eval_dataloader(eval_dataset)
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        with averaged_weights(self.optimizer):
            metrics, num_samples = self.task.evaluate(
                dataset, loader, self.state.global_step, metric_key_prefix, ignore_keys
            )
        metrics = metrics | self.speed_metrics(metric_key_prefix, perf_counter() - started, num_samples)
        self.log(metrics)
        self.events.emit("on_evaluate", metrics=metrics)
        return metrics

    def speed_metrics(self, prefix: str, seconds: float, num_samples: int) -> dict[str, float]:
        """Return the run time, samples and steps per second of an evaluation."""
        return {
            f"{prefix}_runtime": seconds,
            f"{prefix}_samples_per_second": num_samples / seconds,
            f"{prefix}_steps_per_second": self.task.num_eval_batches(num_samples) / seconds,
        }

    def _evaluate_and_compare(self) -> dict[str, float]:
        """Evaluate during a run, and remember the best."""
        metrics = self.evaluate(ignore_keys=self._ignored_outputs)
        answers = self.answers.get(self.state.global_step)
        if answers and self.group.is_main:
            write_answers(Path(self.args.output_dir), self.state.global_step, answers)
        value = best_metric(self.args, metrics)
        state, control = self.state, self.events.control
        if value is not None and improves(self.args, value, state.best_metric):
            if self.args.export_best:
                state.best_model_checkpoint = str(self.save_model(self.export_folder()))
            state.best_metric, state.best_global_step = value, state.global_step
            control.should_save |= self.args.load_best_model_at_end or self.args.save_strategy == "best"
        assert self.lr_scheduler is not None
        feed_metric(self.lr_scheduler, value)
        return metrics

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Build the loader of training data: of this rank's micro-batches, for token data of its global batches."""
        if self.train_dataset is None:
            raise UsageError("nothing to train on: give train_dataset")
        return self.task.train_loader(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Build the loader of this rank's share of held-out samples; a name means one of a dict of data sets."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None:
            raise UsageError("nothing to evaluate on: give eval_dataset, validation_data_path or validation_split")
        return self.task.eval_loader(dataset)

    def create_optimizer_and_scheduler(self, num_training_steps: int | None) -> None:
        """Build the optimizer and its schedule, where they were not given."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer that the options name, or that `optimizer_cls_and_kwargs` says, if there is none yet."""
        model = self.model if model is None else model
        if self.optimizer is None and self.optimizer_cls_and_kwargs is not None:
            kind: Any
            kind, settings = self.optimizer_cls_and_kwargs
            if isinstance(kind, type) and issubclass(kind, Optimizer):
                self.optimizer = kind(parameter_groups(model, self.args), **settings)
            else:
                self.optimizer = kind()(model, **settings)
        elif self.optimizer is None:
            self.optimizer = build_optimizer(model, self.args)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int | None, optimizer: Optimizer | None = None) -> LRScheduler:
        """Build the learning-rate schedule that the options name, if none was given."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.create_optimizer()
            self.lr_scheduler = build_schedule(optimizer, self.args, num_training_steps, more_is_better(self.args))
            self._made_schedule = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add a line to the log history, with epoch and step, and call the callbacks' on_log."""
        logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.events.emit("on_log", logs=logs)

    def export_folder(self) -> Path:
        """Return where weights are exported to at this point of the run: output_dir/hf_format/samples_N."""
        return Path(self.args.output_dir, WEIGHTS, f"samples_{self.state.num_samples_seen}")

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Export weights, and config and tokenizer if any; by default to output_dir/hf_format/samples_N."""
        directory = Path(output_dir or self.export_folder())
        save_dtype = getattr(torch, self.args.save_dtype) if self.args.save_dtype else None
        if self._exports.get(directory) != self.state.global_step:
            is_shared = directory.resolve() == Path(self.args.output_dir).resolve()  # with all that the run writes
            tokenizer = self.processing_class
            if tokenizer is None:
                tokenizer = getattr(self.task.collate, "tokenizer", None)
            with averaged_weights(self.optimizer):
                export_model(self.task.prepared, tokenizer, directory, save_dtype, is_shared=is_shared)
            self._exports[directory] = self.state.global_step
        return directory
