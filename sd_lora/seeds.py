"""Randomness as a function: every draw has an address instead of a history.

Noise, timestep, crop, flip and caption of a sample depend on the run's seed and the sample's
position, never on earlier draws. So resuming, caching, validating and the number of workers or
processes cannot change a training curve.
"""

import hashlib

import torch

Address = tuple[int | str, ...]
"""Parts of a random seed: run seed, kind of item, position, …"""


def seed_for(*address: int | str) -> int:
    """A 63-bit seed for an address, for example (run seed, "noise", position)."""
    digest = hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*address: int | str) -> torch.Generator:
    """A generator for an address; on the CPU, so that draws do not depend on the device."""
    return torch.Generator().manual_seed(seed_for(*address))


def uniform(*address: int | str) -> float:
    """A number in [0, 1) for an address."""
    return seed_for(*address) / 2**63


def shuffled(n: int, *address: int | str) -> list[int]:
    """A permutation of range(n) for an address."""
    return torch.randperm(n, generator=generator_for(*address)).tolist()
