from __future__ import annotations

from qdexport.check.whole import whole_network
from tests.check.conftest import Compiled


def test_a_right_file_reaches_the_noise_floor(stepped: Compiled) -> None:
    seen: list[tuple[int, int]] = []
    whole = whole_network(stepped.model, stepped.path, stepped.io, lambda *state: seen.append(state))
    assert whole.sqnr_db >= whole.noise_floor_db - 1
    # and not by much: FP16 rounds to nearest where the floor rounds at random, which is 3 dB
    assert whole.sqnr_db <= whole.noise_floor_db + 6
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
