"""Text embeddings: what transformers gives, padded with zeros, encoded once and kept by content."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from longtake.engine import text as text_module
from longtake.engine.text import TextEncoder, clean_prompt
from longtake.kernels.errors import ConfigError, StorageError

WIDTH, TEXT_LEN = 32, 48
PROMPT = "pan right slowly past the lighthouse"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def make_model(folder: Path, seed: int = 0, vocab_size: int = 384) -> Path:
    torch.manual_seed(seed)
    config = transformers.UMT5Config(
        vocab_size=vocab_size, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    model = transformers.UMT5EncoderModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125})
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Every load of an encoder, in order."""
    seen: list[Path] = []
    load = text_module._load_encoder

    def count(path: Path, dtype: torch.dtype) -> Any:
        seen.append(path)
        return load(path, dtype)

    monkeypatch.setattr(text_module, "_load_encoder", count)
    yield seen


def test_a_large_encoder_keeps_its_bfloat16(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tmp_path / "half"
    shutil.copytree(model, half)
    encoder = transformers.UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.bfloat16)
    encoder.save_pretrained(half / "text_encoder")
    assert TextEncoder(half, text_len=TEXT_LEN).dtype == torch.float32
    monkeypatch.setattr(text_module, "_LARGE_BYTES", 1000)
    assert TextEncoder(model, text_len=TEXT_LEN).dtype == torch.float32
    embeds = TextEncoder(half, text_len=TEXT_LEN).encode(PROMPT)
    assert embeds.dtype == torch.bfloat16
    whole = TextEncoder(half, text_len=TEXT_LEN, dtype=torch.float32).encode(PROMPT)
    torch.testing.assert_close(embeds.float(), whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_padded_reference(model: Path, dtype: torch.dtype) -> None:
    """As diffusers' WanPipeline encodes: padded to the end, masked, then zeroed after the true length."""
    embeds = TextEncoder(model, text_len=TEXT_LEN, dtype=dtype).encode(PROMPT)
    encoder = transformers.UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=dtype).eval()
    tokens = transformers.ByT5Tokenizer()(
        [PROMPT], padding="max_length", max_length=TEXT_LEN, truncation=True, return_tensors="pt"
    )
    length = int(tokens.attention_mask.sum())
    with torch.no_grad():
        reference = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[0]
    assert embeds.shape == (TEXT_LEN, WIDTH) and embeds.dtype == dtype
    assert length == len(PROMPT) + 1 < TEXT_LEN
    assert not embeds[length:].any()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(embeds[:length], reference[:length], atol=tolerance, rtol=0)


def test_white_space_is_the_only_thing_cleaned(model: Path) -> None:
    encoder = TextEncoder(model, text_len=TEXT_LEN)
    assert torch.equal(encoder.encode("  a\tred \n boat "), encoder.encode("a red boat"))
    assert clean_prompt("a\u00a0b &amp; c") == "a b &amp; c"
    assert encoder.encode("")[0].any() and not encoder.encode("")[1:].any()
    for bad in ("\ud800", None, 7):
        with pytest.raises(ConfigError, match="must be text"):
            clean_prompt(bad)  # type: ignore[arg-type]


def test_a_long_prompt_says_how_much_too_long(model: Path) -> None:
    encoder = TextEncoder(model, text_len=TEXT_LEN)
    fits = "x" * (TEXT_LEN - 1)
    encoder.check(fits)
    assert encoder.encode(fits)[-1].any()
    with pytest.raises(ConfigError, match=r"is 1 token over the model's 48"):
        encoder.check(fits + "x")
    with pytest.raises(ConfigError, match=r"prompt 'x{40}\.\.\.' is 53 tokens over the model's 48: shorten it"):
        encoder.encode("x" * 100)


def test_each_prompt_is_encoded_once(model: Path, tmp_path: Path, loads: list[Path]) -> None:
    prompts = [PROMPT, "a red boat enters", PROMPT]
    first = TextEncoder(model, text_len=TEXT_LEN, cache_dir=tmp_path / "cache").encode_all(prompts)
    assert list(first) == prompts[:2] and len(loads) == 1
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2 and all(file.suffix == ".safetensors" for file in files)
    second = TextEncoder(model, text_len=TEXT_LEN, cache_dir=tmp_path / "cache").encode_all(prompts)
    assert len(loads) == 1
    assert all(torch.equal(first[prompt], second[prompt]) for prompt in prompts)


def test_release_frees_and_loads_again(model: Path, loads: list[Path]) -> None:
    encoder = TextEncoder(model, text_len=TEXT_LEN)
    first = encoder.encode(PROMPT)
    encoder.encode("another")
    assert len(loads) == 1
    encoder.release()
    assert encoder._model is None
    assert torch.equal(encoder.encode(PROMPT), first) and len(loads) == 2


def test_the_cache_knows_what_embeddings_depend_on(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    embeds = TextEncoder(model, text_len=TEXT_LEN, cache_dir=cache).encode(PROMPT)
    other = make_model(tmp_path / "other", seed=1)
    assert not torch.equal(TextEncoder(other, text_len=TEXT_LEN, cache_dir=cache).encode(PROMPT), embeds)
    TextEncoder(model, text_len=TEXT_LEN + 1, cache_dir=cache).encode(PROMPT)
    TextEncoder(model, text_len=TEXT_LEN, cache_dir=cache, dtype=torch.bfloat16).encode(PROMPT)
    TextEncoder(model, text_len=TEXT_LEN, cache_dir=cache).encode("another")
    assert len(list(cache.iterdir())) == 5
    moved = shutil.copytree(model, tmp_path / "moved")
    assert TextEncoder(moved, text_len=TEXT_LEN).identity == TextEncoder(model, text_len=TEXT_LEN).identity


def test_large_files_are_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(text_module, "_SAMPLE_BYTES", 16)
    path = tmp_path / "weights"
    data = bytearray(torch.randint(0, 256, (20_000,), dtype=torch.uint8).numpy().tobytes())
    seen = set()
    for start in (None, 0, 9_000, 20_000 - 100):
        changed = bytearray(data)
        if start is not None:
            changed[start : start + 100] = bytes(100)
        path.write_bytes(changed)
        seen.add(text_module._hash_contents(path))
    assert len(seen) == 4


def test_damaged_entries_are_encoded_again(
    model: Path, tmp_path: Path, loads: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    embeds = TextEncoder(model, text_len=TEXT_LEN, cache_dir=tmp_path).encode(PROMPT)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 1
    for count, damaged in enumerate((b"", whole[:20], whole[:-1], bytes(flipped), b"x" * 100), start=2):
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert torch.equal(TextEncoder(model, text_len=TEXT_LEN, cache_dir=tmp_path).encode(PROMPT), embeds)
        assert len(loads) == count and "damaged" in caplog.text
        assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_writers_at_once_leave_one_whole_entry(model: Path, tmp_path: Path) -> None:
    encoders = [TextEncoder(model, text_len=TEXT_LEN, cache_dir=tmp_path) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda encoder: encoder.encode(PROMPT), encoders))
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be kept"):
        TextEncoder(model, text_len=TEXT_LEN, cache_dir=tmp_path / "file").encode(PROMPT)


def test_a_tokenizer_with_files(tmp_path: Path) -> None:
    """The layout of Wan's own: tokenizer.json of a fast T5 tokenizer."""
    folder = make_model(tmp_path / "model", vocab_size=64)
    words = ["<pad>", "</s>", "<unk>", "\u2581pan", "\u2581right", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    unigram = tokenizers.models.Unigram([(word, -float(rank)) for rank, word in enumerate(words)], unk_id=2)
    backend = tokenizers.Tokenizer(unigram)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = {"tokenizer_class": "T5TokenizerFast", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "extra_ids": 0}))
    encoder = TextEncoder(folder, text_len=8)
    embeds = encoder.encode("pan right")
    assert embeds[:3].any(dim=1).all() and not embeds[3:].any()
    with pytest.raises(ConfigError, match="over the model's 8"):
        encoder.encode("pan right zzzzzzzzzz")


def test_byt5_needs_no_folder(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ConfigError, match="no tokenizer here"):
        TextEncoder(folder, text_len=TEXT_LEN).encode(PROMPT)
    (folder / "model_index.json").write_text(json.dumps({"tokenizer": ["transformers", "ByT5Tokenizer"]}))
    expected = TextEncoder(model, text_len=TEXT_LEN).encode(PROMPT)
    assert torch.equal(TextEncoder(folder, text_len=TEXT_LEN).encode(PROMPT), expected)


def test_bad_folders_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text encoder here"):
        TextEncoder(tmp_path, text_len=TEXT_LEN)
    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # the file is mapped, then replaced
    save_file({name: tensor for name, tensor in tensors.items() if "layer.1" not in name}, weights, {"format": "pt"})
    with pytest.raises(StorageError, match="lack weights"):
        TextEncoder(folder, text_len=TEXT_LEN).encode(PROMPT)
    name = "encoder.final_layer_norm.weight"
    save_file({**tensors, name: torch.full_like(tensors[name], torch.inf)}, weights, {"format": "pt"})
    with pytest.raises(StorageError, match="infinities"):
        TextEncoder(folder, text_len=TEXT_LEN).encode(PROMPT)
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(StorageError, match="does not load"):
        TextEncoder(folder, text_len=TEXT_LEN).encode(PROMPT)
    weights.unlink()
    with pytest.raises(StorageError, match="does not load"):
        TextEncoder(folder, text_len=TEXT_LEN).encode(PROMPT)
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({"model_type": "t5", "d_model": 32}))
    with pytest.raises(ConfigError, match="only 'umt5'"):
        TextEncoder(folder, text_len=TEXT_LEN)
    config.write_text("{")
    with pytest.raises(ConfigError, match="no configuration"):
        TextEncoder(folder, text_len=TEXT_LEN)


def test_bad_arguments_are_named(model: Path) -> None:
    with pytest.raises(ConfigError, match="text_len"):
        TextEncoder(model, text_len=0)
    with pytest.raises(ConfigError, match="float16"):
        TextEncoder(model, text_len=TEXT_LEN, dtype=torch.float16)
