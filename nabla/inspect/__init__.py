"""What people look at: the mass a mask retains, pictures of masks, and the machine they run on."""

from nabla.inspect.environment import environment
from nabla.inspect.picture import draw_mask
from nabla.inspect.recall import recall

__all__ = ["draw_mask", "environment", "recall"]
