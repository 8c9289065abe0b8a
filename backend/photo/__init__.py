# SPDX-License-Identifier: GPL-3.0-or-later
"""From photos to people: `album` keeps images by their hash, `header` measures files, `read` decodes them, `matting`
and `background` find the people in them, `people_in` takes them to a model family on the main road. Beside them stands
what families share of the work behind that."""
