"""Loaders: random weights in exactly the published layouts, each loaded model against the plain implementation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from longtake.engine.config import (
    WAN_1_3B,
    WAN_5B,
    WAN_14B,
    HistoryConfig,
    ModelConfig,
    ModelSpec,
    SamplerConfig,
    WeightsConfig,
)
from longtake.engine.model import CausalWan
from longtake.engine.presets import PRESETS
from longtake.engine.tensor_files import bare_name, diffusers_name, merge_lora, rename
from longtake.engine.weights import load_transformer
from longtake.kernels.attention import attend
from longtake.kernels.errors import ConfigError, StorageError
from longtake.kernels.rotary import apply_rotary, rotary_table
from tests.engine.plain_wan import State, forward, original_shapes, random_state

TINY = ModelConfig(num_heads=2, head_dim=16, num_layers=2, ffn_dim=48, text_dim=24, freq_dim=32)
# float32 rounding over two layers, summed in another order.
TOLERANCE = 3e-5


def spec_of(folder: Path, weights: WeightsConfig) -> ModelSpec:
    sampler = SamplerConfig()
    return ModelSpec(
        path=folder,
        name="test",
        transformer=TINY,
        sampler=sampler,
        block_frames=2,
        fps=16,
        height=32,
        width=48,
        text_len=5,
        history=HistoryConfig(),
        weights=weights,
    )


def loaded(folder: Path, weights: WeightsConfig) -> CausalWan:
    return load_transformer(spec_of(folder, weights), torch.device("cpu"), torch.float32)


def check_flow(model: CausalWan, state: State) -> None:
    torch.manual_seed(5)
    latents, text = torch.randn(16, 2, 4, 6), torch.randn(5, TINY.text_dim)
    rotary = rotary_table([7, 8], 2, 3, TINY.head_dim)

    def attend_block(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = apply_rotary(q[0], rotary), apply_rotary(k[0], rotary)
        return attend(q.transpose(0, 1), k.transpose(0, 1), v[0].transpose(0, 1))[0].transpose(0, 1)[None]

    with torch.no_grad():
        flow = model(latents[None], torch.tensor([[900.0, 0.0]]), model.text_context(text[None]), attend_block)[0]
    expected, _ = forward(state, TINY, latents, [900.0, 0.0], text, [7, 8])
    torch.testing.assert_close(flow, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("config", "count"), [(WAN_1_3B, 825), (WAN_5B, 825), (WAN_14B, 1095)])
def test_full_size_layouts_are_a_pure_rename(config: ModelConfig, count: int) -> None:
    original = original_shapes(config)
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in CausalWan(config).state_dict().items()}
    assert len(original) == count
    assert {diffusers_name(name): shape for name, shape in original.items()} == ours


def test_names_of_image_models() -> None:
    assert diffusers_name("blocks.3.cross_attn.k_img.weight") == "blocks.3.attn2.add_k_proj.weight"
    assert diffusers_name("blocks.3.cross_attn.norm_k_img.weight") == "blocks.3.attn2.norm_added_k.weight"
    assert diffusers_name("img_emb.proj.3.bias") == "condition_embedder.image_embedder.ff.net.2.bias"
    assert diffusers_name("blocks.3.attn1.to_out.0.bias") == "blocks.3.attn1.to_out.0.bias"


def test_wrappers_are_stripped_wherever_they_stand() -> None:
    name = "module.model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._orig_mod.ffn.0.weight"
    assert bare_name(name) == "blocks.0.ffn.0.weight"


def pt(path: str, wrap: Callable[[State], object]) -> Callable[[Path, State], None]:
    def write(folder: Path, state: State) -> None:
        torch.save(wrap(state), folder / path)

    return write


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def sharded(folder: Path, state: State) -> None:
    names = sorted(diffusers_name(name) for name in state)
    tensors = rename(state, "test")
    cut = len(names) // 3
    shards = {
        f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors": names[i * cut : (i + 1) * cut if i < 2 else None]
        for i in range(3)
    }
    for file, held in shards.items():
        save_file({name: tensors[name].contiguous() for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


LAYOUTS: dict[str, tuple[str, Callable[[Path, State], None]]] = {
    "self-forcing": (
        "self-forcing",
        pt("self_forcing_dmd.pt", lambda s: {"generator_ema": prefixed(s, "model."), "generator": {}, "step": 1}),
    ),
    "self-forcing under FSDP": (
        "self-forcing",
        pt("self_forcing_dmd.pt", lambda s: {"generator_ema": prefixed(s, "model._fsdp_wrapped_module.")}),
    ),
    "causvid": ("causvid", pt("model.pt", lambda s: {"generator": prefixed(s, "model.")})),
    "causal-forcing": ("causal-forcing", pt("causal_forcing.pt", lambda s: {"generator": prefixed(s, "model.")})),
    "framewise": (
        "causal-forcing-framewise",
        pt("causal_forcing.pt", lambda s: {"generator_ema": prefixed(s, "model.")}),
    ),
    "infinity-rope": ("infinity-rope", pt("self_forcing_dmd.pt", lambda s: {"generator_ema": prefixed(s, "model.")})),
    "rolling-forcing": (
        "rolling-forcing",
        pt("rolling_forcing_dmd.pt", lambda s: {"generator_ema": prefixed(s, "model.")}),
    ),
    "krea": (
        "krea-14b",
        lambda folder, s: save_file(prefixed(s, "model."), folder / "krea-realtime-video-14b.safetensors"),
    ),
    "longlive-2 merged": ("longlive-2", pt("model_bf16.pt", lambda s: prefixed(s, "model."))),
    "longlive-2 within a key": ("longlive-2", pt("model_bf16.pt", lambda s: {"generator": prefixed(s, "model.")})),
    "diffusers, sharded": ("wan2.1-14b", sharded),
    "original safetensors in a diffusers folder": (
        "wan2.1-1.3b",
        lambda folder, s: save_file(s, folder / "diffusion_pytorch_model.safetensors"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_and_computes_the_same(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    preset, write = LAYOUTS[layout]
    state = {name: tensor.to(dtype) for name, tensor in random_state(TINY).items()}
    (tmp_path / "transformer").mkdir()
    write(tmp_path / "transformer", state)
    check_flow(loaded(tmp_path, PRESETS[preset].weights), state)


def lora_of(state: State, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A PEFT LoRA on every Linear of the blocks, under PEFT's names."""
    lora = {}
    for name, tensor in state.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2:
            stem = "base_model.model." + name.removesuffix(".weight")
            lora[f"{stem}.lora_A.weight"] = torch.randn(rank, tensor.shape[1], generator=generator) * 0.1
            lora[f"{stem}.lora_B.weight"] = torch.randn(tensor.shape[0], rank, generator=generator) * 0.1
    return lora


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_longlive_merges_its_lora(adapter: str, tmp_path: Path) -> None:
    preset = PRESETS["longlive"].weights
    state = random_state(TINY)
    lora = lora_of(state, 8, torch.Generator().manual_seed(1))
    assert len(lora) == 2 * 10 * TINY.num_layers
    folder = tmp_path / "transformer"
    folder.mkdir()
    torch.save({"generator": prefixed(state, "model.")}, folder / "longlive_base.pt")
    named = {name.replace(".weight", f"{adapter}.weight"): tensor.bfloat16() for name, tensor in lora.items()}
    torch.save({"generator_lora": named, "critic_lora": {}}, folder / "lora.pt")
    merged = dict(state)
    for name in state:
        stem = "base_model.model." + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in lora:
            down, up = (lora[f"{stem}.lora_{half}.weight"].bfloat16().float() for half in "AB")
            merged[name] = state[name] + (256 / 8) * (up @ down)
    check_flow(loaded(tmp_path, preset), merged)


def test_lora_errors_list_everything() -> None:
    state = rename(random_state(TINY), "base")
    lora = {
        "base_model.model.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, TINY.dim),
        "base_model.model.blocks.9.ffn.0.lora_A.weight": torch.zeros(4, TINY.dim),
        "base_model.model.blocks.9.ffn.0.lora_B.weight": torch.zeros(TINY.ffn_dim, 4),
        "base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 7),
        "base_model.model.blocks.0.self_attn.q.lora_B.weight": torch.zeros(TINY.dim, 4),
        "something": torch.zeros(1),
    }
    with pytest.raises(ConfigError) as caught:
        merge_lora(state, lora, None, "lora.pt")
    for part in (
        "blocks.0.ffn.net.0.proj.weight has only lora_A",
        "blocks.9.ffn.net.0.proj.weight is no weight",
        "blocks.0.attn1.to_q.weight is [32, 32], B [32, 4] @ A [4, 7]",
        "not of a LoRA: something",
    ):
        assert part in str(caught.value)


def test_tensors_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    state = random_state(TINY)
    del state["head.modulation"], state["blocks.1.ffn.2.bias"]
    state["blocks.0.modulation"] = torch.zeros(1, 6, 8)
    state["img_emb.proj.0.weight"] = torch.zeros(3)
    (tmp_path / "transformer").mkdir()
    torch.save({"generator_ema": prefixed(state, "model.")}, tmp_path / "transformer" / "x.pt")
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, WeightsConfig(files=("x.pt",), key="generator_ema"))
    for part in (
        "missing blocks.1.ffn.net.2.bias [32]; missing scale_shift_table [1, 2, 32]",
        "not of this model: condition_embedder.image_embedder.norm1.weight",
        "blocks.0.scale_shift_table is [1, 6, 8], expected [1, 6, 32]",
    ):
        assert part in str(caught.value)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    torch.save(random_state(replace(TINY, num_heads=4)), tmp_path / "transformer" / "x.pt")
    with pytest.raises(ConfigError, match="weights do not fit"):
        loaded(tmp_path, WeightsConfig(files=("x.pt",)))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        ({"generator": {"a": torch.zeros(1)}}, "generator_ema", "no entry 'generator_ema'; its entries: generator"),
        ({"weights": {"a": torch.zeros(1)}}, None, "none of its entries is known to hold weights: weights"),
        ({"generator": {"a": torch.zeros(1), "step": 3}}, "generator", "that are no tensors: step"),
        ([torch.zeros(1)], None, "it holds a list"),
        ({"generator": Evil()}, "generator", "it holds more than tensors and is not loaded"),
    ],
)
def test_other_pt_files_are_refused(
    content: object, key: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "transformer").mkdir()
    torch.save(content, tmp_path / "transformer" / "x.pt")
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, WeightsConfig(files=("x.pt",), key=key))
    assert capsys.readouterr().out == ""


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    folder.mkdir()
    with pytest.raises(StorageError, match="fetch it again"):
        loaded(tmp_path, WeightsConfig(files=("x.pt",)))
    (folder / "x.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises((StorageError, ConfigError)):
        loaded(tmp_path, WeightsConfig(files=("x.pt",)))
    sharded(folder, random_state(TINY))
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StorageError, match=r"shards are missing.*00002-of-00003"):
        loaded(tmp_path, WeightsConfig())


def test_two_names_for_one_weight() -> None:
    state = random_state(TINY)
    with pytest.raises(ConfigError, match=r"head\.head\.bias, model\.head\.head\.bias"):
        rename(state | {"model.head.head.bias": state["head.head.bias"]}, "x.pt")
