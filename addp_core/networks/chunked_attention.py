"""Attention on a CPU, with relative positions or in half precision: a few rows of scores at a time.

torch's attention has no fused kernel on CPUs for a bias that takes a gradient: it writes all scores and all biases to
memory several times. Here the backward pass computes the scores of long sequences again instead of reading them from
memory, where they would take 800 MB a block at 4096 tokens and 12 heads. Reference: FlashAttention (arXiv 2205.14135).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = (
    5 * 2**20
)  # of scores computed at a time, in a cache; in float32, all of 32 x 32 patches and a class token

Chunk = tuple[slice, slice]  # of the sequences, and of the queries of each


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    vertical: Tensor | None = None,
    horizontal: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T + biases) v, Float[B,heads,Q,d_v], with gradients of all arguments.

    Args:
        q: Float[B,heads,Q,d], already scaled.
        k: Float[B,heads,L,d].
        v: Float[B,heads,L,d_v].
        bias: Float[1,heads,Q,L], added to the scores.
        vertical: Float[B,heads,Q,h]; the bias of a query and a key in row i is its entry i. Then L = h * w.
        horizontal: Float[B,heads,Q,w], the same for the columns.
    """
    if not q.numel():  # no queries, as in the last block of a pretraining in which every position is masked
        return q @ k.mT @ v
    per_sequence = [None if x is None else x.flatten(0, 1) for x in (q, k, v, vertical, horizontal)]
    out = _ChunkedAttention.apply(None if bias is None else bias[0], *per_sequence)
    return out.unflatten(0, q.shape[:2])


class _ChunkedAttention(torch.autograd.Function):
    """Batch and heads are one dimension, S, of sequences; the bias is Float[heads,Q,L]."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *terms: Tensor | None) -> Tensor:
        shape = (*q.shape[:2], k.shape[1])  # of the scores
        keep = shape[1] * shape[2] <= _chunk_scores(q) and any(
            ctx.needs_input_grad
        )  # reading is then faster than computing
        kept = q.new_empty(shape) if keep else None
        ctx.save_for_backward(kept, bias, q, k, v, *terms)
        out = v.new_empty(*q.shape[:2], v.shape[2])
        buffer, k_transposed = _chunk_buffer(q, k, bias), k.mT.contiguous()
        for sequences, rows in _chunks(q, k, bias):
            p = _probabilities(
                kept[sequences] if kept is not None else buffer, (sequences, rows), bias, q, k_transposed, *terms
            )
            torch.bmm(p, v[sequences], out=out[sequences, rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        kept, bias, q, k, v, *terms = ctx.saved_tensors
        d_out, dtype = d_out.to(q.dtype), q.dtype
        is_sum = q.shape[1] > _chunk_scores(q) // k.shape[1]  # of the chunks of a sequence; sums are in float32
        d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32) if is_sum else x.new_empty(x.shape) for x in (k, v))
        d_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32)
        d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        d_terms = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in terms]
        buffer, d_buffer = _chunk_buffer(q, k, bias), _chunk_buffer(q, k, bias)
        k_transposed, v_transposed = (x.mT.contiguous() for x in (k, v))  # products of bfloat16 would copy them again
        for sequences, rows in _chunks(q, k, bias):
            if kept is not None:
                p = kept[sequences]
            else:
                p = _probabilities(buffer, (sequences, rows), bias, q, k_transposed, *terms)
            d_o = d_out[sequences, rows]
            _add_product(d_v[sequences], p.mT, d_o, is_sum)
            d_scores = torch.bmm(d_o, v_transposed[sequences], out=_part(d_buffer, p.shape))
            d_scores = torch._softmax_backward_data(d_scores, p, -1, dtype, grad_input=d_scores)
            torch.bmm(d_scores, k[sequences], out=d_q[sequences, rows])
            _add_product(d_k[sequences], d_scores.mT, q[sequences, rows], is_sum)
            if d_bias is not None:
                d_bias[sequences.start % len(d_bias), rows] += d_scores[0]
            for axis, d_term in zip((-1, -2), d_terms, strict=True):
                if d_term is not None:
                    torch.sum(d_scores.unflatten(-1, _grid(terms)), axis, out=d_term[sequences, rows])
        return d_bias, d_q, d_k.to(dtype), d_v.to(dtype), *d_terms


def _add_product(to: Tensor, a: Tensor, b: Tensor, is_sum: bool) -> None:
    """Add the product to `to`, or write it there if it is no sum."""
    if is_sum:
        to += torch.bmm(a, b)
    else:
        torch.bmm(a, b, out=to)


def _probabilities(
    buffer: Tensor,
    chunk: Chunk,
    bias: Tensor | None,
    q: Tensor,
    k_transposed: Tensor,
    vertical: Tensor | None,
    horizontal: Tensor | None,
) -> Tensor:
    """Compute softmax(q k^T + biases) of a chunk within `buffer`."""
    sequences, rows = chunk
    q, k_transposed = q[sequences, rows], k_transposed[sequences]
    scores = _part(buffer, (*q.shape[:2], k_transposed.shape[2]))
    if bias is not None:
        torch.baddbmm(bias[sequences.start % len(bias), rows].to(q.dtype).unsqueeze(0), q, k_transposed, out=scores)
    elif vertical is not None and horizontal is not None:
        grid_scores = scores.unflatten(-1, _grid((vertical, horizontal)))
        torch.add(vertical[sequences, rows].unsqueeze(-1), horizontal[sequences, rows].unsqueeze(-2), out=grid_scores)
        torch.baddbmm(scores, q, k_transposed, out=scores)
    else:
        torch.bmm(q, k_transposed, out=scores)
    return torch.softmax(scores, -1, out=scores)


def _grid(terms: Any) -> tuple[int, int]:
    """Return the rows and columns of the keys."""
    vertical, horizontal = terms
    return vertical.shape[-1], horizontal.shape[-1]


def _chunks(q: Tensor, k: Tensor, bias: Tensor | None) -> Iterator[Chunk]:
    """Yield chunks: whole sequences where several fit, else some queries of one. With a bias, of one sequence each."""
    (count, queries), length = q.shape[:2], k.shape[1]
    sequences = 1 if bias is not None else max(_chunk_scores(q) // (queries * length), 1)
    rows = max(_chunk_scores(q) // length, 1)
    for start in range(0, count, sequences):
        for row in range(0, queries, rows):
            yield slice(start, start + sequences), slice(row, row + rows)


def _chunk_scores(q: Tensor) -> int:
    """Return the number of scores that are computed at a time."""
    return CHUNK_BYTES // q.element_size()


def _chunk_buffer(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Return memory for the scores of the largest chunk."""
    sequences, rows = next(_chunks(q, k, bias))
    count, queries = q.shape[:2]
    return q.new_empty(min(sequences.stop, count) * min(rows.stop, queries) * k.shape[1])


def _part(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the beginning of `buffer` in this shape."""
    count = shape[0] * shape[1] * shape[2]
    return buffer[:count].view(shape)
