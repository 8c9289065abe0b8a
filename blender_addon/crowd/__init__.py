# SPDX-License-Identifier: GPL-3.0-or-later
"""Crowds: few people, many places. `placement` is arithmetic, `footing` reads the scene, `cast` is the crowd as data,
`arrivals` brings people in; `form`, `operators`, `places` and `panel` are what is seen of it."""
