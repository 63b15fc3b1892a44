"""Parts of multi-resolution looped Transformers and their runtime, in plain PyTorch."""

from spiralformer.block import Block, BlockConfig
from spiralformer.generate import generate, sample_next
from spiralformer.init import init_weights
from spiralformer.model import SpiralFormer

__all__ = ["Block", "BlockConfig", "SpiralFormer", "generate", "init_weights", "sample_next"]
