"""Train the base model that answers everything, and safety-tune copies of it with `DeRTaSFTTrainer`."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from derta_plugins.core.config import DeRTaConfig, Layout
from derta_plugins.demo.model import MAX_LENGTH, copy_model, encode_chat, encode_words
from derta_plugins.demo.records import BaseText, Record

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast, TrainerCallback

METHODS = ("vanilla", "recaug", "derta")

# Called with the optimizer steps done and the steps in all.
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """
    How the models are trained. Safety tuning is the same for every method: same records, rows, steps and rates.

    Args:
        base_rows: Rows of the base model's one epoch.
        base_learning_rate: Peak learning rate of the base model.
        helpful_rows: Plain benign rows of the safety tuning.
        boundary_rows: Benign look-alike rows of the safety tuning.
        triples: Safety triples; each gives two rows with every method.
        learning_rate: Peak learning rate of the safety tuning.
        epochs: Passes over the rows of the safety tuning.
        batch_size: Rows per optimizer step.
        layout: Layout of the rows of DeRTa's triples. In the branch layout a batch holds fewer sequences, of as many
            rows, so that the number of steps does not change.
    """

    base_rows: int = 4400
    base_learning_rate: float = 2e-3
    helpful_rows: int = 300
    boundary_rows: int = 300
    triples: int = 100
    learning_rate: float = 3e-3
    epochs: int = 3
    batch_size: int = 16
    layout: Layout = DeRTaConfig.layout

    def sequences_per_step(self) -> int:
        """Batch size of DeRTa's training, whose two rows of a triple are one sequence in the branch layout."""
        benign = self.helpful_rows + self.boundary_rows
        folded = self.triples if self.layout == "branch" else 2 * self.triples
        return max(1, round(self.batch_size * (benign + folded) / (benign + 2 * self.triples)))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCost:
    """
    What one training took: rows, tokens and target tokens of one epoch, optimizer steps, and wall seconds. Rows that
    the branch layout folds into one sequence count each.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    steps: int
    seconds: float


def train_base(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[BaseText],
    *,
    recipe: Recipe,
    seed: int,
    device: str,
    on_step: OnStep,
) -> TrainingCost:
    """Train `model` in place for one epoch on `texts`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([_base_row(tokenizer, text) for text in texts])
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            **_host_arguments(scratch, recipe=recipe, seed=seed, device=device),
            num_train_epochs=1,
            learning_rate=recipe.base_learning_rate,
        )
        trainer = SFTTrainer(model=model, args=args, processing_class=tokenizer, train_dataset=rows)
        return _train(trainer, rows=len(rows), on_step=on_step)


def safety_tuned(
    base: "nn.Module",
    tokenizer: "PreTrainedTokenizerFast",
    *,
    method: str,
    helpful: Sequence[Record],
    boundary: Sequence[Record],
    triples: Sequence[Record],
    recipe: Recipe,
    seed: int,
    device: str,
    on_step: OnStep,
) -> tuple["nn.Module", TrainingCost]:
    """
    Return a safety-tuned copy of `base`, and what it cost. `base` is not changed.

    `derta` makes a prefix row and an RTO row of each triple. The others make two rows of the first kind, so that every
    method trains the same number of rows.
    """
    from datasets import Dataset

    from derta_plugins.adapters.trl import DeRTaSFTConfig, DeRTaSFTTrainer

    model = copy_model(base)
    with tempfile.TemporaryDirectory() as scratch:
        args = DeRTaSFTConfig(
            **_host_arguments(scratch, recipe=recipe, seed=seed, device=device),
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            method=method,
            num_prefixes=1 if method == "derta" else 2,
            layout=recipe.layout if method == "derta" else "rows",
        )
        if method == "derta":
            args.per_device_train_batch_size = recipe.sequences_per_step()
        trainer = DeRTaSFTTrainer(
            model=model,
            args=args,
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(list(helpful)),
            boundary_dataset=Dataset.from_list(list(boundary)),
            safety_dataset=Dataset.from_list(list(triples)),
        )
        counts = trainer.row_counts
        rows = counts.mle_rows + counts.rto_rows + counts.helpful_rows + counts.boundary_rows
        return model, _train(trainer, rows=rows, on_step=on_step)


def _host_arguments(output_dir: str, *, recipe: Recipe, seed: int, device: str) -> dict[str, Any]:
    # Every value here differs from TRL's or Transformers' default: no half precision and no recomputation for a model
    # this small, and nothing written, logged or reported.
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": recipe.batch_size,
        "max_length": MAX_LENGTH,
        "loss_type": "nll",
        "warmup_steps": 20,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.98,
        "weight_decay": 0.0,
        "use_cpu": device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def _train(trainer: Any, *, rows: int, on_step: OnStep) -> TrainingCost:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_step_callback(on_step))
    start = time.perf_counter()
    trainer.train()
    return TrainingCost(
        rows=rows,
        tokens=sum(map(len, trainer.train_dataset["input_ids"])),
        supervised_tokens=sum(label != -100 for labels in trainer.train_dataset["labels"] for label in labels),
        steps=trainer.state.global_step,
        seconds=round(time.perf_counter() - start, 2),
    )


def _base_row(tokenizer: "PreTrainedTokenizerFast", text: BaseText) -> dict[str, list[int]]:
    # Tokenised here because chats and documents together fit no single text format; targets are what the model is
    # to write, the whole text for a document.
    written = [*encode_words(tokenizer, text.text), tokenizer.eos_token_id]
    if text.question is None:
        return {"input_ids": [tokenizer.bos_token_id, *written], "labels": [-100, *written]}
    prompt = encode_chat(tokenizer, text.question)
    return {"input_ids": prompt + written, "labels": [-100] * len(prompt) + written}


def _step_callback(on_step: OnStep) -> "TrainerCallback":
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        """Tell `on_step` about each finished optimizer step."""

        def on_step_end(self, args, state, control, **kwargs):
            on_step(state.global_step, state.max_steps)

    return StepCallback()
