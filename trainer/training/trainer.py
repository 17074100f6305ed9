"""Trainer: what users hold. It builds what was not given, and hands the work to the loop, evaluation and export."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import set_seed
from transformers.trainer_callback import CallbackHandler, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer_utils import BestRun, TrainOutput

from trainer.checkpoint.run_state import data_fingerprint, tokenizer_fingerprint
from trainer.config.arguments import TrainingArguments
from trainer.data.batched import Collate
from trainer.data.loader import is_token_data
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.export import export_model
from trainer.model.noise import embedding_noise
from trainer.model.traits import LossFunction
from trainer.optim.averaging import averaged_weights
from trainer.optim.scaling import LossScale
from trainer.training.accelerator import AcceleratorWords
from trainer.training.build import check_names, check_optimizer
from trainer.training.callbacks import DefaultFlowCallback, Events, ExportCallback, MetricsFile, RunState
from trainer.training.checkpoints import Checkpoints, load_best_weights
from trainer.training.crash import CrashRecorder
from trainer.training.generation import Answer
from trainer.training.loop import Run, train
from trainer.training.machine import start_machine
from trainer.training.memory import Snapshot, is_out_of_memory, memory_tracker, next_batch_size
from trainer.training.metrics import now
from trainer.training.ordinary import OrdinaryRoad
from trainer.training.osft import start
from trainer.training.parts import TrainerParts
from trainer.training.reporting import reporters
from trainer.training.run_dir import open_output_dir, sole_run
from trainer.training.search import Objective, Search
from trainer.training.step import Engine
from trainer.training.tokens import TokenRoad

ModelInit = Callable[..., nn.Module]  # takes a trial, or nothing
ComputeMetrics = Callable[..., dict[str, float]]


class Trainer(TrainerParts):
    """Trains a model: a causal language model on packed token samples, or any module on any data set.

    Token data (a TokenStore, a JsonlDataset, or the file that data_path names) is packed. With it, what is not given is
    built from `args`: the model from model_name_or_path or model_config, the tokenizer likewise, the data from
    data_path. So `Trainer(args=args).train()` is what the command line does. Any other data set is batched as
    transformers' Trainer does; the model is any module that gives a loss as `loss`, or as its first output.

    Args:
        model: a transformers causal LM, any module, or None.
        args: every option.
        data_collator: from a list of samples to the model's inputs; by default it stacks, and pads where there is a
            tokenizer. Ordinary data only, like all that follows except callbacks and optimizers.
        train_dataset: token data, or anything with samples: map-style, a stream, a datasets.Dataset.
        eval_dataset: the same for evaluation.
        processing_class: the tokenizer, or what else turns raw data into inputs.
        model_init: builds the model, anew for each `train`.
        compute_loss_func: from (outputs, labels, num_items_in_batch=) to the loss.
        compute_metrics, preprocess_logits_for_metrics: see transformers' Trainer.
        callbacks: transformers callbacks, called after the trainer's own.
        optimizers: optimizer and learning-rate schedule to use instead of those that the options name.
        optimizer_cls_and_kwargs: class and settings of the optimizer; or, for the class, one whose objects make an
            optimizer of a model and the settings.

    Raises:
        UsageError, ModelError, DataError: see the messages.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Collate | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: ModelInit | None = None,
        compute_loss_func: LossFunction | None = None,
        compute_metrics: ComputeMetrics | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
    ) -> None:
        self.args = args if args is not None else TrainingArguments()
        if not isinstance(self.args, TrainingArguments):
            given = f"{type(args).__module__}.{type(args).__qualname__}"
            raise UsageError(f"args is a {given}: give trainer.TrainingArguments")
        check_names(self.args)
        self._memory = memory_tracker(self.args.skip_memory_metrics)
        self._memory.start()
        self.group = Group.join(self.args)
        start_machine(self.args, self.group.device)
        self.accelerator = AcceleratorWords(self.group, self.backward)
        self.processing_class = processing_class
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.model_init = model_init
        with self.group.naming_faults(lambda: "before the first step"):
            self.road = self._choose_road(model, (train_dataset, eval_dataset), data_collator)
        self.train_dataset, self.eval_dataset = self.road.train_dataset, self.road.eval_dataset
        torch.manual_seed(self.args.seed + self.group.rank)  # dropout differs between ranks
        self.stop_signal: int | None = None  # the signal that ended the last run, if one did
        self.is_in_train = False
        self._has_trained = False
        self._trial: Any = None
        self._exports: dict[Path, int] = {}  # folder -> step whose weights it holds
        if self.args.push_to_hub:
            self.init_hf_repo()
        self._start_callbacks(callbacks or ())
        self._scale = LossScale(self.state, is_on=False)
        self._memory.stop_and_update_metrics()

    def train(
        self,
        resume_from_checkpoint: bool | str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train from the start, or from a checkpoint, to the end.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True, the newest whole one in output_dir; "auto", the same,
                or from the start if there is none; by default what the option of that name says.
            trial: what `model_init` is given, if it takes an argument; see `hyperparameter_search`.
            ignore_keys_for_eval: outputs of the model that are not predictions, in evaluations while training.

        Returns:
            Steps taken, mean loss (over all loss tokens; over steps where these are not known), and throughput.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
            CheckpointError: there is no whole checkpoint to go on from, or one could not be written.
        """
        self._memory.start()
        self._trial, self._ignored_outputs = trial, ignore_keys_for_eval
        if isinstance(self.road, OrdinaryRoad):
            self.road.per_device_train_batch_size = self.args.per_device_train_batch_size
        before = Snapshot(self.model) if self.args.auto_find_batch_size else None
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        while not self._train_once(before, asked):
            pass
        self._memory.stop_and_update_metrics(self._train_metrics)
        return TrainOutput(self.state.global_step, self._train_metrics["train_loss"], self._train_metrics)

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> Path:
        """Export weights, and config and tokenizer if any; by default to output_dir/hf_format/samples_N.

        With the option push_to_hub it is pushed, too.
        """
        folder = Path("hf_format", f"samples_{self.state.num_samples_seen}")
        directory = Path(output_dir or Path(self.args.output_dir, folder))
        save_dtype = getattr(torch, self.args.save_dtype) if self.args.save_dtype else None
        if self._exports.get(directory) != self.state.global_step:
            is_shared = directory.resolve() == Path(self.args.output_dir).resolve()  # with all that the run writes
            with averaged_weights(self.optimizer):
                export_model(self.model, self._tokenizer_to_save, directory, save_dtype, is_shared=is_shared)
            self._exports[directory] = self.state.global_step
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(f"Step {self.state.global_step}")
        return directory

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Have `model_init` build a model, for a trial where it takes one."""
        assert self.model_init is not None
        return self.model_init(trial) if inspect.signature(self.model_init).parameters else self.model_init()

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], Mapping[str, Any]] | None = None,
        compute_objective: Objective | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **settings: Any,
    ) -> BestRun | list[BestRun]:
        """Train with many settings of options, chosen by optuna, each in a folder of its own; gives the best.

        `settings` are those of optuna's create_study, and `timeout`, `gc_after_trial` and `catch` of its optimize.

        Raises:
            MissingPackageError: optuna is not installed.
            UsageError: there is no model_init, or another backend is asked for.
        """
        if backend not in (None, "optuna"):
            raise UsageError(f"backend = {backend}: only optuna is supported")
        search = Search(self, hp_space, compute_objective, hp_name)
        return search.run(n_trials, direction, **settings)

    @property
    def answers(self) -> dict[int, list[Answer]]:
        """Step -> answers to held-out chats of the evaluation after it."""
        return self.road.answers

    @property
    def _tokenizer_to_save(self) -> Any:
        """What turns raw data into inputs, the collator's where none was given."""
        return (
            self.processing_class
            if self.processing_class is not None
            else getattr(self.data_collator, "tokenizer", None)
        )

    def _choose_road(self, model: Any, datasets: tuple[Any, Any], collate: Collate | None) -> Any:
        """Token data is given, named by an option, or all that is left to be built from; all else is ordinary."""
        train_dataset, eval_dataset = datasets
        is_to_build = (model is None and self.model_init is None) or self.args.data_path is not None
        if is_token_data(train_dataset if train_dataset is not None else eval_dataset) or (
            train_dataset is None and is_to_build
        ):
            self._check_token_road(collate)
            tokens = TokenRoad(self.args, self.group, model, self.processing_class, datasets)
            self.model, self.processing_class = tokens.model, tokens.tokenizer
            return tokens
        if (model is None) == (self.model_init is None):
            raise UsageError("give either model or model_init")
        if self.model_init is not None and self.optimizer is not None:
            raise UsageError(
                "optimizers hold the parameters of one model, and model_init builds it anew for each train(): override "
                "create_optimizer, or give optimizer_cls_and_kwargs"
            )
        self.road = OrdinaryRoad(self.args, self.group, collate, self.processing_class, datasets)
        self._use_model(self.call_model_init() if self.model_init is not None else model)
        return self.road

    def _check_token_road(self, collate: Collate | None) -> None:
        names = ("model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
        others = {"data_collator": collate} | {name: getattr(self, name) for name in names}
        if given := [name for name, value in others.items() if value is not None]:
            raise UsageError(
                f"{', '.join(given)} have no effect on token data: leave them out, or give another data set"
            )

    def _use_model(self, model: nn.Module | None) -> None:
        self.road.use_model(model, self._micro_batch)
        self.model = model
        self.model_accepts_loss_kwargs = self.road.traits.accepts_loss_kwargs
        self.label_names = self.road.traits.label_names

    def _start_callbacks(self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]]) -> None:
        own = [MetricsFile(), ExportCallback(self.save_model)]
        usual = [DefaultFlowCallback(), *self._display(), *reporters(self.args.report_to)]
        self.callback_handler = CallbackHandler([*usual, *callbacks], self.model, self.processing_class, None, None)
        self.events = Events(self.args, self._new_state(), self.callback_handler, own)
        self.events.emit("on_init_end")

    def _display(self) -> list[TrainerCallback]:
        """Show what happens as transformers' Trainer does; the command line has a display of its own."""
        if not isinstance(self.road, OrdinaryRoad):
            return []
        return [PrinterCallback() if self.args.disable_tqdm else ProgressCallback()]

    def _new_state(self) -> RunState:
        is_ordinary = isinstance(self.road, OrdinaryRoad)
        return RunState(
            is_world_process_zero=self.group.is_lead,
            is_local_process_zero=self.group.topology.is_local_lead,
            train_batch_size=self.road.per_device_train_batch_size if is_ordinary else self.args.batch_size,
        )

    def _train_once(self, before: Snapshot | None, asked: bool | str | None) -> bool:
        """Run to the end; gives False where memory ran out and a smaller batch size is to be tried, if one may."""
        self._begin_anew()
        run = self._build_run()
        with sole_run(self.args, self.group):
            return self._train_alone(run, before, asked)

    def _train_alone(self, run: Run, before: Snapshot | None, asked: bool | str | None) -> bool:
        source = run.checkpoints.find(asked)
        if source is None:
            keeps_older = isinstance(self.road, OrdinaryRoad) or asked == "auto"
            open_output_dir(self.args, self.group, keeps_older=keeps_older)
        else:
            run.length = run.checkpoints.restore(source, run.length)
        if self.road.osft is not None:
            self.log(start(self.road.osft, self.events, self.group))
        self._run_started, self.is_in_train, self._has_trained = now(), True, True
        try:
            with embedding_noise(self.model, self.args.neftune_noise_alpha):
                train(run)
        except RuntimeError as error:
            if before is None or not is_out_of_memory(error):
                raise
        else:
            self.group.barrier()  # what the lead rank wrote is there for all
            self.stop_signal = run.stop_signal
            return True
        finally:
            self.is_in_train = False
        before.restore()
        self.optimizer = None
        self.road.per_device_train_batch_size = next_batch_size(self.road.per_device_train_batch_size)
        return False

    def _begin_anew(self) -> None:
        """Forget an earlier run: the second counts from 0, with its own schedule, and with model_init its own model."""
        if not self._has_trained and self._trial is None:
            return
        self.state = self._new_state()
        self._exports.clear()
        if self.model_init is not None:
            set_seed(self.args.seed)
            self._use_model(self.call_model_init(self._trial))
            self.optimizer, self.lr_scheduler = None, None
        elif self._made_schedule:
            self.lr_scheduler = None

    def _build_run(self) -> Run:
        loader = self.get_train_dataloader()
        batches = self.road.batches(loader)
        length = self.road.length(batches)
        self.create_optimizer_and_scheduler(length.num_steps)
        check_optimizer(self.create_optimizer(), self.model)
        self._scale = LossScale(self.state, is_on=self.args.fp16)
        handler = self.callback_handler
        handler.model, handler.train_dataloader = self.model, loader
        handler.optimizer, handler.lr_scheduler = self.optimizer, self.lr_scheduler
        engine = Engine(
            self.model,
            self.road.objective,
            self.create_optimizer(),
            self.create_scheduler(length.num_steps),
            self.group,
            self.args.max_grad_norm,
            self.events.emit,
            self._scale,
            self.road.osft,
        )
        return Run(
            args=self.args,
            engine=engine,
            batches=batches,
            length=length,
            events=self.events,
            evaluate=self._evaluate_and_compare,
            checkpoints=(checkpoints := self._checkpoints(engine, batches)),
            crash=CrashRecorder(self.args, engine, self.state, checkpoints),
            log=self.log,
            finish=self._finish_run,
        )

    def _checkpoints(self, engine: Engine, batches: Any) -> Checkpoints:
        is_async = self.road.saves_beside if self.args.async_save is None else self.args.async_save
        return Checkpoints(self.args, engine, self.events, batches, self._identify, is_async=is_async)

    def _identify(self) -> dict[str, str | None]:
        return {
            "data": data_fingerprint(self.train_dataset),
            "eval_data": data_fingerprint(self.eval_dataset),
            "tokenizer": tokenizer_fingerprint(self.processing_class),
        }

    def _finish_run(self) -> None:
        """Log what the whole run did, and load the best weights if that was asked for."""
        if self.args.load_best_model_at_end:
            load_best_weights(self.model, self.create_optimizer(), self.state, self.group)
            self._exports.clear()
        self._train_metrics = self.state.train_metrics(now() - self._run_started)
        self.log(self._train_metrics)
