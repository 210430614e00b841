"""The grouped product of all experts, against one product for each."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from slipway.training import experts, patches
from slipway.training.experts import grouped_product

SIZES, ROWS, WIDTH = [3, 0, 7, 1, 5], 24, 16


def _inputs(trained: bool):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(ROWS, WIDTH).bfloat16(), requires_grad=trained) for _ in SIZES]
    return torch.randn(sum(SIZES), WIDTH).bfloat16().requires_grad_(), weights


def _one_by_one(inputs, weights):
    return torch.cat([part @ weight.T for part, weight in zip(inputs.split(SIZES), weights, strict=True)])


def _same(one, other):
    torch.testing.assert_close(one.float(), other.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_outputs_and_gradients_are_those_of_one_product_for_each(trained):
    inputs, weights = _inputs(trained)
    gradient = torch.randn(sum(SIZES), ROWS).bfloat16()
    wanted = _one_by_one(inputs, weights)
    of_wanted = torch.autograd.grad(wanted, [inputs, *weights][: None if trained else 1], gradient)
    found = grouped_product(inputs, weights, SIZES)
    _same(found, wanted)
    of_found = torch.autograd.grad(found, [inputs, *weights][: None if trained else 1], gradient)
    for one, other in zip(of_found, of_wanted, strict=True):
        _same(one, other)


def test_frozen_weights_are_moved_together_once_and_keep_their_values():
    inputs, weights = _inputs(False)
    before = [weight.clone() for weight in weights]
    grouped_product(inputs, weights, SIZES)
    places = [weight.data_ptr() for weight in weights]
    assert experts._as_one(weights) is not None
    assert all(map(torch.equal, before, weights))
    grouped_product(inputs, weights, SIZES)
    assert places == [weight.data_ptr() for weight in weights]


class Grouped(torch.nn.Module):
    """As Transformer Engine's GroupedLinear makes its weights: each is registered, then all are filled."""

    def __init__(self, fp8: bool = False, device: str = "cpu") -> None:
        super().__init__()
        self.num_gemms, self.primary_weights_in_fp8, self.about = len(SIZES), fp8, {}
        for number in range(self.num_gemms):
            weight = torch.nn.Parameter(torch.empty(ROWS, WIDTH, device=device, dtype=torch.bfloat16))
            self.register_parameter(f"weight{number}", weight, filled_with=number)
        self.register_parameter("bias0", torch.nn.Parameter(torch.zeros(ROWS)), filled_with=None)
        for name, parameter in self.named_parameters():
            torch.nn.init.constant_(parameter, self.about[name] or 0)

    def register_parameter(self, name, parameter, filled_with) -> None:
        super().register_parameter(name, parameter)
        self.about[name] = filled_with


@pytest.mark.parametrize("options, together", [({}, True), ({"fp8": True}, False), ({"device": "meta"}, False)])
def test_weights_are_made_in_one_piece_of_memory(monkeypatch, options, together):
    monkeypatch.setattr(Grouped, "__init__", experts._made_together(Grouped.__init__))
    made = Grouped(**options)
    weights = [made.get_parameter(f"weight{number}") for number in range(len(SIZES))]
    assert "register_parameter" not in vars(made)
    assert all(isinstance(weight, torch.nn.Parameter) and weight.requires_grad for weight in weights)
    if together:
        piece = experts._as_one(weights)
        assert piece is not None and piece.untyped_storage().nbytes() == len(SIZES) * ROWS * WIDTH * 2
        assert [weight.unique().tolist() for weight in weights] == [[float(number)] for number in range(len(SIZES))]
    elif not weights[0].is_meta:
        assert experts._as_one(weights) is None


IN_BUFFERS = """
import torch
from slipway.training import cpu
cpu.enable()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from slipway.training import experts, patches
parallel_state.initialize_model_parallel()

class Grouped(torch.nn.Module):
    def __init__(self, count, rows, columns):
        super().__init__()
        self.num_gemms, self.primary_weights_in_fp8 = count, False
        for number in range(count):
            weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=torch.bfloat16))
            self.register_parameter(f"weight{number}", weight)
        self.register_parameter("bias0", torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)))
        for number in range(count):
            torch.nn.init.constant_(self.get_parameter(f"weight{number}"), number)

Grouped.__init__ = experts.made_in_one_piece(Grouped.__init__)
for shared in (False, True):
    layers = torch.nn.ModuleList([Grouped(16, 24, 32), Grouped(16, 32, 12), torch.nn.Linear(3, 3).bfloat16()])
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=1)
    about = DistributedDataParallelConfig(use_distributed_optimizer=shared, grad_reduce_in_fp32=True)
    DistributedDataParallel(config, about, layers)
    for layer in layers[:2]:
        weights = [getattr(layer, f"weight{number}") for number in range(16)]
        assert experts._as_one(weights) is not None, "the weights are copied in every product"
        assert experts._buffer_of(weights) is not None, "each weight's gradient is added on its own"
        assert [weight.unique().tolist() for weight in weights] == [[number] for number in range(16)]
print("in one piece")
"""


def test_megatrons_buffers_keep_weights_and_gradients_in_one_piece(warm, tmp_path):
    code, printed = warm.python(["-c", IN_BUFFERS], tmp_path / "output")
    assert code == 0 and "in one piece" in printed, printed


def test_gradients_go_into_megatrons_buffer_where_it_is_in_one_piece():
    inputs, weights = _inputs(True)
    wanted = torch.autograd.grad(_one_by_one(inputs, weights).sum(), weights)
    buffer = torch.ones(len(weights), ROWS, WIDTH)
    for weight, part in zip(weights, buffer, strict=True):
        weight.main_grad, weight.grad_added_to_main_grad = part, False
    grouped_product(inputs, weights, SIZES).sum().backward()
    _same(buffer - 1, torch.stack(wanted))
    assert all(weight.grad is None and weight.grad_added_to_main_grad for weight in weights)


def test_weights_that_stand_in_the_place_of_parameters_are_used():
    module = torch.nn.Module()
    module.num_gemms = 2
    for number in range(2):
        module.register_parameter(f"weight{number}", torch.nn.Parameter(torch.full((1,), float(number))))
    assert experts._weights_of(module) == [module.weight0, module.weight1]
    vars(module)["weight1"] = torch.full((1,), 7.0)
    assert [weight.item() for weight in experts._weights_of(module)] == [0, 7]


def test_tokens_that_are_in_order_are_not_sorted_again():
    calls = []
    sort = experts._unless_sorted(lambda inputs, sizes, order, **options: calls.append(options) or ("sorted", None))
    sizes, probs = torch.tensor([2, 1, 1]), torch.rand(4)
    assert sort("inputs", sizes, torch.arange(3), probs=probs, fused=True) == ("inputs", probs)
    assert not calls
    assert sort("inputs", sizes, torch.tensor([0, 2, 1]), probs=probs, fused=True) == ("sorted", None)
    assert calls == [{"probs": probs, "fused": True}]


def test_every_row_gets_its_experts_bias():
    output, biases = torch.zeros(4, 2), [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0])]
    found = experts._add_bias(output, biases, [1, 0, 3], torch.tensor([[1.0], [0.5], [1.0], [0.0]]))
    assert found.tolist() == [[1.0, 2.0], [2.5, 3.0], [5.0, 6.0], [0.0, 0.0]]
    assert experts._add_bias(output, None, [1, 0, 3], torch.ones(4, 1)) is output


def test_neighbours_in_memory_that_do_not_belong_together_are_copied():
    weights = _inputs(True)[1]
    assert experts._as_one(weights) is None
    whole = torch.stack([weight.detach() for weight in weights])
    assert torch.equal(experts._as_one(whole.unbind()), whole)
    assert experts._as_one(whole.flip(0).unbind()[::2]) is None
    assert experts._as_one(list(whole.unbind())[::-1]) is None


def test_counts_on_the_gpu_make_the_same_product_and_the_same_biases():
    inputs, weights = _inputs(False)
    counts = experts.Counts(torch.tensor(SIZES)).tolist()
    assert torch.equal(grouped_product(inputs, weights, counts), grouped_product(inputs, weights, SIZES))
    biases = [torch.full((2,), float(number)) for number in range(len(SIZES))]
    for sizes in (counts, SIZES):
        found = experts._add_bias(torch.ones(sum(SIZES), 2), biases, sizes, torch.full((sum(SIZES), 1), 0.5))
        assert found.tolist() == [[1 + number / 2] * 2 for number, size in enumerate(SIZES) for _ in range(size)]


PLAIN = {
    "moe_pad_expert_input_to_capacity": False,
    "moe_expert_capacity_factor": None,
    "moe_permute_fusion": True,
    "moe_grouped_gemm": True,
    "fp8": None,
}


@pytest.mark.parametrize(
    "ranks, change, stay",
    [
        (1, {}, True),
        (2, {}, False),
        (1, {"fp8": "hybrid"}, False),
        (1, {"moe_expert_capacity_factor": 1.5}, False),
        (1, {"moe_grouped_gemm": False}, False),
        (1, {"moe_permute_fusion": False}, False),
    ],
)
def test_counts_stay_on_the_gpu_where_nobody_else_asks_for_them(monkeypatch, ranks, change, stay):
    from slipway.training import cpu

    cpu.enable()
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_expert_tensor_and_model_parallel_world_size", lambda: ranks)
    dispatcher, counts = SimpleNamespace(config=SimpleNamespace(**PLAIN | change)), torch.tensor(SIZES)
    fetch = experts._without_waiting(lambda dispatcher, point, counts=None: ("fetched", point))
    before, end = fetch(dispatcher, "before_permutation_1", counts), fetch(dispatcher, "before_finish", counts)
    if stay:
        assert before is counts and isinstance(end, experts.Counts) and end.rows is counts
        assert end.ends.tolist() == [3, 3, 10, 11, 16] and end.ends.dtype == torch.int32
    else:
        assert (before, end) == (("fetched", "before_permutation_1"), ("fetched", "before_finish"))


def test_kernels_that_sort_tokens_are_compiled_in_one_size(monkeypatch):
    """The kernels of Transformer Engine 2.9, which only GPUs have: their names and sizes are as it defines them."""
    sizes = [64, 128, 256, 512, 1024, 2048, 4096]
    kernels = {
        name: SimpleNamespace(configs=[SimpleNamespace(kwargs={"BLOCK_SIZE": size}) for size in sizes])
        for name in experts.SORTING
    }
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    engine = sys.modules["transformer_engine.pytorch.triton"]
    engine.permutation = SimpleNamespace(**kernels)
    monkeypatch.setattr(patches, "installed", lambda _: patches.TRANSFORMER_ENGINE.version)
    experts.choose_blocks()
    for kernel in kernels.values():
        assert [one.kwargs["BLOCK_SIZE"] for one in kernel.configs] == [experts.COLUMNS]
