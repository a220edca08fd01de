"""Attention whose projections are layers.

`nn.MultiheadAttention` holds the weights of its queries, keys and values as a bare parameter, and
reads that of its last linear layer without calling it. Whoever swaps layers does not reach them.
`Attention` has the same parameters and gives the same, by `nn.Linear` layers that it calls:

    self-attention    q, k, v = in_proj(x) in three parts
    any other         q, k, v = q_proj(query), k_proj(key), v_proj(value)
    y = out_proj(softmax(q k^T / sqrt(D) + mask) v),  heads of D channels

One layer for the three of self-attention, as timm's ViTs have it, on which quantized ViTs are
published (FQ-ViT, arXiv 2111.13824; PTQ4ViT, 2111.12293; RepQ-ViT, 2212.08254): its input is
quantized once. The two products and the softmax between them stay in float.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

PARTS = ("q_proj", "k_proj", "v_proj")


@fx.wrap
def merged_mask(q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    """What both masks of `nn.MultiheadAttention` add to the scores.

    Shape: q [N, heads, L, D], attn_mask [L, S] or [N * heads, L, S], key_padding_mask [N, S], each
    additive or True where no attention is paid -> broadcasts with [N, heads, L, S].
    """
    total = q.new_zeros(())
    if attn_mask is not None:
        mask = _additive(attn_mask, q.dtype)
        total = total + (mask.view(*q.shape[:2], *mask.shape[1:]) if mask.dim() == 3 else mask)
    if key_padding_mask is not None:
        total = total + _additive(key_padding_mask, q.dtype)[:, None, None, :]
    return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


class Attention(nn.Module):
    """`nn.MultiheadAttention` whose projections are layers.

    Args:
        source: gives up its parameters; without `bias_k` and `add_zero_attn`.
        fused: query, key and value are one tensor.
    """

    in_proj_bias = None  # torch's encoder layer then leaves its fused kernel, which calls no layer

    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool

    def __init__(self, source: nn.MultiheadAttention, *, fused: bool) -> None:
        super().__init__()
        self.__dict__.update(plain_attributes(source))
        self.fused = fused
        weight: Any = source.in_proj_weight
        bias: Any = source.in_proj_bias
        if fused:
            self.in_proj = linear(weight, bias)
        else:
            own: Any = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
            weights = own if weight is None else thirds(weight)
            biases = (None, None, None) if bias is None else thirds(bias)
            for name, w, b in zip(PARTS, weights, biases, strict=True):
                setattr(self, name, linear(w, b))
        self.out_proj = linear(source.out_proj.weight, source.out_proj.bias)

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
        """As of `nn.MultiheadAttention`; `is_causal` says of `attn_mask` what it holds anyway.

        Shape: query [N, L, C], key [N, S, C_k], value [N, S, C_v] (`batch_first`; else N second)
        -> like query; weights [N, L, S], or [N, heads, L, S] without their average.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal needs the causal attn_mask")
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))  # [N, heads, ., D]
        mask = None
        if attn_mask is not None or key_padding_mask is not None:
            mask = merged_mask(q, attn_mask, key_padding_mask)
        weights = None
        if need_weights:
            scores = (q * (self.embed_dim // self.num_heads) ** -0.5) @ k.transpose(2, 3)
            weights = (scores if mask is None else scores + mask).softmax(-1)  # [N, heads, L, S]
            weights = F.dropout(weights, self.dropout, self.training)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            drop = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # [N, L, C]
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [N, ., C]. What the layers see has the batch first: a row of it is an image."""
        if not self.fused:
            inputs = zip(PARTS, (query, key, value), strict=True)
            return tuple(getattr(self, name)(self._batch_first(x)) for name, x in inputs)
        if query is not key or key is not value:
            raise ValueError(
                "query, key and value are no longer one tensor, as they were when the network was "
                "built. Give each way of attending a module of its own"
            )
        q, k, v = self.in_proj(self._batch_first(query)).chunk(3, -1)  # torch.fx counts three names
        return q, k, v

    def _batch_first(self, x: Tensor) -> Tensor:
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor) -> Tensor:
        """[N, L, C] -> [N, heads, L, D]"""
        return x.unflatten(-1, (self.num_heads, self.embed_dim // self.num_heads)).transpose(1, 2)

    def own_names(self, state: dict[str, Any], prefix: str) -> None:
        """Rename the tensors of the module it stands for, in place."""
        for kind in ("weight", "bias"):
            if (old := f"{prefix}in_proj_{kind}") in state:
                whole = state.pop(old)
                names, parts = (PARTS, whole.chunk(3)) if not self.fused else (["in_proj"], [whole])
                state |= {f"{prefix}{n}.{kind}": t for n, t in zip(names, parts, strict=True)}
        for name in PARTS:
            if (old := f"{prefix}{name}_weight") in state:
                state[f"{prefix}{name}.weight"] = state.pop(old)


def plain_attributes(source: nn.Module) -> dict[str, Any]:
    """Attributes and hooks of a module, without parameters, buffers and children."""
    tensors = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    return {key: value for key, value in source.__dict__.items() if key not in tensors}


def linear(weight: Any, bias: Any) -> nn.Linear:
    """A linear layer of these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def thirds(whole: nn.Parameter) -> list[nn.Parameter]:
    """Of what queries, keys and values have in one, a parameter each."""
    return [nn.Parameter(t.detach().clone(), whole.requires_grad) for t in whole.chunk(3)]
