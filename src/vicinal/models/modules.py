"""Modules that stand in for those of a backbone, with the same weights and the same result.

`SplitAttention` is `torch.nn.MultiheadAttention` with its four projections as separate linear layers:

    softmax(q k^T / sqrt(d) + mask) v,    q = Wq x + bq,  k = Wk x + bk,  v = Wv x + bv,  then Wo (.) + bo

so that a low-rank update reaches each of them. In `MultiheadAttention` the three stand in one matrix, and the fourth is
used without being called, so an adapter put on it never runs.

Letters: B batch, L query tokens, S key tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vicinal.types import InputError

__all__ = ["SplitAttention"]


class SplitAttention(nn.Module):
    """`nn.MultiheadAttention` with `q`, `k`, `v` and `out` as `nn.Linear`; same call, same result, same weights.

    Args:
        attention: the module to take the place of; its weights are copied.

    Raises:
        InputError: `attention` has extra key and value rows (`add_bias_kv`, `add_zero_attn`), which no published
            image or image-text model uses.

    >>> fused = nn.MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(1, 3, 8)
    >>> torch.allclose(SplitAttention(fused)(x, x, x)[0], fused(x, x, x)[0], atol=1e-6)
    True
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn:
            raise InputError("an attention with add_bias_kv or add_zero_attn cannot be split; adapt its mlp instead")
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        self.plain = False
        if attention.in_proj_weight is None:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        else:
            weights = attention.in_proj_weight.chunk(3)
        biases = (None, None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        trained_bias = attention.in_proj_bias is not None and attention.in_proj_bias.requires_grad
        trained = attention.out_proj.weight.requires_grad if attention.in_proj_weight is None else None
        trained = attention.in_proj_weight.requires_grad if trained is None else trained
        self.q, self.k, self.v = (
            _linear(weight, bias, trained, trained_bias) for weight, bias in zip(weights, biases, strict=True)
        )
        out = attention.out_proj
        self.out = _linear(
            out.weight, out.bias, out.weight.requires_grad, out.bias is not None and out.bias.requires_grad
        )
        self.train(attention.training)

    def forward(
        self,
        query: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."] | None]:
        """What `nn.MultiheadAttention` returns for the same arguments: the result, and the weights where wanted.

        Args:
            query: "B L D" with `batch_first`, else "L B D"; "L D" without a batch.
            key: "B S D", "S B D" or "S D".
            value: as `key`.
            key_padding_mask: "B S", true (or minus infinity) where a key does not count.
            need_weights: return the attention weights too.
            attn_mask: "L S" or "B*H L S", true (or minus infinity) where a query does not see a key.
            average_attn_weights: return the weights as "B L S", averaged over heads, instead of "B H L S".
            is_causal: a hint that `attn_mask` is causal; it needs `attn_mask`, as in torch, and changes nothing.

        Raises:
            ValueError: `is_causal` without a mask.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal is a hint about attn_mask, which is missing")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        B, L, D = query.shape
        S, H = key.shape[1], self.num_heads
        q = self.q(query).view(B, L, H, D // H).transpose(1, 2)
        k = self.k(key).view(B, S, H, D // H).transpose(1, 2)
        v = self.v(value).view(B, S, H, D // H).transpose(1, 2)
        mask = _additive_mask(attn_mask, key_padding_mask, q, S)
        dropout = self.dropout if self.training else 0.0

        weights: Tensor | None = None
        if need_weights or self.plain:
            scores = (q * (D // H) ** -0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out(out.transpose(1, 2).reshape(B, L, D))

        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights or weights is None:
            return out, None
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return out, weights if batched else weights.squeeze(0)

    def fused(self) -> nn.MultiheadAttention:
        """The `nn.MultiheadAttention` with these weights: the inverse of the constructor."""
        q, k, v, out = (cast(nn.Linear, layer) for layer in (self.q, self.k, self.v, self.out))
        attention = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=q.bias is not None,
            kdim=k.in_features,
            vdim=v.in_features,
            batch_first=self.batch_first,
            device=q.weight.device,
            dtype=q.weight.dtype,
        )
        with torch.no_grad():
            if attention.in_proj_weight is None:
                attention.q_proj_weight.copy_(q.weight)
                attention.k_proj_weight.copy_(k.weight)
                attention.v_proj_weight.copy_(v.weight)
            else:
                attention.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
            if q.bias is not None:
                attention.in_proj_bias.copy_(torch.cat([q.bias, k.bias, v.bias]))
            attention.out_proj.weight.copy_(out.weight)
            if out.bias is not None:
                attention.out_proj.bias.copy_(out.bias)
        return attention.train(self.training)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool, trained_bias: bool) -> nn.Linear:
    """An `nn.Linear` with a copy of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained_bias)
    return layer


def _additive_mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, S: int) -> Tensor | None:
    """Both masks of `nn.MultiheadAttention` as one that is added to the scores "B H L S"."""
    B, H, L, _ = q.shape
    total: Tensor | None = None
    for mask, shape in ((attn_mask, (-1, H, L, S)), (padding, (B, 1, 1, S))):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
        mask = mask.to(q.dtype)
        mask = mask if mask.dim() == 2 and shape[0] == -1 else mask.view(shape)
        total = mask if total is None else total + mask
    return total
