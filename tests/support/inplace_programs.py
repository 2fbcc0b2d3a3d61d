"""Functions of two tensors that write in place, to views, to parts, and to their arguments."""

from __future__ import annotations

import torch

__all__ = ["PROGRAMS", "gap", "halves", "inputs_swapped", "parts_of_what_was_written", "rotary"]


def rotary(x, y):
    out = torch.empty_like(x)
    out[..., 0::2] = y[..., 4:]
    out[..., 1::2] = x[..., :4]
    return out.type_as(x) * 1


def halves(x, y):
    out = torch.empty_like(x)
    out[..., 4:] = y[..., 4:]
    out[..., :4] = x[..., :4]
    return out


def gap(x, y):
    out = torch.zeros_like(x)
    out[..., 0::4] = y[..., :2]
    out[..., 2::4] = x[..., :2]
    return out


def overlap(x, y):
    out = x * 2
    out[:, :6] = y[:, :6]
    out[:, 4:] = x[:, 4:]
    return out


def views(x, y):
    z = x * 2
    flat = z.view(-1)
    row = z[1]
    flat[3:7].add_(y[0, :4])
    row.mul_(3)
    z.t()[0].copy_(y[0, :4])
    return z, flat, row.clone()


def nested(x, y):
    x = x * 1
    x[:2][:, ::2][1] = y[0, :4]
    x[1:3, 2:5] += y[1:3, 2:5]
    x.narrow(1, 1, 2).narrow(0, 2, 1).zero_()
    return x


def permuted(x, y):
    x = x * 1
    parts = x.view(2, 2, 8).permute(2, 0, 1)
    parts[1:3].mul_(2.0)
    parts.movedim(0, 2).transpose(0, 1).flatten(1)[:, 3].add_(1)
    x.mT[0].neg_()
    return x


def identities(x, y):
    x = x * 1
    a, b, c = x[:, :], x.contiguous(), x.to(torch.float32)
    a.add_(1)
    b.mul_(2)
    c.sub_(y)
    return x, a, b


def diagonal(x, y):
    x = x * 1
    x.diagonal().fill_(3.0)
    torch.diagonal(x, 1).mul_(y[:, 0])
    return x


def complex_numbers(x, y):
    c = torch.view_as_complex(x.view(4, 4, 2) * 1)
    torch.view_as_real(c)[..., 0] = y[:, :4]
    c.mul_(2)
    c.imag.neg_()
    return torch.view_as_real(c)


def shape_changes(x, y):
    x = x * 1
    z = x.unsqueeze(0)
    z.unsqueeze_(1)
    z.add_(1)
    x.reshape(-1)[0] = 5
    x.t_()
    x[0].add_(7)
    return x, z


def masks(x, y):
    x = x * 1
    x.masked_fill_(y > 0, -1.0)
    x.clamp_(-0.5, 0.5)
    x[x > 0.3] = 7.0
    x /= 2
    return x


def indices(x, y):
    x = x.clone()
    i = torch.arange(x.shape[0])
    x.index_add_(0, i, y)
    x.scatter_(1, i[:, None], 0.0)
    x.index_fill_(1, i[:1], 2.0)
    x[i, i] = y[:, 0]
    return x


def integers(x, y):
    m = torch.zeros(x.shape[0], dtype=torch.long)
    m[1:] = 3
    m[0] += 2
    m |= 4
    return m, x + m[:, None]


def dtypes(x, y):
    z = x.to(torch.bfloat16)
    z.add_(y)
    z[0] = 1
    z[1] = y[0]
    return z


def layouts(x, y):
    z = (x * 1).t()
    z.copy_(y.t().contiguous())
    z.add_(1)
    return z.t().view(-1), z


def loop(x, y):
    z = torch.zeros_like(x)
    for i in range(x.shape[0]):
        z[i] = x[i] * i
    return z


def overwritten(x, y):
    z = torch.empty_like(x)
    z.copy_(x)
    w = z + y
    z.copy_(y)
    return z, w


def dropout(x, y):
    return torch.nn.functional.dropout(x * 1, 0.5, training=False, inplace=True).relu_() + y


def input_written(x, y):
    x.add_(y)
    x[0].zero_()
    return x[1:], y + 1, x


def inputs_swapped(x, y):
    t = x.clone()
    x.copy_(y)
    y.copy_(t)
    return x + y


def input_copied_then_written(x, y):
    x.copy_(y)
    y.add_(1)
    return x * 1


def old_value_returned(x, y):
    z = torch.empty_like(x)
    z.copy_(x)
    x.add_(1)
    return z


def input_view_returned(x, y):
    v = x.view(-1)
    v.mul_(2)
    return v, v[:3], y


def both_written(x, y):
    return x.add_(1), y.mul_(x)


def parts_of_what_was_written(x, y):
    out = x * 2
    out.mul_(0.5)
    first, second = out.chunk(2)
    second.mul_(y[2:])
    one, rest = torch.tensor_split(out, [1], 1)
    rest.add_(one)
    return first, second * 1, rest, out.clone()


PROGRAMS = [
    *(rotary, halves, gap, overlap, views, nested, permuted, identities, diagonal, complex_numbers, shape_changes),
    *(masks, indices, integers, dtypes, layouts, loop, overwritten, dropout),
    *(input_written, inputs_swapped, input_copied_then_written, old_value_returned, input_view_returned, both_written),
]
