"""How rows of a pack see each other: documents side by side, and the rotary positions inside them.

In: q, k, v of all rows, text first. Out: what each row has gathered from the rows before it in its own document. Three
ways lead there: "varlen", PyTorch's FlashAttention kernel for documents of any lengths, on CUDA in bf16; "separate", one
call for each document, on CPUs; and "padded", right-padded documents as one batch, where neither can be had. Behind a
causal mask padding needs no other mask; the price is that every document is as long as the longest of its pack. Before
"varlen" is used, it must agree with "padded" on this very device.

Letters: R rows of a pack, D documents, M longest document, P = D * M places, H query heads, G key-value heads, E head size.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from train.model.config import ModelConfig

log = logging.getLogger("train")
AttentionKind = Literal["padded", "separate", "varlen"]
CAUSAL = (-1, 0)  # of varlen_attn: everything before, nothing after
# torch 2.11 takes fewer key-value heads without a word, later ones need enable_gqa.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
CHUNK = 64  # queries; 64 to 128 take 0.70-0.75 of the time of all at once (documents of 300-640, one core, NOTES.md)
ATTEND_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTEND_ON_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Of the largest value. In bf16 two sound kernels were 0.009-0.013 apart (CPU, three head sizes), a wrong mask or a missing
# gradient 1.
AGREE_WITHIN = 0.05


class Attend(Protocol):
    """How rows see each other: a pack's documents in training, a key-value cache in generation."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class Documents(NamedTuple):
    """Where each row stands in the documents of a pack. Documents never see each other; inside one, order is causal."""

    order: Tensor  # [R] int64 row at each position, document behind document
    place: Tensor  # [R] int64 position of each row: the inverse of `order`
    bounds: Tensor  # [D + 1] int32 first position of each document, and the end
    longest: int

    def attend(self, kind: AttentionKind) -> Attend:
        if kind == "varlen":
            return VariableDocuments(*self)
        return self.separate() if kind == "separate" else self.padded()

    def separate(self) -> SeparateDocuments:
        """The same with lengths as numbers, for tensors on the CPU."""
        return SeparateDocuments(self.order, self.place, self.bounds.diff().tolist())

    def padded(self) -> PaddedDocuments:
        """The same as a grid; made where the tensors are, without a synchronisation."""
        device = self.order.device
        starts = self.bounds[:-1, None] + torch.arange(self.longest, device=device)  # [D, M]
        to_padded = self.order[starts.clamp(max=len(self.order) - 1)]
        document = torch.searchsorted(self.bounds, self.place.int(), right=True) - 1  # [R] of each row
        return PaddedDocuments(to_padded, document * self.longest + self.place - self.bounds[document])


class VariableDocuments(NamedTuple):
    """Documents one behind another: no row is computed twice. The fields are those of `Documents`."""

    order: Tensor
    place: Tensor
    bounds: Tensor
    longest: int

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, E], k and v [R, G, E] -> [R, H, E]."""
        q, k, v = (Gather.apply(x, self.order, self.place) for x in (q, k, v))  # pyright: ignore
        out = varlen_attn(
            *(q, k, v, self.bounds, self.bounds, self.longest, self.longest), window_size=CAUSAL, **GROUPED
        )
        return Gather.apply(out, self.place, self.order)  # pyright: ignore


class SeparateDocuments(NamedTuple):
    """Documents one after another, each by itself: a CPU is busy with one, and no graph could be compiled of it."""

    order: Tensor  # as in `Documents`
    place: Tensor
    lengths: list[int]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, E], k and v [R, G, E] -> [R, H, E]."""
        q, k, v = (Gather.apply(x, self.order, self.place) for x in (q, k, v))  # pyright: ignore
        return Gather.apply(attend_separately(q, k, v, self.lengths), self.place, self.order)  # pyright: ignore


def attend_separately(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Documents one behind another on a CPU, q [R, H, E], k and v [R, G, E], each row in one piece -> [R, H, E]."""
    assert sum(lengths) == len(q), "rows of no document would be what the memory held before"
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the kernel reads a head's numbers side by side without looking"
    assert not torch.compiler.is_compiling(), "its gradients would be wrong without a word (pytorch#180642)"
    return Separately.apply(q, k, v, lengths)  # pyright: ignore


class Separately(torch.autograd.Function):
    """The CPU's kernel for CHUNK queries after CHUNK queries of every document.

    It reads keys in blocks of 512, later ones too, so short chunks of queries meet fewer of them. It is called by its own name:
    of chunks that autograd cuts, each would fill its whole document with zeros for a gradient, to be added up.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        out, sums = torch.empty_like(q), []  # not compiled, so it may write in place
        for rows, seen in chunks(lengths):
            given = heads_first(q[rows]), heads_first(k[seen]), heads_first(v[seen])
            part, sum_of_rows = ATTEND_ON_CPU(*given, attn_mask=later_keys(q, rows, seen))
            out[rows] = part[0].transpose(0, 1)
            sums.append(sum_of_rows)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        q, k, v, out, *sums = ctx.saved_tensors
        grad = grad.contiguous()
        grad_q = torch.empty_like(q)
        wide = torch.promote_types(k.dtype, torch.float32)  # many chunks add to one key: in bf16 each would round
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for (rows, seen), sum_of_rows in zip(chunks(ctx.lengths), sums, strict=True):
            given = (heads_first(x) for x in (grad[rows], q[rows], k[seen], v[seen], out[rows]))
            mask = later_keys(q, rows, seen)
            of_q, of_k, of_v = ATTEND_ON_CPU_BACKWARD(*given, sum_of_rows, 0.0, False, attn_mask=mask)
            grad_q[rows] = of_q[0].transpose(0, 1)
            grad_k[seen] += of_k[0].transpose(0, 1)
            grad_v[seen] += of_v[0].transpose(0, 1)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def chunks(lengths: list[int]) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys up to the last of them, in their document."""
    first = 0
    for length in lengths:
        for start in range(first, first + length, CHUNK):
            end = min(start + CHUNK, first + length)
            yield slice(start, end), slice(first, end)
        first += length


def heads_first(x: Tensor) -> Tensor:
    """[n, heads, E] -> [1, heads, n, E]."""
    return x.transpose(0, 1)[None]


def later_keys(q: Tensor, rows: slice, seen: slice) -> Tensor:
    """Minus infinity where a key is later than the query: [queries, keys]."""
    hidden = q.new_full((rows.stop - rows.start, seen.stop - seen.start), float("-inf"))
    return hidden.triu(rows.start - seen.start + 1)


class PaddedDocuments(NamedTuple):
    """Documents as a grid."""

    to_padded: Tensor  # [D, M] int64 row of each position; positions behind a document's end name any row
    from_padded: Tensor  # [R] int64 place of each row in the flattened [D * M]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, H, E], k and v [R, G, E] -> [R, H, E]."""
        num_documents, longest = self.to_padded.shape
        index = self.to_padded.reshape(-1)

        def pad(x: Tensor) -> Tensor:  # [R, heads, E] -> [D, heads, M, E]
            rows = Gather.apply(x.flatten(1), index, self.from_padded)
            return rows.view(num_documents, longest, *x.shape[1:]).transpose(1, 2)  # pyright: ignore

        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2).reshape(num_documents * longest, -1)
        return Collect.apply(out, self.from_padded).view_as(q)  # pyright: ignore


def choose_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype, is_compiled: bool) -> AttentionKind:
    """The fastest way here: "varlen" where its kernel runs and agrees with the padded way, values and gradients."""
    if device.type == "cpu" and not is_compiled:
        return "separate"
    if device.type != "cuda" or dtype is not torch.bfloat16:
        return "padded"
    try:
        apart = disagreement(config, device, dtype)
    except (RuntimeError, ValueError, TypeError) as error:  # an older card, or another build of torch
        log.warning(
            "attention: documents are padded, since varlen_attn does not run here: %s", str(error).splitlines()[0]
        )
        return "padded"
    if not apart <= AGREE_WITHIN:
        log.warning("attention: documents are padded, since varlen_attn is %.2g apart from it here", apart)
        return "padded"
    log.info("attention: varlen_attn, %.2g apart from padded documents here", apart)
    return "varlen"


def disagreement(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> float:
    """How far the two ways are apart on three random documents, relative to the largest value or gradient."""
    lengths = torch.tensor([1, 70, 300])
    num_rows = int(lengths.sum())
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_rows, generator=generator)
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    documents = Documents(order.to(device), order.argsort().to(device), bounds.to(device), 300)
    heads = config.num_heads, config.num_key_value_heads, config.num_key_value_heads
    given = [torch.randn(num_rows, n, config.head_dim, generator=generator).to(device, dtype) for n in heads]
    weight = torch.randn(num_rows, config.num_heads, config.head_dim, generator=generator).to(device, dtype)

    def results(kind: AttentionKind) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in given]
        out = documents.attend(kind)(0, *inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, weight)]

    pairs = zip(results("padded"), results("varlen"), strict=True)
    return max(((one - other).abs().max() / one.abs().max()).item() for one, other in pairs)


class Gather(torch.autograd.Function):
    """x [R, ...] -> x[index] [P, ...]. Backward reads each row's gradient at its one real place, where autograd's own would add
    atomically; exact, because places that are nobody's receive zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Collect(torch.autograd.Function):
    """padded [P, n] -> padded[place] [R, n]; backward writes each row to its place and leaves zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.num_places = padded.shape[0]
        return padded.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        padded = grad.new_zeros(ctx.num_places, grad.shape[1])
        return padded.index_copy(0, ctx.saved_tensors[0], grad), None
