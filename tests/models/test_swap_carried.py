"""What a new norm takes over of the batch norm before it: scale, shift, statistics, eps; and the bias before it."""

import pytest
import torch
from strangers_network import StrangersNet
from swapping import difference, learned, norm_of, pair, rows, settings
from torch import nn

from models import NORMS, with_norm
from models.norms.base import RunningNorm
from models.norms.batch_renorm import BatchRenorm
from models.norms.power import PowerNorm
from models.norms.switchable import SwitchableNorm
from models.norms.weight_standardization import (
    StandardizedConv1d,
    StandardizedConv2d,
    StandardizedConv3d,
    StandardizedLinear,
)

pytestmark = pytest.mark.filterwarnings("ignore:with_norm has replaced nothing")


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"none"}))
def test_scale_shift_and_statistics_are_carried_over(norm):
    network = pair()
    old, new = norm_of(network), norm_of(with_norm(network, settings(norm)).network)
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.bias, old.bias)
    if isinstance(new, PowerNorm):
        torch.testing.assert_close(new.running_square, old.running_var + old.running_mean**2)
    elif isinstance(new, BatchRenorm):
        torch.testing.assert_close(new.running_std, (old.running_var + old.eps).sqrt())
    elif isinstance(new, RunningNorm):
        assert torch.equal(new.running_var, old.running_var)
    if isinstance(new, RunningNorm) and not isinstance(new, PowerNorm):
        assert torch.equal(new.running_mean, old.running_mean)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_a_layer_keeps_dtype_device_mode_gradients_hooks_and_names(norm):
    network = pair().bfloat16()
    network[1].weight.requires_grad_(False)
    network.train()
    network[1].eval()  # a frozen batch norm
    seen = []
    network[1].register_forward_hook(lambda module, given, result: seen.append("forward"))
    network[1].register_forward_pre_hook(lambda module, given: seen.append("pre"))
    network[1].register_full_backward_hook(lambda module, given, result: seen.append("backward"))
    swapped = with_norm(network, settings(norm)).network
    assert seen == []  # a trace calls no hooks
    assert all(p.dtype == torch.bfloat16 for p in swapped.parameters())
    assert all(b.dtype in (torch.bfloat16, torch.int64) for b in swapped.buffers())
    assert swapped.training
    assert swapped[0].training
    assert not swapped[1].training
    if norm != "none":
        assert not swapped[1].weight.requires_grad
        assert swapped[1].bias.requires_grad
    assert swapped[0].weight.requires_grad
    swapped(torch.randn(2, 3, 5, 5).bfloat16()).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    names = {name for name, _ in swapped.named_parameters()}
    own = {"1.mean_weights", "1.var_weights"} if norm == "switchable" else set()
    assert names == ({"0.weight", "0.bias"} if norm == "none" else {"0.weight", "1.weight", "1.bias"} | own)
    moved = with_norm(network.to("meta"), settings(norm)).network
    assert {str(values.device) for values in [*moved.parameters(), *moved.buffers()]} == {"meta"}


def test_the_given_network_stays_as_it_is_and_results_repeat():
    network = learned(StrangersNet(width=8)).train()
    before = {name: values.clone() for name, values in network.state_dict().items()}
    kinds = [type(module) for module in network.modules()]
    state = torch.get_rng_state()
    for norm in NORMS:
        one, other = (with_norm(network, settings(norm)) for _ in range(2))
        assert one[1:] == other[1:]
        assert one.network.state_dict().keys() == other.network.state_dict().keys()
        for name, values in one.network.state_dict().items():
            assert torch.equal(values, other.network.state_dict()[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in network.modules()] == kinds
    assert all(torch.equal(before[name], values) for name, values in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("norm", ["batch", "batch_renorm", "instance"])
def test_a_bias_that_the_norm_subtracts_goes_with_the_function_kept(norm):
    network = pair(bias=True)
    swapped = with_norm(network, settings(norm))
    assert swapped.notes == {"0": "its bias is gone: 1 subtracts the mean of each channel"}
    assert swapped.network[0].bias is None
    kept = nn.Sequential(network[0], norm_of(with_norm(nn.Sequential(nn.ReLU(), network[1]), settings(norm)).network))
    x = rows(4, 3, 6, 6)
    assert difference(kept.eval(), swapped.network.eval(), x) <= 1e-12
    assert difference(kept.train(), swapped.network.train(), x) <= 1e-12
    assert difference(kept.eval(), swapped.network.eval(), x) <= 1e-12


@pytest.mark.parametrize("norm", ["group", "layer", "power", "switchable"])
def test_a_bias_that_means_something_to_the_norm_stays(norm):
    network = pair(bias=True)
    swapped = with_norm(network, settings(norm))
    assert torch.equal(swapped.network[0].bias, network[0].bias)
    assert swapped.notes == {}


@pytest.mark.parametrize("norm", ["group", "layer", "power", "switchable", "weight_standardized_group"])
def test_a_norm_without_a_shift_leaves_it_to_the_bias_before(norm):
    network = pair()
    old = network[1]
    swapped = with_norm(network, settings(norm, norm_shift="off"))
    conv, new = swapped.network
    expected = old.bias * (old.running_var + old.eps).sqrt() - old.running_mean
    torch.testing.assert_close(conv.bias.detach(), expected.detach())
    assert conv.bias.requires_grad
    assert new.bias is None
    if isinstance(new, SwitchableNorm):  # its statistics are those of what the convolution gives now
        torch.testing.assert_close(new.running_mean, (old.running_mean + expected).detach())
    fixed = with_norm(network, settings(norm, norm_shift="fixed")).network
    assert torch.equal(fixed[0].bias, torch.zeros(4).double())
    assert torch.equal(fixed[1].bias, old.bias)
    assert not isinstance(fixed[1].bias, nn.Parameter)


def test_a_shift_that_is_lost_is_said():
    swapped = with_norm(pair(), settings("batch", norm_shift="off", norm_scale="off"))
    assert swapped.notes == {
        "1": "model.norm_scale is off: its scale is gone; model.norm_shift is off: its shift is gone"
    }


def test_eps_and_momentum_of_a_layer_stay_unless_the_settings_say_others():
    network = pair(eps=1e-3, momentum=0.01)
    new = norm_of(with_norm(network, settings("batch")).network)
    assert (new.eps, new.momentum) == (1e-3, 0.01)
    new = norm_of(with_norm(network, settings("batch", norm_eps=1e-4, norm_momentum=0.2)).network)
    assert (new.eps, new.momentum) == (1e-4, 0.2)
    new = norm_of(with_norm(pair(momentum=None), settings("batch")).network)
    assert new.momentum == 0.1


def test_batch_norm_without_parameters_or_statistics():
    network = pair(affine=False)
    for norm in ("batch", "none"):
        swapped = with_norm(network, settings(norm)).network
        assert difference(network, swapped, rows(2, 3, 5, 5)) <= 1e-12
    assert list(dict(with_norm(network, settings("group")).network.named_parameters())) == ["0.weight"]
    alone = learned(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False)))
    affine = with_norm(alone, settings("none")).network
    assert difference(alone, affine, rows(2, 3, 5, 5)) <= 1e-12
    assert list(affine.parameters()) == []  # what was not learned is not learned
    network = pair(track_running_stats=False)
    swapped = with_norm(network, settings("batch"))
    assert swapped.notes == {"1": "it had no running statistics: they start at mean 0 and variance 1"}
    assert difference(network.train(), swapped.network.train(), rows(2, 3, 5, 5)) <= 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kind", "norm_kind", "shape"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (5,)),
        (nn.Conv2d, nn.BatchNorm2d, (5, 4)),
        (nn.Conv3d, nn.BatchNorm3d, (5, 4, 3)),
        (nn.ConvTranspose1d, nn.BatchNorm1d, (5,)),
        (nn.ConvTranspose2d, nn.BatchNorm2d, (5, 4)),
        (nn.ConvTranspose3d, nn.BatchNorm3d, (5, 4, 3)),
        (nn.Linear, nn.BatchNorm1d, ()),
    ],
)
def test_layers_of_all_kinds_take_up_what_batch_norm_did(kind, norm_kind, shape, groups, bias):
    options = {} if kind is nn.Linear else {"kernel_size": 2, "groups": groups}
    network = learned(nn.Sequential(kind(4, 6, bias=bias, **options), norm_kind(6)))
    x = rows(3, 4, *shape)
    for norm in ("none", "batch"):
        swapped = with_norm(network, settings(norm))
        assert difference(network, swapped.network, x) <= 1e-12
        assert all(p.dtype == torch.float64 for p in swapped.network.parameters())
    assert type(with_norm(network, settings("none")).network[1]) is nn.Identity
    standardized = with_norm(network, settings("weight_standardized_group"))
    known = (StandardizedConv1d, StandardizedConv2d, StandardizedConv3d, StandardizedLinear)
    assert isinstance(standardized.network[0], known) == (
        kind not in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    )
    assert standardized.network(x).shape == network(x).shape


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 5, 3), (4, 5, 3, 2)])
def test_every_norm_takes_vectors_sequences_images_and_volumes(norm, shape):
    """Vectors excepted where a norm needs several positions of a channel."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    network = learned(nn.Sequential(kind(4)))
    x = rows(3, *shape).requires_grad_()
    swapped = with_norm(network, settings(norm), inputs=x)
    if norm in ("instance", "switchable") and len(shape) == 1:
        assert list(swapped.kept) == ["0"]
        return
    assert (swapped.replaced, swapped.kept) == (("0",), {})
    for training in (True, False):
        y = swapped.network.train(training)(x)
        y.square().sum().backward()
        assert y.shape == x.shape
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
