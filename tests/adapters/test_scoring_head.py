"""Targets scored in a model's head: the loss and gradients of full logits, for any head, and nothing left behind."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig

from derta_plugins.adapters.scoring_head import HeadNotScorableError, cannot_score, logit_changes, scoring
from derta_plugins.core.constants import IGNORE_INDEX
from tests.adapters.tiny_models import SIZE, VOCABULARY, all_in_float64, tiny_model


def make_batch(targets_left: int = 9):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(6, VOCABULARY, (2, 8), generator=generator)
    targets = torch.randint(6, VOCABULARY, (2, 8), generator=generator)
    drop = torch.randperm(16, generator=generator)[targets_left:]
    targets.view(-1)[drop] = IGNORE_INDEX
    return ids, targets, torch.rand(2, 8, generator=generator, dtype=torch.float64)


def loss_of_logits(model, ids, targets, token_weights):
    logits = model(input_ids=ids).logits
    options = {"ignore_index": IGNORE_INDEX, "reduction": "none"}
    nll = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **options)
    return (nll.view(targets.shape) * token_weights).sum(), nll.view(targets.shape).detach(), logits.detach()


def loss_of_head(model, ids, targets, token_weights, **options):
    with scoring(model, targets, token_weights, **options) as head:
        return head.read(model(input_ids=ids))


def with_lora(model, **options):
    model = get_peft_model(model, LoraConfig(r=2, **options)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "qwen2": lambda: tiny_model("qwen2"),
    "gemma3, tied": lambda: tiny_model("gemma3"),
    "a bias": lambda: biased(tiny_model("llama")),
    "LoRA": lambda: with_lora(tiny_model("llama"), target_modules=["q_proj"]),
    "LoRA on the head": lambda: with_lora(tiny_model("llama"), target_modules=["lm_head", "q_proj"]),
    "a copy of the head": lambda: with_lora(
        tiny_model("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "checkpointing": lambda: checkpointed(tiny_model("llama")),
}


def biased(model):
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY, dtype=torch.float64))
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@pytest.mark.parametrize("targets_left", [9, 1, 0])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_logits(name, targets_left):
    model = MODELS[name]()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = make_batch(targets_left)
    with all_in_float64():
        expected, nll, logits = loss_of_logits(model, *batch)
        found = loss_of_head(model, *batch, stats=True)
        wanted = torch.autograd.grad(expected, parameters)
        gradients = torch.autograd.grad(found.total, parameters)  # also without a target: zeros, for every parameter
    torch.testing.assert_close(found.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.nll, nll, rtol=1e-12, atol=1e-12)
    scale = max(1.0, *(gradient.abs().max().item() for gradient in wanted))
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * scale)
    is_target = batch[1] != IGNORE_INDEX
    entropy = torch.distributions.Categorical(logits=logits).entropy() * is_target
    torch.testing.assert_close(found.entropy, entropy, rtol=0, atol=1e-10)
    assert torch.equal(found.is_top1, (logits.argmax(dim=-1) == batch[1]) & is_target)


def test_the_vocabulary_meets_supervised_positions_alone():
    model, seen = tiny_model("llama"), []
    linear = nn.functional.linear

    def spy(hidden, weight, bias=None):
        if weight.shape[0] == VOCABULARY:
            seen.append(hidden.shape)
        return linear(hidden, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", spy)
        loss_of_head(model, *make_batch(5))
    assert seen == [(5, SIZE["hidden_size"])]


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model("gemma2"),
        lambda: AutoModelForCausalLM.from_config(GraniteConfig(**SIZE, logits_scaling=3.0)).double(),
        lambda: AutoModelForCausalLM.from_config(CohereConfig(**SIZE, logit_scale=0.1)).double(),
    ],
    ids=["soft-cap", "logits scaled down", "logits scaled up"],
)
def test_a_model_that_changes_its_logits_is_noticed(make):
    model = make()
    assert logit_changes(model.config)
    with all_in_float64(), pytest.raises(HeadNotScorableError, match="changes its logits after the head"):
        loss_of_head(model, *make_batch())
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3, tied"])
def test_models_that_leave_their_logits_alone_are_known(name):
    assert not logit_changes(MODELS[name]().config)


AFTER_HEAD = {
    "a soft-cap": lambda logits: 30 * torch.tanh(logits / 30),
    "a factor": lambda logits: 1.01 * logits,
    "a factor in place": lambda logits: logits.mul_(3),
    "a bias": lambda logits: logits + torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype),
    "a floor in place": lambda logits: logits.clamp_(min=-20),
    "entries left out": lambda logits: logits[..., :45],
    "entries forbidden": lambda logits: logits.index_fill(-1, torch.tensor([3, 7]), -torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets_left", [9, 0])
@pytest.mark.parametrize("name", AFTER_HEAD)
def test_a_change_that_no_config_tells_is_noticed_on_every_rank(name, targets_left, dtype):
    """Whether a rank has targets or not, or ranks would go different ways, and wait for one another."""
    model = tiny_model("llama").to(dtype)
    ids, targets, token_weights = make_batch(targets_left)
    with scoring(model, targets, token_weights) as head:
        outputs = model(input_ids=ids)
    outputs.logits = AFTER_HEAD[name](outputs.logits.to(dtype))
    with pytest.raises(HeadNotScorableError, match="changes its logits after the head"):
        head.read(outputs)


@pytest.mark.parametrize("targets_left", [9, 0])
def test_the_marks_decide_alone(targets_left):
    """Not the total, which ranks do not share: it may be rounded where the marks are not."""
    model = tiny_model("llama").float()
    ids, targets, token_weights = make_batch(targets_left)
    with scoring(model, targets, token_weights) as head:
        outputs = model(input_ids=ids)
    outputs.logits = outputs.logits.bfloat16().float()
    expected = loss_of_head(model, ids, targets, token_weights).total
    assert torch.equal(head.read(outputs).total, expected)


def fail_while_scoring(model, error, *, is_answered=False, is_read=False):
    ids, targets, token_weights = make_batch()
    with scoring(model, targets, token_weights) as head:
        outputs = model(input_ids=ids) if is_answered else None
        if is_read:
            head.read(outputs)
        raise error


def test_a_model_that_fails_with_its_heads_answer_is_not_scorable():
    model = tiny_model("llama")
    reshape = RuntimeError("shape '[2, 8, 60]' is invalid for input of size 60")
    with pytest.raises(HeadNotScorableError, match=r"takes no loss from its head for logits: shape '\[2, 8, 60\]'"):
        fail_while_scoring(model, reshape, is_answered=True)
    for error, options in (
        (reshape, {}),  # before the head
        (reshape, {"is_answered": True, "is_read": True}),
        (torch.OutOfMemoryError("full"), {"is_answered": True}),
    ):
        with pytest.raises(RuntimeError) as caught:
            fail_while_scoring(model, error, **options)
        assert caught.value is error


def test_an_infinite_loss_stays_one():
    model = tiny_model("llama")
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCABULARY, dtype=torch.float64))
    ids, targets, token_weights = make_batch()
    model.lm_head.bias.data[targets[targets != IGNORE_INDEX][0]] = -torch.inf
    found = loss_of_head(model, ids, targets, token_weights, stats=True)
    assert found.total == torch.inf
    assert found.entropy.isfinite().all()


@pytest.mark.parametrize("targets_left", [9, 0])
def test_outputs_cast_to_half_precision_cost_the_total_nothing(targets_left):
    """As FSDP2 casts them."""
    model = tiny_model("llama").float()
    ids, targets, token_weights = make_batch(targets_left)
    expected = loss_of_head(model, ids, targets, token_weights).total
    with scoring(model, targets, token_weights) as head:
        outputs = model(input_ids=ids)
    outputs.logits, seen = outputs.logits.bfloat16(), []
    outputs.logits.register_hook(lambda gradient: seen.append(gradient[0, 0, 0].item()))
    total = head.read(outputs).total
    assert torch.equal(total, expected)
    parameters = list(model.parameters())
    for ours, wanted in zip(*(torch.autograd.grad(loss, parameters) for loss in (total, expected)), strict=True):
        assert torch.equal(ours, wanted)
    assert seen == [1.0]  # through the outputs, which sharded models watch
    outputs.logits = outputs.logits.half()
    with pytest.raises(HeadNotScorableError, match="cast to float16"):
        head.read(outputs)


def test_gradients_in_float16_are_those_of_a_scaled_loss():
    """At half a million targets a step: one of them is less than float16 has, before the loss is scaled."""
    scale, weight = 65536.0, 2.0**-19
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        model = tiny_model("llama").float()
        ids, targets, _ = make_batch()
        with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
            found = loss_of_head(model, ids, targets, torch.full((2, 8), weight))
        (scale * found.total).backward()
        gradients[dtype] = model.lm_head.weight.grad / scale
    assert gradients[torch.float16].isfinite().all()
    error = (gradients[torch.float16] - gradients[torch.float32]).norm()
    assert error < 0.02 * gradients[torch.float32].norm()


def test_what_cannot_be_scored_is_known_beforehand():
    compiled = tiny_model("llama")
    compiled.compile()
    assert cannot_score(compiled)
    plain, prompt = tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert not cannot_score(plain)
    assert cannot_score(get_peft_model(plain, prompt))


def test_a_loss_that_is_not_a_number_is_no_changed_logit():
    """One rank alone would leave the head otherwise, and the others wait for it."""
    model = tiny_model("llama")
    model.lm_head.weight.data[7] = float("nan")
    found = loss_of_head(model, *make_batch())
    assert found.total.isnan()


class _Scaled(torch.Tensor):
    """A weight that means twice what is stored, as quantised weights mean something else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            hidden, weight, *rest = args
            return function(hidden, 2 * weight.as_subclass(torch.Tensor), *rest, **kwargs or {})
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_weight_of_another_kind_is_left_to_its_own_head():
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().as_subclass(_Scaled))
    batch = make_batch()
    with all_in_float64():
        expected, nll, _ = loss_of_logits(model, *batch)
        found = loss_of_head(model, *batch)
        embedding = model.get_input_embeddings().weight
        wanted, got = (torch.autograd.grad(loss, embedding)[0] for loss in (expected, found.total))
    torch.testing.assert_close(found.nll, nll, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


class _Doubled(nn.Linear):
    """A head that does more than its class."""

    def forward(self, hidden):
        return 2 * super().forward(hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_head_of_another_kind_is_left_to_itself(dtype):
    model = tiny_model("llama")
    model.lm_head.__class__ = _Doubled
    model, batch = model.to(dtype), make_batch()
    with all_in_float64() if dtype == torch.float64 else nullcontext():
        expected, nll, _ = loss_of_logits(model, *batch)
        found = loss_of_head(model, *batch)
    exact = dtype == torch.float64
    assert found.total.dtype == (torch.float64 if exact else torch.float32)
    options = {"rtol": 1e-12 if exact else 2e-2, "atol": 1e-12 if exact else 2e-2, "check_dtype": False}
    torch.testing.assert_close(found.nll, nll, **options)
    torch.testing.assert_close(found.total, expected, **options)


def test_the_head_is_its_own_again_afterwards():
    model = tiny_model("llama")
    ids, targets, token_weights = make_batch()
    before = model(input_ids=ids).logits
    loss_of_head(model, ids, targets, token_weights)
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises(ZeroDivisionError), scoring(model, targets, token_weights):
        raise ZeroDivisionError
    assert torch.equal(model(input_ids=ids).logits, before)


def test_misuse_is_refused():
    model = tiny_model("llama")
    ids, targets, token_weights = make_batch()
    with scoring(model, targets, token_weights) as head:
        assert not head.awaits_reading
        with pytest.raises(HeadNotScorableError, match="did not ask its head"):
            head.read(object())
        with pytest.raises(HeadNotScorableError, match="another tool replaced"), scoring(model, targets, token_weights):
            pass
        model(input_ids=ids)
        assert head.awaits_reading
        with pytest.raises(HeadNotScorableError, match="called once"):
            model(input_ids=ids)
    with scoring(model, targets, token_weights), pytest.raises(HeadNotScorableError, match=r"got \(1, 8, 32\)"):
        model(input_ids=ids[:1])
    model.set_output_embeddings(None)
    with pytest.raises(HeadNotScorableError, match="has no head"), scoring(model, targets, token_weights):
        pass
