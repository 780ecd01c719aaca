"""`RowCollator` around collators that pad, pack and flatten: the mask stands where the labels stand."""

import pickle

import numpy as np
import pytest
import torch

from derta_plugins.adapters.collator import RowCollator

PAD = -100


class Pads:
    """Pads on the tokenizer's side to a multiple, as `DataCollatorForSeq2Seq` does."""

    def __init__(self, side="right", multiple=8):
        self.tokenizer, self.multiple = type("Tokenizer", (), {"padding_side": side}), multiple

    def __call__(self, features, return_tensors=None):
        if isinstance(features[0], list):  # packs become one row each, as Axolotl's multipack collators do
            features = [
                {name: np.concatenate([row[name] for row in pack]).tolist() for name in pack[0]} for pack in features
            ]
        width = -(-max(len(row["labels"]) for row in features) // self.multiple) * self.multiple
        return {
            name: torch.tensor([self._padded(list(row[name]), width, fill) for row in features])
            for name, fill in (("input_ids", 0), ("labels", PAD))
        }

    def _padded(self, values, width, fill):
        filling = [fill] * (width - len(values))
        return values + filling if self.tokenizer.padding_side == "right" else filling + values


def flattens(features):
    """One row of everything, each sequence's first label ignored, as `DataCollatorWithFlattening` does."""
    labels = [label for row in features for label in [PAD, *row["labels"][1:]]]
    return {
        "input_ids": torch.tensor([[i for row in features for i in row["input_ids"]]]),
        "labels": torch.tensor([labels]),
    }


def row(length, rto=(), *, mask=True):
    """`length` tokens, RTO at the places `rto`, whose label is 9."""
    labels = [9 if place in rto else PAD for place in range(length)]
    return {
        "input_ids": list(range(1, length + 1)),
        "labels": labels,
        "rto_mask": [place in rto for place in range(length)] if mask else None,
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows(side):
    batch = RowCollator(Pads(side))([row(5, {3, 4}), row(3, {2}), row(4, mask=False)])
    assert batch["rto_mask"].shape == batch["labels"].shape == (3, 8)
    assert torch.equal(batch["rto_mask"], batch["labels"] == 9)
    assert batch["rto_mask"].sum() == 3


def test_packs_become_one_row_each():
    batch = RowCollator(Pads())([[row(3, {2}), row(4, mask=False)], [row(5, {1, 4})]])
    assert batch["labels"].shape == (2, 8)
    assert batch["rto_mask"].nonzero().tolist() == [[0, 2], [1, 1], [1, 4]]


def test_flattened_rows():
    batch = RowCollator(flattens)([row(3, {2}), row(4, {1, 3})])
    assert batch["rto_mask"].nonzero().tolist() == [[0, 2], [0, 4], [0, 6]]


def test_the_hosts_collator_never_sees_the_mask():
    seen = []

    def host(features):
        seen.extend(features)
        return Pads()(features)

    RowCollator(host)([row(3, {2})])
    assert seen
    assert all("rto_mask" not in features for features in seen)


def test_the_features_are_not_modified():
    features = [row(3, {2})]
    RowCollator(Pads())(features)
    assert features == [row(3, {2})]


def test_attributes_and_pickling_reach_the_hosts_collator():
    collator = RowCollator(Pads("left"))
    assert collator.tokenizer.padding_side == "left"
    copy = pickle.loads(pickle.dumps(RowCollator(flattens)))
    assert copy([row(3, {2})])["rto_mask"].tolist() == [[False, False, True]]


def drops_the_last_label(features):
    batch = Pads()(features)
    batch["labels"][:, 2:] = PAD
    return batch


def pads_on_the_other_side(features):
    batch = Pads("left")(features)
    return batch


@pytest.mark.parametrize("name", ["labels", "rto_mask", "input_ids"])
def test_a_row_that_lost_a_column_is_refused(name):
    broken = {key: value for key, value in row(3, {2}).items() if key != name}
    with pytest.raises(ValueError, match=rf"lost \['{name}'\].*keep the columns"):
        RowCollator(Pads())([broken])


@pytest.mark.parametrize("name", ["labels", "rto_mask"])
def test_columns_of_different_lengths_are_refused(name):
    broken = row(4, {2})
    broken[name] = broken[name][:3]
    with pytest.raises(ValueError, match="different lengths"):
        RowCollator(Pads())([broken])


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (drops_the_last_label, "an RTO position has no target"),
        (pads_on_the_other_side, "an RTO position has no target"),
        (lambda features: {"labels": torch.full((1, 2), 9)}, "cannot tell which"),
        (lambda features: {"labels": torch.full((5, 8), 9)}, "cannot tell which"),
    ],
    ids=["drops", "other side", "cuts", "splits"],
)
def test_a_collator_whose_labels_do_not_fit_is_refused(collator, message):
    with pytest.raises(ValueError, match=message):
        RowCollator(collator)([row(4, {2, 3}), row(3, {1})])


# --- the branch layout -----------------------------------------------------------------------------------------------


def branch_row():
    """Three trunk tokens, and two branches that leave after the second and the first of them."""
    made = row(7, {2, 3})
    return {**made, "branch_starts": [0, 0, 0, 2, 0, 1, 0]}


@pytest.mark.parametrize("side", ["right", "left"])
def test_branches_of_padded_rows(side):
    batch = RowCollator(Pads(side), "branch")([branch_row(), row(4, mask=False)])
    here = slice(0, 7) if side == "right" else slice(1, 8)
    assert batch["position_ids"][0, here].tolist() == [0, 1, 2, 1, 2, 0, 1]
    assert batch["branch_ids"][0, here].tolist() == [0, 0, 0, 1, 1, 2, 2]
    ordinary = [0, 1, 2, 3, 0, 1, 2, 3]  # four tokens and four of padding, each a sequence of its own
    assert batch["position_ids"][1].tolist() == ordinary
    assert batch["branch_ids"][1].tolist() == [0] * 8
    assert torch.equal(batch["rto_mask"], batch["labels"] == 9)


@pytest.mark.parametrize("collator", [Pads(), flattens], ids=["packed", "flattened"])
def test_branches_of_rows_in_one_row(collator):
    features = [branch_row(), {**row(3, {2}), "branch_starts": [0, 0, 0]}, branch_row()]
    batch = RowCollator(collator, "branch")(features if collator is flattens else [features])
    one, other = [0, 1, 2, 1, 2, 0, 1], [0, 1, 2]
    assert batch["position_ids"][0, :17].tolist() == [*one, *other, *one]
    assert batch["branch_ids"][0, :17].tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2]


def test_the_first_token_of_a_row_is_no_target_of_the_row_before():
    first = {**row(3), "labels": [7, 8, 9], "rto_mask": None, "branch_starts": None}
    batch = RowCollator(Pads(), "branch")([[branch_row(), first, first]])
    assert batch["labels"][0, 7:13].tolist() == [PAD, 8, 9, PAD, 8, 9]


def test_rows_make_no_ids():
    assert not {"position_ids", "branch_ids"} & set(RowCollator(Pads())([row(3, {2})]))


def test_a_layout_that_does_not_fit_the_rows_is_refused():
    with pytest.raises(ValueError, match="A row has branches, but the layout is 'rows'"):
        RowCollator(Pads())([branch_row()])
    for lost in (row(3, {2}), {**row(3, {2}), "branch_starts": None}):
        with pytest.raises(ValueError, match="lost `branch_starts` before batching"):
            RowCollator(Pads(), "branch")([lost])
    with pytest.raises(ValueError, match="7 tokens, but 6 `branch_starts`"):
        RowCollator(Pads(), "branch")([{**branch_row(), "branch_starts": [0] * 6}])
    RowCollator(Pads(), "branch")([row(3)])  # an ordinary row of a host that does not know the column
