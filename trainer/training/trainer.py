"""Trainer: what users hold. It builds what was not given, and hands the work to the loop, evaluation and export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput

from trainer.arguments.training import TrainingArguments
from trainer.data.dataset import JsonlDataset
from trainer.data.length import run_length
from trainer.data.loader import get_data_loader
from trainer.data.sampler import EpochSampler
from trainer.data.store import TokenStore
from trainer.distributed.group import Group
from trainer.errors import UsageError
from trainer.model.export import export_model
from trainer.model.tokenizer import load_tokenizer
from trainer.optim.optimizers import build_optimizer
from trainer.optim.schedules import build_schedule
from trainer.training.build import build_cost, build_model, check_fit, check_samples, load_datasets
from trainer.training.callbacks import ExportCallback, FlowCallback, MetricsFile, RunState
from trainer.training.evaluation import best_metric, check_metric, evaluation_loss, improves
from trainer.training.generation import Answer, Question, answer_questions, check_room, questions_of
from trainer.training.loop import GlobalBatch, Run, train
from trainer.training.metrics import now
from trainer.training.output import open_output_dir
from trainer.training.step import Engine

Dataset = TokenStore | JsonlDataset


class Trainer:
    """Fine-tunes a causal language model on packed token samples.

    What is not given is built from `args`: the model from model_name_or_path or model_config, the tokenizer likewise,
    the data from data_path. So `Trainer(args=args).train()` is what the command line does.

    Args:
        model: a transformers causal LM, or None.
        args: every option.
        train_dataset: a prepared store or a JsonlDataset, or None.
        eval_dataset: the same for evaluation.
        processing_class: the tokenizer.
        callbacks: transformers callbacks, called after the trainer's own.

    Raises:
        UsageError, ModelError, DataError: see the messages.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.args = args if args is not None else TrainingArguments()
        if not isinstance(self.args, TrainingArguments):
            raise UsageError(f"args is a {_class_of(args)}: give trainer.TrainingArguments")
        self.group = Group.join(self.args)
        set_seed(self.args.seed)
        self.processing_class = processing_class
        if processing_class is None and (model is None or train_dataset is None):
            self.processing_class = load_tokenizer(self.args)
        self._check_held_out(train_dataset, eval_dataset)
        if train_dataset is None:
            assert self.processing_class is not None
            train_dataset, held_out = load_datasets(self.args, self.processing_class, self.group)
            eval_dataset = held_out if eval_dataset is None else eval_dataset
        self.train_dataset = _store(train_dataset)
        self.eval_dataset = None if eval_dataset is None else _store(eval_dataset)
        self._check_data()
        self.model = build_model(model, self.args, self.processing_class, self.group)
        check_fit(self.model, self.train_dataset, "train_dataset")
        if self.eval_dataset is not None:
            check_fit(self.model, self.eval_dataset, "eval_dataset")
        torch.manual_seed(self.args.seed + self.group.rank)  # dropout differs between ranks
        self.stop_signal: int | None = None  # the signal that ended the last run, if one did
        self.answers: dict[int, list[Answer]] = {}  # step -> answers of the evaluation after it
        self._exports: dict[Path, int] = {}  # folder -> step whose weights it holds
        self._asked: tuple[TokenStore, list[Question]] | None = None  # what a data set asks, read once
        self._start_state(callbacks)

    def train(self) -> TrainOutput:
        """Train from the start to the end.

        Returns:
            Steps taken, mean loss over all loss tokens, and the run's duration in seconds.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite.
        """
        if self.args.does_evaluate and self.eval_dataset is not None:
            self._questions(self.eval_dataset)  # whatever is wrong with them shows before the first step
        run = self._build_run()
        open_output_dir(self.args, self.group)
        started = now()
        train(run)
        self.group.barrier()  # what the lead rank wrote is there for all
        self.stop_signal = run.stop_signal
        mean_loss = run.loss_sum / max(self.state.num_loss_tokens_seen, 1)
        return TrainOutput(self.state.global_step, mean_loss, {"train_runtime": now() - started})

    def evaluate(self, eval_dataset: Dataset | None = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Measure the loss, and exact answers where asked for, on held-out samples.

        Returns:
            `eval_loss`, `eval_num_loss_tokens`, `eval_num_samples`, `eval_runtime`, and `eval_exact_match` when
            `eval_exact_match` is set.
        """
        store = _store(eval_dataset) if eval_dataset is not None else self.eval_dataset
        if store is None:
            raise UsageError("nothing to evaluate on: give eval_dataset, validation_data_path or validation_split")
        check_samples(store, "eval_dataset")
        check_fit(self.model, store, "eval_dataset")
        started = now()
        metrics = evaluation_loss(self.model, self.get_eval_dataloader(store), self.group)
        metrics |= self._answer(store)
        metrics["runtime"] = now() - started
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        self.callbacks.on_evaluate(self.args, self.state, self.control, metrics=named)
        return named

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """Export Hugging Face weights, config and tokenizer; by default to output_dir/hf_format/samples_N."""
        folder = Path("hf_format", f"samples_{self.state.num_samples_seen}")
        directory = Path(output_dir or Path(self.args.output_dir, folder))
        save_dtype = getattr(torch, self.args.save_dtype) if self.args.save_dtype else None
        if self._exports.get(directory) != self.state.global_step:
            export_model(self.model, self.processing_class, directory, save_dtype)
            self._exports[directory] = self.state.global_step
        return directory

    def log(self, logs: dict[str, float]) -> None:
        """Add a line to the log history, with epoch and step, and tell the callbacks."""
        line = {**logs, "epoch": self.state.epoch, "step": self.state.global_step}
        self.state.log_history.append(line)
        self.callbacks.on_log(self.args, self.state, self.control, logs=dict(line))

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback, given as object or class."""
        self.callbacks.add_callback(callback)

    def get_train_dataloader(self) -> DataLoader[GlobalBatch]:
        """Build the loader of this rank's share of every global batch; its sampler is an EpochSampler."""
        return self._loader(self.train_dataset, EpochSampler(len(self.train_dataset), self.args.seed))

    def get_eval_dataloader(self, eval_dataset: Dataset) -> DataLoader[GlobalBatch]:
        """Build the loader of this rank's share of held-out samples."""
        store = _store(eval_dataset)
        return self._loader(store, EpochSampler(len(store)))

    def _loader(self, store: TokenStore, sampler: EpochSampler) -> DataLoader[GlobalBatch]:
        return get_data_loader(
            store=store,
            batch_size=self.args.batch_size,
            max_tokens_per_rank=self.args.max_tokens_per_rank,
            rank=self.group.rank,
            world_size=self.group.world_size,
            sampler=sampler,
            cost=build_cost(self.args, self.model),
        )

    def _check_data(self) -> None:
        check_samples(self.train_dataset, "train_dataset")
        if self.args.does_evaluate and self.eval_dataset is None:
            raise UsageError(
                "evaluation needs held-out data: give validation_split, validation_data_path, or eval_dataset"
            )
        if self.args.does_evaluate:
            check_metric(self.args)

    def _check_held_out(self, train_dataset: Dataset | None, eval_dataset: Dataset | None) -> None:
        """Raise UsageError where the options name held-out data that would not be used."""
        if not self.args.validation_split and self.args.validation_data_path is None:
            return
        if train_dataset is None and eval_dataset is not None:
            raise UsageError("validation_split, validation_data_path and eval_dataset exclude each other: give one")
        if train_dataset is not None and eval_dataset is None:
            raise UsageError(
                "validation_split and validation_data_path have no effect beside train_dataset: give eval_dataset"
            )

    def _start_state(self, callbacks: Sequence[TrainerCallback]) -> None:
        self.state = RunState(
            is_world_process_zero=self.group.is_lead,
            is_local_process_zero=self.group.topology.is_local_lead,
            train_batch_size=self.args.batch_size,
            eval_steps=self.args.eval_steps or 0,
            logging_steps=self.args.logging_steps,
        )
        self.control = TrainerControl()
        own = [
            FlowCallback(),
            MetricsFile(Path(self.args.output_dir, "metrics.jsonl")),
            ExportCallback(self.save_model),
        ]
        self.callbacks = CallbackHandler([*own, *callbacks], self.model, self.processing_class, None, None)
        self.callbacks.on_init_end(self.args, self.state, self.control)

    def _build_run(self) -> Run:
        loader = self.get_train_dataloader()
        assert isinstance(loader.sampler, EpochSampler)
        length = run_length(self.train_dataset.num_loss_tokens, self.args.batch_size, self.args.seed, self.args)
        optimizer = build_optimizer(self.model, self.args)
        schedule = build_schedule(optimizer, self.args, length.num_steps)
        self.callbacks.optimizer, self.callbacks.lr_scheduler = optimizer, schedule
        self.callbacks.train_dataloader = loader
        engine = Engine(
            self.model, optimizer, schedule, self.group, self.args.max_grad_norm, self.args.label_smoothing_factor
        )
        return Run(
            args=self.args,
            engine=engine,
            loader=loader,
            sampler=loader.sampler,
            num_samples=len(self.train_dataset),
            length=length,
            state=self.state,
            control=self.control,
            callbacks=self.callbacks,
            evaluate=self._evaluate_and_compare,
            log=self.log,
        )

    def _evaluate_and_compare(self) -> dict[str, float]:
        metrics = self.evaluate()
        value = best_metric(self.args, metrics)
        if improves(self.args, value, self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step
        return metrics

    def _answer(self, store: TokenStore) -> dict[str, float]:
        """Answer held-out chats where asked for; gives `exact_match` if all of them were answered."""
        questions = self._questions(store)
        if not questions:
            return {}
        assert self.processing_class is not None
        answers = answer_questions(
            self.model, self.processing_class, questions, self.group, self.args.generation_max_new_tokens
        )
        self.answers[self.state.global_step] = answers
        if not self.args.eval_exact_match:
            return {}
        return {"exact_match": sum(answer.is_exact for answer in answers) / len(answers)}

    def _questions(self, store: TokenStore) -> list[Question]:
        """Read the held-out chats to answer, if answers are asked for; the file may change or go while training."""
        count = None if self.args.eval_exact_match else self.args.num_generation_samples
        if count == 0:
            return []
        if self.processing_class is None:
            raise UsageError("eval_exact_match and num_generation_samples need a tokenizer: give processing_class")
        if self._asked is None or self._asked[0] is not store:
            questions = questions_of(store, self.processing_class, count, self.args.chat_template)
            check_room(self.model, questions, self.args.generation_max_new_tokens)
            self._asked = store, questions
        return self._asked[1]


def _store(dataset: Dataset) -> TokenStore:
    if isinstance(dataset, TokenStore):
        return dataset
    if isinstance(dataset, JsonlDataset):
        return dataset.store
    raise UsageError(
        f"a data set is a {_class_of(dataset)}: give JsonlDataset(path), TokenStore.from_samples([(ids, labels)]), or "
        "name a file with data_path"
    )


def _class_of(given: object) -> str:
    return f"{type(given).__module__}.{type(given).__qualname__}"
