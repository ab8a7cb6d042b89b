"""``longtake bench film``: frames a second of a rollout with its VAE decoding, alone or on a gang.

Protocol: the transformer's geometry and the VAE's are Wan2.1's, weights are random, the window of history is full from
the start (encoded random K/V). The rollout renders block after block and hands each to a decoder that works beside it,
on its own stream, at most two blocks behind, as a shot's does; on a gang every rank decodes its stripe of rows. Timed
from a block boundary with an empty queue until the last frame of the last block is in the host's memory; encoding to
video is not part of it. The share of each is measured by a second run without decoding. Figures are written part by
part; on one device a part that fails is printed, and listed in the file's "failed".

    longtake bench film --json one.json
    torchrun --nproc-per-node 4 --no-python longtake bench film --json four.json
"""

from __future__ import annotations

import argparse
import dataclasses
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longtake.engine import record
from longtake.engine.bench_rollout import GEOMETRIES, made_up_basis
from longtake.engine.bench_scaling import ScalingCase, default_meshes, fill_history, random_sharded
from longtake.engine.config import Precision
from longtake.engine.gang import Gang, join
from longtake.engine.ledger import read_ledger, reset_peak
from longtake.engine.mesh import ALONE, open_mesh, parse_mesh
from longtake.engine.rollout import Rollout
from longtake.engine.shotcache import open_cache
from longtake.engine.streams import going_first
from longtake.engine.timing import await_device
from longtake.engine.vae import StreamingDecoder
from longtake.engine.vae_fast import make_fast
from longtake.engine.vae_stripes import StripedDecoder, StripeWorker
from longtake.kernels.clock import survive

_QUEUE_BLOCKS = 2
_TINY_VAE = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


class DecodeThread:
    """Decodes blocks in order beside the rollout; counts frames that reached the host.

    Args:
        decoder: its alone from now on.
        device: of the decoder.
    """

    def __init__(self, decoder: StreamingDecoder, device: torch.device) -> None:
        self._decoder, self._device = decoder, device
        self.num_frames = 0
        self._error: BaseException | None = None
        self._queue: queue.Queue[tuple[Tensor, Any] | None] = queue.Queue(_QUEUE_BLOCKS)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def put(self, latents_CFYX: Tensor) -> None:
        """Queue a block; waits while the queue is full."""
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._queue.put((latents_CFYX, event))

    def finish(self) -> int:
        """Wait for all that was put; frames in the host's memory."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.num_frames

    def _work(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        try:
            with torch.cuda.stream(stream):
                while (item := self._queue.get()) is not None:
                    latents, event = item
                    if stream is not None:
                        stream.wait_event(event)
                        latents.record_stream(stream)
                    self.num_frames += len(self._decoder.decode(latents).cpu())
        except BaseException as error:  # finish() raises it
            self._error = error
            while self._queue.get() is not None:
                pass


def make_decoder(gang: Gang, device: torch.device, fast: bool, tiny: bool) -> StreamingDecoder | StripeWorker:
    """A decoder of Wan2.1's size with random weights; a worker for its stripes on ranks other than 0."""
    torch.manual_seed(0)
    with torch.device(device):
        vae = AutoencoderKLWan(**(_TINY_VAE if tiny else {}))
    vae = vae.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval().requires_grad_(False)
    if fast:
        make_fast(vae)
    if gang.size == 1:
        return StreamingDecoder(vae)
    axis = gang.host_axis()
    return StripedDecoder(vae, axis, gang) if gang.leads else StripeWorker(vae, axis, gang)


def run_blocks(rollout: Rollout, decoder: StreamingDecoder | None, gang: Gang, num_blocks: int) -> dict[str, float]:
    """Render blocks, decoding them where there is a decoder; seconds until all is done on every rank."""
    device = rollout.device
    thread = None if decoder is None else DecodeThread(decoder, device)
    await_device(device)
    gang.any(False)
    started = time.perf_counter()
    for _ in range(num_blocks):
        clean = rollout.step()
        if thread is not None:
            thread.put(clean)
        gang.any(False)
    num_frames = 0 if thread is None else thread.finish()
    await_device(device)
    seconds = gang.agree(time.perf_counter() - started, max)
    return {"seconds": seconds, "frames": num_frames, "seconds_a_block": seconds / num_blocks}


def run_film(
    case: ScalingCase,
    gang: Gang,
    num_blocks: int,
    fast_vae: bool,
    rounds: int,
    failed: dict[str, str],
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Frames a second of one configuration; every rank calls it.

    Args:
        case: the configuration.
        gang: of all ranks.
        num_blocks: of a round.
        fast_vae: with the engine's own layers.
        rounds: timed, with decoding and without.
        failed: told of parts that fail on one device; a gang ends there, or its ranks would wait for each other.
        save: given the figures so far, part by part.
    """
    device = torch.device(gang.device(case.device))
    result: dict[str, Any] = {}
    guard = partial(survive, failed) if gang.size == 1 else lambda part: nullcontext()
    with closing(make_rollout(case, gang, device)) as rollout:
        with guard("rollout alone"):
            run_blocks(rollout, None, gang, 3)
            without = [run_blocks(rollout, None, gang, num_blocks) for _ in range(rounds)]
            result["seconds_a_block_without_decoding"] = record.summary([one["seconds_a_block"] for one in without])
            result["memory_bytes"] = rollout.memory()
            save(result)
        with guard("decoding"):
            made = make_decoder(gang, device, fast_vae, tiny=case.geometry == "tiny")
            decoder = made if isinstance(made, StreamingDecoder) else None
            run_blocks(rollout, decoder, gang, 3)
            reset_peak(device)
            whole = [run_blocks(rollout, decoder, gang, num_blocks) for _ in range(rounds)]
            if gang.leads:
                result["frames_a_second"] = record.summary([one["frames"] / one["seconds"] for one in whole])
            result["seconds_a_block"] = record.summary([one["seconds_a_block"] for one in whole])
            save(result)
            result["seconds_of_decoding_alone"] = _decode_alone(decoder, rollout.shot.latent_shape, gang, device)
            if decoder is not None:
                result["decoder_state_bytes"] = decoder.state_bytes
                ledger = read_ledger(rollout, {"vae": decoder.weight_bytes, "decoder_state": decoder.state_bytes})
                result["ledger"] = ledger.to_json() if ledger else {}
            if isinstance(decoder, StripedDecoder):
                decoder.close()
            save(result)
    return result


def make_rollout(case: ScalingCase, gang: Gang, device: torch.device) -> Rollout:
    """A rollout with random weights whose history is full."""
    shot, config = case.shot(), GEOMETRIES[case.geometry]
    mesh = ALONE if gang.size == 1 else open_mesh(parse_mesh(case.mesh))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_sharded(config, mesh, device, dtype, shot.model.weights.precision)
    if device.type == "cuda" and case.compile_layers:
        model.compile_layers()
    text = torch.zeros(1, shot.model.text_len, config.text_dim, device=device)
    with torch.inference_mode():
        contexts = [model.text_context(text)]
    basis = made_up_basis(shot, len(model.heads), device)
    rollout = Rollout(shot, model, contexts, open_cache(shot, device, heads=model.heads), basis=basis)
    with torch.inference_mode():
        fill_history(rollout, shot.history.sink_blocks + shot.history.recent_blocks)
    return rollout


def _decode_alone(
    decoder: StreamingDecoder | None, shape: tuple[int, int, int, int], gang: Gang, device: torch.device
) -> dict[str, float]:
    """Seconds to decode a block when nothing else runs."""
    seconds = []
    for index in range(4 if decoder is not None else 0):
        assert decoder is not None
        latents = torch.randn(shape, device=device)
        await_device(device)
        started = time.perf_counter()
        decoder.decode(latents).cpu()
        if index:
            seconds.append(time.perf_counter() - started)
    gang.any(False)
    return record.summary(seconds) if seconds else {}


def main(arguments: list[str]) -> int:
    """Command line of ``longtake bench film``; every rank runs it, rank 0 writes."""
    parser = argparse.ArgumentParser(prog="longtake bench film", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default="1.3b")
    parser.add_argument("--kv", type=int, default=32760, help="tokens that a block attends, its own included")
    parser.add_argument("--mesh", help="like sp=4 (default: all along sp)")
    parser.add_argument("--codec", default="int4")
    parser.add_argument("--attention", default="fp8")
    parser.add_argument("--weights", choices=[*Precision], default="model")
    parser.add_argument("--size", default="480x832")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of a timed round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain-vae", action="store_true", help="diffusers' own decoder")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args(arguments)
    height, width = (int(side) for side in options.size.split("x"))
    with join() as gang:
        case = ScalingCase(
            geometry=options.geometry,
            mesh=options.mesh or default_meshes(gang.size)[0],
            kv_tokens=options.kv,
            codec=options.codec,
            attention=options.attention,
            weights=options.weights,
            height=height,
            width=width,
            blocks=options.blocks,
            compile_layers=not options.no_compile,
            device=options.device,
        )
        failed: dict[str, str] = {}
        config = {**dataclasses.asdict(case), "arguments": arguments, "failed": failed}

        def save(result: dict[str, Any]) -> None:
            if gang.leads:
                record.write(options.json, "film", config, [{"num_ranks": gang.size, "result": result}])

        with going_first(torch.device(gang.device(case.device))):
            result = run_film(case, gang, options.blocks, not options.plain_vae, options.rounds, failed, save)
        save(result)
        if "frames_a_second" in result:
            print(f"{case.geometry} {case.mesh}: {result['frames_a_second']['median']:.1f} frames a second", flush=True)
        return 1 if failed else 0
