"""The cross entropy with the output layer inside it, against torch's of whole logits."""

import pytest
import torch
from slipway.training.cross_entropy import linear_cross_entropy
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, HIDDEN, VOCABULARY = 37, 24, 101


def _inputs(trained: bool):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=trained)
    return hidden, weight, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_loss_and_gradients_are_those_of_torch(trained, chunk):
    hidden, weight, labels = _inputs(trained)
    expected = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.25, [hidden, weight][: 1 + trained])
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    found = torch.autograd.grad(loss * 0.25, [hidden, weight][: 1 + trained])
    torch.testing.assert_close(loss, expected)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_large_logits_do_not_overflow():
    hidden, weight, labels = _inputs(False)
    loss = linear_cross_entropy(hidden * 1e4, weight, labels)
    torch.testing.assert_close(loss, functional.cross_entropy(hidden * 1e4 @ weight.T, labels, reduction="sum"))


def test_no_tokens_are_no_loss_and_no_gradient():
    hidden, weight, labels = _inputs(True)
    loss = linear_cross_entropy(hidden[:0], weight, labels[:0])
    loss.backward()
    assert loss == 0 and not weight.grad.any()


def test_nothing_is_computed_but_the_loss_where_no_gradient_is_wanted():
    hidden, weight, labels = _inputs(True)
    with torch.no_grad(), _Products() as products:
        linear_cross_entropy(hidden, weight, labels)
    assert len(products.shapes) == 1


@pytest.mark.parametrize("sequences", [1, 2])
def test_every_product_with_the_vocabulary_is_of_two_dimensions(sequences):
    """With strides as Megatron's loss leaves them for one sequence, torch multiplies row by row on a GPU."""
    hidden, weight, labels = _inputs(True)
    states = hidden[:36].view(-1, sequences, HIDDEN)
    with _Products() as products:
        linear_cross_entropy(states.reshape(-1, HIDDEN), weight, labels[:36]).backward()
    assert len(products.shapes) == 3
    assert all(len(shape) == 2 for shapes in products.shapes for shape in shapes)


class _Products(TorchDispatchMode):
    """Remembers the shapes of the factors of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if any(word in str(function) for word in ("mm", "matmul", "linear")):
            self.shapes.append([tuple(one.shape) for one in arguments if isinstance(one, torch.Tensor)])
        return function(*arguments, **(keywords or {}))
