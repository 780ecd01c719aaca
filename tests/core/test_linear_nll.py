"""The loss through the head: the ladder of `linear_nll`, against full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from derta_plugins.core.linear_nll import linear_nll

N, D, V = 13, 6, 29


def make(dtype=torch.float64, count=N, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(count, D, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (count,), generator=generator)
    token_weights = torch.rand(count, generator=generator, dtype=torch.float64)
    return hidden, weight, bias, targets, token_weights


def dense(hidden, weight, bias, targets, token_weights):
    nll = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    return (nll * token_weights).sum(), nll.detach()


def test_value_is_the_loop_oracle():
    hidden, weight, bias, targets, token_weights = make()
    found = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias, chunk_size=4, stats=True)
    hidden, weight, bias, total = hidden.tolist(), weight.tolist(), bias.tolist(), 0.0
    for i in range(N):
        scores = [sum(hidden[i][d] * weight[v][d] for d in range(D)) + bias[v] for v in range(V)]
        partition = sum(math.exp(score) for score in scores)
        probabilities = [math.exp(score) / partition for score in scores]
        nll = -math.log(probabilities[targets[i]])
        total += float(token_weights[i]) * nll
        assert found.nll[i].item() == pytest.approx(nll, abs=1e-12)
        assert found.entropy[i].item() == pytest.approx(-sum(p * math.log(p) for p in probabilities), abs=1e-12)
        assert found.is_top1[i].item() == (max(range(V), key=scores.__getitem__) == targets[i])
    assert found.total.item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100, None])
def test_value_and_gradient_match_full_logits(chunk_size, has_bias):
    hidden, weight, bias, targets, token_weights = make()
    bias = bias if has_bias else None
    inputs = [value for value in (hidden, weight, bias) if value is not None]
    found = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias, chunk_size=chunk_size)
    expected, nll = dense(hidden, weight, bias, targets, token_weights)
    torch.testing.assert_close(found.total, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.nll, nll, rtol=0, atol=1e-12)
    assert not found.nll.requires_grad
    assert found.entropy is None
    assert found.is_top1 is None
    # an upstream factor other than one
    for ours, wanted in zip(
        torch.autograd.grad(3.5 * found.total, inputs), torch.autograd.grad(3.5 * expected, inputs), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_gradcheck():
    hidden, weight, bias, targets, token_weights = make(count=4)

    def total(*inputs):
        return linear_nll(*inputs[:2], targets, token_weights=token_weights, bias=inputs[2], chunk_size=3).total

    assert torch.autograd.gradcheck(total, (hidden, weight, bias))


def test_known_value_and_gradient():
    """Uniform over V tokens: log V nats; the gradient of the hidden state is w (mean of the weights - the target's)."""
    weight = torch.zeros(V, D, dtype=torch.float64)
    weight[7, 0] = 1e-30
    hidden = torch.zeros(2, D, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    found = linear_nll(hidden, weight, torch.tensor([3, 7]), token_weights=torch.tensor([1.0, 0.25]))
    assert found.nll.tolist() == pytest.approx([math.log(V)] * 2, abs=1e-12)
    assert found.total.item() == pytest.approx(1.25 * math.log(V), abs=1e-12)
    found.total.backward()
    assert hidden.grad[1, 0].item() == pytest.approx(0.25 * (1e-30 / V - 1e-30), rel=1e-9)


def test_splits_add_up():
    hidden, weight, bias, targets, token_weights = make()
    whole = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias)
    (gradient,) = torch.autograd.grad(whole.total, weight)
    parts, summed = [], torch.zeros_like(gradient)
    for rows in (slice(0, 5), slice(5, 5), slice(5, 13)):
        options = {"token_weights": token_weights[rows], "bias": bias}
        parts.append(linear_nll(hidden[rows], weight, targets[rows], **options).total)
        summed += torch.autograd.grad(parts[-1], weight, retain_graph=True)[0]
    torch.testing.assert_close(sum(parts), whole.total, rtol=0, atol=1e-12)
    torch.testing.assert_close(summed, gradient, rtol=0, atol=1e-12)


def test_no_target_gives_an_attached_zero():
    hidden, weight, bias, targets, token_weights = make(count=0)
    found = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias, stats=True)
    assert found.total.item() == 0.0
    found.total.backward()
    assert hidden.grad.shape == (0, D)
    assert weight.grad.abs().sum() == bias.grad.abs().sum() == 0


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, bias, targets, token_weights = make()
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, value in inputs.items():
        value.requires_grad_(frozen not in (name, "all"))
    found = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias, chunk_size=4)
    expected, _ = dense(hidden, weight, bias, targets, token_weights)
    torch.testing.assert_close(found.total, expected, rtol=0, atol=1e-12)
    assert found.total.requires_grad == (frozen != "all")
    if frozen == "all":
        return
    found.total.backward()
    for name, value in inputs.items():
        assert (value.grad is None) == (name == frozen), name


def test_without_grad_the_value_is_the_same():
    hidden, weight, bias, targets, token_weights = make()
    with torch.no_grad():
        found = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias, chunk_size=4, stats=True)
    torch.testing.assert_close(found.total, dense(hidden, weight, bias, targets, token_weights)[0], rtol=0, atol=1e-12)


def test_large_logits_do_not_overflow():
    hidden, weight, bias, targets, token_weights = make(torch.float32, scale=1e4)
    found = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias, stats=True)
    expected, nll = dense(hidden, weight, bias, targets, token_weights)
    torch.testing.assert_close(found.nll, nll, rtol=1e-5, atol=1e-2)
    assert found.entropy.isfinite().all()
    (gradient,) = torch.autograd.grad(found.total, hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["half precision", "autocast"])
def test_half_precision_is_as_near_the_truth_as_full_logits_are(how):
    truth = make(seed=1)
    exact = torch.autograd.grad(dense(*truth)[0], truth[:3])
    dtype = torch.bfloat16 if how == "half precision" else torch.float32
    hidden, weight, bias, targets, token_weights = make(dtype, seed=1)
    losses = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        options = {"token_weights": token_weights, "bias": bias, "chunk_size": 3}
        losses.append(linear_nll(hidden, weight, targets, **options).total)
        logits = F.linear(hidden, weight, bias).float()
        losses.append((F.cross_entropy(logits, targets, reduction="none") * token_weights.float()).sum())
    assert losses[0].dtype == torch.float32
    errors = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        assert [of.dtype for of in gradients] == [dtype] * 3
        errors.append([(of.double() - to).norm() / to.norm() for of, to in zip(gradients, exact, strict=True)])
    assert all(ours <= 1.5 * theirs + 1e-3 for ours, theirs in zip(*errors, strict=True)), errors


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_more_than_a_chunk_of_logits_exists_at_once():
    hidden, weight, bias, targets, token_weights = make(count=1000)
    with LargestTensor() as largest:
        options = {"token_weights": token_weights, "bias": bias, "chunk_size": 10}
        linear_nll(hidden, weight, targets, **options, stats=True).total.backward()
    assert largest.elements <= max(10 * V, 1000 * D, V * D)
    with LargestTensor() as largest:
        dense(hidden, weight, bias, targets, token_weights)[0].backward()
    assert largest.elements == 1000 * V  # so the look at tensors sees logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(N - 1, dtype=torch.int64)}, r"`hidden` must have the shape \(12, 6\), got \(13, 6\)"),
        ({"weight": torch.zeros(V, D + 1)}, r"`hidden` must have the shape \(13, 7\)"),
        ({"token_weights": torch.zeros(N, 1)}, r"`token_weights` must have the shape \(13,\), got \(13, 1\)"),
        ({"bias": torch.zeros(V + 1)}, r"`bias` must have the shape \(29,\), got \(30,\)"),
        ({"targets": torch.full((N,), V)}, r"`targets` must be in \[0, 29\), got 29 to 29"),
        ({"targets": torch.full((N,), -100)}, r"`targets` must be in \[0, 29\), got -100 to -100"),
        ({"targets": torch.full((N,), -1)}, r"`targets` must be in \[0, 29\), got -1 to -1"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    names = ("hidden", "weight", "bias", "targets", "token_weights")
    inputs = {**dict(zip(names, make(), strict=True)), **change}
    with pytest.raises(ValueError, match=message):
        linear_nll(inputs.pop("hidden"), inputs.pop("weight"), inputs.pop("targets"), **inputs)


def test_without_gradients_none_are_made(monkeypatch):
    hidden, weight, bias, targets, token_weights = make()
    with torch.no_grad():
        found = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias)
        monkeypatch.setattr("derta_plugins.core.linear_nll._Chunks._add_gradients", None)
        again = linear_nll(hidden, weight, targets, token_weights=token_weights, bias=bias)
    assert torch.equal(found.total, again.total)
    assert not found.total.requires_grad


@pytest.mark.parametrize("is_autocast", [True, False], ids=["autocast", "weights"])
def test_gradients_in_float16_are_refused(is_autocast):
    hidden, weight, _, targets, token_weights = make(torch.float32 if is_autocast else torch.float16)
    with torch.autocast("cpu", dtype=torch.float16, enabled=is_autocast):
        with pytest.raises(ValueError, match="train in bfloat16"):
            linear_nll(hidden, weight, targets, token_weights=token_weights)
        with torch.no_grad():
            assert linear_nll(hidden, weight, targets, token_weights=token_weights).total.isfinite()
