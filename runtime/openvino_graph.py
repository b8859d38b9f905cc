"""Graphs of OpenVINO, changed in memory as they are loaded: group norms that the CPU plugin runs
several times faster than its own, networks for several frames at once, networks cut in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from diffusionact.errors import BundleError
from diffusionact.runtime.openvino_library import op, openvino

Part: TypeAlias = Literal["", "whole", "shallow"]  # of a network that is cut

DEEP = "deep"  # the tensor that a network is cut at
FIRST_AXIS = 0  # which counts the frames


def widen(model: openvino.Model, frames: int) -> None:
    """Return nothing; a network of one frame becomes one of several, frame by frame the same.

    To be followed by `rewrite_norms`, which gives each frame its own scale and shift.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Reshape":
            sizes = node.input_value(1).get_node()
            if sizes.get_type_name() != "Constant" or sizes.get_data()[0] != 1:
                continue  # of a weight, or it counts the frames by itself
            wider = _integers([frames, *sizes.get_data()[1:]])
            node.input(1).replace_source_output(wider.output(0))
    for parameter in model.get_parameters():
        _, *sizes = parameter.get_output_shape(0)
        parameter.set_partial_shape(openvino.PartialShape([frames, *sizes]))
    model.validate_nodes_and_infer_types()


def check_wide(path: Path, model: openvino.Model, frames: int) -> None:
    """Return nothing if every frame has its own result. Raises: BundleError."""
    shapes = [list(result.get_output_shape(0)) for result in model.get_results()]
    if any(shape[0] != frames for shape in shapes) or any(map(_picks_one, model.get_ordered_ops())):
        raise BundleError(f"{path}: made for one frame at a time, in a way that admits no more")


def _picks_one(node: Any) -> bool:
    """Whether a node takes one frame's values out of those of all."""
    if node.get_type_name() != "Gather":
        return False
    data, _, axis = (port.get_node() for port in node.input_values())
    return bool(data.get_type_name() != "Constant" and axis.get_data().item() == FIRST_AXIS)


def rewrite_norms(model: openvino.Model) -> None:
    """Return nothing; means over channels, then over the few numbers that are left, are in the
    place of every group norm; the same values up to rounding.

    The plugin's own goes through a reshape to [N, groups, -1], which breaks the channels-last
    order that its convolutions want. Variances are of differences from the mean: E[x^2] - m^2
    would save nothing here, and cancels where a mean is large.
    """
    for norm in model.get_ordered_ops():
        if norm.get_type_name() != "GroupNormalization":
            continue
        made = _norm(norm)
        made.set_friendly_name(norm.get_friendly_name())
        for target in norm.output(0).get_target_inputs():
            target.replace_source_output(made.output(0))
    model.validate_nodes_and_infer_types()


def _norm(norm: Any) -> Any:
    """One group norm of [N, C, *sizes], as a graph of plain operators."""
    x, weight, bias = (port.get_source_output() for port in norm.inputs())
    (frames, channels, *rest), how = norm.get_output_shape(0), norm.get_attributes()
    groups = _integers([frames, how["num_groups"], channels // how["num_groups"]])
    column = _integers([frames, channels, *[1] * len(rest)])
    sizes = _integers(range(2, 2 + len(rest)))

    def by_group(values: Any) -> Any:
        means = op.reduce_mean(op.reshape(values, groups, False), _integers([2]), keep_dims=True)
        return op.reshape(op.broadcast(means, groups), column, False)

    def by_channel(values: Any) -> Any:
        if frames > 1 and _picks_one(values.get_node()):  # the first frame's, of [N, C]
            return op.reshape(values.get_node().input_value(0), column, False)
        return op.reshape(values, _integers([1, channels, *[1] * len(rest)]), False)

    mean = by_group(op.reduce_mean(x, sizes, keep_dims=True))
    apart = op.subtract(x, mean)
    variance = by_group(op.reduce_mean(op.multiply(apart, apart), sizes, keep_dims=True))
    epsilon = op.constant(np.float32(how["epsilon"]))
    deviation = op.sqrt(op.add(variance, epsilon))
    scale = op.divide(by_channel(weight), deviation)
    return op.add(op.multiply(apart, scale), by_channel(bias))


def cut(path: Path, model: openvino.Model, part: Part) -> openvino.Model:
    """Return the whole model, which gives the features that meet its last skip connection too; or
    what is left of it when these are given. Raises: BundleError."""
    joins = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Concat" and _joins_features(node)
    ]
    if not joins:
        raise BundleError(f"{path}: no skip connection to cut it at; approximate nothing")
    deep = joins[-1].input_value(0)
    parameters, results = model.get_parameters(), model.get_results()
    if part == "whole":
        deep.set_names({DEEP})
        return openvino.Model([*(r.input_value(0) for r in results), deep], parameters, part)
    given = op.parameter(deep.get_shape(), np.float32, DEEP)
    given.output(0).set_names({DEEP})
    for target in deep.get_target_inputs():
        target.replace_source_output(given.output(0))
    return openvino.Model([r.input_value(0) for r in results], [*parameters, given], part)


def _joins_features(node: Any) -> bool:
    return (
        node.get_input_size() == 2
        and len(node.get_output_shape(0)) == 4
        and node.get_attributes()["axis"] in (1, -3)
    )


def _integers(values: Any) -> Any:
    return op.constant(np.array(list(values), np.int64))
