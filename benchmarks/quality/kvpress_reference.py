"""Writes what kvpress' presses score and keep on small attention layers, for the parity test.

Runs where kvpress is installed (kvpress_env.sh). One file per case under
tests/data/kvpress, with H KV heads, g query heads each, n tokens, head size d, hidden size m:

    key, value      [H, n, d] float32, keys with RoPE
    query           [H, g, n, d] float32, with RoPE
    output_weight   [H, g, d, m] float32
    value_norm      [H, n] float32, CriticalKV's norm of the projected values
    inv_freq        [d / 2] float32, attention_scaling (a number): the rotary encoding
    runs            JSON: one {"name", "press", options ...} per press that was run
    <name>/kept     [H, n] bool
    <name>/score    [H, n] float32, what the press that kept them got from `score`

The case 'pyramid' holds six layers: its arrays have a layer axis in front.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import kvpress
import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

OUTPUT = Path(__file__).resolve().parents[2] / "tests" / "data" / "kvpress"
# A cut is trusted only if noise of this relative size does not move it.
NOISE = 5e-5


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one reference file.

    Attributes:
        num_heads, group, num_tokens, head_size: H, g, n, d.
        window: queries of SnapKV and its relatives; the tokens before it are whole pages of 8.
        kept: tokens that each head keeps on average, the window included.
        num_layers: layers of the model.
        yarn: whether the rotary encoding also scales (YaRN).
    """

    num_heads: int
    group: int
    num_tokens: int
    head_size: int
    window: int
    kept: tuple[int, ...]
    num_layers: int = 1
    yarn: bool = False


CASES = {
    "group1": Case(2, 1, 61, 8, 5, (13, 29)),
    "group3": Case(2, 3, 97, 16, 9, (33, 46)),
    "group4": Case(3, 4, 130, 8, 66, (82, 101)),
    "group8": Case(2, 8, 203, 8, 67, (91, 131)),
    "pyramid": Case(2, 2, 203, 8, 3, (62, 90), num_layers=6),
    "yarn": Case(2, 3, 97, 8, 9, (46,), yarn=True),
}


def ratio_for(kept: int, num_tokens: int) -> float:
    """The fraction removed that keeps so many tokens, safe from float's rounding down."""
    return 1 - (kept + 0.01) / num_tokens


class NearTieError(Exception):
    """Rounding could change what a press keeps."""


class Layer:
    """One attention layer with seeded weights, and a prompt's tensors on it."""

    def __init__(self, case: Case, layer: int, seed: int):
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        if case.yarn:
            rope |= {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
        hidden_size = 24
        config = LlamaConfig(
            hidden_size=hidden_size,
            num_attention_heads=case.num_heads * case.group,
            num_key_value_heads=case.num_heads,
            head_dim=case.head_size,
            num_hidden_layers=case.num_layers,
            max_position_embeddings=256,
            rope_parameters=rope,
            attn_implementation="sdpa",
        )
        generator = torch.Generator().manual_seed(seed)
        self.module = LlamaAttention(config, layer).eval()
        for parameter in self.module.parameters():
            size = 1.2 / parameter.shape[1] ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
        # Heads of unlike sharpness, so that they deserve unlike budgets.
        sharpness = torch.linspace(0.4, 1.4, case.num_heads).repeat_interleave(case.head_size)
        self.module.k_proj.weight.data *= sharpness[:, None]
        self.module.rotary_emb = LlamaRotaryEmbedding(config)
        # A common direction gives queries a mean, without which Expected Attention sees little.
        common = torch.randn(1, 1, hidden_size, generator=generator)
        self.hidden = torch.randn(1, case.num_tokens, hidden_size, generator=generator) + common
        self.positions = self.module.rotary_emb(self.hidden, torch.arange(case.num_tokens)[None])

        def heads(projection: torch.nn.Linear) -> torch.Tensor:
            return projection(self.hidden).view(1, case.num_tokens, -1, case.head_size)

        query, key = (
            heads(self.module.q_proj).transpose(1, 2),
            heads(self.module.k_proj).transpose(1, 2),
        )
        self.query, self.key = apply_rotary_pos_emb(query, key, *self.positions)
        self.value = heads(self.module.v_proj).transpose(1, 2)
        self.case = case

    def attentions(self) -> torch.Tensor:
        """[1, H * g, n, n] weights of the whole prompt, as eager attention returns them."""
        num_tokens = self.case.num_tokens
        mask = torch.full((1, 1, num_tokens, num_tokens), float("-inf")).triu(1)
        implementation = self.module.config._attn_implementation
        self.module.config._attn_implementation = "eager"
        weights = self.module(self.hidden, self.positions, mask)[1]
        self.module.config._attn_implementation = implementation
        return weights

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors that our scorers take; see the head of this file."""
        case, module = self.case, self.module
        heads = (case.num_heads, case.group)
        weight = module.o_proj.weight.t().reshape(*heads, case.head_size, -1)
        return {
            "key": self.key[0].numpy(),
            "value": self.value[0].numpy(),
            "query": self.query[0].view(*heads, case.num_tokens, case.head_size).numpy(),
            "output_weight": weight.detach().numpy(),
            "value_norm": kvpress.CriticalKVPress.vwl1norm(self.value, module)[0].numpy(),
            "inv_freq": module.rotary_emb.inv_freq.numpy(),
            "attention_scaling": np.float64(module.rotary_emb.attention_scaling),
        }


def kept_by(layer: Layer, press: kvpress.BasePress, eager: bool) -> np.ndarray:
    """[H, n] mask of what a press' `compress` leaves."""
    layer.module.masked_key_indices = None
    attentions = layer.attentions() if eager else None
    kwargs = {"position_embeddings": layer.positions}
    key, _ = press.compress(layer.module, layer.hidden, layer.key, layer.value, attentions, kwargs)
    kept = np.zeros(layer.key.shape[1:3], dtype=bool)
    if layer.module.masked_key_indices is not None:
        # Presses with a budget per head mask instead of gathering.
        kept[:] = True
        _, heads, tokens = layer.module.masked_key_indices
        kept[heads.numpy(), tokens.numpy()] = False
        return kept
    for head in range(key.shape[1]):
        is_same = (key[0, head, :, None] == layer.key[0, head, None]).all(dim=-1)
        assert bool((is_same.sum(dim=1) == 1).all()), "two tokens have the same key"
        kept[head, is_same.int().argmax(dim=1).numpy()] = True
    return kept


def run(layer: Layer, press: kvpress.BasePress, eager: bool = False) -> dict[str, np.ndarray]:
    """Scores and kept tokens of a press; NearTieError if rounding could change the latter."""
    attentions = layer.attentions() if eager else None
    kwargs = {"position_embeddings": layer.positions}
    inner = press
    while hasattr(inner, "press"):
        inner = inner.press
    # CriticalKV's own scores depend on its budget; they are judged by what it keeps.
    original = inner.score
    score = original(layer.module, layer.hidden, layer.key, layer.value, attentions, kwargs)
    kept = kept_by(layer, press, eager)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        factor = 1 + NOISE * torch.randn(score.shape, generator=generator)
        inner.score = lambda *args, factor=factor: original(*args) * factor
        if not np.array_equal(kept_by(layer, press, eager), kept):
            raise NearTieError(str(press))
    inner.score = original
    return {"score": score[0].numpy(), "kept": kept}


def presses(case: Case):
    """Yields (options, press, needs eager attention) for every run of an ordinary case."""

    def snapkv(ratio: float, kernel: int = 5) -> kvpress.SnapKVPress:
        return kvpress.SnapKVPress(ratio, window_size=case.window, kernel_size=kernel)

    def expected(ratio: float, **options) -> kvpress.ExpectedAttentionPress:
        return kvpress.ExpectedAttentionPress(ratio, **options)

    for kept in case.kept:
        ratio, budget = ratio_for(kept, case.num_tokens), {"budget": kept}
        for own in (
            {},
            {"use_covariance": False},
            {"use_vnorm": False},
            {"n_sink": 0, "n_future_positions": 33, "epsilon": 0.01},
        ):
            yield {"press": "expected", **budget, **own}, expected(ratio, **own), False
        if case.yarn:
            continue
        yield {"press": "snapkv", **budget}, snapkv(ratio), False
        for alpha in (0.0, 0.2, 0.9):
            options = {**budget, "alpha": alpha}
            press = kvpress.AdaKVPress(snapkv(ratio), alpha)
            yield {"press": "ada-snapkv", **options}, press, False
            press = kvpress.AdaKVPress(expected(ratio), alpha)
            yield {"press": "ada-expected", **options}, press, False
        for share in (0.0, 0.5, 0.9):
            options = {**budget, "first_stage": share}
            press = kvpress.CriticalKVPress(snapkv(ratio), first_stage_ratio=share)
            yield {"press": "critical", **options}, press, False
            for alpha in (0.0, 0.2, 0.9):
                press = kvpress.CriticalAdaKVPress(snapkv(ratio), alpha, first_stage_ratio=share)
                yield {"press": "critical-ada", **options, "alpha": alpha}, press, False
        yield {"press": "observed", **budget}, kvpress.ObservedAttentionPress(ratio), True
        yield {"press": "tova", **budget}, kvpress.TOVAPress(ratio), False
        yield {"press": "keydiff", **budget}, kvpress.KeyDiffPress(ratio), False
        yield {"press": "knorm", **budget}, kvpress.KnormPress(ratio), False
        for sinks in (0, 4):
            press = kvpress.StreamingLLMPress(ratio, sinks)
            yield {"press": "streaming", **budget, "n_sink": sinks}, press, False
        for length in (4, 8, 10, 20):
            press = kvpress.ChunkKVPress(snapkv(ratio, kernel=1), length)
            yield {"press": "chunk", **budget, "chunk_length": length}, press, False


def name_of(options: dict) -> str:
    """A run's name: its options, joined."""
    rest = [f"{key}={value}" for key, value in options.items() if key != "press"]
    return "_".join([options["press"], *rest])


def single_layer_case(case: Case, seed: int) -> dict[str, np.ndarray]:
    """All arrays of a case with one layer."""
    layer = Layer(case, 0, seed)
    arrays, runs, scores = layer.arrays(), [], {}
    for options, press, eager in presses(case):
        name = name_of(options)
        result = run(layer, press, eager)
        # Many presses share their scores; one copy of each is stored.
        same = [key for key, score in scores.items() if np.array_equal(score, result["score"])]
        score_key = same[0] if same else f"{name}/score"
        scores[score_key] = result["score"]
        arrays[f"{name}/kept"] = result["kept"]
        runs.append({"name": name, "score": score_key, "window": case.window, **options})
    return {**arrays, **scores, "runs": np.array(json.dumps(runs))}


def pyramid_case(case: Case, seed: int) -> dict[str, np.ndarray]:
    """PyramidKV over all layers of a model, and its budgets for other settings."""
    layers = [Layer(case, index, seed + index) for index in range(case.num_layers)]
    per_layer = [layer.arrays() for layer in layers]
    arrays = {name: np.stack([x[name] for x in per_layer]) for name in ("key", "query")}
    # Only the window's queries are needed.
    arrays["query"] = arrays["query"][:, :, :, -case.window :]
    runs = []
    for kept in case.kept:
        press = kvpress.PyramidKVPress(ratio_for(kept, case.num_tokens), window_size=case.window)
        results = [run(layer, press) for layer in layers]
        name = name_of({"press": "pyramid", "budget": kept})
        for part in ("score", "kept"):
            arrays[f"{name}/{part}"] = np.stack([result[part] for result in results])
        runs.append({"name": name, "window": case.window})
    budgets = []
    for num_tokens, mean, window, beta in (
        (1000, 250, 8, 20),
        (1000, 100, 4, 20),
        (997, 199, 8, 3),
        (4096, 512, 8, 20),
        (1009, 500, 8, 20),
        (1000, 500, 8, 20),
        (300, 210, 8, 20),
        (300, 30, 32, 20),
    ):
        ratio = 1 - mean / num_tokens
        press = kvpress.PyramidKVPress(ratio, window_size=window, beta=beta)
        per_layer = [press.get_layer_budget(layer.module, num_tokens) for layer in layers]
        budgets.append(
            {
                "num_tokens": num_tokens,
                "mean": mean,
                "window": window,
                "beta": beta,
                "kept": per_layer,
            }
        )
    arrays["budgets"] = np.array(json.dumps(budgets))
    arrays["runs"] = np.array(json.dumps(runs))
    return arrays


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder to write to")
    parser.add_argument("--version", default="0.5.5", help="kvpress version to insist on")
    arguments = parser.parse_args()
    found = importlib.metadata.version("kvpress")
    if found != arguments.version:
        sys.exit(f"kvpress is {found}, want {arguments.version}")
    # The same sums in the same order, whatever the machine's core count.
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, (name, case) in enumerate(CASES.items()):
        make = pyramid_case if case.num_layers > 1 else single_layer_case
        for seed in itertools.count(1000 * number, case.num_layers):
            try:
                arrays = make(case, seed)
                break
            except NearTieError as error:
                print(f"{name}: near tie with seed {seed}: {error}")
        path = arguments.out / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
