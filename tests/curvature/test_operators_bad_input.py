"""Bad input: one line that names the culprit and the mend."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from exact import gap, losses, made, operator, refused, small, uneven, untouched
from steppe.curvature.objective import Objective
from steppe.curvature.operator import Operator

KINDS = ["hessian", "ggn", "fisher", "empirical"]
BATCHES = uneven(4)
ONES = torch.ones(43, dtype=torch.float64)


class Once(torch.autograd.Function):
    """A sine whose author says that it cannot be differentiated twice; torch's own ``grad`` takes that for 0."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return slope * ctx.saved_tensors[0].cos()


class Sine(nn.Module):
    def forward(self, x):
        return Once.apply(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_that_is_differentiable_once(kind):
    model = made(lambda: nn.Sequential(nn.Linear(4, 5), Sine(), nn.Linear(5, 3)))
    A = operator(model, losses, BATCHES, kind)
    with untouched(model):
        refused(lambda: A @ ONES, "not twice differentiable", "Once", "once_differentiable", "replace that operation")
    head = operator(model, losses, BATCHES, kind, params=model[2])  # beyond it all is well
    assert (head @ ONES[:18]).isfinite().all()


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_a_loss_that_is_differentiable_once(kind):
    def loss_fn(model, batch):
        return Once.apply(model(batch[0])).square().sum(1)

    refused(lambda: operator(small(), loss_fn, BATCHES, kind) @ ONES, "not twice differentiable", "OnceBackward")


@pytest.mark.parametrize("kind", ["hessian", "ggn", "empirical"])
def test_an_operation_without_double_backward(kind):
    def ctc(model, batch):
        logits = model(batch[0])
        n = len(logits)
        steps = logits.expand(4, n, 3).log_softmax(2)
        return F.ctc_loss(steps, torch.ones(n, 1).long(), torch.full((n,), 4), torch.full((n,), 1), reduction="none")

    model = small()
    with untouched(model):
        refused(
            lambda: operator(model, ctc, BATCHES, kind) @ ONES,
            "the loss is not twice differentiable",
            "_ctc_loss_backward",
            "replace that operation",
        )


def test_other_runtime_errors_are_not_dressed_up():
    def loss_fn(model, batch):
        raise RuntimeError("CUDA out of memory: not a matter of derivatives\nsecond line")

    with pytest.raises(RuntimeError, match="out of memory"):
        operator(small(), loss_fn, BATCHES) @ ONES


def test_an_infinite_second_derivative():
    def loss_fn(model, batch):
        return losses(model, batch) + (0 * model(batch[0])).norm(dim=1)

    refused(lambda: operator(small(), loss_fn, BATCHES) @ ONES, "hessian", "not finite", "second derivative")


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite(kind, value):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return losses(model, batch) + (value if len(calls) % 2 == 0 else 0)

    model = small()
    A = operator(model, loss_fn, BATCHES, kind)
    for measure in (lambda: A @ ONES, A.objective.loss, A.objective.gradient):
        calls.clear()
        with untouched(model):
            refused(measure, f"the loss is {value} in batch 1 of the loader", "not finite")
    assert not A.objective.loss(finite=False).isfinite()


def test_losses_of_a_wrong_shape():
    model = small()
    for loss_fn, word in (
        (lambda m, b: losses(m, b)[:, None], "shape (4, 1) for 4 examples"),
        (lambda m, b: m(b[0]), "shape (4, 3) for 4 examples"),
        (lambda m, b: 1.0, "float for 4 examples"),
    ):
        refused(lambda f=loss_fn: operator(model, f, BATCHES) @ ONES, word, "reduction='none'", error=TypeError)


def test_a_mean_where_single_examples_are_needed():
    def mean(model, batch):
        return losses(model, batch).mean()

    model = small()
    objective = Objective(model, mean, BATCHES)
    words = "loss_fn returned a mean", "return shape (B,)", "reduction='none'"
    refused(lambda: Operator(objective, "empirical") @ ONES, *words, error=TypeError)
    assert gap(Operator(objective) @ ONES, operator(model, losses, BATCHES) @ ONES) < 1e-13  # the refusal left no trace
    weighted = Objective(model, mean, BATCHES, weights=lambda batch: batch[1])
    for measure in (weighted.loss, weighted.gradient, lambda: Operator(weighted) @ ONES):
        refused(measure, *words, error=TypeError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_does_not_depend_on_the_weights(kind):
    model = small()
    for loss_fn in (
        lambda m, b: losses(m, b).detach(),
        lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1], reduction="none"),
        torch.no_grad()(losses),
    ):
        refused(lambda f=loss_fn: operator(model, f, BATCHES, kind) @ ONES, "not depend on")


def test_a_hessian_of_weights_that_take_no_part():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.net = nn.Linear(2, 1), small()

        def forward(self, x):
            return self.net(x)

    A = operator(made(Spare), losses, BATCHES, params="spare")
    refused(lambda: A @ ONES[:3], "does not depend on the 2 parameters spare.weight, ...", "unused")
    B = operator(made(Spare), losses, BATCHES, "ggn", params="spare")
    refused(lambda: B @ ONES[:3], "outputs do not depend on the chosen parameters")


def test_what_gauss_newton_and_fisher_cannot_do():
    model = small()

    def twice(model, batch):
        return losses(model, batch) + losses(model, batch)

    def penalty(model, batch):
        return losses(model, batch) + model[0].weight.square().sum()

    def linear(model, batch):
        return model(batch[0]).sum(1)

    def run(loss_fn, kind, **kwargs):
        return lambda: operator(model, loss_fn, BATCHES, kind, **kwargs) @ ONES

    for kind in ("ggn", "fisher"):
        refused(run(twice, kind), "loss_fn calls the model 2 times", "need it once")
        refused(run(lambda m, b: losses(m.forward, b), kind), "calls the model 0 times")
    refused(run(penalty, "ggn"), "not only through the model's outputs", "penalties out of loss_fn", 'kind="hessian"')
    head = operator(model, penalty, BATCHES, "ggn", params=model[2])  # the penalty is on others
    assert (head @ ONES[:18]).isfinite().all()
    refused(run(linear, "ggn"), "linear in the model's outputs")
    for likelihood in ("categorical", "gaussian"):
        assert (run(linear, "fisher", likelihood=likelihood)()).isfinite().all()
    flat = nn.Sequential(small(), nn.Flatten(0))
    refused(
        lambda: operator(flat, lambda m, b: m(b[0]).view(-1, 3).square().sum(1), BATCHES, "fisher") @ ONES,
        "logits (B, C) for 4 examples",
        "the loss uses (12,)",
        'kind="ggn"',
    )


def test_weights_that_cannot_be_used():
    model = small()

    def measures(weights):
        objective = Objective(model, losses, BATCHES, weights=weights)
        return (objective.loss, objective.gradient, lambda: Operator(objective) @ ONES)

    for value in (-1.0, float("nan"), float("inf")):
        for measure in measures(lambda batch, value=value: torch.full((len(batch[1]),), value)):
            refused(measure, "weights of batch 0 of the loader are negative or not finite")
    for measure in measures(lambda batch: torch.zeros(len(batch[1]))):
        refused(measure, "the weights of all examples are 0")
    for measure in measures(lambda batch: torch.ones(2)):
        refused(measure, "weights returned shape (2,) for losses of (4,)")
    plain, listed = (
        operator(model, losses, BATCHES),
        operator(model, losses, BATCHES, weights=lambda b: [1.0] * len(b[1])),
    )
    assert torch.equal(plain @ ONES, listed @ ONES)


# Parameters, vectors, options -----------------------------------------------------------------------------------------


def test_parameters_that_cannot_be_chosen():
    model = small()

    def choose(params):
        return lambda: Objective(model, losses, BATCHES, params=params)

    refused(choose("blocks"), "no parameter's name has 'blocks' in it", "0.weight, 0.bias, 2.weight")
    refused(choose("("), "'(' is not a regular expression")
    refused(choose([]), "no parameter was chosen")
    refused(choose(nn.Tanh()), "no parameter was chosen")
    refused(choose(small()), "4 of the 4 parameters asked for are not the model's", "model.parameters()")
    refused(choose([model[0].weight, nn.Parameter(torch.ones(1))]), "1 of the 2 parameters")
    assert choose(model[0].bias)().names == ["0.bias"]
    refused(lambda: Objective(model, losses, BATCHES).only("blocks"), "'blocks'")
    for p in model.parameters():
        p.requires_grad_(False)
    refused(choose(None), "Sequential has no parameter that requires a gradient")
    assert choose("bias")().size == 8


def test_complex_weights():
    model = nn.ParameterDict({"real": torch.ones(2), "waves": torch.ones(2, dtype=torch.complex128)})
    refused(lambda: Objective(model, losses, BATCHES), "waves is torch.complex128", "real weights")
    assert Objective(model, losses, BATCHES, params="real").size == 2


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_that_do_not_fit(kind):
    model = small()
    A = operator(model, losses, BATCHES, kind)
    for v in (ONES[:42], torch.ones(44, 2), torch.ones(43, 1, 1), torch.ones(()), torch.ones(0)):
        refused(lambda v=v: A @ v, f"a vector of shape {tuple(v.shape)} for a matrix of 43 rows")
    refused(lambda: A @ (ONES / 0), "the vector to be multiplied is not finite")
    refused(lambda: A.objective.split(ONES[:42]), "shape (42,) for 43 entries of the 4 parameters 0.weight, ...")


def test_options_that_do_not_exist():
    objective = Objective(small(), losses, BATCHES)
    for kwargs, words in (
        ({"kind": "kfac"}, ("kind='kfac'", "'hessian', 'ggn', 'fisher', 'empirical'")),
        ({"kind": "fisher", "likelihood": "poisson"}, ("likelihood='poisson'", '"categorical"', '"gaussian"')),
        ({"kind": "fisher", "draws": 0}, ("draws=0", "at least 1")),
        ({"kind": "ggn", "draws": 3}, ("draws=3", 'kind="fisher"')),
    ):
        refused(lambda kwargs=kwargs: Operator(objective, **kwargs), *words)
