"""Parts of multi-resolution looped Transformers and their runtime, in plain PyTorch."""

from spiralformer.block import Block, BlockConfig
from spiralformer.decoding import DecodeState
from spiralformer.generate import Sampling, generate, sample_next
from spiralformer.init import init_weights
from spiralformer.model import SpiralFormer

__all__ = [
    "Block",
    "BlockConfig",
    "DecodeState",
    "Sampling",
    "SpiralFormer",
    "generate",
    "init_weights",
    "sample_next",
]
