"""A few examples of every room of `attack.py`, the same ones each time."""

import attack
import pytest


ROOMS = attack.open_rooms()


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_answers_well(name):
    with attack.world_of(ROOMS[name]) as world:
        attack.attack(ROOMS[name], world, 0, ROOMS[name].examples)
