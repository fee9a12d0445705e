"""Parameters of layers that differ, put together for kernels that score several layers."""

from __future__ import annotations

import torch

from vllm_kvcompress.compaction.parameters import LayerParameters, StackedParameters

POOL = torch.empty(0, dtype=torch.bfloat16)


def test_each_layer_has_its_own():
    roots = torch.randn(3, 2, 4, 4)
    sinks = torch.randn(2, 3)
    layers = [
        LayerParameters(0.5, output_root=roots[0]),
        LayerParameters(0.25, 30.0, output_root=roots[1], sinks=sinks),
        LayerParameters(2.0, output_root=roots[2]),
    ]
    found = StackedParameters.of(layers, POOL).options(1, 2)
    logits = found["logits"]
    assert logits.scale.tolist() == [0.25, 2.0]
    assert logits.soft_cap.tolist() == [30.0, 0.0]
    assert torch.equal(logits.sinks[0], sinks.flatten())
    assert (logits.sinks[1] == float("-inf")).all()
    assert torch.equal(found["output_root"], roots[1:].bfloat16())


def test_what_no_layer_has_is_left_out():
    stacked = StackedParameters.of([LayerParameters(0.5), LayerParameters(0.25)], POOL)
    options = stacked.options(1, 1)
    assert options["logits"].scale.tolist() == [0.25]
    assert options["logits"].soft_cap == 0.0
    assert options["logits"].sinks is None and options["output_root"] is None
