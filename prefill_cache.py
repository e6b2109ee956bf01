"""A prefix cache in memory and on disk: a repeated context is prefilled once.

An entry serves every prompt that shares a prefix with it, up to where the two diverge: a token's
keys and values depend only on the tokens before it. Entries are looked up by token ids, not text.

On disk an entry is one safetensors file (https://github.com/huggingface/safetensors, "Format") with
one tensor. A file is used only if no other user can have written it, its header is byte for byte
the one this model would write, and the SHA-256 of header and data matches; otherwise the context is
prefilled again. The header is written here because the library's key order is random.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import stat
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from cli import UserError
from files import replacing
from model import Transformer
from process import printable

FORMAT = "tokenbus prefill cache 2"
NAME = re.compile(r"([0-9a-f]{16}-\d+of\d+)-([0-9a-f]{16})\.safetensors")  # fingerprint, tokens
TEMPORARY = re.compile(r"\.\d+-" + NAME.pattern)  # the temporary names of `replacing`
STALE_S = 3600  # the writer of an older temporary file is dead
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
MAX_HEADER = 2**26  # bytes: tokens of any context
SAMPLES = 64  # values of each tensor in a fingerprint


@dataclasses.dataclass
class Entry:
    """Keys and values `[n_layer, 2, H, n, D]` of `tokens`, the first `length` of them usable."""

    tokens: list[int]
    kv: Tensor
    length: int

    def load_into(self, model: Transformer, rows: slice = slice(None)) -> None:
        """Write the first `length` positions into these rows of the model's KV cache."""
        for layer, (k, v) in zip(model.layers, self.kv, strict=True):  # [H, n, D] each
            cache = layer.attention.kv_cache
            cache.k_cache[rows, :, : self.length] = k[:, : self.length]
            cache.v_cache[rows, :, : self.length] = v[:, : self.length]


class PrefillCache:
    """Prefilled contexts: up to `max_bytes` in device memory, and up to `max_bytes` a rank on disk.

    Eviction is LRU. One cache serves several models, such as a target and its draft; several
    processes may share a directory. Raises a `UserError` if the directory is not writable.

    Under tensor parallelism each rank has its own cache and files. `lookup` is a collective: the
    ranks agree on the shortest prefix that any of them found.
    """

    def __init__(self, max_bytes: int, directory: Path | None = None):
        self.max_bytes = max_bytes
        ranks = dist.get_world_size() if distributed() else 1  # they share the directory
        self.folder = Folder(Path(directory), max_bytes * ranks) if directory else None
        self.entries: dict[str, Entry] = {}  # by name, in LRU order
        self.fingerprints: weakref.WeakKeyDictionary[Transformer, str] = weakref.WeakKeyDictionary()

    def fingerprint(self, model: Transformer) -> str:
        """The fingerprint of a model, computed once: its weights must not change afterwards."""
        if model not in self.fingerprints:
            self.fingerprints[model] = fingerprint(model)
        return self.fingerprints[model]

    def lookup(self, tokens: list[int], model: Transformer, leave: int = 1) -> Entry | None:
        """The entry with the longest common prefix with `tokens`, or None.

        The last `leave` tokens are not matched: logits need at least one token to prefill.
        """
        wanted, model_id = tokens[: max(0, len(tokens) - leave)], self.fingerprint(model)
        mine = [entry for name, entry in self.entries.items() if name.startswith(model_id + "-")]
        found = max(mine, key=lambda entry: common_length(entry.tokens, wanted), default=None)
        length = common_length(found.tokens, wanted) if found else 0
        if self.folder and length < len(wanted):
            on_disk = self.folder.find(wanted, length, model_id, model)
            if on_disk:
                found, length = on_disk, common_length(on_disk.tokens, wanted)
                self.keep(name_of(model_id, found.tokens), found)
        length = agree(length, model.device)
        if not length:
            return None
        name = name_of(model_id, found.tokens)
        if name in self.entries:
            self.entries[name] = self.entries.pop(name)  # most recently used
        if self.folder:
            self.folder.touch(name)
        return dataclasses.replace(found, length=length)

    def store(self, tokens: list[int], model: Transformer, row: int = 0) -> None:
        """Store the keys and values of `tokens`, the first positions in a row of the KV cache."""
        if not 0 < len(tokens) <= model.max_seq_length:
            raise ValueError(f"{len(tokens)} tokens, and a cache of {model.max_seq_length}")
        caches = [layer.attention.kv_cache for layer in model.layers]
        pairs = [(cache.k_cache[row], cache.v_cache[row]) for cache in caches]  # [H, S + 1, D]
        kv = torch.stack([torch.stack(pair)[:, :, : len(tokens)] for pair in pairs])
        entry = Entry([*tokens], kv.contiguous(), len(tokens))
        if kv.nbytes > self.max_bytes:
            warn(
                f"{len(tokens)} tokens of context take {kv.nbytes / 1e9:.2f} GB, and the prefill "
                f"cache is limited to {self.max_bytes / 1e9:.2f}; they are not kept"
            )
            return
        model_id = self.fingerprint(model)
        self.keep(name_of(model_id, entry.tokens), entry)
        if self.folder:
            self.folder.write(model_id, entry)

    def keep(self, name: str, entry: Entry) -> None:
        """Keep an entry in memory, and evict least recently used ones until it fits."""
        self.entries.pop(name, None)
        if entry.kv.nbytes <= self.max_bytes:
            self.entries[name] = entry
        used = sum(entry.kv.nbytes for entry in self.entries.values())
        while used > self.max_bytes:
            used -= self.entries.pop(next(iter(self.entries))).kv.nbytes

    def prefill_context(
        self,
        context: list[int],
        model: Transformer,
        prefill: Callable[[list[list[int]], int], Tensor],
    ) -> int:
        """Store a context; returns how many of its tokens had to be prefilled.

        `prefill(prompts, start)` should be that of an uncompiled `Engine` without a prefill cache.
        It runs one row whatever the batch size, so shapes, and with them rounding, do not depend
        on flags.
        """
        entry = self.lookup(context, model, leave=0)
        start = entry.length if entry else 0
        if start < len(context):
            if entry:
                entry.load_into(model)
            prefill([context], start)
            self.store(context, model)
        return len(context) - start

    def restore_prefix(self, prompts: list[list[int]], model: Transformer) -> int:
        """Load the stored part of the prompts' common prefix into every row of the KV cache.

        Returns its length in tokens. The last token of a prompt is never part of it.
        """
        shared = os.path.commonprefix([prompt[:-1] for prompt in prompts if prompt])
        entry = self.lookup(shared, model, leave=0)
        if entry is None:
            return 0
        entry.load_into(model)
        return entry.length


# ------------------------------------------------------------------------------------------------
# On disk


class Folder:
    """The cache files of a directory, limited to `max_bytes`."""

    def __init__(self, path: Path, max_bytes: int):
        self.path, self.max_bytes = path, max_bytes
        self.tokens: dict[str, list[int]] = {}  # by name, which contains their hash
        self.warned: set[str] = set()
        advice = "name a folder of yours with --prefill_cache"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {path} ({error}); {advice}") from None
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"the folder {path} cannot be written; {advice}")

    def warn(self, name: str, why: str) -> None:
        """Warn once that a file is ignored."""
        if name not in self.warned:
            warn(f"{self.path / name} {why}; it is ignored")
        self.warned.add(name)

    def listing(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except OSError:  # the directory was removed meanwhile
            return []

    def names(self) -> Iterator[re.Match]:
        """The finished files, as matches of NAME."""
        for name in sorted(self.listing()):
            if match := NAME.fullmatch(name):
                yield match
            elif name.endswith(".safetensors") and not name.startswith("."):
                self.warn(name, "is not a file of the prefill cache")

    def find(
        self, wanted: list[int], length: int, model_id: str, model: Transformer
    ) -> Entry | None:
        """The entry with the longest common prefix with `wanted`, if longer than `length`.

        Files are read whole, so one is skipped if less than a sixteenth of it would be used.
        """
        found = []
        for match in self.names():
            tokens = self.tokens_of(match[0]) if match[1] == model_id else []
            shared = common_length(tokens, wanted)
            if shared > length and shared * 16 >= len(tokens):
                found.append((-shared, len(tokens), match[0]))
        for *_, name in sorted(found):
            if entry := self.checked(name, lambda name: read(self.path / name, model_id, model)):
                return entry
        return None

    def tokens_of(self, name: str) -> list[int]:
        """The token ids in a file's header; none, with a warning, if it cannot be read."""
        if name not in self.tokens:
            tokens = self.checked(name, lambda name: read_tokens(self.path / name))
            if tokens is None:
                return []
            self.tokens[name] = tokens
        return self.tokens[name]

    def checked(self, name: str, reader):
        """`reader(name)`, or None if the file is gone or, with a warning, unusable."""
        try:
            return reader(name)
        except FileNotFoundError:  # evicted by another process
            return None
        except OSError as error:
            return self.warn(name, f"cannot be read ({error.strerror})")
        except ValueError as error:
            return self.warn(name, str(error))

    def touch(self, name: str) -> None:
        """Mark a file as used now."""
        with contextlib.suppress(OSError):  # missing, or another user's
            os.utime(self.path / name)

    def write(self, model_id: str, entry: Entry) -> None:
        """Write an entry, readable by its owner only; evict files until the rest fits.

        A failure only warns: the generated text does not depend on it.
        """
        data = bytearray(entry.kv.nbytes)
        flat = torch.frombuffer(data, dtype=entry.kv.dtype)
        flat.copy_(entry.kv.flatten())
        shape, dtype = entry.kv.shape, entry.kv.dtype
        digest = digest_of(make_header(model_id, entry.tokens, shape, dtype), data)
        header = make_header(model_id, entry.tokens, shape, dtype, digest)
        path = self.path / name_of(model_id, entry.tokens)
        if len(header) + len(data) > self.max_bytes:
            return warn(f"{path} would exceed the limit of the prefill cache; it is not written")
        if path.is_symlink() or (os.path.exists(path) and not os.path.isfile(path)):
            return  # `replacing` would follow it
        try:
            with replacing(path) as temporary:
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                with open(os.open(temporary, flags, 0o600), "wb") as file:
                    os.fchmod(file.fileno(), 0o600)  # a killed process may have left it
                    file.write(header)
                    file.write(data)
        except UserError as error:
            warn(str(error))
        self.warned.discard(path.name)
        self.trim()

    def trim(self) -> None:
        """Evict least recently used files, including other processes', until the rest fits.

        Files still being written count but stay, unless their age shows that the writer is dead.
        """
        files, used = [], 0
        for name in self.listing():
            made, making = NAME.fullmatch(name), TEMPORARY.fullmatch(name)
            if not (made or making):
                continue
            with contextlib.suppress(OSError):  # evicted by another process
                found = os.stat(self.path / name)
                if making and time.time() - found.st_mtime > STALE_S:
                    os.unlink(self.path / name)
                    continue
                used += found.st_size
                if made:
                    files.append((found.st_mtime_ns, found.st_size, name))
        for _, size, name in sorted(files):
            if used <= self.max_bytes:
                return
            with contextlib.suppress(OSError):
                os.unlink(self.path / name)
            used -= size


def make_header(
    model_id: str, tokens: list[int], shape: torch.Size, dtype: torch.dtype, digest: str = "0" * 64
) -> bytes:
    """The safetensors header of an entry: its length, and JSON."""
    size = shape.numel() * dtype.itemsize
    metadata = {"format": FORMAT, "fingerprint": model_id, "sha256": digest}
    metadata["tokens"] = " ".join(map(str, tokens))
    kv = {"dtype": DTYPES[dtype], "shape": [*shape], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": metadata, "kv": kv}).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    return len(text).to_bytes(8, "little") + text


def read_header(file) -> tuple[bytes, dict]:
    """The header of an open file and its metadata; `ValueError` if there is none."""
    start = file.read(8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > min(MAX_HEADER, os.fstat(file.fileno()).st_size):
        raise ValueError("is truncated or not a safetensors file")
    header = file.read(size)
    try:
        metadata = json.loads(header)["__metadata__"]
        return start + header, {key: metadata[key] + "" for key in ("format", "sha256", "tokens")}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("is damaged or not a file of the prefill cache") from None


def open_own(path: Path) -> BinaryIO:
    """Open a file that only this user can have written; `ValueError` if another may have.

    The checksum detects accidents, not malice: anyone can compute it.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe would wait for a writer
    file = open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))
    found = os.fstat(file.fileno())
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return file
    file.close()
    raise ValueError("may have been written by another user")


def read_tokens(path: Path) -> list[int]:
    """The token ids of an entry; `ValueError` if their hash is not the one in its name."""
    with open_own(path) as file:
        metadata = read_header(file)[1]
    if metadata["format"] != FORMAT:
        raise ValueError(f"has the format {metadata['format'][:80]!r}, not {FORMAT!r}")
    if hash_of(metadata["tokens"]) != NAME.fullmatch(path.name)[2]:
        raise ValueError("is damaged: its tokens do not match its name")
    return [int(token) for token in metadata["tokens"].split()]


def read(path: Path, model_id: str, model: Transformer) -> Entry:
    """Read an entry of this model; `ValueError` unless every byte is as written."""
    tokens = read_tokens(path)
    slots = model.layers[0].attention.kv_cache.k_cache  # [B, H, S + 1, D]
    shape = torch.Size((len(model.layers), 2, slots.shape[1], len(tokens), slots.shape[3]))
    with open_own(path) as file:
        header, metadata = read_header(file)
        if header != make_header(model_id, tokens, shape, slots.dtype, metadata["sha256"]):
            raise ValueError("is damaged or of another model: its header does not match")
        data = bytearray(shape.numel() * slots.dtype.itemsize)
        if file.readinto(data) != len(data) or file.read(1):
            raise ValueError("is damaged: its length does not match its header")
    if digest_of(make_header(model_id, tokens, shape, slots.dtype), data) != metadata["sha256"]:
        raise ValueError("is damaged: its checksum does not match")
    kv = torch.frombuffer(data, dtype=slots.dtype).view(shape)
    return Entry(tokens, kv.to(slots.device), len(tokens))


# ------------------------------------------------------------------------------------------------
# Identity of contexts and models


def common_length(a: list[int], b: list[int]) -> int:
    """Length of the common prefix of two token sequences."""
    return len(os.path.commonprefix([a, b]))  # it takes lists as well as paths


def hash_of(tokens: list[int] | str) -> str:
    """A hash of token ids, or of their text in a file's header: 16 hexadecimal digits."""
    text = tokens if isinstance(tokens, str) else " ".join(map(str, tokens))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def name_of(model_id: str, tokens: list[int]) -> str:
    """The file name of these tokens for the model with this fingerprint."""
    return f"{model_id}-{hash_of(tokens)}.safetensors"


def digest_of(header: bytes, data: bytearray) -> str:
    """The SHA-256 of a file, computed with zeros in place of itself."""
    digest = hashlib.sha256(header)
    digest.update(data)
    return digest.hexdigest()


def fingerprint(model: Transformer) -> str:
    """Identifies this model's keys and values: a hash of 16 digits, and the rank of the world size.

    The hash covers the configuration, the shape and dtype of a cached position, what decides
    rounding (device type, version of torch, kernels) and, for every tensor, its name, shape, dtype
    and 64 evenly spaced values. A 140 GB file need not be read; an edit that misses all sampled
    values goes unnoticed.
    """
    cache = model.layers[0].attention.kv_cache
    slots, kernels = cache.k_cache, cache.has_kernels
    facts = [FORMAT, torch.__version__, slots.device.type, str(slots.dtype), kernels]
    facts += [slots.shape[1], slots.shape[3], dataclasses.asdict(model.args)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        step = tensor.numel() // SAMPLES | 1  # odd, so as not to stay in one column
        values = tensor.reshape(-1)[::step].contiguous()
        digest.update(bytes(values.view(torch.uint8).tolist()))
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    return f"{digest.hexdigest()[:16]}-{rank}of{world}"


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def agree(length: int, device: torch.device) -> int:
    """The minimum over the ranks: all must prefill the same tokens."""
    if not distributed() or dist.get_world_size() == 1:
        return length
    least = torch.tensor(length, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr)
