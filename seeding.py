"""Seeds for every use of randomness, each a function of the run's seed and of what it is for.

Dropout in step 7, the order of the second pass over a data set, the plan of a step: each has a seed of its own. Nothing
has to be saved for a resumed run to draw the same, and no flag can shift the draws of another.
"""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed from 0 to 2 ** 63 - 1 for a purpose, such as derive_seed(0, "dropout", "finetune", 7)."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
