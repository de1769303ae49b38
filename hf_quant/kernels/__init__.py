"""Packed formats, one folder each: `format.py` (codec and reference), kernels beside it. See `hf_quant.formats`."""

from hf_quant._src import source_dir as _source_dir

__path__ += _source_dir("kernels")
