"""The optimizer, and its rate as a function of images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from sumuk.train.config import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices and kernels only, not on biases and norms."""
    every = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in every if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.rate, betas=config.betas, fused=True)


def rate_at(config: OptimConfig, images: int, total: int) -> float:
    """The learning rate after ``images`` of ``total``: linear warm-up, then as ``config.fall`` says."""
    if images < config.warmup:
        return config.rate * (images + 1) / (config.warmup + 1)
    done = min((images - config.warmup) / max(total - config.warmup, 1), 1.0)
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return config.rate * fall[config.fall]
