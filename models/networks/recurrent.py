"""LSTM and GRU that read an image row by row, with layer norm, recurrent batch norm, or any other norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.norms.affine import ScaleAndShift
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

# Added to what the forget gate sees (Jozefowicz et al. 2015), so that an LSTM begins by remembering.
FORGET_BIAS = 1.0
# At a scale of 1 tanh saturates and gradients vanish over time (Cooijmans et al. 2016, section 4).
SCALE_INIT = 0.1


class StepNorm(nn.Module):
    """A norm of vectors of shape (N, features) at one of ``steps`` time steps.

    A norm that keeps statistics has one layer for each step, as activations differ at the start of a sequence; the
    steps share scale and shift, and the scale starts at 0.1 times `model.norm_scale_init` (Cooijmans et al. 2016,
    sections 3 and 4). Any other norm is one layer for all steps (Ba et al. 2016). Where the norm needs several
    positions, vectors stay as they are.
    """

    def __init__(self, features: int, steps: int, norm: Norm, settings: ModelSettings):
        super().__init__()
        self.scale_and_shift: nn.Module = nn.Identity()
        if norm.needs_positions:
            layers: list[nn.Module] = [nn.Identity()]
        elif norm.keeps_statistics:
            layers = [norm.layer(features, scale="off", shift="off") for _ in range(steps)]
            self.scale_and_shift = ScaleAndShift(
                features,
                scale=settings.norm_scale,
                shift=settings.norm_shift,
                scale_init=SCALE_INIT * settings.norm_scale_init,
            )
        else:
            layers = [norm.layer(features)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x_nd: torch.Tensor, step: int) -> torch.Tensor:
        return self.scale_and_shift(self.layers[min(step, len(self.layers) - 1)](x_nd))


class RecurrentLayer(nn.Module):
    """What the two cells share: the projections of input and hidden state, each with its norm, and the loop over time.

    Both projections are normalized at each step, before they are added (Ba et al. 2016, equation 20; Cooijmans et al.
    2016, equation 6); the papers' bias b is the sum of the two norms' shifts. A norm that needs several positions, such
    as instance norm, normalizes the input's projections alone, over time (Laurent et al. 2016).

    The input has shape (N, T, inputs) with T = ``steps``; the output has shape (N, T, width) and holds the hidden
    states.

    Attributes
    ----------
    parts : tuple of int
        The sizes of the parts of a projection that are normalized apart, as multiples of the width.
    states : int
        The number of vectors of shape (N, width) that go from step to step, the hidden state first; they start at 0.
    input, hidden : Module
        The two projections, without biases where a norm's shift follows.
    """

    parts: tuple[int, ...]
    states: int

    def __init__(self, inputs: int, steps: int, norm: Norm, settings: ModelSettings):
        super().__init__()
        self.width, self.steps = settings.width, steps
        self.sizes = [part * settings.width for part in self.parts]
        self.input = norm.linear(inputs, sum(self.sizes), bias=not norm.replaces_bias)
        hidden = nn.Linear if norm.needs_positions else norm.linear
        self.hidden = hidden(settings.width, sum(self.sizes), bias=norm.needs_positions or not norm.replaces_bias)
        over_time = [norm.tokens(size) if norm.needs_positions else nn.Identity() for size in self.sizes]
        self.over_time = nn.ModuleList(over_time)
        self.input_norms = nn.ModuleList(StepNorm(size, steps, norm, settings) for size in self.sizes)
        self.hidden_norms = nn.ModuleList(StepNorm(size, steps, norm, settings) for size in self.sizes)

    def forward(self, x_ntd: torch.Tensor) -> torch.Tensor:
        sequence = self.input(x_ntd).split(self.sizes, dim=2)
        sequence = [norm(part) for norm, part in zip(self.over_time, sequence, strict=True)]
        state = (x_ntd.new_zeros(x_ntd.shape[0], self.width),) * self.states
        outputs = []
        for step in range(self.steps):
            new = [norm(part[:, step], step) for norm, part in zip(self.input_norms, sequence, strict=True)]
            old = self.hidden(state[0]).split(self.sizes, dim=1)
            old = [norm(part, step) for norm, part in zip(self.hidden_norms, old, strict=True)]
            state = self.next(new, old, state, step)
            outputs.append(state[0])
        return torch.stack(outputs, dim=1)

    def next(
        self, new: Sequence[torch.Tensor], old: Sequence[torch.Tensor], state: tuple[torch.Tensor, ...], step: int
    ) -> tuple[torch.Tensor, ...]:
        """Return the state after a step, from the normalized parts of the input's projection (``new``) and of the
        hidden state's (``old``)."""
        raise NotImplementedError


class LSTM(RecurrentLayer):
    """The cell computes, with a the sum of the two normalized projections and torch's order of the gates (Ba et al.
    2016, equations 20 to 22; Cooijmans et al. 2016, equations 6 to 8)::

        i, f, g, o = a,  c' = sigmoid(f + 1) * c + sigmoid(i) * tanh(g),  h' = sigmoid(o) * tanh(norm(c'))
    """

    parts, states = (4,), 2

    def __init__(self, inputs: int, steps: int, norm: Norm, settings: ModelSettings):
        super().__init__(inputs, steps, norm, settings)
        self.cell_norm = StepNorm(settings.width, steps, norm, settings)
        self.admit, self.forget, self.emit = nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid()
        self.candidate, self.squash = nn.Tanh(), nn.Tanh()

    def next(self, new, old, state, step):
        i, f, g, o = (new[0] + old[0]).chunk(4, dim=1)
        cell = self.forget(f + FORGET_BIAS) * state[1] + self.admit(i) * self.candidate(g)
        return self.emit(o) * self.squash(self.cell_norm(cell, step)), cell


class GRU(RecurrentLayer):
    """The cell computes, with x and y the normalized projections of input and hidden state, the two gates normalized
    together and the candidate by itself (Ba et al. 2016, appendix, with torch's 1 - z for z)::

        r, z = sigmoid(x_rz + y_rz),  n = tanh(x_n + r * y_n),  h' = (1 - z) * n + z * h
    """

    parts, states = (2, 1), 1

    def __init__(self, inputs: int, steps: int, norm: Norm, settings: ModelSettings):
        super().__init__(inputs, steps, norm, settings)
        self.reset, self.keep, self.candidate = nn.Sigmoid(), nn.Sigmoid(), nn.Tanh()

    def next(self, new, old, state, step):
        r, z = (new[0] + old[0]).chunk(2, dim=1)
        keep, candidate = self.keep(z), self.candidate(new[1] + self.reset(r) * old[1])
        return ((1 - keep) * candidate + keep * state[0],)


CELLS: dict[str, type[RecurrentLayer]] = {"lstm": LSTM, "gru": GRU}


class Recurrent(nn.Module):
    """The network has ``depth`` layers of ``width`` features, each of which reads the hidden states of the one before;
    the first reads the rows of the image, C * W numbers at each of H steps. A linear layer classifies the last hidden
    state.

    The input has shape (N, C, H, W), the output (N, num_classes); both are float.

    Raises
    ------
    ValueError
        An activation is set.
    """

    def __init__(self, settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int, norm: Norm):
        super().__init__()
        if settings.activation is not None:
            raise ValueError(
                f"model.activation {settings.activation}: the cells of the recurrent network have their own, sigmoid "
                "and tanh; set it to null"
            )
        channels, steps, row = image_shape
        cell = CELLS[settings.cell]
        inputs = [channels * row, *[settings.width] * (settings.depth - 1)]
        self.layers = nn.Sequential(*(cell(count, steps, norm, settings) for count in inputs))
        self.classifier = nn.Linear(settings.width, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        rows_ntd = x_nchw.transpose(1, 2).flatten(2)
        return self.classifier(self.layers(rows_ntd)[:, -1])
