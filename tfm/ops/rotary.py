"""Rotary position embedding of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from tfm.errors import BadArgument
from tfm.operators.autograd import apply
from tfm.operators.rotary import DifferentiableRotary, DifferentiableRotary_, Rotary, Rotary_
from tfm.ops.backends import choose
from tfm.ops.checks import broadcasts, check_floating, check_integers, check_same_device
from tfm.ops.registry import namespace_of
from tfm.ops.routing import door
from tfm.reference import rotary as reference
from tfm.taping import checked


@door
def rotary(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Turns pairs of a head's columns by its token's angles (Su et al. 2021, "RoFormer", equation 34).

    (a, b) becomes (a · cos - b · sin, b · cos + a · sin), in fp32 at least, rounded once. Tables that are scaled (YaRN,
    LongRoPE) scale the result. Columns beyond twice the tables' pass unchanged: partial rotation is a narrower table.

    The tables of Hugging Face's families are mostly [..., R] of two equal halves: call with cos[..., : R // 2], and
    `interleaved` where the model pairs neighbouring columns (GLM) rather than halves (Llama, GPT-NeoX, Gemma, Qwen).
    GPT-J's are half as wide as they come, and `interleaved`.

    Args:
        query: [B, Hq, S, D] or packed [N, Hq, D], floating point, any strides.
        key: the same with its own number of heads; turned in the same launch. None where there is none.
        cos, sin: without `positions` a row for each token, [B, S, R/2], [1, S, R/2], [S, R/2] or packed [N, R/2]; with
            them tables [P, R/2]. R <= D. Floating point, without gradient.
        positions: integers [N], or broadcastable to [B, S]: each token's row of the tables.
        interleaved: pair column 2i with 2i + 1 (GPT-J), not i with i + R/2 (GPT-NeoX, Llama).
        impl: the backend, "reference", "triton" or "native"; "auto" leaves the choice to tfm.ops.backends.

    Returns:
        (query, key), shapes and dtypes as given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, tables that need a gradient, a backend that cannot run.
        IndexError: on CPU, a position outside the tables. (On a GPU torch stops the process; the Triton kernel reads
            nothing and gives NaN.)
    """
    _check("query", query, cos, sin, positions)
    if key is not None:
        alike = query.dim() == key.dim() and query.shape[-1] == key.shape[-1] and query.dtype == key.dtype
        if not alike or _tokens(query) != _tokens(key):
            raise BadArgument(
                f"key: expected {query.dtype} of query's shape {tuple(query.shape)}, heads apart,"
                f" got {key.dtype} of {tuple(key.shape)}"
            )
        check_same_device(query=query, key=key)
    backend = choose("rotary", impl, query, "", cos.dtype)
    if backend == "reference":
        turned = reference.rotary(query, cos, sin, positions, interleaved)
        return turned, None if key is None else reference.rotary(key, cos, sin, positions, interleaved)
    call = Rotary(query, key, cos, sin, positions, query.shape[1], interleaved, inverse=False)
    return apply(DifferentiableRotary, namespace_of(backend), call)


@door
def rotary_(
    x: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Rotates the first `heads` heads of `x` in place: a fused projection's queries and keys, not its values.

    Saves the memory of a second copy of queries and keys. Where `x` is a view of a tensor that needs a gradient,
    autograd copies that gradient; there `rotary` of the parts moves less.

    Args:
        x: [B, H, S, D] or packed [N, H, D], floating point, any strides in which no two elements share an address.
        heads: how many heads are turned, of the H.
        cos, sin, positions, interleaved, impl: as in `rotary`.

    Returns:
        `x`.

    Raises:
        ValueError: as `rotary`; more heads than there are; a leaf that needs a gradient, or a view of one, whose values
            autograd keeps; an expanded tensor.
    """
    _check("x", x, cos, sin, positions)
    checked(_check_in_place, x)
    if not 0 <= heads <= x.shape[1]:
        raise BadArgument(f"heads: expected at most the {x.shape[1]} of x, got {heads}")
    backend = choose("rotary_", impl, x, "", cos.dtype)
    if backend == "reference":
        part = x.narrow(1, 0, heads)
        part.copy_(reference.rotary(part, cos, sin, positions, interleaved))
        return x
    call = Rotary_(x, cos, sin, positions, heads, interleaved)
    return apply(DifferentiableRotary_, namespace_of(backend), call)[0]


def _check_in_place(x: Tensor) -> bool:
    """Refuses what cannot be changed in place; tells whether that hung on more than shape and strides."""
    if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise BadArgument(f"x: expected elements with addresses of their own, got strides {x.stride()}: clone it")
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad):
        return False
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        raise BadArgument("x: expected the result of an operation, got a leaf that needs a gradient: take `rotary`")
    return True


def rotary_table(
    length: int,
    dim: int,
    theta: float = 10000.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of position · theta^(-2i / dim) (Su et al. 2021, section 3.2.2), computed in float64.

    Args:
        length: the number of positions.
        dim: the columns that are turned, an even number.
        theta: the base of the frequencies.
        device, dtype: of the tables.

    Returns:
        cos and sin, [length, dim / 2] each.

    Raises:
        ValueError: an odd `dim`.
    """
    if dim % 2:
        raise BadArgument(f"dim: expected an even number of columns, got {dim}")
    return reference.rotary_table(length, dim, theta, device, dtype)


def _tokens(x: Tensor) -> tuple[int, ...]:
    """Returns the shape of the tokens: (B, S), or (N,) where they are packed."""
    return tuple(x.shape[:1]) if x.dim() == 3 else (x.shape[0], x.shape[2])


def _check(name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if x.dim() not in (3, 4):
        raise BadArgument(f"{name}: expected [B, H, S, D] or packed [N, H, D], got shape {tuple(x.shape)}")
    check_floating(**{name: x}, cos=cos, sin=sin)
    check_integers(positions=positions)
    check_same_device(**{name: x}, cos=cos, sin=sin, positions=positions)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise BadArgument(
            f"sin: expected {cos.dtype} of shape {tuple(cos.shape)} like cos, got {sin.dtype} of {tuple(sin.shape)}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise BadArgument("cos, sin: expected tables without gradient, got one that requires it: detach it")
    tokens, columns = _tokens(x), x.shape[-1]
    if cos.dim() == 0 or 2 * cos.shape[-1] > columns:
        raise BadArgument(f"cos: expected at most {columns // 2} columns for dim {columns}, got {tuple(cos.shape)}")
    if positions is None:
        leading, what = tuple(cos.shape[:-1]), f"cos: expected [*tokens, {cos.shape[-1]}]"
    elif cos.dim() != 2:
        raise BadArgument(f"cos: expected a table [positions, columns], got shape {tuple(cos.shape)}")
    else:
        leading, what = tuple(positions.shape), "positions: expected a shape"
    if not broadcasts(leading, tokens):
        raise BadArgument(f"{what} that broadcasts to the tokens {tokens}, got {leading}")
