"""Secure aggregation's messages, damaged in every way, fed to their readers and to its machines."""

from tests.comm.secure_rounds import attack, attack_machines

MESSAGES, ROUNDS = 200_000, 3_000


def test_damaged_messages_are_refused_by_name_and_none_is_taken_for_another():
    """None raises anything else; what is accepted is, to the last bit, of the agreed form."""
    found = attack(MESSAGES, seed=1)
    assert sum(found.values()) == MESSAGES
    assert found["accepted"] < MESSAGES / 2  # those whose keys, ciphertexts or vectors changed


def test_damaged_messages_give_the_right_sum_or_a_typed_error():
    """But for masked vectors, of which nothing can be said."""
    found = attack_machines(ROUNDS, seed=1)
    assert sum(found.values()) == ROUNDS
    assert {stage for stage, outcome in found if outcome == "wrong"} <= {"MASKED"}
