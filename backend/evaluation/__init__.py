# SPDX-License-Identifier: GPL-3.0-or-later
"""How good is a family? `populace eval`: generated people against sampled ones that training never saw.

`metrics`, `images`, `shapes`, `lightfield` and `health` are pure functions with known answers in the tests;
`portraits` makes what they measure, `people` puts the report together.
"""
