"""Films of a batch are what the doubled sequence computes; the window slides, its sink stays."""

from __future__ import annotations

import torch

from longtake.engine.config import ModelConfig
from longtake.engine.mini.films import Film, Player
from longtake.engine.mini.teacher_forcing import Layout, Rotations, block_mask, make_attend
from longtake.engine.model import CausalWan

CPU = torch.device("cpu")
CONFIG = ModelConfig(num_heads=2, head_dim=32, num_layers=2, ffn_dim=64, text_dim=8, in_channels=4, out_channels=4)
LAYOUT = Layout(num_blocks=4, block_frames=2, rows=2, columns=3)


def random_model() -> CausalWan:
    torch.manual_seed(0)
    model = CausalWan(CONFIG).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_().mul_(0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model


def doubled_flow(model: CausalWan, clean, noisy, sigma, starts, embeds, mask):  # type: ignore[no-untyped-def]
    attend = make_attend(*Rotations(LAYOUT, 32, CPU)(starts), block_mask(LAYOUT, CPU))
    frames = LAYOUT.num_blocks * LAYOUT.block_frames
    times = torch.cat((torch.zeros(len(clean), frames), torch.full((len(clean), frames), 1000 * sigma)), dim=1)
    context = model.text_context(embeds)
    return model(torch.cat((clean, noisy), dim=2), times, context, attend, mask)[:, :, frames:]


def test_film_equals_the_doubled_sequence() -> None:
    model = random_model()
    clean, noise, embeds = torch.randn(2, 4, 8, 4, 6), torch.randn(2, 4, 8, 4, 6), torch.randn(2, 10, 8)
    noisy = torch.lerp(clean, noise, 0.6)
    prompt_BN = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    prompt_BT = prompt_BN.repeat_interleave(LAYOUT.block_tokens, dim=1).repeat(1, 2)
    mask = (prompt_BT[:, :, None] == torch.tensor([0] * 5 + [1] * 5))[:, None]
    starts = torch.arange(4).expand(2, -1) * 2 + 17  # only differences count
    parallel = doubled_flow(model, clean, noisy, 0.6, starts, embeds, mask)
    film = Film(model, LAYOUT, embeds, 2, (1.0,), window=8)
    for block in range(4):
        frames = slice(2 * block, 2 * block + 2)
        flow = film.flow(noisy[:, :, frames], 0.6, prompt_BN[:, block])
        torch.testing.assert_close(flow, parallel[:, :, frames], rtol=0, atol=3e-5)
        film.push(clean[:, :, frames], prompt_BN[:, block])


def test_window_keeps_the_first_and_the_last() -> None:
    """One layer, whose keys depend on a block's own latents alone: after sliding, as if the middle had never been."""
    torch.manual_seed(1)
    config = ModelConfig(num_heads=2, head_dim=32, num_layers=1, ffn_dim=64, text_dim=8, in_channels=4, out_channels=4)
    model = CausalWan(config).eval().requires_grad_(False)
    embeds, blocks, prompt = torch.randn(1, 5, 8), torch.randn(7, 1, 4, 2, 4, 6), torch.zeros(1, dtype=torch.int64)
    slid, short = (Film(model, LAYOUT, embeds, 1, (1.0,), window=3) for _ in range(2))
    for block in blocks[:6]:
        slid.push(block, prompt)
    for block in blocks[[0, 4, 5]]:
        short.push(block, prompt)
    expected = short.flow(blocks[6], 0.5, prompt)
    torch.testing.assert_close(slid.flow(blocks[6], 0.5, prompt), expected, rtol=0, atol=3e-5)


def test_steps_renoise() -> None:
    drawn: list[torch.Tensor] = []

    def noise(shape: tuple[int, ...]) -> torch.Tensor:
        drawn.append(torch.randn(shape))
        return drawn[-1]

    model = Player(random_model(), CPU).model
    film = Film(model, LAYOUT, torch.randn(2, 5, 8), 1, (1.0, 0.5), window=2, noise=noise)
    prompt = torch.zeros(2, dtype=torch.int64)
    first = film.step(prompt)
    again = Film(model, LAYOUT, torch.zeros(2, 5, 8), 1, (1.0, 0.5), window=2)
    again._context = film._context
    guess = drawn[0] - again.flow(drawn[0], 1.0, prompt)
    noisy = torch.lerp(guess, drawn[1], 0.5)
    torch.testing.assert_close(first, noisy - 0.5 * again.flow(noisy, 0.5, prompt))
    assert first.shape == (2, 4, 2, 4, 6) and film.num_blocks == 1 and len(drawn) == 2
