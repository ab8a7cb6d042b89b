"""Make the table that is shipped with mini, for the codecs pc2 to pc4: python -m longtake.engine.mini.calibrate

As ``longtake calibrate``, but behind true histories, as return visits have them: worlds 1 to 4, of those that mini was
trained on, a whole turn of the camera each, and two blocks generated behind it.
"""

from __future__ import annotations

from contextlib import closing

import torch

from longtake.engine.basis import BASIS_NAME, write_basis
from longtake.engine.bench_memory import FULL, Case, film_truth, load, make_shot, plain_script
from longtake.engine.calibrate import HeadMoments, watch
from longtake.engine.rollout import Prefix, Rollout, open_cache
from longtake.engine.vae import StreamingEncoder, from_uint8

SEEDS = (1, 2, 3, 4)
PAN_PX = 4
PAST_BLOCKS, OWN_BLOCKS = 11, 2  # a turn, and what is generated


@torch.inference_mode()
def main() -> None:
    """Command line; see the module's docstring."""
    models = load("mini", torch.device("cpu"))
    spec, model = models.spec, models.transformer
    moments = HeadMoments(model)
    for seed in SEEDS:
        script = plain_script(seed, PAN_PX)
        num_frames = 1 + (PAST_BLOCKS * spec.block_frames - 1) * spec.temporal_stride
        truth = film_truth(seed, script, num_frames, models.device)
        latents = StreamingEncoder(models.vae).encode_float(from_uint8(truth))
        prefix = Prefix(latents=latents.split(spec.block_frames, dim=1))
        case = Case(name="calibrate", history=FULL, codec="bf16")
        shot = make_shot(models, seed, script, case, OWN_BLOCKS, PAST_BLOCKS)
        context = [model.text_context(models.text.encode(script[0].prompt)[None])]
        cache = open_cache(shot, models.device, PAST_BLOCKS)
        with closing(cache), closing(Rollout(shot, model, context, cache, prefix, graphs=False)) as rollout:
            count = watch(rollout, moments)
            for _ in range(rollout.total_blocks):
                rollout.step()
                count()
    write_basis(*moments.basis(), spec.path / BASIS_NAME)


if __name__ == "__main__":
    main()
