"""Put a trained mini together: a folder in the hub's layout, weights in bfloat16.

python -m longtake.engine.mini.export --vae DIR/vae --state DIR [--teacher DIR] --out engine/mini/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.engine.basis import BASIS_NAME
from longtake.engine.mini.train_dit import LAYOUT, TEXT, TRANSFORMER
from longtake.engine.mini.world import FPS, HEIGHT, WIDTH

TEXT_LEN = 128
# The sampler's steps and what a rollout attends by default, chosen by measurement (see CARD.md).
SETTINGS = {
    "name": "mini",
    "block_frames": LAYOUT.block_frames,
    "timesteps": [1000, 750, 500, 250],
    "shift": 3.0,
    "fps": FPS,
    "height": HEIGHT,
    "width": WIDTH,
    "text_len": TEXT_LEN,
    "history": {
        "policy": "window",
        "sink_blocks": 1,
        "recent_blocks": 24,
        "positions": "relative",
        "trained_frames": LAYOUT.num_blocks * LAYOUT.block_frames,
    },
}


def averages(state: Path) -> dict[str, Tensor]:
    """The averaged weights of a training state, bfloat16, by parameter name."""
    counters = json.loads((state / "state.json").read_text())
    found: dict[str, Tensor] = {}
    for index in range(counters["num_files"]):
        tensors = load_file(state / f"state-{index}.safetensors")
        found |= {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
    return found


def blend(student: dict[str, Tensor], teacher: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights between a teacher's (share 0) and its student's (share 1), bfloat16.

    What a few-step student invents is sharp, what it recalls is less exact than its teacher's; weights in between keep
    most of both (weight-space ensembles, arXiv 2109.01903).
    """
    return {name: torch.lerp(teacher[name].float(), student[name].float(), share).bfloat16() for name in student}


def export(weights: dict[str, Tensor], vae: Path, out: Path) -> None:
    """Write the model folder.

    Args:
        weights: by name in ``Trainee``: ``transformer.*`` and ``text_encoder.*``.
        vae: folder of the trained VAE.
        out: the folder to be made or filled.
    """
    for part in ("transformer", "text_encoder", "vae", "tokenizer", "scheduler"):
        (out / part).mkdir(parents=True, exist_ok=True)
    _save(weights, "transformer.", out / "transformer" / "diffusion_pytorch_model.safetensors")
    _save(weights, "text_encoder.", out / "text_encoder" / "model.safetensors", drop=("encoder.embed_tokens.weight",))
    _write_json(out / "transformer" / "config.json", TRANSFORMER.to_hub())
    text = {**TEXT.to_dict(), "architectures": ["UMT5EncoderModel"], "model_type": "umt5"}
    _write_json(out / "text_encoder" / "config.json", text)
    _write_json(out / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": SETTINGS["shift"]}
    _write_json(out / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "ByT5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    _write_json(out / "model_index.json", index)
    _write_json(out / "longtake.json", SETTINGS)
    (out / BASIS_NAME).unlink(missing_ok=True)  # of other weights; longtake.engine.mini.calibrate makes it
    for file in vae.iterdir():
        if file.resolve() != (out / "vae" / file.name).resolve():
            shutil.copyfile(file, out / "vae" / file.name)


def _save(weights: dict[str, Tensor], prefix: str, path: Path, drop: tuple[str, ...] = ()) -> None:
    chosen = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    kept = {name: tensor for name, tensor in chosen.items() if name not in drop}
    tensors = {name: tensor.to(torch.bfloat16).contiguous().cpu() for name, tensor in kept.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="training state to blend with")
    parser.add_argument("--share", type=float, default=0.6, help="of the state in the blend; the rest is the teacher's")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    weights = averages(options.state)
    if options.teacher:
        weights = blend(weights, averages(options.teacher), options.share)
    export(weights, options.vae, options.out)
    size = sum(file.stat().st_size for file in options.out.rglob("*.safetensors"))
    print(f"{options.out}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
