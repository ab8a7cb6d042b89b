"""Weights as projects publish them: .pt dicts within dicts, safetensors in shards, wrappers' prefixes, original names.

Tensors stay memory-mapped until they are used. Whatever the layout, what comes out has the names of diffusers'
``WanTransformer3DModel``; the way there is a pure rename::

    {"generator_ema": {"model._fsdp_wrapped_module.blocks.0.self_attn.q.weight": ...}}
                       ^-- wrappers -------------^ ^-- original name ---------^
                                                  blocks.0.attn1.to_q.weight      diffusers' name
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longtake.kernels.errors import ConfigError, StorageError

# What training and compilation put in front of a name, in any order and number.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.", "model.", "generator.")
_INNER_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Where a .pt file keeps the tensors when nothing is said, the first that is there.
_KEYS = ("generator_ema", "generator", "model", "state_dict")

_RENAMES = (
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"head\.modulation$", "scale_shift_table"),
    (r"head\.head\.", "proj_out."),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.(self|cross)_attn\.([qkv])\.", r"\1.\2.to_\3."),
    (r"(blocks\.\d+)\.(self|cross)_attn\.o\.", r"\1.\2.to_out.0."),
    (r"(blocks\.\d+)\.(self|cross)_attn\.(norm_[qk])\.", r"\1.\2.\3."),
    (r"(blocks\.\d+)\.cross_attn\.([kv])_img\.", r"\1.cross.add_\2_proj."),
    (r"(blocks\.\d+)\.cross_attn\.norm_k_img\.", r"\1.cross.norm_added_k."),
    (r"img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
)
_ATTENTIONS = {"self": "attn1", "cross": "attn2"}
_RENAME = tuple((re.compile(pattern), into) for pattern, into in _RENAMES)


def diffusers_name(name: str) -> str:
    """The diffusers name of an original Wan name; any other name is given back as it is."""
    for pattern, into in _RENAME:
        if pattern.match(name):
            renamed = pattern.sub(into, name, count=1)
            return re.sub(r"^(blocks\.\d+)\.(self|cross)\.", lambda m: f"{m[1]}.{_ATTENTIONS[m[2]]}.", renamed)
    return name


def bare_name(name: str) -> str:
    """A name without wrappers' prefixes, wherever they stand."""
    for wrapper in _INNER_WRAPPERS:
        name = name.replace(wrapper, "")
    while wrapper := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(wrapper)
    return name


def rename(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Tensors under their diffusers names.

    Raises:
        ConfigError: several tensors come to the same name; lists them all.
    """
    renamed: dict[str, Tensor] = {}
    sources: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        target = diffusers_name(bare_name(name))
        renamed[target] = tensor
        sources.setdefault(target, []).append(name)
    twice = [f"{target} ({', '.join(names)})" for target, names in sorted(sources.items()) if len(names) > 1]
    if twice:
        raise ConfigError(f"{where}: several tensors for one weight: {'; '.join(twice)}")
    return renamed


def read_tensors(folder: Path, patterns: Iterable[str], key: str | None = None) -> dict[str, Tensor]:
    """All tensors of a folder's files, memory-mapped, under the names they have there.

    Args:
        folder: of the files.
        patterns: names or patterns of .safetensors, .pt or .pth files in it.
        key: entry of a .pt file that holds the tensors; None: found out.

    Raises:
        StorageError: a file is missing or damaged.
        ConfigError: a file holds something else than tensors.
    """
    found: dict[str, Tensor] = {}
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if not files:
            raise StorageError(f"no {pattern.lstrip('*')} file in {folder}: the model is incomplete, fetch it again")
        if pattern == "*.safetensors":
            _check_shards(folder)
        for file in files:
            found.update(read_file(file, key))
    return found


def read_file(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """All tensors of one file, memory-mapped."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError) as error:
            raise StorageError(f"the weights file is damaged or missing, fetch it again: {error}", path=file) from error
    return _pick(_read_pt(file), key, file)


def merge_lora(
    tensors: dict[str, Tensor], lora: Mapping[str, Tensor], alpha: float | None, where: str
) -> dict[str, Tensor]:
    """Merge a PEFT LoRA: ``W + (alpha / r) * B @ A`` in float32, rounded to W's type once.

    Args:
        tensors: under diffusers names; merged ones are replaced.
        lora: ``[base_model.model.]NAME.lora_A[.default].weight`` [r, in] and ``lora_B`` [out, r].
        alpha: PEFT's lora_alpha; None: as the rank.
        where: the file, for errors.

    Raises:
        ConfigError: a half is missing, a target is not there or of another shape; lists them all.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for name, tensor in lora.items():
        match = re.fullmatch(r"(.*)\.lora_(A|B)(?:\.[^.]+)?\.weight", name)
        if match is None:
            problems.append(f"not of a LoRA: {name}")
            continue
        base = match[1].removeprefix("base_model.model.")
        halves.setdefault(diffusers_name(bare_name(f"{base}.weight")), {})[match[2]] = tensor
    for name, half in sorted(halves.items()):
        if half.keys() != {"A", "B"}:
            problems.append(f"{name} has only lora_{next(iter(half))}")
        elif name not in tensors:
            problems.append(f"{name} is no weight of the model")
        else:
            shape = (half["B"].shape[0], half["A"].shape[1])
            if half["A"].shape[0] != half["B"].shape[1] or shape != tuple(tensors[name].shape):
                shapes = f"B {list(half['B'].shape)} @ A {list(half['A'].shape)}"
                problems.append(f"{name} is {list(tensors[name].shape)}, {shapes} does not fit it")
    if problems:
        raise ConfigError(f"{where}: the LoRA does not fit the model: {'; '.join(problems)}")
    for name, half in halves.items():
        scale = 1.0 if alpha is None else alpha / half["A"].shape[0]
        weight = tensors[name]
        tensors[name] = (weight.float() + scale * (half["B"].float() @ half["A"].float())).to(weight.dtype)
    return tensors


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """That the tensors are exactly those of the model.

    Raises:
        ConfigError: some are missing, left over or of the wrong shape; lists them all.
    """
    problems = [f"missing {name} {list(wanted[name])}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"not of this model: {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if tuple(found[name].shape) != wanted[name]
    ]
    if problems:
        raise ConfigError(f"{where}: weights do not fit config.json: {'; '.join(problems)}")


def _check_shards(folder: Path) -> None:
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise StorageError(f"the index of the weights is damaged, fetch it again: {error}", path=index) from error
        if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise StorageError(f"shards are missing, fetch the model again: {', '.join(missing)}", path=index)


def _read_pt(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise StorageError("the weights file is missing, fetch the model again", path=file) from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"it holds more than tensors and is not loaded: {reason}", path=file) from error
    except (RuntimeError, OSError, EOFError) as error:
        raise StorageError(f"the weights file is damaged, fetch it again: {error}", path=file) from error


def _pick(content: Any, key: str | None, file: Path) -> dict[str, Tensor]:
    """The dict of tensors inside a .pt file's content."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"it holds a {type(content).__name__}, not a dict of tensors", path=file)
    if key is not None:
        if key not in content:
            raise ConfigError(f"it has no entry {key!r}; its entries: {_some(content)}", path=file)
        content = content[key]
    elif not all(isinstance(value, Tensor) for value in content.values()):
        key = next((known for known in _KEYS if isinstance(content.get(known), Mapping)), None)
        if key is None:
            raise ConfigError(f"none of its entries is known to hold weights: {_some(content)}", path=file)
        content = content[key]
    others = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ConfigError(f"entries of {key!r} that are no tensors: {_some(others)}", path=file)
    return dict(content)


def _some(names: Iterable[str]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
