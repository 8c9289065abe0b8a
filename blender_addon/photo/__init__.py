# SPDX-License-Identifier: GPL-3.0-or-later
"""People from photos: `keeping` holds what the photos showed in the .blend, `camera` is the photo's view of the scene,
`operators` are the button, the file browser and the drop."""
