"""Make the table that is shipped with mini, for the codecs pc2 to pc4: python -m longtake.engine.mini.calibrate

As ``longtake calibrate``, but behind true histories, as return visits have them: worlds 1 to 4, of those that mini was
trained on, ten seconds each, and two blocks generated behind them.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import torch

from longtake.engine.basis import BASIS_NAME, write_basis
from longtake.engine.bench_memory import Case, film_truth, load, make_shot, plain_script
from longtake.engine.calibrate import HistoryCost
from longtake.engine.rollout import Prefix, Rollout, open_cache
from longtake.engine.sensitivity import watch
from longtake.engine.vae import StreamingEncoder, from_uint8

SEEDS = (1, 2, 3, 4)
PAN_PX = 4
PAST_BLOCKS, OWN_BLOCKS = 13, 2  # ten seconds, and what is generated
PROBES = 4


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="default: in the model's folder")
    options = parser.parse_args()
    models = load("mini", torch.device("cpu"))
    spec, model = models.spec, models.transformer
    cost = HistoryCost(spec.transformer, models.device)
    for seed in SEEDS:
        print(f"world {seed}: {OWN_BLOCKS} blocks", flush=True)
        script = plain_script(seed, PAN_PX)
        num_frames = 1 + (PAST_BLOCKS * spec.block_frames - 1) * spec.temporal_stride
        truth = film_truth(seed, script, num_frames, models.device)
        with torch.inference_mode():
            latents = StreamingEncoder(models.vae).encode_float(from_uint8(truth))
            context = [model.text_context(models.text.encode(script[0].prompt)[None])]
        prefix = Prefix(latents=latents.split(spec.block_frames, dim=1))
        case = Case(name="calibrate", history=spec.history, codec="bf16")
        shot = make_shot(models, seed, script, case, OWN_BLOCKS, PAST_BLOCKS)
        cache = open_cache(shot, models.device, PAST_BLOCKS)
        with closing(cache), closing(Rollout(shot, model, context, cache, prefix, graphs=False)) as rollout:
            watch(rollout, cost, PROBES)
            for _ in range(rollout.total_blocks):
                rollout.step()
    with torch.inference_mode():
        turn_LHEE, rates = cost.table()
    path = options.out or spec.path / BASIS_NAME
    write_basis(turn_LHEE, rates, path)
    print(path, *rates, sep="\n")


if __name__ == "__main__":
    main()
