"""Frozen linear layers, plain or quantised: quantise a float base on loading, and multiply by packed weights.

Weights are held in affine groups as mlx-lm writes them: `group_size` neighbours of a row share a scale and an offset.
On the CPU, MLX multiplies by packed weights one value at a time. From a few rows on it is many times faster to unpack
the matrix and leave the product to the BLAS. A block of rows is unpacked at a time and lives for one product: the
backward pass unpacks it again.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from finetune.core.errors import ModelError
from finetune.engines.mlx import compat
from finetune.engines.mlx.layout import layers_of

BITS: Mapping[str, int] = {"4bit": 4, "8bit": 8}
GROUP_SIZES = (64, 32)  # in order of preference; MLX has no smaller ones
_UNPACKED = 1 << 20  # values at once
_FEWEST_UNPACKED = 64  # rows at once: fewer make slow products
_FEWEST_ROWS = 4  # from here on unpacking costs less than multiplying packed values, on one core


class Packed(NamedTuple):
    """A quantised matrix [out, in] and how its values are packed."""

    weight: Any
    scales: Any
    biases: Any | None
    group_size: int
    bits: int
    mode: str = "affine"

    def dense(self, dtype: Any, *, after: Any | None = None) -> Any:
        """The matrix that the packed values stand for; unpacked no earlier than `after` is computed."""
        weight = self.weight if after is None else mx.depends([self.weight], [after])[0]
        return mx.dequantize(weight, self.scales, self.biases, self.group_size, self.bits, mode=self.mode, dtype=dtype)

    def product(self, x: Any) -> Any:
        """x W^T, on the CPU through a dense W that lives for this product only."""
        if not compat.on_cpu() or x.size < _FEWEST_ROWS * x.shape[-1]:
            return mx.quantized_matmul(
                x, self.weight, self.scales, self.biases, True, self.group_size, self.bits, self.mode
            )
        return self._through_dense(x)

    def _through_dense(self, x: Any) -> Any:
        @mx.custom_function
        def forward(x: Any) -> Any:
            parts = [x]
            for _, rows in self._blocks():
                parts.append(x @ rows.dense(x.dtype, after=parts[-1]).T)
            return mx.concatenate(parts[1:], axis=-1)

        @forward.vjp
        def backward(primals: Any, cotangent: Any, outputs: Any) -> Any:
            sums = [cotangent]
            for columns, rows in self._blocks():
                part = cotangent[..., columns] @ rows.dense(cotangent.dtype, after=sums[-1])
                sums.append(part if len(sums) == 1 else sums[-1] + part)
            return sums[-1]

        return forward(x)

    def _blocks(self) -> Iterator[tuple[slice, "Packed"]]:
        """Rows that are unpacked together: unpacking needs four times the memory of what it gives."""
        rows, words = self.weight.shape
        step = max(_FEWEST_UNPACKED, _UNPACKED * self.bits // (32 * words))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            biases = None if self.biases is None else self.biases[part]
            yield part, self._replace(weight=self.weight[part], scales=self.scales[part], biases=biases)


def packed(layer: Any) -> Packed:
    """The weights of a quantised linear module or embedding."""
    return Packed(layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, layer.mode)


def product(layer: Any, x: Any) -> Any:
    """x W^T of a linear module, plain or quantised, without its bias."""
    return packed(layer).product(x) if isinstance(layer, nn.QuantizedLinear) else x @ layer.weight.T


def dense(layer: Any, dtype: Any) -> Any:
    """The weight [out, in] of a linear module, plain or quantised."""
    return packed(layer).dense(dtype) if isinstance(layer, nn.QuantizedLinear) else layer.weight.astype(dtype)


class FrozenLinear(nn.QuantizedLinear):  # type: ignore[misc]
    """mlx's layer with a product that suits the device."""

    def __call__(self, x: Any) -> Any:
        y = packed(self).product(x)
        return y + self.bias if "bias" in self else y


class FrozenEmbedding(nn.QuantizedEmbedding):  # type: ignore[misc]
    """mlx's layer with a product, as a tied head, that suits the device."""

    def as_linear(self, x: Any) -> Any:
        return packed(self).product(x)


def suit_device(model: Any) -> None:
    """Let every quantised layer of the model multiply as the device does it best."""
    for _, module in model.named_modules():
        if type(module) is nn.QuantizedLinear:
            module.__class__ = FrozenLinear
        elif type(module) is nn.QuantizedEmbedding:
            module.__class__ = FrozenEmbedding


def group_size(in_features: int) -> int | None:
    """The group size for rows of this length; None where no size divides it."""
    return next((size for size in GROUP_SIZES if in_features % size == 0), None)


def quantizable(model: Any) -> dict[str, int]:
    """Path -> group size of what `model.quantization` applies to: linear modules of the repeated layers.

    Embeddings, norms, the head, and rows that no group size divides stay as they are.
    """
    return {path: size for path, size in _linear_groups(model) if size is not None}


def left_float(model: Any) -> tuple[str, ...]:
    """Linear modules of the repeated layers whose rows no group size divides."""
    return tuple(path for path, size in _linear_groups(model) if size is None)


def _linear_groups(model: Any) -> Iterable[tuple[str, int | None]]:
    for layer, block in layers_of(model):
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{layer}.{path}", group_size(module.weight.shape[1])


def quantize_weights(weights: dict[str, Any], groups: Mapping[str, int], bits: int) -> None:
    """Replace the matrices at the paths of `groups` by packed ones, in place.

    One at a time: what is lazy is read, packed and dropped before the next.
    """
    for path, size in groups.items():
        weight, scales, biases = mx.quantize(weights.pop(f"{path}.weight"), size, bits)
        mx.eval(weight, scales, biases)
        weights.update({f"{path}.weight": weight, f"{path}.scales": scales, f"{path}.biases": biases})


def quantize_layers(model: Any, groups: Mapping[str, int], bits: int) -> None:
    """Make quantised layers, still without values, of the modules at the paths of `groups`."""

    def layer(path: str, module: Any) -> Any:
        return {"group_size": groups[path], "bits": bits} if path in groups else False

    nn.quantize(model, class_predicate=layer)


def require_same_bits(model: Any, wanted: str, source: str) -> None:
    """Raises ModelError where the linear layers of a quantised model have other bits than `wanted` ("4bit")."""
    layers = [module for _, module in model.named_modules() if isinstance(module, nn.QuantizedLinear)]
    found = sorted({module.bits for module in layers})
    if found != [BITS[wanted]]:
        listed = ", ".join(map(str, found))
        raise ModelError(
            f"model.quantization={wanted}: the weights in {source} are quantised already, to {listed} bits. "
            "Leave model.quantization out to train on them as they are, or choose the original model."
        )
