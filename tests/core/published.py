"""The search network of DARTS (Liu et al., ICLR 2019) once more, written from the paper's definition in
functional form, for our modules to be held to.

It draws its tensors one after the other from a flat sequence, so it also fixes the order in which a supernet
registers parameters and buffers: that of the published network.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

NODES = 4


class PublishedNetwork:
    def __init__(self, tensors: Iterable[Tensor], layers: int, training: bool) -> None:
        self.tensors = list(tensors)
        self.layers = layers
        self.training = training

    def __call__(self, x: Tensor, alpha_normal: Tensor, alpha_reduce: Tensor) -> Tensor:
        self.source: Iterator[Tensor] = iter(self.tensors)
        s0 = s1 = self._bn(F.conv2d(x, self._next(), padding=1), affine=True)
        reduction_prev = False
        for layer in range(self.layers):
            reduction = layer in (self.layers // 3, 2 * self.layers // 3)
            w = F.softmax(alpha_reduce if reduction else alpha_normal, dim=-1)
            s0, s1 = s1, self._cell(s0, s1, w, reduction, reduction_prev)
            reduction_prev = reduction
        logits = F.linear(s1.mean(dim=(2, 3)), self._next(), self._next())
        assert next(self.source, None) is None, "tensors are left over"
        return logits

    def _next(self) -> Tensor:
        return next(self.source)

    def _bn(self, x: Tensor, affine: bool = False) -> Tensor:
        scale, shift = (self._next(), self._next()) if affine else (None, None)
        mean, var, count = self._next(), self._next(), self._next()
        if self.training:
            count += 1
        return F.batch_norm(x, mean, var, scale, shift, self.training, momentum=0.1, eps=1e-5)

    def _cell(self, s0: Tensor, s1: Tensor, w: Tensor, reduction: bool, reduction_prev: bool) -> Tensor:
        first = self._factorized_reduce(s0) if reduction_prev else self._relu_conv_bn(s0)
        states = [first, self._relu_conv_bn(s1)]
        edge = 0
        for _ in range(NODES):
            node: Tensor | float = 0.0
            for j, state in enumerate(list(states)):
                stride = 2 if reduction and j < 2 else 1
                node = node + self._mixed(state, w[edge], stride)
                edge += 1
            assert isinstance(node, Tensor)
            states.append(node)
        return torch.cat(states[-NODES:], dim=1)

    def _mixed(self, x: Tensor, w: Tensor, stride: int) -> Tensor:
        """none, max pool, average pool, skip, sep 3, sep 5, dil 3, dil 5."""
        none = x[:, :, ::stride, ::stride] * 0.0
        max_pool = self._bn(F.max_pool2d(x, 3, stride, 1))
        avg_pool = self._bn(F.avg_pool2d(x, 3, stride, 1, count_include_pad=False))
        skip = x if stride == 1 else self._factorized_reduce(x)
        sep = [self._block(self._block(x, k, stride, 1), k, 1, 1) for k in (3, 5)]
        dil = [self._block(x, k, stride, 2) for k in (3, 5)]
        outputs = [none, max_pool, avg_pool, skip, *sep, *dil]
        return sum(w[k] * y for k, y in enumerate(outputs))  # type: ignore[return-value]

    def _relu_conv_bn(self, x: Tensor) -> Tensor:
        return self._bn(F.conv2d(F.relu(x), self._next()))

    def _factorized_reduce(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        halves = [
            F.conv2d(x, self._next(), stride=2),
            F.conv2d(x[:, :, 1:, 1:], self._next(), stride=2),
        ]
        return self._bn(torch.cat(halves, dim=1))

    def _block(self, x: Tensor, k: int, stride: int, dilation: int) -> Tensor:
        padding = dilation * (k - 1) // 2
        x = F.conv2d(F.relu(x), self._next(), None, stride, padding, dilation, groups=x.shape[1])
        return self._bn(F.conv2d(x, self._next()))
