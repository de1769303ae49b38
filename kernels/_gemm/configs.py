"""Which tile runs: tuned on this device, else shipped for its kind, else for the nearest kind."""

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from hf_quant.kernels._gemm.operand import TABLES, WHOLE_ROW, Weight

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # tokens up to which a configuration serves; beyond, the last
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
RESERVED = 1 << 10  # bytes that a program has besides


@dataclass(frozen=True, slots=True)
class Config:
    """One way to run a product.

    Attributes:
        way: "vector" multiplies and adds, "tensor" uses matrix instructions, "dense" dequantizes once and calls the
            vendor's product, "vendor" calls that at once.
        BM: tokens of a tile.
        BN: outputs of a tile, a multiple of 16.
        BK: columns multiplied at once, at least those of a block.
        splits: parts into which K is cut.
        num_warps: warps of a program.
        num_stages: blocks on their way from memory.
    """

    way: Literal["vector", "tensor", "dense", "vendor"]
    BM: int = 16
    BN: int = 64
    BK: int = 128
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def blocks(self, weight: Weight, itemsize: int) -> int:
        """Block columns multiplied at once. Products of integers have one scale."""
        columns, along = weight.shuffle.columns, weight.shuffle.blocks(weight.shape)[1]
        count = max(1, self.BK // columns)
        while count > along or (itemsize == 1 and weight.span != WHOLE_ROW and weight.group % (count * columns)):
            count //= 2
        return max(1, count)

    def shared_bytes(self, weight: Weight, itemsize: int) -> int:
        """What the loop keeps in shared memory: stages of words, tokens and scales, or the tile on its way out."""
        shuffle, blocks = weight.shuffle, self.blocks(weight, itemsize)
        tile = self.BN // 16 * shuffle.words * 512 + self.BM * shuffle.columns * itemsize
        stage = tile * blocks + 8 * self.BN
        return max(stage * max(1, self.num_stages - 1), self.BN * self.BM * 4)


def bucket(tokens: int) -> int:
    """The smallest bucket that holds so many tokens."""
    return next((b for b in BUCKETS if tokens <= b), BUCKETS[-1] * 2)


@cache
def kind(device: torch.device) -> str:
    """The device as a compilation target: "sm_90", "gfx942"."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def shipped() -> dict[str, dict[str, Config]]:
    """Target -> bucket -> configuration, of `configs.json`."""
    table = json.loads(files(__package__).joinpath("configs.json").read_text())
    return {target: {b: Config(**c) for b, c in row.items()} for target, row in table["targets"].items()}


def key(weight: Weight, dtype: torch.dtype, tokens: int) -> str:
    """What a configuration is tuned for."""
    (N, K), name = weight.shape, str(dtype).removeprefix("torch.")
    stored = f"{weight.decode}{weight.bits} {weight.ranges}"
    return f"{stored} {name} {N}x{K} group {weight.group} tokens {bucket(tokens)}"


@cache
def choose(weight: Weight, dtype: torch.dtype, tokens_bucket: int, device: torch.device) -> Config:
    """The configuration for one bucket of tokens."""
    tuned = remembered(device).get(key(weight, dtype, tokens_bucket))
    if tuned is not None:
        return tuned
    return fitted(default(kind(device), tokens_bucket), weight, dtype, device)


def default(target: str, tokens_bucket: int) -> Config:
    """The shipped configuration, of the newest NVIDIA machine not newer than this one where it has none of its own."""
    table = shipped()
    if target not in table:
        older = [t for t in table if t.startswith("sm_") and target.startswith("sm_") and int(t[3:]) <= int(target[3:])]
        target = max(older, key=lambda t: int(t[3:]), default="gfx942" if target.startswith("gfx") else "sm_80")
    row = table[target]
    return next((c for b, c in row.items() if tokens_bucket <= int(b)), Config("dense"))


def fit(config: Config, weight: Weight, itemsize: int, target: str, limit: int) -> Config:
    """The configuration with fewer stages, fewer tokens, then fewer outputs, until it fits a machine.

    Args:
        config: what is wished for.
        weight: what is multiplied.
        itemsize: bytes of a token's value.
        target: the machine's kind.
        limit: bytes of its shared memory.
    """
    table = weight.decode in TABLES
    through = (table and target.startswith("gfx")) or itemsize == 4  # weights that go through shared memory

    def columns(config: Config) -> int:
        return config.blocks(weight, itemsize) * weight.shuffle.columns

    def shared(config: Config) -> int:
        return config.shared_bytes(weight, itemsize) + (8 * config.BN * columns(config) if through else 0)

    def crowded(config: Config) -> bool:
        """Whether a thread lacks registers for its decoded weights and its sums."""
        threads, weights = 32 * config.num_warps, config.BN * columns(config)
        if not target.startswith(("sm_8", "sm_9")):  # Blackwell's compiler spills, AMD's fragments are larger
            return weights > 32 * threads
        return (weights if table else weights // 2) + config.BN * config.BM > 160 * threads

    def smaller(config: Config, tokens: int) -> Config | None:
        """Fewer columns, then fewer tokens but not below so many, then fewer outputs; None: no more."""
        if config.blocks(weight, itemsize) > 1:
            return replace(config, BK=columns(config) // 2)
        if tokens < config.BM:
            return replace(config, BM=config.BM // 2)
        return replace(config, BN=config.BN // 2) if config.BN > 16 else None

    while config.way != "dense" and crowded(config) and (less := smaller(config, 32)):
        config = less
    while shared(config) > limit:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif less := smaller(config, 16):
            config = less
        else:
            break
    return config


def fitted(config: Config, weight: Weight, dtype: torch.dtype, device: torch.device) -> Config:
    """`fit` for this device, with K cut into parts until every processor has 16 warps: as many as end first, because
    where a processor has no room for its programs, some wait for others.
    """
    limit, processors = limits(device)
    config = fit(config, weight, dtype.itemsize, kind(device), limit)
    if config.way == "dense" or config.splits == 1:
        return config
    tiles = -(-weight.shape[0] // config.BN)
    at_once = processors * max(1, limit // (config.shared_bytes(weight, dtype.itemsize) + RESERVED))
    steps = weight.shuffle.blocks(weight.shape)[1] // config.blocks(weight, dtype.itemsize)
    most = max(1, min(config.splits, steps, 16 * processors // (tiles * config.num_warps)))

    def duration(splits: int) -> tuple[int, int]:
        return -(-tiles * splits // at_once) * -(-steps // splits), -splits

    return replace(config, splits=min(range(1, most + 1), key=duration))


def limits(device: torch.device) -> tuple[int, int]:
    """(bytes of shared memory a program may have, processors)."""
    if device.type != "cuda":
        return SHARED["sm_80"], 108
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", SHARED.get(kind(device), 64 << 10))
    return shared, properties.multi_processor_count


def cache_file(device: torch.device) -> Path:
    """Where the tuned configurations of this device and these versions are kept."""
    import triton

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    slug = "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()
    return root / "hf_quant" / "triton" / f"{slug}-torch{torch.__version__}-triton{triton.__version__}.json"


@cache
def remembered(device: torch.device) -> dict[str, Config]:
    """What was tuned before; a file that cannot be read counts as none."""
    try:
        return {k: Config(**c) for k, c in json.loads(cache_file(device).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(device: torch.device, found: dict[str, Config]) -> None:
    """Keep tuned configurations for later processes and use them from the next call on."""
    path, table = cache_file(device), remembered(device) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({k: asdict(c) for k, c in sorted(table.items())}, indent=1))
    part.replace(path)
    remembered.cache_clear()
    choose.cache_clear()
