# SPDX-License-Identifier: GPL-3.0-or-later
"""Poses that were made by hand, in degrees from the anatomical standing position: upright, arms and legs straight down,
feet ahead, palms to the thighs. `backend.training.poses` turns them into rotations and documents the rest.

A bone without "_l" or "_r" stands for both sides (the right one mirrored), with it for that side alone. Keys:

    thigh, upperarm, lowerarm   flex: ahead      abduct: away from the body     twist: inward
    calf                        flex: heel to the seat
    foot, ball                  flex: toes up    twist: toes outward            level: flat on the floor
    clavicle                    flex: ahead      abduct: raised
    hand                        flex: to the palm's side    abduct: ahead (thumb's side)    twist: inward
    fingers (thumb, index, ...) flex: curl       abduct: towards the little finger
    pelvis, spine, neck, head   flex: bow        abduct: lean to the left       twist: turn to the left
"""

from __future__ import annotations

from typing import Any, Final

BVH: Final = {
    "t_pose": "tpose.bvh", "standing_1": "standing01.bvh", "standing_2": "standing02.bvh",
    "standing_3": "standing03.bvh", "standing_4": "standing04.bvh", "running": "run01.bvh",
}  # fmt: skip

# The files' people are barefoot and cross their legs: degrees by which each leg is moved outward, for room for shoes.
SPREAD: Final = {"standing_1": 4.0, "standing_3": 3.0}

# A hand at ease: fingers lie closer than the rest pose spreads them, and curl more towards the little one.
HAND: Final[dict[str, dict[str, float]]] = {
    "index_01": {"flex": 12, "abduct": 9}, "index_02": {"flex": 18}, "index_03": {"flex": 10},
    "middle_01": {"flex": 16}, "middle_02": {"flex": 22}, "middle_03": {"flex": 12},
    "ring_01": {"flex": 20, "abduct": -5}, "ring_02": {"flex": 25}, "ring_03": {"flex": 14},
    "pinky_01": {"flex": 24, "abduct": -9}, "pinky_02": {"flex": 27}, "pinky_03": {"flex": 15},
    "thumb_01": {"flex": 4}, "thumb_02": {"flex": 8}, "thumb_03": {"flex": 10},
}  # fmt: skip

TABLE: Final[dict[str, dict[str, Any]]] = {
    "arms_down": {
        "upperarm": {"abduct": 11, "flex": 2}, "lowerarm": {"flex": 14}, "hand": {"flex": 4},
        "thigh": {"abduct": 3}, "foot": {"level": 1, "twist": 7},
    },
    "contrapposto": {  # weight on the left leg: that hip is up and out, the shoulders tilt the other way
        "pelvis": {"abduct": -6, "twist": -6}, "spine_01": {"abduct": 3}, "spine_02": {"abduct": 4, "twist": 4},
        "spine_03": {"abduct": 4, "twist": 4}, "neck_01": {"abduct": -2},
        "head": {"abduct": -3, "twist": 12, "flex": 3},
        "thigh_l": {"abduct": -10, "flex": -1}, "calf_l": {"flex": 0}, "foot_l": {"level": 1, "twist": 10},
        "thigh_r": {"abduct": 10, "flex": 16, "twist": -14}, "calf_r": {"flex": 28}, "foot_r": {"level": 1, "twist": 8},
        "upperarm_l": {"abduct": 14, "flex": -4}, "lowerarm_l": {"flex": 22},
        "upperarm_r": {"abduct": 10, "flex": 4}, "lowerarm_r": {"flex": 12}, "hand": {"flex": 6},
    },
    "walking": {  # heel strike of the left foot
        "pelvis": {"twist": -6, "flex": 3}, "spine_02": {"twist": 5}, "spine_03": {"twist": 6}, "head": {"twist": -4},
        "thigh_l": {"flex": 27}, "calf_l": {"flex": 6}, "foot_l": {"flex": 4, "twist": 5},
        "thigh_r": {"flex": -12}, "calf_r": {"flex": 18}, "foot_r": {"flex": 2, "twist": 5}, "ball_r": {"flex": 25},
        "upperarm_l": {"flex": -20, "abduct": 10}, "lowerarm_l": {"flex": 12, "twist": 20},
        "upperarm_r": {"flex": 20, "abduct": 10}, "lowerarm_r": {"flex": 28, "twist": 20}, "hand": {"flex": 5},
    },
    "walking_2": {  # left foot flat below the body, right leg swings past it
        "pelvis": {"flex": 3, "abduct": 2}, "spine_02": {"abduct": -2},
        "thigh_l": {"flex": 5, "abduct": -2}, "calf_l": {"flex": 8}, "foot_l": {"level": 1, "twist": 5},
        "thigh_r": {"flex": 22}, "calf_r": {"flex": 58}, "foot_r": {"flex": -4, "twist": 5},
        "upperarm_l": {"flex": 4, "abduct": 10}, "upperarm_r": {"flex": 0, "abduct": 10},
        "lowerarm": {"flex": 20, "twist": 20}, "hand": {"flex": 5},
    },
    "sitting": {
        "seat_m": 0.45,
        "pelvis": {"flex": -8}, "spine_01": {"flex": 6}, "spine_02": {"flex": 5}, "spine_03": {"flex": 2},
        "head": {"flex": -3}, "thigh": {"flex": 82, "abduct": 9}, "calf": {"flex": 88},
        "foot": {"level": 1, "twist": 10},
        "upperarm": {"flex": 16, "abduct": 12, "twist": 8}, "lowerarm": {"flex": 52, "twist": 60}, "hand": {"flex": -8},
    },
    "hands_on_hips": {
        "thigh": {"abduct": 4}, "foot": {"level": 1, "twist": 9},
        "clavicle": {"abduct": 4}, "upperarm": {"abduct": 41, "flex": -46, "twist": 49},
        "lowerarm": {"flex": 105, "twist": -15}, "hand": {"flex": -10, "abduct": 8},
    },
    "waving": {
        "pelvis": {"abduct": 2}, "spine_02": {"abduct": -3}, "head": {"abduct": 5, "flex": -2},
        "thigh": {"abduct": 4}, "foot": {"level": 1, "twist": 8},
        "clavicle_r": {"abduct": 14}, "upperarm_r": {"abduct": 85, "flex": 20, "twist": -80},
        "lowerarm_r": {"flex": 75, "twist": 30}, "hand_r": {"flex": -6, "abduct": 6},
        "index_r": {"flex": 4}, "middle_r": {"flex": 4}, "ring_r": {"flex": 6}, "pinky_r": {"flex": 8},
        "upperarm_l": {"abduct": 11, "flex": 2}, "lowerarm_l": {"flex": 14}, "hand_l": {"flex": 4},
    },
}  # fmt: skip
