"""Few-step distillation of mini: four re-noised steps that give sharp samples instead of means.

    python -m longtake.engine.mini.distil --vae DIR/vae --weights DIR --out DIR --seconds 650 [--resume DIR]
    torchrun --nproc-per-node 4 -m longtake.engine.mini.distil ...    the same on four GPUs

Distribution matching (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867) for a causal model, as Self-Forcing (arXiv
2506.08009) does it, but all blocks of a sequence at once in the doubled layout of teacher_forcing.py::

    history (clean half)    true clips, lightly noised; or films of the student's own (film_pool.py)
    student (noisy half)    steps 1 .. k from noise, k random for each block, gradients through step k alone
    real score              the frozen flow-matching model   } given the same history, at a
    fake score              trained on the student's blocks  } random noise level for each block

The real score is guided by a worse state of the same model, one of the beginning of its training (autoguidance, arXiv
2406.02507): what the two differ in is what more training would mend. Long sequences take turns with beginnings of
films.

Some blocks under a true history are not scored but denoised from the truth at the last steps' noise levels, and
compared with it, so that recall does not suffer. Stops by the clock; goes on with ``--resume`` (the teacher is
always that of ``--weights``).
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch

from longtake.engine.mini.clips import shared_beginnings, shared_clips
from longtake.engine.mini.distiller import DistilConfig, Distiller
from longtake.engine.mini.preview import PreviewPlan, preview
from longtake.engine.mini.ranks import join, leave
from longtake.engine.mini.recall import Recall
from longtake.engine.mini.state import fill, load_distilled, save_distilled
from longtake.engine.mini.train_dit import BEGINNING, LAYOUT, Trainee


def read_options() -> argparse.Namespace:
    """The command line; see the module's docstring."""
    defaults = DistilConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--weights", type=Path, required=True, help="teacher: a folder of a model or training state")
    parser.add_argument("--guide", type=Path, help="a worse state of the teacher: a folder of the same kinds")
    parser.add_argument("--guidance", type=float, default=defaults.guidance)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="of this run")
    parser.add_argument("--horizon", type=float, help="seconds of all runs together; as --seconds unless given")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--student-rate", type=float, default=defaults.student_rate)
    parser.add_argument("--fake-rate", type=float, default=defaults.fake_rate)
    parser.add_argument("--fake-updates", type=int, default=defaults.fake_updates)
    parser.add_argument("--truth-weight", type=float, default=defaults.truth_weight)
    parser.add_argument("--own-share", type=float, default=defaults.own_history_share)
    parser.add_argument("--clips", type=int, default=2048, help="clips kept on the device")
    parser.add_argument("--first-clips", type=int, default=256, help="clips made before training starts")
    parser.add_argument("--beginnings", type=int, default=4096, help="beginnings of clips kept on the device")
    parser.add_argument("--first-beginnings", type=int, default=1024, help="of them, made before training starts")
    parser.add_argument("--every", type=float, default=100.0, help="seconds between states, sheets and measures")
    parser.add_argument("--preview-blocks", type=int, default=80, help="blocks of 0.75 s of the films shown")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Distil as the command line says."""
    options = read_options()
    torch.set_float32_matmul_precision("high")
    ranks, device = join(options.device)
    config = DistilConfig(
        seconds=options.seconds,
        horizon_s=options.horizon or options.seconds,
        batch=options.batch,
        student_rate=options.student_rate,
        fake_rate=options.fake_rate,
        fake_updates=options.fake_updates,
        truth_weight=options.truth_weight,
        own_history_share=options.own_share,
        guidance=options.guidance,
    )
    clips = shared_clips(options.vae, options.clips, device, ranks)
    model = Trainee().to(device)
    fill(model, options.weights, device)
    beginnings = shared_beginnings(options.vae, options.beginnings, device, ranks)
    guide = None
    if options.guide:
        guide = Trainee().to(device)
        fill(guide, options.guide, device)
    distiller = Distiller(config, model, clips, beginnings, (LAYOUT, BEGINNING), device, guide=guide, ranks=ranks)
    if options.resume:
        load_distilled(options.resume, distiller)
    clips.fill(options.first_clips // ranks.size)
    beginnings.fill(options.first_beginnings // ranks.size)
    options.out.mkdir(parents=True, exist_ok=True)
    watch(distiller, options.out, PreviewPlan(blocks=options.preview_blocks, sigmas=distiller.sigmas), options.every)
    leave()


def watch(distiller: Distiller, out: Path, plan: PreviewPlan, every_s: float) -> None:
    """Run a distillation, with its states, contact sheets and measures in ``out``."""
    sequence = distiller.true_sequence()
    assert sequence.clean_BCFYX is not None
    recall = Recall(sequence.clean_BCFYX, distiller.long.layout.num_blocks, distiller.sigmas)
    shown = copy.deepcopy(distiller.teacher)
    if distiller.ranks.leads:
        print("teacher:", recall(lambda noisy, sigma: distiller.denoised(shown, noisy, sigma, sequence)), flush=True)

    def save() -> None:
        save_distilled(out, distiller)
        record = {
            "config": asdict(distiller.config),
            "ranks": distiller.ranks.size,
            "step": distiller.step,
            "elapsed_s": distiller.elapsed_s,
        }
        (out / "distillation.json").write_text(json.dumps(record, indent=1))

    def look() -> None:
        with torch.no_grad():
            for name, parameter in shown.named_parameters():
                parameter.copy_(distiller.average[f"transformer.{name}"])
        print("average:", recall(lambda noisy, sigma: distiller.denoised(shown, noisy, sigma, sequence)), flush=True)
        path = out / f"preview-{distiller.step:06d}.png"
        line = preview(distiller.model, distiller.average, distiller.clips, distiller.long.layout, plan, path)
        print("preview:", line, flush=True)

    if distiller.ranks.leads:
        look()
    distiller.run(distiller.config.seconds, every_s, save, look)


if __name__ == "__main__":
    main()
