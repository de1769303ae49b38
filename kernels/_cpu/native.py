"""The C++ product: compiled where it first runs, kept in the cache folder, called by address."""

import ctypes
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hf_quant.kernels._cpu.layout import KINDS, Kind, block

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-exceptions", "-fno-rtti", "-w")
PARTS = (
    "ahead",
    "amx",
    "avx512",
    "avx512_operands",
    "avx2",
    "avx2_operands",
    "dense",
    "in_tiles",
    "operands",
    "outputs",
    "tokens",
    "unfold",
    "vectors",
)
SOURCES = ("product.cpp", *(f"{name}.h" for name in PARTS))
CPU = torch.device("cpu")
WIDE = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16", "-mfma")
NARROW = ("-mavx2", "-mfma", "-mf16c")
TILES = ("-mamx-tile", "-mamx-int8", "-mamx-bf16")


PRODUCT = struct.Struct(
    "@26q"
)  # `Product` of vectors.h. One call packs it: between two layers Python is out of the cache


class Grid(NamedTuple):
    """What tokens become integers on, with scales (and zero points) for each, as `runtime.activation` has it."""

    low: int
    high: int
    asymmetric: bool


Ranges = tuple[Tensor, Tensor | None]  # of tokens: scales and zero points, float32 `[M]`


def wide() -> bool:
    """Whether it is made for AVX-512 with VNNI and BF16; without them it multiplies floats."""
    capable = torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()
    return capable and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def tiled() -> bool:
    """Whether it has AMX as well, and the system grants it."""
    return wide() and torch.cpu._is_amx_tile_supported() and bool(library().hf_quant_tiles())


def few(kind: Kind) -> int:
    """Tokens up to which codes are decoded in registers (`by_tokens` of product.cpp)."""
    return int(library().hf_quant_few(KINDS.index(kind)))


@cache
def why_not() -> str | None:
    """None where the product runs, else the reason why not."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return "made for x86-64 on Linux"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        return "needs a processor with AVX2"
    try:
        library()
    except (OSError, subprocess.SubprocessError) as error:
        return f"could not be compiled here ({str(error).splitlines()[0][:120]})"
    return None


@cache
def library() -> ctypes.CDLL:
    """The compiled file, loaded.

    Raises:
        OSError: no C++ compiler (`$CXX`, g++, clang++), no folder to write to, or symbols of OpenMP that torch lacks.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler: neither $CXX, g++ nor clang++")
    sources = {name: files(__package__).joinpath(name).read_bytes() for name in SOURCES}
    if wide() and torch.cpu._is_amx_tile_supported():
        with suppress(subprocess.SubprocessError):  # gcc knows them since 11
            return _loaded((compiler, *FLAGS, *WIDE, *TILES), sources)
    return _loaded((compiler, *FLAGS, *(WIDE if wide() else NARROW)), sources)


def _loaded(command: tuple[str, ...], sources: dict[str, bytes]) -> ctypes.CDLL:
    stamp = hashlib.sha256(b"".join(sources.values()) + " ".join(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_quant" / "cpu"
    made = folder / f"product-{stamp}.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(command, sources, made)
    found = ctypes.CDLL(str(made))
    found.hf_quant_product.argtypes = [ctypes.c_char_p]
    found.hf_quant_tokens.argtypes = _types("plllllpppppl")
    found.hf_quant_unfold.argtypes = _types("pllplpllpl")
    found.hf_quant_dense.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64]
    found.hf_quant_tiles.restype = found.hf_quant_few.restype = ctypes.c_int64
    found.hf_quant_few.argtypes = [ctypes.c_int64]
    for function in (found.hf_quant_product, found.hf_quant_dense, found.hf_quant_tokens, found.hf_quant_unfold):
        function.restype = None
    return found


def _types(letters: str) -> list[type]:
    return [{"p": ctypes.c_void_p, "l": ctypes.c_int64}[letter] for letter in letters]


def _compile(compiler: tuple[str, ...], sources: dict[str, bytes], made: Path) -> None:
    """Two steps, so that OpenMP's symbols stay open: they are found in torch's own runtime, and threads are shared."""
    with tempfile.TemporaryDirectory(dir=made.parent) as work:
        text, binary, whole = (Path(work) / name for name in ("product.cpp", "product.o", "product.so"))
        for name, source in sources.items():
            (Path(work) / name).write_bytes(source)
        for step in ((*compiler, "-c", text, "-o", binary), (compiler[0], "-shared", binary, "-o", whole)):
            subprocess.run([*map(str, step)], check=True, capture_output=True, timeout=300)
        whole.replace(made)


def multiply(
    x: Tensor,
    blob: list[Tensor],
    N: int,
    kind: Kind,
    group: int,
    middle: int,
    dtype: torch.dtype,
    grid: Grid | None = None,
    ranges: Ranges | None = None,
) -> Tensor:
    """`y = x W^T`, `[M, N]` in `dtype` (bfloat16 or float32).

    Args:
        x: bfloat16 (float32 too unless `wide`) `[M, K]`, or with a grid bfloat16 or float32; contiguous.
        blob: words of `layout.pack`; scales and shifts `[N / 16, G, 16]` (bfloat16 or float32); what `table` gives;
            sums of the dequantized rows float32 `[N]` (up to whole 16), for tokens with zero points; a scale of all
            weights float32 `[1]`. All but the words may be empty.
        N: outputs.
        kind: of codes and tokens.
        group: columns that share a scale or a table, whole blocks, or all.
        middle: for integers, the code that a shift of 0 takes for zero.
        dtype: of the result.
        grid: where tokens become integers first.
        ranges: theirs, contiguous; without them each token has its own.
    """
    words, scale, shift, table, rows, tensor = blob
    M, K = x.shape
    y_MN = torch.empty(M, N, dtype=dtype, device=CPU)
    sx, zx = (None, None) if ranges is None else ranges
    width = words.shape[1] * block(kind)[1]
    group = min(group, width)
    product = PRODUCT.pack(
        x.data_ptr(),
        words.data_ptr(),
        table.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        rows.data_ptr(),
        tensor.data_ptr(),
        0 if sx is None else sx.data_ptr(),
        0 if zx is None else zx.data_ptr(),
        y_MN.data_ptr(),
        M,
        N,
        K,
        width,
        group,
        -(-width // group),
        KINDS.index(kind),
        middle,
        x.dtype == torch.bfloat16,
        scale.dtype == torch.bfloat16,
        shift.dtype == torch.bfloat16,
        dtype == torch.bfloat16,
        *(grid or (0, 0, 0)),
        torch.get_num_threads(),
    )
    library().hf_quant_product(product)
    return y_MN


def dense(
    blob: list[Tensor], N: int, columns: slice, kind: Kind, group: int, middle: int, dtype: torch.dtype
) -> Tensor:
    """Some columns of the weight, transposed: `W_NK[:, columns].T`, each number rounded to `dtype` once.

    Args:
        blob: see `multiply`.
        N: outputs.
        columns: from the beginning of a block.
        kind: one whose values are in a table of 16, or that has no table.
        group: see `multiply`.
        middle: the code that stands for 0 where no table says so.
        dtype: bfloat16 or float32.
    """
    words, scale, shift, table, _, tensor = blob
    W_KN = torch.empty(columns.stop - columns.start, N, dtype=dtype, device=CPU)
    width = words.shape[1] * block(kind)[1]
    group = min(group, width)
    at = [t.data_ptr() for t in (words, table, scale, shift)]
    narrow = [t.dtype == torch.bfloat16 for t in (scale, shift, W_KN)]
    facts = (0, N, width, width, group, -(-width // group), KINDS.index(kind), middle, False, *narrow, 0, 0, 0)
    record = PRODUCT.pack(0, *at, 0, tensor.data_ptr(), 0, 0, W_KN.data_ptr(), *facts, torch.get_num_threads())
    library().hf_quant_dense(record, columns.start, columns.stop)
    return W_KN


def table(values: Tensor, kind: Kind) -> Tensor:
    """What codes stand for, float32 `[16 or 256]`, or `[N / 16, G, 16, 16]` for rows, as the product reads it."""
    if kind in ("levels8", "rows4"):
        return values.bfloat16().view(torch.uint8)
    high = values.repeat(2).bfloat16()  # a lookup reads five bits
    low = (values.repeat(2) - high.float()).bfloat16()
    return torch.cat([t.view(torch.uint8) for t in (high, values.float(), low)])


def quantize(x_MK: Tensor, grid: Grid, ranges: Ranges | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the product does first where it is given a grid: the codes of `runtime.activation.quantize_input`.

    Codes of unsigned 8-bit grids and their zero points are less 128. A token with NaN has a scale that is NaN.

    Args:
        x_MK: bfloat16 or float32, contiguous.
        grid: of all tokens.
        ranges: see `multiply`.

    Returns:
        codes int8 `[M, K]`, scales float32 `[M]`, zero points float32 `[M]` or None.
    """
    M, K = x_MK.shape
    codes, scale = torch.empty(M, K, dtype=torch.int8), torch.empty(M)
    zero = torch.empty(M) if grid.asymmetric else None
    sx, zx = (None, None) if ranges is None else ranges
    library().hf_quant_tokens(
        x_MK.data_ptr(),
        x_MK.dtype == torch.bfloat16,
        M,
        K,
        grid.low,
        grid.high,
        None if sx is None else sx.data_ptr(),
        None if zx is None else zx.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, scale, zero


def unfold(x: Tensor, windows: Tensor, runs: Tensor, run: int) -> Tensor:
    """Rows of `run` values from each of `runs`, counted from each of `windows`: `[B, ...] -> [B, P, R run]`.

    Args:
        x: contiguous.
        windows: int64 `[P]`, in bytes from the beginning of a sample.
        runs: int64 `[R]`, in bytes.
        run: values.
    """
    rows, bytes_ = x.new_empty(len(x), len(windows), len(runs) * run), run * x.element_size()
    library().hf_quant_unfold(
        x.data_ptr(),
        len(x),
        x.stride(0) * x.element_size(),
        windows.data_ptr(),
        len(windows),
        runs.data_ptr(),
        len(runs),
        bytes_,
        rows.data_ptr(),
        torch.get_num_threads(),
    )
    return rows
