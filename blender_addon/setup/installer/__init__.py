# SPDX-License-Identifier: GPL-3.0-or-later
"""Installs the generator into an environment of its own: a program, run by Blender's Python in a process of its own.

It imports nothing but the standard library and needs no Blender. It says what it does as JSON lines on stdout, writes
everything that pip says to `setup.log`, and ends when its stdin closes: so it cannot outlive Blender.

    <folder>/current.json     which environment is in use, and which one was before: switched in one rename
    <folder>/envs/<name>/     whole environments; one that the pointer does not name is a leftover and is removed
    <folder>/cache/           what pip has downloaded, so that a second attempt goes on where the first one stopped
"""
