"""The diffusion process, whatever the network: its noise, its sampling, its training.

What training needs of a network are two functions; what sampling needs is `sampler.Sampled`.
"""
# B rows, T target length, D latent

from collections.abc import Callable

from torch import Tensor

# (z_t [B, T, D], t [], [B, 1] or [B, T], self_cond [B, T, D]) -> z0_hat [B, T, D]
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
# z0_hat -> the self_cond that the network is given for it, both [B, T, D]
ToSelfCond = Callable[[Tensor], Tensor]
