"""How much a network suffers when one layer gets few bits: Omega_l(b), weights only.

HAWQ-V2: Z. Dong, Z. Yao, Y. Cai, D. Arfeen, A. Gholami, M. W. Mahoney, K. Keutzer. "HAWQ-V2:
Hessian Aware trace-Weighted Quantization of Neural Networks." NeurIPS 2020, arXiv 1911.03852.
HAWQ-V3: Z. Yao et al., "HAWQ-V3: Dyadic Neural Network Quantization." ICML 2021, arXiv 2011.10680.

Around a trained minimum the loss grows by 1/2 dw' H dw when the weights move by dw. With
dw = Q_b(W_l) - W_l, made by the weight quantizer that the run uses, calibrated at b bits:

  hutchinson     Omega_l(b) = tr(H_l) / n_l * |dw|^2            (HAWQ-V2; H_l: the layer's block)
                 tr(H_l) = E[v' H v],  v = +-1 with equal odds  (Hutchinson's estimator)
  fisher         Omega_l(b) = sum_i F_i dw_i^2,   F_i = mean over images of (dL/dw_i)^2
  loss_increase  Omega_l(b) = L(only layer l at b bits) - L(float)
  size_only      Omega_l(b) = 4^-b: every layer suffers alike, so a budget of weight bits goes to
                 the small ones. The control that looks at no data and no weights.

L is the mean cross-entropy over the images, of the network in eval mode (batch norm as an affine
map), so images do not interact and are taken in chunks. The chunks' traces add up, so each chunk
draws probes of its own: together there are as many as asked, and no more image passes than needed.
A probe spans one layer. One that spans all layers gives every v_l' (H v)_l at once, with the same
expectation, but the terms between layers are noise: on ResNet-20 (CIFAR-10, 64 images, 12 probes)
its variance was 2 to 29 times larger, 9 in the median, for a fifth of the time, and small layers
came out negative (by hand, not kept). The constant 1/2 is dropped.

Q_b is the quantizer as its calibration leaves it. ADQ's is then at quantiles: its codebook moves to
the means of its cells only while training, so that |dw|^2 is 1.8 to 3.6 times that of a codebook
after Lloyd's steps, unevenly over bits (ResNet-20, by hand, not kept; the allocation changed in two
of 18 layers, its objective by less than 0.1 %). `quantizer.weight.init=kmeans` takes those.

Departs from the papers: a trace estimated below zero (the network is not at a minimum, or too few
probes) counts as zero. Fisher uses the data's labels: the empirical Fisher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qexp.quant.convert import QuantizerFactory
from qexp.quant.trace import Layer

# Omega_l(b) by layer name and bits.
Omega = dict[str, dict[int, float]]

CHUNK = 64  # images a pass: bounds the memory of the second backward


@contextmanager
def _differentiable(model: nn.Module, layers: Sequence[Layer]) -> Iterator[list[Tensor]]:
    """The layers' weights, requiring gradients, with the network in eval mode inside the block."""
    weights: list[Tensor] = [model.get_submodule(layer.name).weight for layer in layers]  # type: ignore[misc]
    required = [w.requires_grad for w in weights]
    was_training = model.training
    model.eval()
    for w in weights:
        w.requires_grad_(True)
    try:
        yield weights
    finally:
        model.train(was_training)
        for w, before in zip(weights, required, strict=True):
            w.requires_grad_(before)


@contextmanager
def _twice_differentiable() -> Iterator[None]:
    """Attention in matrix products, its one form with a second derivative, inside the block.

    Raises:
        ValueError: another operation has none.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "derivative for" not in text and "differentiate twice" not in text:
            raise
        raise ValueError(
            f"metric=hutchinson takes second derivatives of the network ({text}); use "
            "bitwidth.metric=fisher"
        ) from error


def check_second_derivatives(model: nn.Module, layers: Sequence[Layer], images: Tensor) -> None:
    """Take second derivatives once, for all layers together.

    Shape: images [N, C, H, W].

    Raises:
        ValueError: an operation of the network has none.
    """
    with _differentiable(model, layers) as weights, _twice_differentiable():
        loss = F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.int64))
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        torch.autograd.grad([g.sum() for g in grads], weights, allow_unused=True)


def hutchinson_trace(
    model: nn.Module,
    layers: Sequence[Layer],
    images: Tensor,
    labels: Tensor,
    *,
    probes: int = 50,
    seed: int = 0,
    chunk: int = CHUNK,
) -> dict[str, float]:
    """tr(H_l) / n_l of the mean cross-entropy, by layer name.

    Args:
        probes: vectors a layer, shared out over the chunks and rounded up.
        chunk: images a pass. Memory grows with it.

    Shape: images [N, C, H, W], labels [N]. Source: HAWQ-V2, Hutchinson's algorithm.

    Raises:
        ValueError: an operation of the network has no second derivative.
    """
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    each = math.ceil(probes / math.ceil(len(images) / chunk))
    with _differentiable(model, layers) as weights, _twice_differentiable():
        total = torch.zeros(len(weights), dtype=torch.float64, device=images.device)
        for x, y in zip(images.split(chunk), labels.split(chunk), strict=True):
            loss = F.cross_entropy(model(x), y, reduction="sum") / len(images)
            grads = torch.autograd.grad(loss, weights, create_graph=True)
            for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
                for _ in range(each):
                    v = torch.randint(0, 2, w.shape, generator=generator) * 2 - 1
                    v = v.to(w.device, w.dtype)
                    h_v = torch.autograd.grad(g, w, grad_outputs=v, retain_graph=True)[0]
                    total[i] += (v * h_v).double().sum()  # v' H v
    traces = (total / each).tolist()
    return {layer.name: t / layer.weights for layer, t in zip(layers, traces, strict=True)}


@torch.no_grad()
def perturbation(
    model: nn.Module, layer: Layer, weight_factory: QuantizerFactory, bits: int
) -> Tensor:
    """dw = Q_b(W) - W of a layer, by a fresh weight quantizer. Shape: as the weight."""
    weight: Tensor = model.get_submodule(layer.name).weight.detach()  # type: ignore[assignment,operator]
    quantizer = weight_factory(bits=bits, signed=True, shape=layer.weight_shape).to(weight.device)
    quantizer.calibrate(weight)
    return quantizer.eval()(weight) - weight


def hutchinson(
    model: nn.Module,
    layers: Sequence[Layer],
    weight_factory: QuantizerFactory,
    candidates: Sequence[int],
    images: Tensor,
    labels: Tensor,
    *,
    probes: int = 50,
    seed: int = 0,
) -> Omega:
    """tr(H_l) / n_l * |dw|^2 (HAWQ-V2, eq. for Omega); a negative trace counts as zero."""
    traces = hutchinson_trace(model, layers, images, labels, probes=probes, seed=seed)
    return {
        layer.name: {
            b: (0.0 if traces[layer.name] < 0 else traces[layer.name])  # NaN stays
            * perturbation(model, layer, weight_factory, b).double().square().sum().item()
            for b in candidates
        }
        for layer in layers
    }


def fisher(
    model: nn.Module,
    layers: Sequence[Layer],
    weight_factory: QuantizerFactory,
    candidates: Sequence[int],
    images: Tensor,
    labels: Tensor,
) -> Omega:
    """sum_i F_i dw_i^2 with the empirical Fisher diagonal, from one backward an image."""
    with _differentiable(model, layers) as weights:
        diagonal = [torch.zeros_like(w) for w in weights]
        for x, y in zip(images.split(1), labels.split(1), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), weights)
            for f, g in zip(diagonal, grads, strict=True):
                f.add_(g.square() / len(images))
    return {
        layer.name: {
            b: (f * perturbation(model, layer, weight_factory, b).square()).double().sum().item()
            for b in candidates
        }
        for layer, f in zip(layers, diagonal, strict=True)
    }


@torch.no_grad()
def loss_increase(
    model: nn.Module,
    layers: Sequence[Layer],
    weight_factory: QuantizerFactory,
    candidates: Sequence[int],
    images: Tensor,
    labels: Tensor,
) -> Omega:
    """L(only layer l at b bits) - L(float), nats; below zero if quantizing happens to help."""
    omega: Omega = {}
    with _differentiable(model, layers) as weights:
        before = _mean_loss(model, images, labels)
        for layer, weight in zip(layers, weights, strict=True):
            kept, omega[layer.name] = weight.clone(), {}
            for b in candidates:
                dw = perturbation(model, layer, weight_factory, b)
                try:
                    weight.add_(dw)
                    omega[layer.name][b] = _mean_loss(model, images, labels) - before
                finally:
                    weight.copy_(kept)
    return omega


def _mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=images.device)
    for x, y in zip(images.split(4 * CHUNK), labels.split(4 * CHUNK), strict=True):
        total += F.cross_entropy(model(x), y, reduction="sum").double()
    return total.item() / len(images)


def size_only(layers: Sequence[Layer], candidates: Sequence[int]) -> Omega:
    """4^-b for every layer: the error of a uniform grid, whatever the layer."""
    return {layer.name: {b: 4.0**-b for b in candidates} for layer in layers}
