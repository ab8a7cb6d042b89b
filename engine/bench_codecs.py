"""``longtake bench codecs``: every codec side by side, on keys and values of a trained model.

Protocol: in held-out worlds of the shipped model a camera pans for one turn; the true latents are committed, and one
block is generated behind them. What each layer's attention was given is recorded in float32: keys and values of the
commit passes, queries of the third denoising step. Each codec encodes and reads back every block; errors as in
longtake.kernels.compare, whose made-up inputs (``--kinds noise,structured``) are at the real models' size, and whose
files (``--data``) hold what was recorded of any other model.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from longtake.engine import record
from longtake.engine.basis import BASIS_NAME, read_basis, read_table
from longtake.engine.bench_memory import FIRST_SEED, FULL, Case, Models, film_truth, load, make_shot, plain_script
from longtake.engine.rollout import Prefix, Rollout, open_cache
from longtake.engine.vae import StreamingEncoder, from_uint8
from longtake.engine.weights import read_spec
from longtake.kernels import compare, synthetic
from longtake.kernels.attention_path import AttentionPath
from longtake.kernels.codec import Rates, codec_names
from longtake.kernels.errors import ConfigError
from longtake.kernels.principal import HistoryBasis
from longtake.kernels.rotary import Turns, apply_rotary, rotary_table

_STEP = 2  # whose queries are recorded: neither noise nor finished


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _MadeUp:
    """Size of made-up inputs."""

    grid: synthetic.Grid
    blocks: int
    heads: int
    dim: int


_WAN = _MadeUp(grid=synthetic.Grid(frames=3, height=30, width=52), blocks=3, heads=2, dim=128)
_MINI = _MadeUp(grid=synthetic.Grid(frames=3, height=6, width=10), blocks=7, heads=4, dim=64)


class _Recorder:
    """What every layer is given, pass by pass, while a rollout runs."""

    def __init__(self, path: AttentionPath) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Turns]] = []
        self._begin = path.begin
        path.begin = self  # type: ignore[method-assign]

    def __call__(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, rotary: Turns) -> None:
        q_THD, k_THD, v_THD = (x.float().clone() for x in (q_THD, k_THD, v_THD))
        self.calls.append((q_THD, k_THD, v_THD, rotary))
        self._begin(q_THD, k_THD, v_THD, rotary)


@torch.inference_mode()
def recorded(models: Models, seed: int, num_blocks: int) -> list[compare.Sample]:
    """Every layer of one world's turn: ``num_blocks`` blocks of true history and the queries behind them."""
    spec, device = models.spec, models.device
    script = plain_script(seed, 4)
    num_latents = num_blocks * spec.block_frames
    truth = film_truth(seed, script, 1 + (num_latents - 1) * spec.temporal_stride, device)
    latents = StreamingEncoder(models.vae).encode_float(from_uint8(truth))
    shot = make_shot(models, seed, script, Case(name="exact", history=FULL, codec="fp32"), 1, num_blocks)
    context = [models.transformer.text_context(models.text.encode(script[0].prompt)[None].to(device))]
    prefix = Prefix(latents=latents.split(spec.block_frames, dim=1))
    rollout = Rollout(shot, models.transformer, context, open_cache(shot, device, num_blocks), prefix)
    recorder = _Recorder(rollout.path)
    for _ in range(rollout.total_blocks):
        rollout.step()
    num_layers = spec.transformer.num_layers
    samples = []
    for layer in range(num_layers):
        history = recorder.calls[layer : num_blocks * num_layers : num_layers]
        q_THD, _, _, own = recorder.calls[(num_blocks + _STEP) * num_layers + layer]
        samples.append(
            compare.Sample(
                k_NTHD=torch.stack([k_THD for _, k_THD, _, _ in history]).cpu(),
                v_NTHD=torch.stack([v_THD for _, _, v_THD, _ in history]).cpu(),
                q_THD=apply_rotary(q_THD, own).cpu(),
                rotary=rotary_table(range(num_latents), *shot.grid, spec.transformer.head_dim),
                grid=shot.grid,
                layer=layer,
            )
        )
    return samples


def main(arguments: list[str]) -> None:
    """Command line of ``longtake bench codecs``."""
    parser = argparse.ArgumentParser(prog="longtake bench codecs", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default="mini", help="trained on the procedural world; none: the other inputs only")
    parser.add_argument("--data", type=Path, help="K, V and Q of a model, .safetensors, instead of --model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the model")
    parser.add_argument("--worlds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=11, help="blocks of history; a turn is 11")
    parser.add_argument("--kinds", default="", help="made-up inputs as well: noise,structured")
    parser.add_argument("--small", action="store_true", help="made-up inputs at mini's size, not Wan's")
    parser.add_argument("--codecs", default="", help="names with semicolons; default: all")
    parser.add_argument("--queries", type=int, default=180, help="queries of a sample that are attended")
    options = parser.parse_args(arguments)
    names = options.codecs.split(";") if options.codecs else codec_names()
    inputs = _inputs(options)
    basis, rates = _table(options.model) if options.model in inputs else (None, ())
    with torch.inference_mode():
        rows = [
            compare.measure(kind, name, samples, options.queries, basis, rates)
            for kind, samples in inputs.items()
            for name in names
        ]
    print(compare.table(rows))
    config = {key: str(value) for key, value in vars(options).items() if key != "json"}
    record.write(options.json, "codecs", config, [dataclasses.asdict(row) for row in rows])


def _table(model: str) -> tuple[HistoryBasis | None, Rates]:
    """The model's table and rates, if it has them."""
    spec = read_spec(model)
    if not (spec.path / BASIS_NAME).is_file():
        return None, ()
    table = read_table(spec)
    return read_basis(spec, range(spec.transformer.num_heads), torch.device("cpu"), table), table.quarters


def _inputs(options: argparse.Namespace) -> dict[str, list[compare.Sample]]:
    """What the codecs encode, by its name in the table."""
    inputs: dict[str, list[compare.Sample]] = {}
    if options.data is not None:
        inputs[options.data.stem] = compare.load_samples(options.data)
    elif options.model != "none":
        models = load(options.model, torch.device(options.device))
        worlds = (recorded(models, FIRST_SEED + world, options.blocks) for world in range(options.worlds))
        inputs[options.model] = [sample for samples in worlds for sample in samples]
    size = _MINI if options.small else _WAN
    for kind in filter(None, options.kinds.split(",")):
        sample = compare.synthetic_sample(kind, size.grid, blocks=size.blocks, heads=size.heads, dim=size.dim, seed=0)
        inputs[kind] = [sample]
    if not inputs:
        raise ConfigError("there is nothing to encode: give --model, --data or --kinds")
    return inputs
