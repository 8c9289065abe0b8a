# SPDX-License-Identifier: GPL-3.0-or-later
"""Many people from one plan: `populace plan`, `populace batch`, `populace farm`.

`plan` reads and writes plans, `item` makes one person in a worker process, `runner` keeps workers busy through any
`concurrent.futures.Executor`, `results` knows the folder that all of it ends in, `farm` writes job files for render
farms, `command` is the command line. Only `item` loads models.
"""
