"""What traces show of who takes whose output, and what happens where a module cannot be traced."""

import pytest
import torch
from strangers_network import StrangersNet
from torch import nn
from torch.nn import functional as F

from models.dataflow import SOMEWHERE, DataFlow, input_shapes

BRANCH = "symbolically traced variables cannot be used as inputs to control flow"


def flow_of(network):
    return DataFlow(network, (nn.BatchNorm2d,))


class Block(nn.Module):
    def __init__(self, branch=False):
        super().__init__()
        self.branch = branch
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x, mask=None):
        if mask is not None:  # a default is left alone: not a branch
            return self.norm(x)
        if self.branch and x.mean() > 0:
            return x
        return self.norm(self.conv(x)) + x


class Outer(nn.Module):
    """Branches itself; one of its blocks does, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.plain, self.odd = Block(), Block(branch=True)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.odd(self.plain(x)) if x.shape[0] > 1 else x


def test_the_source_and_the_consumers_of_a_layer():
    flow = flow_of(Block())
    assert flow.sources("norm") == {"conv"}
    assert flow.consumers("conv") == {"norm"}
    assert flow.consumers("norm") == {SOMEWHERE}
    with pytest.raises(LookupError, match=r"^it follows an input$"):
        flow.sources("conv")
    assert flow.untraced == {}


def test_only_the_module_that_branches_is_unknown():
    flow = flow_of(nn.Sequential(Block(), Block(branch=True), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert flow.untraced == {"1": BRANCH}
    assert flow.sources("0.norm") == {"0.conv"}
    assert flow.sources("3") == {"2"}
    with pytest.raises(LookupError, match=rf"^the calls within 1 are not known: {BRANCH}$"):
        flow.sources("1.norm")
    assert flow.consumers("1.conv") == {SOMEWHERE}


def test_children_of_what_cannot_be_traced_are_traced_by_themselves():
    flow = flow_of(Outer())
    assert flow.untraced == {"": BRANCH, "odd": BRANCH}
    assert flow.sources("plain.norm") == {"plain.conv"}
    for name in ("norm", "odd.norm"):
        with pytest.raises(LookupError, match=r"^the calls within (the network|odd) are not known: "):
            flow.sources(name)


class ComplaintError(Exception):
    pass


class Complaining(nn.Module):
    """Uses its layers before it raises what no library knows."""

    def __init__(self):
        super().__init__()
        self.norm, self.gain = nn.BatchNorm2d(3), nn.Parameter(torch.ones(()))

    def forward(self, x, other):
        x = self.norm(x) * self.gain
        if not isinstance(other, torch.Tensor):
            raise ComplaintError("tensors only")
        return x * self.gain + other


class Complained(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.inner, self.after, self.norm = (
            nn.Conv2d(3, 3, 1),
            Complaining(),
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
        )

    def forward(self, x):
        y = self.conv(x)
        return self.norm(
            self.after(F.batch_norm(self.inner(y, y), None, None, self.inner.gain.expand(3), training=True))
        )


def test_a_module_that_raises_leaves_the_rest_known():
    flow = flow_of(Complained())
    assert flow.untraced == {"inner": "tensors only"}
    assert flow.sources("norm") == {"after"}
    assert flow.consumers("conv") == {"inner"}
    assert flow.functional == ("batch_norm",)  # it is the outer module that calls it
    with pytest.raises(LookupError, match=r"^the calls within inner are not known: tensors only$"):
        flow.sources("inner.norm")


def test_assertions_about_shapes_are_no_branches():
    """A stranger's network asserts; here pytest would write the assertion anew."""
    flow = flow_of(StrangersNet())
    assert flow.untraced == {"branching": BRANCH}
    assert flow.sources("stem.1") == {"stem.0"}


class ByMode(nn.Module):
    """A norm after one convolution in training and after another in evaluation; a third is used by none."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm, self.never = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.one(x) if self.training else self.two(x))


def test_both_modes_count():
    network = ByMode()
    assert flow_of(network).sources("norm") == {"one", "two"}
    with pytest.raises(LookupError, match=r"^it is not called$"):
        flow_of(network).sources("never")
    assert network.training


class Stateful(nn.Module):
    """Counts, draws, and leaves what it has seen on itself and with its hooks."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("steps", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.steps += 1
        self.last = self.norm(self.conv(x + torch.rand(1)))
        return self.last


def test_a_trace_leaves_no_traces():
    network = Stateful()
    seen = []
    network.conv.register_forward_hook(lambda module, given, result: seen.append(result))
    state = torch.get_rng_state()
    assert flow_of(network).sources("norm") == {"conv"}
    input_shapes(network, (nn.BatchNorm2d,), torch.zeros(2, 3, 4, 4))
    assert (seen, network.last, float(network.steps)) == ([], None, 0.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(network.conv._forward_hooks) == 1


class Functions(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        if self.branch and x.mean() > 0:
            return x
        return F.batch_norm(torch.relu(F.batch_norm(x, self.mean, self.var)), self.mean, self.var)


def test_batch_norm_as_a_function_is_found_in_traces_and_in_code():
    flow = flow_of(nn.Sequential(Functions(False), nn.Sequential(Functions(True))))
    assert flow.functional == ("0.batch_norm", "0.batch_norm_1", "1.0.batch_norm")


def test_shapes_of_what_reaches_layers():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Conv2d(3, 3, 1))
    shared = nn.Sequential(network[0], nn.MaxPool2d(2), network[0])
    assert input_shapes(shared, (nn.BatchNorm2d,), torch.zeros(2, 3, 4, 4)) == {"0": {(2, 3, 4, 4), (2, 3, 2, 2)}}
    assert float(shared[0].running_mean.abs().sum()) == 0
