"""Films that a model in training makes on its own, kept going beside the training and cut into histories.

A reel is a batch of films under prompts of clips, from the prompt alone or after some true blocks, as long as a minute.
Each refresh lets one reel go on by some blocks with the newest weights and keeps its first block and its last ones, at
the positions they have in a rollout's window: what the model will see late in a film of its own.

Shape legend: B films, N blocks of a sequence, Q blocks of a clip, P prompts of a clip, C latent channels, F latent
frames, Y, X latent rows and columns, K text tokens.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.engine.mini.clips import NUM_PROMPTS, ClipBuffer
from longtake.engine.mini.films import Film, Player
from longtake.engine.mini.teacher_forcing import Layout
from longtake.engine.mini.train_dit import Trainee


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """How films are made.

    Args:
        batch: films of a reel.
        reels: in the making at once.
        blocks: of the longest film.
        advance: blocks added by a refresh.
        window: history blocks attended, the first one among them.
        max_true_blocks: most blocks of a clip that a film may start from; half the films start from none.
        kept: sequences kept.
    """

    batch: int = 16
    reels: int = 2
    blocks: int = 80
    advance: int = 10
    window: int = 25
    max_true_blocks: int = 10
    kept: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSequence:
    """The model's own blocks, where they stand in time, and their prompts."""

    latents_BCFYX: Tensor
    starts_BN: Tensor
    tokens_BPK: Tensor
    prompt_BN: Tensor


@dataclass(slots=True, kw_only=True)
class _Reel:
    film: Film
    blocks: list[Tensor]
    tokens_BPK: Tensor
    prompt_BQ: Tensor
    end: int

    def prompt(self, block: int) -> Tensor:
        """Prompt numbers of a block; a clip's last prompt holds on."""
        return self.prompt_BQ[:, min(block, self.prompt_BQ.shape[1] - 1)]


class FilmPool:
    """The reels and what is kept of them.

    Args:
        clips: prompts and true beginnings.
        model: gives the architecture; its weights are taken at each refresh.
        layout: of the sequences to be kept.
        sigmas: of the sampler's steps.
        plan: sizes.
        device: of everything.
        choices: what is drawn besides the films themselves; ranks that train together have equal ones.
    """

    def __init__(
        self,
        clips: ClipBuffer,
        model: Trainee,
        layout: Layout,
        sigmas: tuple[float, ...],
        plan: PoolPlan,
        device: torch.device,
        choices: random.Random,
    ) -> None:
        self._choices = choices
        self._clips, self._layout, self._sigmas, self._plan = clips, layout, sigmas, plan
        self._player = Player(model.transformer, device, compiled=device.type == "cuda")
        self._reels: list[_Reel | None] = [None] * plan.reels
        self._turn = 0
        self._kept: deque[OwnSequence] = deque(maxlen=plan.kept)

    @torch.no_grad()
    def refresh(self, model: Trainee) -> None:
        """Let the reel whose turn it is go on, or begin it anew, and keep its newest sequence."""
        self._player.refill(model.transformer)
        self._turn = (self._turn + 1) % len(self._reels)
        reel = self._reels[self._turn]
        if reel is None or len(reel.blocks) >= reel.end:
            reel = self._reels[self._turn] = self._begin(model)
        target = max(self._layout.num_blocks, len(reel.blocks) + self._plan.advance)
        while len(reel.blocks) < target:
            prompt = reel.prompt(len(reel.blocks))
            reel.blocks.append(reel.film.step(prompt))
        self._kept.append(self._sequence(reel))

    def sample(self) -> OwnSequence:
        """One of the kept sequences; :meth:`refresh` must have run."""
        return self._choices.choice(self._kept)

    def _begin(self, model: Trainee) -> _Reel:
        plan, frames = self._plan, self._layout.block_frames
        clips = self._clips.sample_clips(plan.batch)
        dtype = self._player.model.proj_out.weight.dtype
        embeds = model.encode_text(clips.tokens_BPK).to(dtype)
        film = Film(self._player.model, self._layout, embeds, NUM_PROMPTS, self._sigmas, plan.window)
        end = self._choices.randint(self._layout.num_blocks, max(plan.blocks, self._layout.num_blocks))
        reel = _Reel(film=film, blocks=[], tokens_BPK=clips.tokens_BPK, prompt_BQ=clips.prompt_BQ, end=end)
        num_true = self._choices.choice((0, self._choices.randint(0, plan.max_true_blocks)))
        for block in clips.latents_BCFYX.float().split(frames, dim=2)[:num_true]:
            film.push(block, reel.prompt(len(reel.blocks)))
            reel.blocks.append(block)
        return reel

    def _sequence(self, reel: _Reel) -> OwnSequence:
        layout = self._layout
        last = len(reel.blocks)
        chosen = [0, *range(last - layout.num_blocks + 1, last)]
        prompts = torch.stack([reel.prompt(block) for block in chosen], dim=1)
        starts = torch.arange(layout.num_blocks, device=prompts.device) * layout.block_frames
        return OwnSequence(
            latents_BCFYX=torch.cat([reel.blocks[block] for block in chosen], dim=2),
            starts_BN=starts.expand(len(prompts), -1),
            tokens_BPK=reel.tokens_BPK,
            prompt_BN=prompts,
        )
