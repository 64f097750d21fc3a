"""A BERT sentence encoder as an ONNX graph: token ids and mask in, unit vectors out.

The architecture is that of Devlin et al. 2018 (post-norm encoder, exact GELU) with the pooling of
Reimers and Gurevych 2019 (mean over the tokens that are not padding, then L2 norm), which is what
all-MiniLM-L6-v2 says of itself in `config.json`, `1_Pooling` and `2_Normalize`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# onnxruntime 1.31 refuses the IR and opset that onnx 1.23 writes of its own accord.
_IR_VERSION = 10
_OPSET = 20

# Added to the attention score of a padding token: far below any real score, finite in float32.
_MASKED_SCORE = -1e9


Attribute: TypeAlias = int | float | list[int]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of an encoder."""

    layers: int
    heads: int
    hidden: int
    layer_norm_epsilon: float


class _Graph:
    """An ONNX graph in the making; every method adds one thing and answers its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Attribute) -> str:
        return self.split(kind, *inputs, outputs=1, **attributes)[0]

    def split(self, kind: str, *inputs: str, outputs: int, **attributes: Attribute) -> list[str]:
        names = [f"{kind}_{len(self.nodes)}_{n}" for n in range(outputs)]
        node = helper.make_node(kind, list(inputs), names)
        node.attribute.extend(helper.make_attribute(name, attributes[name]) for name in attributes)
        self.nodes.append(node)
        return names


def encoder(weights: Mapping[str, np.ndarray], shape: Shape) -> bytes:
    """The serialized ONNX model of an encoder, from weights under their Hugging Face names.

    Inputs: `input_ids` and `attention_mask`, both int64 [texts, tokens]. Output: `vectors`,
    float32 [texts, hidden], each of length 1.
    """
    graph = _Graph()
    hidden = _embeddings(graph, weights, shape)
    mask = graph.add("Cast", "attention_mask", to=TensorProto.FLOAT)
    bias = _attention_bias(graph, mask)
    graph.constant("to_heads", np.array([0, 0, shape.heads, shape.hidden // shape.heads]))
    graph.constant("from_heads", np.array([0, 0, shape.hidden]))
    for layer in range(shape.layers):
        hidden = _layer(graph, weights, f"encoder.layer.{layer}.", shape, hidden, bias)
    _pooled(graph, hidden, mask)
    ids = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "tokens"])
        for name in ("input_ids", "attention_mask")
    ]
    vectors = helper.make_tensor_value_info("vectors", TensorProto.FLOAT, ["texts", shape.hidden])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "encoder", ids, [vectors], graph.constants),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model.SerializeToString()


def quantized(model: bytes) -> bytes:
    """The same encoder with int8 weights (one scale a column) and activations quantized as met."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(prefix="tollgate-") as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(model)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        return target.read_bytes()


def _embeddings(graph: _Graph, weights: Mapping[str, np.ndarray], shape: Shape) -> str:
    words = graph.constant("words", weights["embeddings.word_embeddings.weight"])
    # Every token is of type 0, so its type embedding is folded into the positions.
    places = graph.constant(
        "positions",
        weights["embeddings.position_embeddings.weight"]
        + weights["embeddings.token_type_embeddings.weight"][0],
    )
    tokens = graph.add("Shape", "input_ids", start=1, end=2)
    start = graph.constant("start", np.array([0]))
    axis = graph.constant("axis", np.array([0]))
    position = graph.add("Slice", places, start, tokens, axis)
    summed = graph.add("Add", graph.add("Gather", words, "input_ids"), position)
    return _normed(graph, weights, "embeddings.LayerNorm", shape, summed)


def _attention_bias(graph: _Graph, mask: str) -> str:
    """0 for a token, a very low score for padding; [texts, 1, 1, tokens]."""
    one = graph.constant("one", np.array(1, dtype=np.float32))
    low = graph.constant("masked_score", np.array(_MASKED_SCORE, dtype=np.float32))
    axes = graph.constant("head_and_query", np.array([1, 2]))
    padding = graph.add("Sub", one, mask)
    return graph.add("Unsqueeze", graph.add("Mul", padding, low), axes)


def _layer(
    graph: _Graph,
    weights: Mapping[str, np.ndarray],
    prefix: str,
    shape: Shape,
    hidden: str,
    bias: str,
) -> str:
    attended = _attention(graph, weights, f"{prefix}attention.self.", shape, hidden, bias)
    projected = _dense(graph, weights, f"{prefix}attention.output.dense", attended)
    summed = graph.add("Add", projected, hidden)
    middle = _normed(graph, weights, f"{prefix}attention.output.LayerNorm", shape, summed)
    wide = graph.add("Gelu", _dense(graph, weights, f"{prefix}intermediate.dense", middle))
    summed = graph.add("Add", _dense(graph, weights, f"{prefix}output.dense", wide), middle)
    return _normed(graph, weights, f"{prefix}output.LayerNorm", shape, summed)


def _attention(
    graph: _Graph,
    weights: Mapping[str, np.ndarray],
    prefix: str,
    shape: Shape,
    hidden: str,
    bias: str,
) -> str:
    """softmax(q k / sqrt(d) + bias) v, with q, k and v from one product."""
    # The scale is folded into the query's weights: one multiplication less for every score.
    scale = np.float32(1.0 / np.sqrt(shape.hidden // shape.heads))
    parts = [(name, scale if name == "query" else np.float32(1)) for name in _QKV]
    weight = np.concatenate([weights[f"{prefix}{n}.weight"].T * by for n, by in parts], axis=1)
    offset = np.concatenate([weights[f"{prefix}{n}.bias"] * by for n, by in parts])
    product = graph.add("MatMul", hidden, graph.constant(f"{prefix}qkv.weight", weight))
    qkv = graph.add("Add", product, graph.constant(f"{prefix}qkv.bias", offset))
    q, k, v = graph.split("Split", qkv, outputs=3, axis=-1, num_outputs=3)
    scores = graph.add("MatMul", _heads(graph, q), _heads(graph, k, transposed=True))
    chances = graph.add("Softmax", graph.add("Add", scores, bias), axis=-1)
    mixed = graph.add("MatMul", chances, _heads(graph, v))
    return graph.add("Reshape", graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), "from_heads")


_QKV = ("query", "key", "value")


def _heads(graph: _Graph, hidden: str, *, transposed: bool = False) -> str:
    """[texts, tokens, hidden] to [texts, heads, tokens, d], or with the last two exchanged."""
    apart = graph.add("Reshape", hidden, "to_heads")
    return graph.add("Transpose", apart, perm=[0, 2, 3, 1] if transposed else [0, 2, 1, 3])


def _dense(graph: _Graph, weights: Mapping[str, np.ndarray], name: str, hidden: str) -> str:
    weight = graph.constant(f"{name}.weight", weights[f"{name}.weight"].T)
    bias = graph.constant(f"{name}.bias", weights[f"{name}.bias"])
    return graph.add("Add", graph.add("MatMul", hidden, weight), bias)


def _normed(
    graph: _Graph, weights: Mapping[str, np.ndarray], name: str, shape: Shape, hidden: str
) -> str:
    weight = graph.constant(f"{name}.weight", weights[f"{name}.weight"])
    bias = graph.constant(f"{name}.bias", weights[f"{name}.bias"])
    return graph.add(
        "LayerNormalization", hidden, weight, bias, axis=-1, epsilon=shape.layer_norm_epsilon
    )


def _pooled(graph: _Graph, hidden: str, mask: str) -> None:
    """The mean of each text's tokens, scaled to length 1, as `vectors`."""
    last = graph.constant("last_axis", np.array([2]))
    tokens = graph.constant("token_axis", np.array([1]))
    kept = graph.add("Mul", hidden, graph.add("Unsqueeze", mask, last))
    # The sum points the same way as the mean, and the norm takes the length out.
    total = graph.add("ReduceSum", kept, tokens, keepdims=0)
    graph.nodes.append(helper.make_node("LpNormalization", [total], ["vectors"], axis=-1, p=2))
