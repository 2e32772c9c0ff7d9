"""Words that ranks tell each other."""

from array import array

from edgekv.ranks.orders import prefix_hashes


def test_a_hash_is_of_all_tokens_up_to_its_end():
    tokens = [5, 6, 7, 8, 200_000]
    first, second, third = prefix_hashes(tokens, [2, 3, 5])
    assert prefix_hashes(array("I", tokens), [2, 5]) == [first, third]
    assert prefix_hashes([5, 9, 7], [2, 3])[1] != second
    assert prefix_hashes(tokens[:4], [2, 3, 5])[:2] == [first, second]
    assert prefix_hashes(tokens[:4], [2, 3, 5])[2] != third
    assert all(0 <= one < 1 << 62 for one in (first, second, third))
