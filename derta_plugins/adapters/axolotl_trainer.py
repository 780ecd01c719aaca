"""Axolotl's trainer with DeRTa's loss, which looks at the rows it is given before it trains them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import axolotl
import pyarrow.compute as pc
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from datasets import Dataset, List, Value

from derta_plugins.adapters.row_datasets import arrow_batches
from derta_plugins.adapters.trainer_mixins import DeRTaLossMixin
from derta_plugins.core.config import DeRTaConfig

# Axolotl's console shows INFO of its own loggers alone
logger = get_logger("axolotl.derta_plugins")


@dataclass
class RowTally:
    """What a dataset of rows holds: its rows by kind, MLE rows folded into RTO rows, and the ids of its RTO targets."""

    targets: frozenset[int]
    ordinary: int
    mle: int
    rto: int
    branches: int = 0

    @classmethod
    def of(cls, dataset: Dataset) -> RowTally:
        """Count the rows of a dataset with `labels` and `rto_mask`."""
        tally = cls(frozenset(), 0, 0, 0)
        for labels, masks in _safety_rows(dataset):
            flat = pc.list_flatten(masks)
            if not pc.list_value_length(labels).equals(pc.list_value_length(masks)):
                raise ValueError("`labels` and `rto_mask` of prepared rows differ in length: prepare them again.")
            rto = len(pc.unique(pc.list_parent_indices(masks).filter(flat)))
            tally.targets |= set(pc.unique(pc.list_flatten(labels).filter(flat)).to_pylist())
            tally.rto += rto
            tally.mle += len(masks) - rto
        tally.ordinary = len(dataset) - tally.mle - tally.rto
        if "branch_starts" in dataset.column_names:
            tally.branches = sum(map(_count_branches, arrow_batches(dataset, "branch_starts")))
        return tally


def _count_branches(batch: Any) -> int:
    starts = pc.list_flatten(batch["branch_starts"])
    return pc.sum(pc.greater(starts, 0)).as_py() or 0


def _safety_rows(dataset: Dataset) -> Iterator[tuple[Any, Any]]:
    """`labels` and `rto_mask` of the rows that DeRTa made, in batches; ordinary rows have no mask."""
    for batch in arrow_batches(dataset, "labels", "rto_mask"):
        ours = batch.filter(pc.is_valid(batch["rto_mask"])).combine_chunks()
        yield tuple(pc.cast(ours[name], ours[name].type).combine_chunks() for name in ("labels", "rto_mask"))


class AxolotlDeRTaTrainer(DeRTaLossMixin, AxolotlTrainer):
    """
    `AxolotlTrainer` that trains the rows of safety records with DeRTa, beside ordinary rows. Made by `for_run`.

    Raises:
        ValueError: If the rows do not belong to the run: none is DeRTa's, or their RTO targets are not one token of the
            model.
    """

    host_version = f"Axolotl {axolotl.__version__}"
    tag_names: ClassVar[list[str]] = ["axolotl", "derta"]
    derta_config: ClassVar[DeRTaConfig]
    evaluates_triples: ClassVar[bool]

    @classmethod
    def for_run(cls, config: DeRTaConfig, *, is_loss_fused: bool, evaluates_triples: bool) -> type[AxolotlDeRTaTrainer]:
        """The trainer with the settings of one run, as a class: Axolotl makes its trainers by itself."""
        settings = {"derta_config": config, "is_loss_fused": is_loss_fused, "evaluates_triples": evaluates_triples}
        return type(cls.__name__, (cls,), settings)

    def __init__(self, *args: Any, train_dataset: Any = None, eval_dataset: Any = None, **kwargs: Any) -> None:
        self._check_has_rows("training", train_dataset)
        if isinstance(eval_dataset, Dataset) and "rto_mask" not in eval_dataset.column_names:
            if self.evaluates_triples:
                self._check_has_rows("evaluation", eval_dataset)
            masks = [None] * len(eval_dataset)
            eval_dataset = eval_dataset.add_column("rto_mask", masks, feature=List(Value("bool")))
        self._start_derta(self.derta_config)
        self._fused_checked = False
        super().__init__(*args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self._finish_derta()
        self._check_targets(train_dataset, eval_dataset)

    def _check_targets(self, train_dataset: Dataset, eval_dataset: Dataset | None) -> None:
        """Over the rows themselves, which may come from a cache."""
        tallies = {"training": RowTally.of(train_dataset)}
        if eval_dataset is not None:
            tallies["evaluation"] = RowTally.of(eval_dataset)
        for name, tally in tallies.items():
            folded = f", {tally.branches} MLE folded into those" if tally.branches else ""
            logger.info(
                "DeRTa's %s rows: %d ordinary, %d MLE, %d RTO%s", name, tally.ordinary, tally.mle, tally.rto, folded
            )
        targets = sorted(set().union(*(tally.targets for tally in tallies.values())))
        if len(targets) > 1:
            raise ValueError(
                f"The rows have several RTO targets: {targets}. Set `derta.refusal_text`, so that there is one, and "
                "delete the prepared datasets."
            )
        size = self.model.config.get_text_config().vocab_size
        if targets and not 0 <= targets[0] < size:
            raise ValueError(
                f"The RTO target has id {targets[0]}, but the model has {size} tokens: tokenizer and model do not "
                "belong together."
            )
        needs_rto = self.derta_config.method == "derta" and self.derta_config.rto_ratio == 1.0
        if needs_rto and not tallies["training"].rto:
            raise ValueError("No training row has RTO targets, though every triple gives some: prepare the rows again.")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.is_loss_fused and num_items_in_batch is not None and not self._fused_checked:
            self._fused_checked = True
            self._check_fused_divides(model, inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _check_fused_divides(self, model: Any, inputs: dict[str, Any]) -> None:
        """Once a run: a fused loss must divide by what it is given, and not by the targets of its micro-batch."""
        given, losses = self._with_masks(self._laid_out(inputs)), []
        del given["rto_mask"]
        for divisor in (1.0, 2.0):
            divisor = torch.tensor(divisor, device=inputs["labels"].device)
            with torch.no_grad(), torch.random.fork_rng():  # the same dropout twice, and none taken from the run
                outputs = model(**given, num_items_in_batch=divisor)
            losses.append(outputs["loss"] if isinstance(outputs, dict) else outputs[0])
        if not torch.allclose(losses[0].float(), 2 * losses[1].float(), rtol=1e-2):
            raise RuntimeError(
                "The fused loss of this model does not divide by the targets of the whole step, so it would weigh "
                "micro-batches instead of targets. Turn the fused loss off."
            )
