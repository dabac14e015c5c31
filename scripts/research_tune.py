"""Loss gradients at the experts' outputs, and a short distillation of scales, norms, routers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmoe.types import QuantizedMatrix, grid_index, grid_scale

Weights = list[tuple[Tensor, Tensor]]


def experts_forward(
    act: Callable[[Tensor], Tensor], gate_up: Callable[[int], Tensor], down: Callable[[int], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Differentiable ``for e in experts: y[tokens(e)] += gate[e] * expert_e(x[tokens(e)])``."""

    def forward(hidden: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        y = torch.zeros_like(hidden)
        for e in index.unique().tolist():
            token, slot = torch.where(index == e)
            a, b = F.linear(hidden[token], gate_up(e)).chunk(2, -1)
            out = F.linear(act(a) * b, down(e)) * gate[token, slot, None]
            y = y.index_add(0, token, out)
        return y

    return forward


@torch.enable_grad()
def loss_gradients(model: Any, weights: Weights, data: Tensor, seed: int = 0) -> list[Tensor]:
    """Gradients of the loss at every layer's experts' output, labels drawn from the model itself.

    Args:
        model: the original causal model.
        weights: gate_up and down projections of every layer.
        data: token ids [windows, ctx].
        seed: of the drawn labels.

    Returns:
        One float32 [tokens, width] per layer.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = model.model.layers
    kept: list[list[Tensor]] = [[] for _ in layers]
    saved = [layer.mlp.experts.forward for layer in layers]
    for x in data.split(8):
        outputs: list[Tensor] = []
        for layer, (gate_up, down) in zip(layers, weights, strict=True):
            run = experts_forward(layer.mlp.experts.act_fn, gate_up.__getitem__, down.__getitem__)

            def forward(*args: Tensor, run: Any = run, outputs: list[Tensor] = outputs) -> Tensor:
                y = run(*args).requires_grad_()
                outputs.append(y)
                return y

            layer.mlp.experts.forward = forward
        logits = model(input_ids=x).logits.flatten(0, 1)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        grads = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), outputs)
        for k, g in zip(kept, grads, strict=True):
            k.append(g)
    for layer, forward in zip(layers, saved, strict=True):
        layer.mlp.experts.forward = forward
    return [torch.cat(k) for k in kept]


class Tuned(nn.Module):
    """Experts of one projection with trainable row and column scales over fixed integers."""

    def __init__(self, matrices: list[QuantizedMatrix], train_cols: bool) -> None:
        super().__init__()
        self.matrices = matrices
        self.codes = torch.stack([m.codes for m in matrices])
        self.col = torch.stack([grid_scale(m.col_scale) for m in matrices])
        self.row = torch.stack([grid_scale(m.row_scale) for m in matrices])
        self.log_row = nn.Parameter(torch.zeros_like(self.row))
        self.log_col = nn.Parameter(torch.zeros_like(self.col), requires_grad=train_cols)

    def forward(self, e: int) -> Tensor:
        w = self.codes[e] * (self.col[e] * self.log_col[e].exp())
        return w * (self.row[e] * self.log_row[e].exp())[:, None]

    def rounded(self, row_step: int, col_step: int) -> list[QuantizedMatrix]:
        """Matrices with the trained scales on the grid."""
        row = grid_index(self.row * self.log_row.detach().exp(), row_step)
        col = torch.stack([m.col_scale for m in self.matrices])
        if self.log_col.requires_grad:
            col = grid_index(self.col * self.log_col.detach().exp(), col_step)
        return [
            QuantizedMatrix(m.codes, r, c) for m, r, c in zip(self.matrices, row, col, strict=True)
        ]


def distill(
    model: Any,
    original_final: Tensor,
    groups: list[list[QuantizedMatrix]],
    data: Tensor,
    *,
    epochs: int = 1,
    batch: int = 8,
    lr_scales: float = 1e-3,
    lr_dense: float = 1e-4,
    train_cols: bool = False,
    row_step: int = 4,
    col_step: int = 16,
) -> list[list[QuantizedMatrix]]:
    """Trains row scales, norms and routers towards the original logits; `model` keeps its new norms
    and routers.

    Args:
        model: causal model; its own experts are not used.
        original_final: the original's final normed states on `data`, [tokens, width]; the head is
            not trained.
        groups: quantized matrices, gate_up and down of every layer.
        data: calibration token ids [windows, ctx].
        epochs, batch: passes over the data and windows in a step.
        lr_scales, lr_dense: Adam's rates for log scales, and for norms and routers.
        train_cols: column scales too.
        row_step, col_step: coarseness of the grid that trained scales return to.
    """
    layers = model.model.layers
    tuned = [Tuned(g, train_cols) for g in groups]
    head = model.lm_head.weight.detach()
    dense = [p for n, p in model.named_parameters() if "norm" in n or n.endswith("mlp.gate.weight")]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in dense:
        p.requires_grad_(True)
    scales = [p for t in tuned for p in t.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        [{"params": scales, "lr": lr_scales}, {"params": dense, "lr": lr_dense}], betas=(0.9, 0.95)
    )
    per_epoch = len(data) // batch
    steps = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [lr_scales, lr_dense], total_steps=steps, pct_start=0.1
    )
    saved = [layer.mlp.experts.forward for layer in layers]
    for n, layer in enumerate(layers):
        layer.mlp.experts.forward = experts_forward(
            layer.mlp.experts.act_fn, tuned[2 * n], tuned[2 * n + 1]
        )
    ctx = data.shape[1]
    original = original_final.view(*data.shape, -1)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for step in range(steps):
            if step % per_epoch == 0:
                order = torch.randperm(len(data), generator=generator)
            pick = order[step % per_epoch * batch :][:batch]
            final = model.model(input_ids=data[pick]).last_hidden_state
            q = F.linear(final, head).log_softmax(-1)
            with torch.no_grad():
                p = F.linear(original[pick], head).log_softmax(-1)
            loss = F.kl_div(q, p, reduction="sum", log_target=True) / (batch * ctx)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    for layer, forward in zip(layers, saved, strict=True):
        layer.mlp.experts.forward = forward
    for p in dense:
        p.requires_grad_(False)
    return [t.rounded(row_step, col_step) for t in tuned]
