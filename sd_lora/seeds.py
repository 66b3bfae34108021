"""Randomness as a function: every draw has an address instead of a history.

What a sample gets (noise, timestep, crop, flip, caption) depends on the run's seed and on where
the sample stands, never on what was drawn before it. So resuming, caching, validating and the
number of workers or processes cannot change a training curve.
"""

import hashlib

import torch


def seed_for(*address: int | str) -> int:
    """Returns a 63-bit seed for an address such as (run seed, "noise", position)."""
    digest = hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*address: int | str) -> torch.Generator:
    """Returns a CPU generator for an address; CPU, so that draws do not depend on the device."""
    return torch.Generator().manual_seed(seed_for(*address))


def uniform(*address: int | str) -> float:
    """Returns a number in [0, 1) for an address."""
    return seed_for(*address) / 2**63


def shuffled(n: int, *address: int | str) -> list[int]:
    """Returns the permutation of range(n) for an address."""
    return torch.randperm(n, generator=generator_for(*address)).tolist()
