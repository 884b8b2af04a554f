"""The LM loss in chunks against float64 over whole logits. Shapes: M tokens, h hidden size, V vocabulary rows."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from l2e_ds.training import loss
from l2e_ds.training.loss import CHUNK, LossHead, chunked_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 2 * CHUNK["cpu"] + 37, 24, 150


def example(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("scale", [1.0, 4096.0 / 4])
def test_value_and_gradients(dtype, tolerance, scale):
    """Mean over all tokens, with a remainder of a chunk; gradients under a loss scale and accumulation."""
    hidden, weight, targets = example(dtype)
    (chunked_cross_entropy(hidden, weight, targets) * scale).backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = functional.cross_entropy(exact[0] @ exact[1].T, targets)
    found = chunked_cross_entropy(hidden, weight, targets)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    (expected * scale).backward()
    for tensor, reference in zip((hidden, weight), exact, strict=True):
        assert tensor.grad.dtype == dtype
        error = (tensor.grad.double() - reference.grad).norm() / reference.grad.norm()
        assert float(error) < tolerance


@pytest.mark.parametrize("in_one_piece", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_loss(monkeypatch, dtype, in_one_piece):
    """The gradient is that of cross-entropy and z-loss as they are written out; the value is the cross-entropy's."""
    coefficient, scale = 0.02, 4.0
    random = torch.Generator().manual_seed(0)
    # sums of 24 multiples of 1/4 up to 1/4: the logits are exact in bf16
    hidden = torch.randint(-1, 2, (TOKENS, HIDDEN), generator=random).to(dtype).requires_grad_()
    projection = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
    projection.weight.data.copy_(torch.randint(-1, 2, (VOCABULARY, HIDDEN), generator=random) / 4)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=random)

    class Network(torch.nn.Module):
        def get_output_embeddings(self):
            return projection

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=projection(hidden[None]))

    monkeypatch.setattr(loss, "IN_ONE_PIECE", 10**9 if in_one_piece else 1)
    head = LossHead(Network(), coefficient)
    found, found_z_loss = head.loss(Network(), targets[None], targets[None])
    (found * scale).backward()

    x, w = (tensor.detach().double().requires_grad_() for tensor in (hidden, projection.weight))
    logits = x @ w.T
    log_z = torch.log(torch.exp(logits).sum(1))
    cross_entropy = (log_z - logits[torch.arange(TOKENS), targets]).mean()
    z_loss = coefficient * (log_z**2).mean()
    (scale * (cross_entropy + z_loss)).backward()
    # float32: log-probabilities up to 16, so their rounding is 16 roundings of p at most, and sums of up to 1,061 terms
    float32 = (TOKENS + 4 * 16) * 2.0**-24
    for value, expected in ((found, cross_entropy), (found_z_loss, z_loss)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=float32, atol=0)
    # The gradient of the logits and, twice, that of the inputs are rounded to dtype; a sum of rounded terms is off by
    # at most the rounding of their magnitudes. That of one logit is a difference, of the target's.
    half = torch.finfo(dtype).eps / 2
    terms = scale / TOKENS * (1 + 2 * coefficient * log_z.detach())[:, None] * logits.detach().softmax(1)
    terms[torch.arange(TOKENS), targets] += scale / TOKENS
    for tensor, exact, magnitude in (
        (hidden, x, terms @ w.detach().abs()),
        (projection.weight, w, terms.T @ x.detach().abs()),
    ):
        allowed = (half + float32) * magnitude + 2 * half * exact.grad.abs()
        assert bool(((tensor.grad.double() - exact.grad).abs() <= allowed).all())

    losses = head.token_losses(Network(), targets[None], targets[None])
    torch.testing.assert_close(losses.double().mean(), cross_entropy.detach(), rtol=float32, atol=0)


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_the_logits_as_on_a_gpu(dtype, coefficient):
    """What a GPU compiles, with Pythia's vocabulary: it traces as one graph, and even the smallest probabilities of a
    micro-batch of 32,768 tokens keep their gradient (divided by that number before, fp16 would round them to zero)."""
    logits = (2 * torch.randn(8, 50304, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.arange(8) * 1000
    function = partial(loss._logit_gradient, coefficient=coefficient)
    traced = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
    losses, gradient = traced(logits, targets)
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, targets, reduction="none")
    (expected.sum() + coefficient * exact.logsumexp(1).square().sum()).backward()
    # float32 sums of V = 50,304 terms, pairwise: relative error below 2 log2(V) eps
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2 * 16 * torch.finfo(torch.float32).eps, atol=0)
    # rounded once to dtype: half an eps each, or half of fp16's smallest subnormal, and float32's own error
    eps = torch.finfo(dtype).eps / 2 + 3 * 16 * torch.finfo(torch.float32).eps
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=eps, atol=smallest / 2)
    assert gradient.dtype == dtype
    assert float((gradient.double() - exact.grad).norm() / exact.grad.norm()) < eps


def test_a_forward_does_not_wait_for_the_device():
    """transformers asks the device in every forward pass whether sequences are packed; here they never are."""
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(97, (2, 17))
    head = LossHead(model)
    head.loss(model, tokens[:, :-1], tokens[:, 1:])  # checks itself, once
    with Reads() as ours:
        head.loss(model, tokens[:, :-1], tokens[:, 1:])[0].backward()
    with Reads() as theirs:
        model(input_ids=tokens[:, :-1], use_cache=False)
    assert (ours.count, theirs.count) == (0, 1)


class Reads(TorchDispatchMode):
    """Counts how often Python asks for a tensor's value: on a GPU, each time, it waits for all that was launched."""

    count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        self.count += operation.overloadpacket.__name__ in ("_local_scalar_dense", "equal", "nonzero")
        return operation(*arguments, **(options or {}))


def test_each_token():
    hidden, weight, targets = example(torch.float32)
    with torch.no_grad():
        found = chunked_cross_entropy(hidden, weight, targets, "none")
    expected = functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_probability_of_zero():
    """A target whose probability is below float32's smallest number has a finite loss."""
    hidden, weight = torch.ones(600, 1), torch.zeros(4, 1)
    weight[0] = 300.0
    found = chunked_cross_entropy(hidden, weight, torch.ones(600, dtype=torch.int64))
    assert float(found) == pytest.approx(300.0)


def test_a_second_backward_is_refused():
    """The gradients are scaled in place; asked again they must not come out scaled twice."""
    hidden, weight, targets = example(torch.float32)
    value = chunked_cross_entropy(hidden, weight, targets)
    value.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        value.backward()


@pytest.mark.parametrize("in_one_piece", [True, False])
def test_head_of_a_network(monkeypatch, in_one_piece):
    """Loss, token losses and all parameter gradients are those of the network's own logits, which it still gives."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(97, (3, 201))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(input_ids=inputs).logits
    functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    monkeypatch.setattr(loss, "IN_ONE_PIECE", 10**9 if in_one_piece else 1)
    head = LossHead(model)
    mean, z_loss = head.loss(model, inputs, targets)
    mean.backward()
    assert z_loss is None
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        losses = head.token_losses(model, inputs, targets)
    torch.testing.assert_close(
        losses, functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    )
    assert torch.equal(model(input_ids=inputs).logits, logits)
    assert "lm_head.weight" in model.state_dict()


def test_an_error_leaves_logits(monkeypatch):
    """After an exception within the network the projection gives logits again."""
    projection = torch.nn.Linear(4, 8, bias=False)

    class Network(torch.nn.Module):
        def get_output_embeddings(self):
            return projection

        def forward(self, input_ids, use_cache):
            raise RuntimeError("out of memory")

    head = LossHead(Network())
    with pytest.raises(RuntimeError):
        head.loss(Network(), torch.zeros(1, 3).long(), torch.zeros(1, 3).long())
    assert projection(torch.ones(2, 4)).shape == (2, 8)
