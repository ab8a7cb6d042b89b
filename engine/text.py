"""Prompts to text embeddings: a UMT5 encoder from a model folder, each prompt encoded once and kept on disk by content.

A prompt's runs of white space become one blank and its ends are trimmed; nothing else is changed. (Wan's own pipelines
also unescape HTML entities and repair mojibake when ftfy happens to be installed: that would make a film depend on what
is installed beside longtake.)

Shapes: S tokens of a prompt, the end token included; E width of the encoder.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longtake.kernels.errors import ConfigError, StorageError
from longtake.offload.files import FileOps, as_bytes, crc32c, fsync_dir, write_file

_LOG = logging.getLogger(__name__)
_FORMAT = "longtake text 1"
_DTYPES = (torch.float32, torch.bfloat16)
_LARGE_BYTES = 2 << 30
_WHOLE_BYTES = 64 << 20
_SAMPLE_BYTES = 64 << 10
_NUM_SAMPLES = 256
# transformers swaps globals while it loads: two loads at once leave it unable to load at all
_LOADING = threading.Lock()


class TextEncoder:
    """Encodes prompts with a model folder's UMT5 encoder, which is loaded for the first prompt that no cache holds.

    Not thread-safe; several processes may share one cache folder. Nothing here reaches for the network.

    Args:
        folder: model folder in the hub's layout, with text_encoder/ and tokenizer/. Without tokenizer/ it is a
            ByT5Tokenizer, which needs no files, if model_index.json says so.
        text_len: rows of an embedding; longer prompts are refused.
        dtype: float32 or bfloat16, of the weights and of the embeddings; None: float32, but bfloat16 for files of 2 GiB
            and more that are (umT5-xxl then takes 11 GB of memory, not 23).
        cache_dir: where embeddings are kept; None: nowhere. A run that keeps its own has the same bits wherever it
            resumes, as encoders round differently from one kind of device to another.

    Raises:
        ConfigError: the folder holds no UMT5 encoder, or another argument is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        text_len: int,
        dtype: torch.dtype | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if text_len < 1:
            raise ConfigError(f"text_len must be at least 1, not {text_len}")
        if dtype not in (None, *_DTYPES):
            raise ConfigError(f"text embeddings are float32 or bfloat16, not {dtype}")
        self.folder = Path(folder)
        self.text_len = text_len
        self.dtype = dtype or _fitting_dtype(self.folder / "text_encoder")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.dim = _read_width(self.folder / "text_encoder")
        self._identity: str | None = None
        self._tokenizer: Any = None
        self._model: Any = None

    @property
    def identity(self) -> str:
        """Hash of the encoder's and the tokenizer's files: what embeddings depend on besides the prompt."""
        if self._identity is None:
            digest = hashlib.sha256()
            for part in ("text_encoder", "tokenizer"):
                for path in sorted((self.folder / part).glob("*")):
                    if path.suffix in (".json", ".safetensors", ".model", ".txt"):
                        digest.update(f"{part}/{path.name} ".encode())
                        digest.update(_hash_contents(path))
            self._identity = digest.hexdigest()
        return self._identity

    def check(self, prompt: str) -> None:
        """Refuse a prompt that does not fit, before anything is rendered.

        Raises:
            ConfigError: it is too long, and by how many tokens; or it is no text.
        """
        text = clean_prompt(prompt)
        over = len(self._tokenise(text)) - self.text_len
        if over > 0:
            start = text if len(text) <= 40 else text[:40] + "..."
            raise ConfigError(
                f"prompt {start!r} is {over} token{'s'[: over > 1]} over the model's {self.text_len}: shorten it"
            )

    def encode(self, prompt: str) -> Tensor:
        """Encode one prompt, or read it from the cache.

        Args:
            prompt: any text; an empty one is encoded as such.

        Returns: [text_len, E], zero after the prompt's tokens, in the encoder's dtype, on the CPU.

        Raises:
            ConfigError: the prompt is too long.
            StorageError: the encoder's files are missing or corrupt, or the cache cannot be written.
        """
        text = clean_prompt(prompt)
        path = None if self.cache_dir is None else self.cache_dir / f"{self._key(text)}.safetensors"
        embeds_SE = None if path is None else self._read(path)
        if embeds_SE is None:
            self.check(prompt)
            embeds_SE = self._run(text)
            if path is not None:
                self._write(path, embeds_SE, text)
        padded = torch.zeros(self.text_len, self.dim, dtype=self.dtype)
        padded[: len(embeds_SE)] = embeds_SE
        return padded

    def encode_all(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Encode all the prompts of a film, each once, and free the encoder; by prompt, as `encode` gives them."""
        try:
            return {prompt: self.encode(prompt) for prompt in dict.fromkeys(prompts)}
        finally:
            self.release()

    def release(self) -> None:
        """Free the encoder's memory; the next prompt that no cache holds loads it again."""
        if self._model is not None:
            self._model = None
            gc.collect()

    def _key(self, text: str) -> str:
        parts = [_FORMAT, text, self.identity, str(self.dtype), self.text_len]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _tokenise(self, text: str) -> list[int]:
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.folder)
        tokens: list[int] = self._tokenizer(text, add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
        return tokens

    @torch.no_grad()
    def _run(self, text: str) -> Tensor:
        if self._model is None:
            self._model = _load_encoder(self.folder / "text_encoder", self.dtype)
        tokens_1S = torch.tensor([self._tokenise(text)])
        embeds_SE: Tensor = self._model(tokens_1S).last_hidden_state[0].to(self.dtype)
        if not bool(embeds_SE.isfinite().all()):
            raise StorageError("the text encoder gives infinities: its weights are damaged", path=self.folder)
        return embeds_SE

    def _read(self, path: Path) -> Tensor | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                note, embeds_SE = json.loads(file.metadata()[_FORMAT]), file.get_tensor("embeds_SE")
                checksum = note["crc32c"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            _LOG.warning("encoding a prompt again, as %s is damaged: %s", path, error)
            return None
        intact = embeds_SE.dtype == self.dtype and embeds_SE.dim() == 2 and embeds_SE.shape[1] == self.dim
        if not intact or len(embeds_SE) > self.text_len or checksum != _checksum(embeds_SE):
            _LOG.warning("encoding a prompt again, as %s is damaged", path)
            return None
        kept: Tensor = embeds_SE
        return kept

    def _write(self, path: Path, embeds_SE: Tensor, text: str) -> None:
        embeds_SE = embeds_SE.contiguous()
        # one entry, as safetensors writes several in a random order
        note = json.dumps({"prompt": text, "crc32c": _checksum(embeds_SE)})
        data = safetensors.torch.save({"embeds_SE": embeds_SE}, {_FORMAT: note})
        # other processes write this prompt too
        own = path.with_name(f"{path.stem}.{os.getpid()}.{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(FileOps(), own, [as_bytes(data)])
            os.replace(own, path)
            fsync_dir(FileOps(), path.parent)
        except OSError as error:
            with suppress(OSError):
                own.unlink(missing_ok=True)
            raise StorageError(f"a text embedding cannot be kept: {error}", path=path) from error


def clean_prompt(prompt: str) -> str:
    """A prompt with each run of white space made one blank and its ends trimmed.

    Raises:
        ConfigError: it is no text that UTF-8 can hold.
    """
    try:
        prompt.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise ConfigError(f"a prompt must be text, not {prompt!r}") from error
    return " ".join(prompt.split())


def _read_width(folder: Path) -> int:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        kind, width = config["model_type"], config["d_model"]
    except FileNotFoundError as error:
        raise ConfigError("no text encoder here: a model folder holds text_encoder/config.json", path=path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"this is no configuration of a text encoder: {error}", path=path) from error
    if kind != "umt5" or not isinstance(width, int):
        raise ConfigError(f"the text encoder is {kind!r}: only 'umt5', which Wan uses, is supported", path=path)
    return width


def _fitting_dtype(folder: Path) -> torch.dtype:
    """bfloat16 for a large encoder whose weights all are; what is damaged shows when it is loaded."""
    files = sorted(folder.glob("*.safetensors"))
    if sum(path.stat().st_size for path in files) < _LARGE_BYTES:
        return torch.float32
    kinds: set[str] = set()
    for path in files:
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return torch.bfloat16 if kinds == {"BF16"} else torch.float32


def _load_tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer"
    if not path.is_dir():
        if _index_entry(folder, "tokenizer") == "ByT5Tokenizer":
            return transformers.ByT5Tokenizer()
        raise ConfigError("no tokenizer here: a model folder holds tokenizer/tokenizer_config.json", path=path)
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"the tokenizer does not load, copy the folder again: {error}", path=path) from error


def _index_entry(folder: Path, part: str) -> str | None:
    try:
        entry = json.loads((folder / "model_index.json").read_text())[part]
        return str(entry[1])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _load_encoder(path: Path, dtype: torch.dtype) -> Any:
    try:
        with _LOADING, _quiet():
            model, report = transformers.UMT5EncoderModel.from_pretrained(
                str(path), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StorageError(f"the text encoder does not load, copy the folder again: {error}", path=path) from error
    if report["missing_keys"] or report["mismatched_keys"]:
        first = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))[0]
        raise StorageError(f"the text encoder's files lack weights, {first} for one: copy the folder again", path=path)
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of transformers' own: they would run through longtake's."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _hash_contents(path: Path) -> bytes:
    """Hash of a file: of all of it up to 64 MiB; beyond, of its size and 256 evenly spaced pieces of 64 KiB.

    Training or merging changes all weights of a matrix, and every large matrix is hit; reading 11 GB whole at each
    start would take longer than encoding a film's prompts.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            for index in range(_NUM_SAMPLES):
                file.seek(index * (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def _checksum(embeds_SE: Tensor) -> str:
    return f"{crc32c(embeds_SE.contiguous().view(torch.uint8).flatten().numpy()):08x}"
