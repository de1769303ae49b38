"""Methods, one folder a family, one file a paper. Imported by `hf_quant.method` when a method is asked for."""

from hf_quant._src import source_dir as _source_dir

__path__ += _source_dir("plugins")
