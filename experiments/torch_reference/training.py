"""Both training stages' steps in PyTorch: losses, clipping, AdamW, schedule (DESIGN §6, §7, §10; paper §4.4).

Batches are the JAX side's, as tensors. Losses are sums divided by their weights at the end, so that micro-batches with
different numbers of tokens or views add up to the whole batch.

Letters: B windows or subjects, T tokens, K views, P points, H × W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.torch_reference.flame import Head, animate, bind
from experiments.torch_reference.gaussian_decoder import GaussianDecoder
from experiments.torch_reference.losses import Lpips, l1, marginal_nll, regularizer, ssim
from experiments.torch_reference.point_transformer import PointTransformer
from experiments.torch_reference.rasterizer import rasterize
from experiments.torch_reference.settings import wide

if TYPE_CHECKING:
    from pointillist_jax.configs import TrainConfig

Batch = Mapping[str, Any]


class Metrics(NamedTuple):
    """Of one step, before it changed anything.

    Attributes:
      loss: mean over tokens or views.
      grad_norm: of all gradients together, before clipping.
      finite: a step that is not changes no parameter.
    """

    loss: Tensor
    grad_norm: Tensor
    finite: bool


class Optimizer:
    """AdamW with decoupled decay of matrices, a schedule by step, and clipping before everything else.

    Attributes:
      config: a `TrainConfig`.
      adamw: torch's; its state has `exp_avg` and `exp_avg_sq` of every parameter.
      step: steps taken, those that were not finite among them.
      updates: steps that changed something: the schedule's and the bias corrections' count.
    """

    def __init__(self, module: nn.Module, config: TrainConfig):
        self.config, self.parameters, self.step, self.updates = config, list(module.parameters()), 0, 0
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.b1, config.b2),
            eps=1e-8,
        )

    def apply(self, loss: Tensor) -> Metrics:
        """One update from the gradients that lie in the parameters; `loss` is reported."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        self.step += 1
        if finite:
            # Not clip_grad_norm_, which divides by the norm + 1e-6.
            if self.config.clip_norm and norm >= self.config.clip_norm:
                for gradient in gradients:
                    gradient.mul_(self.config.clip_norm / norm)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate(self.config, self.updates)
            self.adamw.step()
            self.updates += 1
        return Metrics(loss.detach(), norm, finite)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up whose first step already moves, then constant or a cosine to a tenth."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    done = min((step - warmup) / max(config.steps - warmup, 1), 1.0)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


class StageOne(nn.Module):
    """The transformer and what makes its context; frozen encoders are not part of it."""

    def __init__(self, transformer: PointTransformer, condition: nn.Module | None = None):
        """`condition`: `condition.Condition`; without one, batches carry their contexts."""
        super().__init__()
        self.transformer, self.condition = transformer, condition

    def forward(self, batch: Batch, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """Summed loss (with that of the marginals, where the config has one) and number of supervised tokens.

        Args:
          batch: tokens, targets, positions [B, T], mask [B, T], and context [B, S, D] or condition (of `Condition`).
        """
        context = batch["context"] if self.condition is None else self.condition(batch["condition"])
        tokens, targets = batch["tokens"].long(), batch["targets"].long()
        mask, weight = batch.get("mask"), self.transformer.config.condition_loss
        total, count = self.transformer.loss_sums(tokens, targets, context, batch.get("positions"), mask, z_loss)
        if weight and self.condition is not None:
            total = total + weight * self.marginal_loss(context, targets, mask)
        return total, count

    def marginal_loss(self, context: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Σ -log p of a window's targets under what the context alone says of their slots (`config.condition_loss`).

        The classifiers are only read: this loss trains the condition, not the transformer.
        """
        ids, total = self.transformer.ids, 0
        targets = targets if mask is None else torch.where(mask, targets, ids.pad)
        classifiers, states = self.transformer.classifiers(), self.condition.marginals(context)
        for slot, (classifier, state) in enumerate(zip(classifiers, states, strict=True)):
            logits = F.linear(state, classifier.rows.detach()).to(wide(state.dtype))
            # Target t is the token after token t.
            labels = classifier.labels(targets[:, (slot - 1) % 4 :: 4], ids.eos)
            total = total + marginal_nll(logits, labels)
        return total


class StageTwo(nn.Module):
    """The decoder with what it is compared through: head, renderer, LPIPS."""

    def __init__(self, decoder: GaussianDecoder, head: Head, lpips: Lpips | None = None):
        """`lpips`: without it, or with a weight of 0, the loss has no such term."""
        super().__init__()
        self.decoder, self.head = decoder, head
        # Not a submodule: its weights are nobody's parameters and belong in no state dict.
        self._lpips = [lpips] if lpips is not None and decoder.config.lambda_lpips else []

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss and summed weight of the views.

        Args:
          batch: points [B, P, 3], hidden [B, P, 4, E], num_points [B], binding [B, P], canonical (FLAME parameters
            [B, n]), viewmats [B, K, 4, 4], Ks [B, K, 3, 3], flame (parameters [B, K, n]), image [B, K, H, W, 3] uint8,
            weight [B, K]; context for cross-attention.
        """
        config = self.decoder.config
        decoded = self.decoder(*(batch.get(name) for name in ("points", "hidden", "num_points", "context")))
        images, dtype = self.render(decoded, batch), decoded.means.dtype
        target = batch["image"].to(dtype) / 255
        loss = config.lambda_l1 * l1(images, target) + config.lambda_ssim * (1 - ssim(images, target))
        loss = loss + config.lambda_reg * regularizer(decoded.offsets, batch["num_points"])[:, None]
        for lpips in self._lpips:
            loss = loss + config.lambda_lpips * lpips(images, target)
        weight = batch["weight"].to(dtype)
        return (loss * weight).sum(), weight.sum()

    def render(self, decoded, batch: Batch) -> Tensor:
        """[B, K, H, W, 3]: each subject posed for each of its views, on white."""
        height, width = batch["image"].shape[2:4]
        white = torch.ones(3, dtype=decoded.means.dtype, device=decoded.means.device)
        subjects = []
        for i, (points, binding) in enumerate(zip(batch["points"], batch["binding"], strict=True)):
            rig = bind(self.head, _row(batch["canonical"], i), points, binding.long())
            flame = _row(batch["flame"], i)
            views = []
            for k in range(batch["viewmats"].shape[1]):
                # The identity is the rig's, whatever the driving frame says.
                means, quats, scales = animate(
                    self.head, rig, decoded.quats[i], decoded.scales[i], _row(flame, k), offsets=decoded.offsets[i]
                )
                image, _ = rasterize(
                    means,
                    quats,
                    scales,
                    decoded.opacities[i],
                    decoded.colors[i],
                    batch["viewmats"][i, k : k + 1],
                    batch["Ks"][i, k : k + 1],
                    width,
                    height,
                    backgrounds=white,
                )
                views.append(image[0])
            subjects.append(torch.stack(views))
        return torch.stack(subjects)


def stage_one_step(model: StageOne, optimizer: Optimizer, batch: Batch) -> Metrics:
    """One optimiser step on a batch of windows."""
    return _step(optimizer, batch, lambda part: model(part, optimizer.config.z_loss))


def stage_two_step(model: StageTwo, optimizer: Optimizer, batch: Batch) -> Metrics:
    """One optimiser step on a batch of subjects with their views; the optimiser's module is `model.decoder`."""
    return _step(optimizer, batch, model)


def _step(optimizer: Optimizer, batch: Batch, sums: Callable[[Batch], tuple[Tensor, Tensor]]) -> Metrics:
    for parameter in optimizer.parameters:
        parameter.grad = None
    total, weight = 0, 0
    for part in _parts(batch, optimizer.config.accumulate):
        loss, count = sums(part)
        loss.backward()
        total, weight = total + loss.detach(), weight + count.detach()
    weight = weight.clamp(min=1e-9) if weight.is_floating_point() else weight.clamp(min=1)
    for parameter in optimizer.parameters:
        if parameter.grad is None:
            # Unused ones decay all the same.
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(weight)
    return optimizer.apply(total / weight)


def _parts(batch: Batch, parts: int) -> Iterator[Batch]:
    """Micro-batch i has rows i, i + parts, …"""
    for i in range(parts):
        yield _map(lambda x, i=i: x[i::parts], batch)


def _row(tree: Mapping[str, Any], index: int) -> dict[str, Any]:
    return _map(lambda x: x[index], tree)


def _map(function: Callable[[Tensor], Tensor], tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if value is None else _map(function, value) if isinstance(value, Mapping) else function(value)
        for name, value in tree.items()
    }
