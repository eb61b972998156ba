"""Modules that stand in for those of a backbone, with the same weights and the same result.

`SplitAttention` is `torch.nn.MultiheadAttention` with its four projections as separate linear layers:

    softmax(q k^T / sqrt(d) + mask) v,    q = Wq x + bq,  k = Wk x + bk,  v = Wv x + bv,  then Wo (.) + bo

so that a low-rank update reaches each of them. In `MultiheadAttention` the three stand in one matrix, and the fourth is
used without being called, so an adapter put on it never runs.

`FoldedLinear` is a linear layer with its low-rank update, as one matrix product instead of three:

    y = (W + s B A) x + b,    dA = s (B^T g) x^T,    dB = s g (A x)^T,    dx = (W + s B A)^T g        (g = dy, W frozen)

The gradients go through the narrow sides, so the full dW is never formed: two large products a step and four thin ones.

`DINOHead` stands behind an encoder while it is trained without labels, and is thrown away with it:

    logits = V u / |V_k| |u|,   u = W3 gelu(W2 gelu(W1 x + b1) + b2) + b3

`prepare_for` puts the first two, and attention in the form that is fastest for the number type, in place for training.

Letters: B batch (in updates: their wide factor), L query tokens, S key tokens, D width, H heads, d = D / H, r rank,
s = alpha / r, o and i numbers out of and into a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vicinal.types import InputError

__all__ = ["DINOHead", "FoldedLinear", "SplitAttention", "plain_attention", "prepare_for", "put", "unprepared"]


M = TypeVar("M", bound=nn.Module)


class DINOHead(nn.Module):
    """From embeddings to prototypes: three layers, then the cosine to each of K. Caron et al. 2021, arXiv:2104.14294.

    Weights start as the authors' do: truncated normal of .02, biases zero; the prototypes are of length one (their
    weight norm with its gain fixed to 1).

    Args:
        dim: D, of the embeddings.
        prototypes: K. The paper: 65,536.
        hidden: width of the two hidden layers. The paper: 2,048.
        bottleneck: numbers of what is compared with the prototypes. The paper: 256.

    >>> logits = DINOHead(8, 5, hidden=16, bottleneck=4)(torch.randn(3, 8))
    >>> tuple(logits.shape), bool((logits.abs() <= 1.001).all())
    ((3, 5), True)
    """

    def __init__(self, dim: int, prototypes: int, *, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(nn.Linear(bottleneck, prototypes, bias=False).weight.detach())

    def forward(self, embeddings: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """The cosine of each embedding's bottleneck to each prototype."""
        return F.linear(F.normalize(self.layers(embeddings), dim=-1), F.normalize(self.prototypes, dim=-1))


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
        if not _standard(attention):
            raise InputError("an attention with add_bias_kv or add_zero_attn cannot be split; adapt its mlp instead")
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        self.plain = False
        weights, biases = _projections(attention)
        trained = (attention.in_proj_weight if attention.q_proj_weight is None else weights[0]).requires_grad
        trained_bias = attention.in_proj_bias is not None and attention.in_proj_bias.requires_grad
        self.q, self.k, self.v = (
            _linear(weight, bias, trained, trained_bias) for weight, bias in zip(weights, biases, strict=True)
        )
        out = attention.out_proj
        bias = cast("Tensor | None", out.bias)
        self.out = _linear(out.weight, bias, out.weight.requires_grad, bias is not None and bias.requires_grad)
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
        return _attention(
            self,
            lambda query, key, value: (self.q(query), self.k(key), self.v(value)),
            self.out,
            self.plain,
            (query, key, value),
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )

    def fused(self) -> nn.MultiheadAttention:
        """The `nn.MultiheadAttention` with these weights: the inverse of the constructor."""
        attention = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.q.bias is not None,
            kdim=self.k.in_features,
            vdim=self.v.in_features,
            batch_first=self.batch_first,
            device=self.q.weight.device,
            dtype=self.q.weight.dtype,
        )
        with torch.no_grad():
            weights, biases = _projections(attention)
            for weight, bias, layer in zip(weights, biases, (self.q, self.k, self.v), strict=True):
                weight.copy_(layer.weight)
                if bias is not None:
                    bias.copy_(layer.bias)
            attention.out_proj.load_state_dict(self.out.state_dict())
        return attention.train(self.training)


class _PlainMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` as plain matrix products: `plain_attention` switches the class, and the weights stay."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        def project(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if query is key and key is value and self.in_proj_weight is not None:
                q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
                return q, k, v
            (wq, wk, wv), (bq, bk, bv) = _projections(self)
            return F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)

        return _attention(
            self,
            project,
            self.out_proj,
            True,
            (query, key, value),
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )


def _standard(attention: nn.MultiheadAttention) -> bool:
    return attention.bias_k is None and attention.bias_v is None and not attention.add_zero_attn


def _projections(attention: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The weights and the biases of q, k and v: views of what the module holds."""
    fused = cast("Tensor | None", attention.in_proj_weight)
    if fused is None:
        weights: tuple[Tensor, ...] = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    else:
        weights = fused.chunk(3)
    bias = cast("Tensor | None", attention.in_proj_bias)
    return weights, (None, None, None) if bias is None else bias.chunk(3)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool, trained_bias: bool) -> nn.Linear:
    """An `nn.Linear` with a copy of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=trained)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=trained_bias)
    return layer


def _attention(
    module: SplitAttention | nn.MultiheadAttention,
    project: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    out: nn.Module,
    plain: bool,
    inputs: tuple[Tensor, Tensor, Tensor],
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """The call of `nn.MultiheadAttention` around any three projections."""
    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, which is missing")
    batched = inputs[0].dim() == 3
    q, k, v = project(*inputs)
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    elif not module.batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    B, L, D = q.shape
    S, H = k.shape[1], module.num_heads
    q = q.reshape(B, L, H, D // H).transpose(1, 2)
    k = k.reshape(B, S, H, D // H).transpose(1, 2)
    v = v.reshape(B, S, H, D // H).transpose(1, 2)
    mask = _additive_mask(attn_mask, key_padding_mask, q, S)
    dropout = module.dropout if module.training else 0.0

    weights: Tensor | None = None
    if need_weights or plain:
        scores = (q * (D // H) ** -0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        result = weights @ v
    else:
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    result = out(result.transpose(1, 2).reshape(B, L, D))

    if not batched:
        result = result.squeeze(0)
    elif not module.batch_first:
        result = result.transpose(0, 1)
    if not need_weights or weights is None:
        return result, None
    weights = weights.mean(dim=1) if average_attn_weights else weights
    return result, weights if batched else weights.squeeze(0)


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
        if mask is not None and not (shape[0] == -1 and mask.dim() == 2):  # "L S" holds for every item and head
            mask = mask.view(shape)
        total = mask if total is None else total + mask
    return total


class FoldedLinear(nn.Module):
    """A peft LoRA layer as one matrix product: y = (W + s B A) x + b, with gradients for A, B and x alone.

    It holds the very modules of the layer it stands for, under the same names, so weights, optimiser and state dict are
    the same. W + s B A is summed in float32 and rounded once to the number type of the products (autocast's, if it is
    on); plain LoRA under autocast rounds W, A x, B A x and the sum each for itself.

    Args:
        layer: one of peft's `lora.Linear`, with one adapter, without dropout, its weight and bias frozen.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = cast(nn.Linear, layer.base_layer)
        self.lora_A = cast(nn.ModuleDict, layer.lora_A)
        self.lora_B = cast(nn.ModuleDict, layer.lora_B)
        self.scaling = cast("dict[str, float]", layer.scaling)
        self._stands_for = (layer,)  # in a tuple, so that it is not a second child with the same weights
        self.train(layer.training)

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """Whether `layer` is such a layer."""
        if not all(hasattr(layer, name) for name in ("base_layer", "lora_A", "lora_B", "lora_dropout", "scaling")):
            return False  # peft is not imported for this: it is one of the heavy ones
        base, dropouts = layer.base_layer, cast(nn.ModuleDict, layer.lora_dropout).values()
        return (
            type(base) is nn.Linear
            and not any(p.requires_grad for p in base.parameters())
            and len(cast(nn.ModuleDict, layer.lora_A)) == 1
            and all(isinstance(dropout, nn.Identity) for dropout in dropouts)
            and not any(cast("dict[str, bool]", layer.use_dora).values())
        )

    @property
    def weight(self) -> Tensor:
        """Of the base layer, for code that asks a layer for its number type."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the base layer."""
        return self.base_layer.bias

    def forward(self, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        """The linear layer with its update."""
        ((name, A),) = self.lora_A.items()
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        B = cast(nn.Linear, self.lora_B[name]).weight
        base = self.base_layer
        return cast(Tensor, _Folded.apply(x, base.weight, base.bias, A.weight, B, self.scaling[name], dtype))


class _Folded(torch.autograd.Function):
    """The formulas of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 (torch gives it no public type)
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        s: float,
        dtype: torch.dtype,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # else the sum itself would be rounded
            weight = torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=s).to(dtype)
            x = x.to(dtype)
            ctx.save_for_backward(x, weight, A, B)
            ctx.s = s
            return F.linear(x, weight, None if b is None else b.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, A, B = ctx.saved_tensors
        g_No, x_Ni = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (g_No @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        u_Nr = g_No @ B.to(g.dtype)
        h_Nr = x_Ni @ A.t().to(g.dtype)
        dA = ctx.s * (u_Nr.t() @ x_Ni).to(A.dtype)
        dB = ctx.s * (h_Nr.t() @ g_No).t().to(B.dtype)  # this way round is the faster one for a narrow h
        return dx, None, None, dA, dB, None, None


class plain_attention:  # noqa: N801 (called like a function; `with` is optional)
    """Attention as plain matrix products (`enabled`), or in the library's fused form, for all three families.

    The result is the same up to rounding. On CPUs in bf16 the plain form is faster, the more in the backward pass; in
    float32 the fused one is (`benchmarks/training_step.py` measures both). The call takes effect at once; used in a
    `with`, it restores on leaving what was there before.

    Args:
        encoder: an encoder, or anything that holds one.
        enabled: true for plain.

    >>> attention = SplitAttention(nn.MultiheadAttention(8, 2))
    >>> with plain_attention(attention, True):
    ...     attention.plain
    True
    >>> attention.plain
    False
    """

    def __init__(self, encoder: nn.Module, enabled: bool) -> None:
        self._undo: list[Callable[[], None]] = []
        for module in encoder.modules():
            if isinstance(module, SplitAttention):
                self._set(module, "plain", enabled)
            elif type(module) is (nn.MultiheadAttention if enabled else _PlainMultiheadAttention):
                if _standard(module):
                    self._set(module, "__class__", _PlainMultiheadAttention if enabled else nn.MultiheadAttention)
            elif isinstance(getattr(module, "fused_attn", None), bool):  # timm's flag; other modules have none
                from timm.layers import use_fused_attn

                self._set(module, "fused_attn", not enabled and use_fused_attn())
            elif hasattr(module, "set_attn_implementation"):  # transformers' models
                self._set_transformers(module, enabled)

    def __enter__(self) -> None:
        """It has taken effect already."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._undo:
            self._undo.pop()()

    def _set(self, module: nn.Module, name: str, value: object) -> None:
        before = getattr(module, name)
        self._undo.append(lambda: setattr(module, name, before))
        setattr(module, name, value)

    def _set_transformers(self, module: Any, enabled: bool) -> None:  # noqa: ANN401 (transformers is not imported)
        before = module.config._attn_implementation
        wanted = {"sdpa": "eager"}.get(before) if enabled else {"eager": "sdpa"}.get(before)
        if wanted is not None and module._supports_sdpa:  # flash attention and the like were chosen: leave them
            self._undo.append(lambda: module.set_attn_implementation(before))
            module.set_attn_implementation(wanted)


@contextmanager
def prepare_for(encoder: nn.Module, device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """Within: the encoder computes the same, faster, for training with products in `dtype`. After: it is as it was.

    On the CPU, low-rank updates are folded into their layers (`FoldedLinear`), where they have no dropout and the
    layer's own weight is frozen; in bf16, attention takes its plain form too. On other devices nothing is changed, for
    nothing has been measured there. Names, parameters, optimiser and state dict stay the same. Plain attention keeps
    B H L L numbers a block for the backward pass, which the fused form computes again: for a batch of 64 and ViT-B/16,
    60 MB at 224 px and 510 MB at 384 px.

    Args:
        encoder: an encoder, or anything that holds one, such as an objective.
        device_type: "cpu", "cuda", ...
        dtype: of the matrix products: autocast's, or float32.
    """
    if device_type != "cpu":
        yield
        return
    _fold(encoder)
    try:
        if dtype == torch.bfloat16:
            with plain_attention(encoder, True):
                yield
        else:
            yield
    finally:
        unprepared(encoder)


def unprepared(encoder: M) -> M:
    """The same object, with its own layers again where `prepare_for` put others (a copy made within it has those)."""
    for name, module in list(encoder.named_modules()):
        if isinstance(module, FoldedLinear):
            (layer,) = module._stands_for
            put(encoder, name, layer.train(module.training))
        elif type(module) is _PlainMultiheadAttention:
            setattr(module, "__class__", nn.MultiheadAttention)  # noqa: B010 (mypy does not allow the assignment)
    return encoder


def _fold(encoder: nn.Module) -> None:
    for name, module in list(encoder.named_modules()):
        if FoldedLinear.takes(module):
            put(encoder, name, FoldedLinear(module))


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Let `module` stand at a dotted name of `root`."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
