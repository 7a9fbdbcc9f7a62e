"""Who is shown which arm.

A user's arm is drawn by weighted rendezvous hashing (Thaler & Ravishankar 1998; the weights: Schindler & Schomaker 2005): each arm gets a number
-ln(u) / share, u in (0, 1) a hash of (salt, arm, user), and the smallest wins. Nothing is stored, so the arm is the same in every process and after
every restart; and when one arm's share changes and the others keep their proportions, only users who must move do, to or from that arm.
"""

import hashlib
import math
from collections.abc import Mapping


class Assignment:
    """User to name. `shares` are by name and need not add up to 1; the names and `salt` make the hash."""

    def __init__(self, shares: Mapping[str, float], salt: str) -> None:
        self.shares = {name: share for name, share in shares.items() if share > 0}
        if not self.shares:
            raise ValueError(f"shares {dict(shares)}: expected one above 0")
        # An arm's name holds no zero byte, so that no salt and name read like another salt and name.
        self._keys = [(name, share, hashlib.blake2b(f"{salt}\0{name}".encode()).digest()) for name, share in self.shares.items()]
        self._only = self._keys[0][0] if len(self._keys) == 1 else None

    def of(self, user_key: str) -> str:
        if self._only is not None:
            return self._only
        user = user_key.encode("utf-8", "surrogatepass")
        return min(self._keys, key=lambda arm: -math.log(_uniform(user, arm[2])) / arm[1])[0]


def _uniform(user: bytes, key: bytes) -> float:
    """In (0, 1), 53 bits."""
    return ((int.from_bytes(hashlib.blake2b(user, key=key, digest_size=8).digest()) >> 11) + 0.5) * 2.0**-53
