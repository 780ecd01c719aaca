"""
A branch row trains what its rows train apart: loss and all gradients, in float64, family by family.

The rows apart run one by one under the model's own eager attention and its own causal mask, with loss from full logits:
nothing of ours but `build_rows` and `derta_loss` is in them.
"""

import functools
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from derta_plugins.adapters.branch_batch import flatten_batch
from derta_plugins.adapters.branch_model import BranchAttention
from derta_plugins.adapters.collator import RowCollator
from derta_plugins.adapters.trainer_mixins import MicroBatch, count_batch
from derta_plugins.core.branch_attention import branch_mask
from derta_plugins.core.branch_layout import fold_rows
from derta_plugins.core.chat import TokenizedTriple
from derta_plugins.core.config import DeRTaConfig
from derta_plugins.core.constants import IGNORE_INDEX
from derta_plugins.core.losses import derta_loss, per_token_nll
from derta_plugins.core.transform import Row, build_rows
from tests.adapters.tiny_models import FAMILIES, VOCABULARY, WAYS, all_in_float64, plain_flex_attention, tiny_model

NORMALIZATIONS = ["token_mean", "sequence_sum", "component_mean"]


@functools.cache
def triples() -> list[TokenizedTriple]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, VOCABULARY, (length,), generator=generator).tolist())

    lengths = [(3, 7, 11), (6, 3, 5), (2, 9, 14)]
    return [TokenizedTriple(ids(q), ids(r), ids(h), end_ids=(2,)) for q, r, h in lengths]


def make_rows(config: DeRTaConfig) -> list[list[Row]]:
    """Rows of each triple. Those of the first have no harmful prefix, those of the second all of it."""
    made = [build_rows(triple, config, refusal_token_id=5, index=place) for place, triple in enumerate(triples())]
    for place, length in ((0, 0), (1, 5)):
        triple, (mle, *rest) = triples()[place], made[place]
        context = [*triple.prompt_ids, *triple.rejected_ids[:length]]
        answer = [*triple.chosen_ids, *triple.end_ids]
        labels = [*[IGNORE_INDEX] * len(context), *answer]
        made[place] = [Row([*context, *answer], labels, [False] * len(labels), mle.objective, length), *rest]
    return made


def ordinary_row() -> Row:
    return Row([9, 8, 7, 6, 2], [IGNORE_INDEX, IGNORE_INDEX, 7, 6, 2], [False] * 5, "mle", 0)


def pad(features):
    width = max(len(row["input_ids"]) for row in features) + 2
    columns = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
    return {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in features])
        for name, fill in columns.items()
    }


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    features = [
        {
            "input_ids": row.input_ids,
            "labels": row.labels,
            "rto_mask": row.rto_mask,
            "attention_mask": [1] * len(row.input_ids),
            "branch_starts": row.branch_starts or None,
        }
        for row in rows
    ]
    return RowCollator(pad, "branch")(features)


def loss_of_rows(model, config):
    """Each row by itself; the counts are those of all."""
    rows = [*itertools.chain.from_iterable(make_rows(config)), ordinary_row()]
    mle = sum(label != IGNORE_INDEX for row in rows for label in row.labels) - sum(sum(row.rto_mask) for row in rows)
    counts = torch.tensor([mle, sum(sum(row.rto_mask) for row in rows), len(rows)])
    total = 0.0
    for row in rows:
        labels, rto_mask = torch.tensor([row.labels]), torch.tensor([row.rto_mask])
        nll = per_token_nll(model(input_ids=torch.tensor([row.input_ids])).logits, labels)
        options = {"counts": counts, "normalization": config.normalization, "rto_weight": config.rto_weight}
        total = total + derta_loss(nll, labels[:, 1:] != IGNORE_INDEX, rto_mask[:, 1:], **options).loss
    return total


def loss_of_branches(model, config, way, *, in_head):
    """All triples in one batch of branch rows."""
    batch = collate([*itertools.chain.from_iterable(map(fold_rows, make_rows(config))), ordinary_row()])
    counts = count_batch(batch)
    attention = BranchAttention.of(model, way)
    if attention.flattens:
        batch = flatten_batch(batch)
    masks = attention.masks(batch["position_ids"], batch["branch_ids"], torch.float64)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": masks}
    micro_batch = MicroBatch.of(batch["labels"], batch["rto_mask"], counts, config)
    if not in_head:
        return micro_batch.loss(per_token_nll(model(**inputs).logits, batch["labels"])).loss
    with micro_batch.scoring(model) as head:
        return micro_batch.loss_of_head(head.read(model(**inputs))).loss


def check_same(model, config, way, *, in_head=True, tolerance=1e-12):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with all_in_float64():
        expected = loss_of_rows(model, config)
        wanted = torch.autograd.grad(expected, parameters)
        loss = loss_of_branches(model, config, way, in_head=in_head)
        gradients = torch.autograd.grad(loss, parameters)
    assert abs(loss.item() - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
    scale = max(1.0, *(gradient.abs().max().item() for gradient in wanted))
    worst = max((ours - theirs).abs().max().item() for ours, theirs in zip(gradients, wanted, strict=True))
    assert worst <= tolerance * scale, worst


@pytest.mark.parametrize("num_prefixes", [1, 2, 4])
@pytest.mark.parametrize(("family", "way"), [(family, way) for family in FAMILIES for way in WAYS[family]])
def test_every_family_trains_the_same(family, way, num_prefixes):
    config = DeRTaConfig(num_prefixes=num_prefixes, rto_weight=0.7, zero_prefix_ratio=None)
    check_same(tiny_model(family), config, way, in_head=family != "gemma2")


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("in_head", [True, False], ids=["in the head", "from logits"])
def test_every_normalization_trains_the_same(normalization, in_head):
    config = DeRTaConfig(num_prefixes=2, normalization=normalization, rto_weight=0.7, rto_keep_ratio=0.5)
    check_same(tiny_model("llama"), config, "segments", in_head=in_head)


@pytest.mark.parametrize("way", ["segments", "dense"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_gradient_checkpointing_changes_nothing(family, way):
    model = tiny_model(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_same(model, DeRTaConfig(num_prefixes=2), way)


def test_sdpa_takes_the_dense_mask_too():
    model = tiny_model("mistral", attention="sdpa")
    check_same(model, DeRTaConfig(num_prefixes=2), "dense")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", [*FAMILIES])
def test_flex_attention_trains_the_same(family, monkeypatch):
    plain_flex_attention(monkeypatch)
    check_same(tiny_model(family), DeRTaConfig(num_prefixes=2), "flex", in_head=family != "gemma2")


def test_lora_trains_the_same():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    check_same(model.double(), DeRTaConfig(num_prefixes=2), "segments")


def test_half_precision_is_within_the_noise_of_rows():
    config = DeRTaConfig(num_prefixes=2)
    model = tiny_model("llama").float()
    truth = torch.autograd.grad(loss_of_rows(model, config), list(model.parameters()))
    model = model.bfloat16()
    errors = []
    for loss in (loss_of_rows(model, config), loss_of_branches(model, config, "segments", in_head=True)):
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        pairs = list(zip(gradients, truth, strict=True))
        error = sum((ours.float() - exact).square().sum() for ours, exact in pairs)
        errors.append((error / sum(exact.square().sum() for _, exact in pairs)).sqrt().item())
    assert errors[1] <= 1.5 * errors[0], errors
    assert errors[0] < 0.2


MISTAKES = {
    # what is done wrong: (family, way, the mistake); none of these raises, and the loss is another
    "no mask, so that a jump of positions begins another sequence": ("llama", "dense", {"attention_mask": None}),
    "a mask of padding alone, so that a safe response sees all of the harmful one": (
        "llama",
        "dense",
        {"attention_mask": lambda batch, masks: torch.ones_like(batch["input_ids"])},
    ),
    "positions counted through": (
        "llama",
        "segments",
        {"position_ids": lambda batch, masks: torch.arange(batch["input_ids"].shape[1])[None]},
    ),
    "a bool mask, which eager attention adds": (
        "llama",
        "dense",
        {"attention_mask": lambda batch, masks: masks >= 0},
    ),
    "a sliding window forgotten": (
        "mistral",
        "dense",
        {"attention_mask": lambda batch, masks: additive(branch_mask(batch["position_ids"], batch["branch_ids"]))},
    ),
    "a sliding window over places in the row": (
        "mistral",
        "dense",
        {"attention_mask": lambda batch, masks: additive(window_by_place(batch))},
    ),
}


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e300)


def window_by_place(batch):
    mask = branch_mask(batch["position_ids"], batch["branch_ids"])
    places = torch.arange(mask.shape[-1])
    return mask & (places[:, None] - places[None, :] < 8)


@pytest.mark.parametrize("name", [None, *MISTAKES])
def test_silent_mistakes_would_be_seen(name):
    """Each changes the loss far beyond the tolerance of the tests above; without a mistake (None) nothing differs."""
    family, way, changes = MISTAKES[name] if name else ("llama", "segments", {})
    config = DeRTaConfig(num_prefixes=1)
    model = tiny_model(family)
    (row,) = fold_rows(make_rows(config)[2])
    attention = BranchAttention.of(model, way)
    batch = flatten_batch(collate([row]))
    with all_in_float64():
        masks = attention.masks(batch["position_ids"], batch["branch_ids"], torch.float64)
        right = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": masks}
        changed = {key: change(batch, masks) if callable(change) else change for key, change in changes.items()}
        losses = [
            per_token_nll(model(**inputs).logits, batch["labels"]).sum().item() for inputs in (right, right | changed)
        ]
    assert (abs(losses[0] - losses[1]) > 1e-3) == (name is not None)
